"""From a configuration to a DeepSpeed engine with its sharded EMA and teacher."""

import logging
from dataclasses import dataclass

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

from sra_fast import ops
from sra_fast.alignment.objective import SRAObjective, alignment_phases, make_process
from sra_fast.config.schema import Config
from sra_fast.models import Backbone, SiT
from sra_fast.models.fp8 import fp8_layers, use_fp8
from sra_fast.models.layers import Block
from sra_fast.training.checks import check_device, split_batch
from sra_fast.utils.cuda_graph import GraphedGradients, held_accumulators
from sra_fast.zero.deepspeed_config import clips_itself, deepspeed_config, zero_stage
from sra_fast.zero.ema import PartitionedTeacher, ReplicatedTeacher, ShardedEMA
from sra_fast.zero.fused_step import (
    PartitionedStep,
    ReplicatedStep,
    Stage3Step,
    let_go_of_accumulators,
)
from sra_fast.zero.master_weights import MasterShards
from sra_fast.zero.optimizer import AdamWEMA, clip_before_step, make_optimizer

log = logging.getLogger("sra_fast")


@dataclass
class Trainer:
    """What a training loop and a checkpoint need; ``teacher`` refreshes the teacher inside ``engine.module`` or is None."""

    cfg: Config
    engine: deepspeed.DeepSpeedEngine
    student: SiT
    shards: MasterShards
    ema: ShardedEMA
    teacher: object | None
    device: torch.device
    stage: int
    micro: int
    accumulation: int
    rank: int
    world: int
    ds_config: dict
    graphed: GraphedGradients | None = None

    def micro_step(
        self,
        x0: Tensor,
        y: Tensor,
        noise: Tensor,
        times: tuple[Tensor, Tensor],
        drop: Tensor,
        weight: float,
        first: bool,
    ) -> dict[str, Tensor]:
        """Forward and backward pass of a micro-batch; its gradients are added to those of the optimizer step's earlier ones.

        Args:
            x0, y, noise, times, drop, weight: see ``SRAObjective.forward``.
            first: of the optimizer step's micro-batches.

        Returns:
            The ``loss`` and its parts, scalars on the device.
        """
        if self.graphed is None:
            loss, parts = self.engine(x0, y, noise, times, drop, weight)
            self.engine.backward(loss)
            return {"loss": loss.detach(), **parts}
        plain = x0, y, noise, *times, drop
        inputs = {False: plain, True: (*plain, torch.full((), weight, device=self.device))}
        phases = alignment_phases(self.cfg.align)
        if True in phases:
            self.engine.module.teacher_pass.ready()
        if not self.graphed.captured:  # every step that this run will take
            accumulate = (False, True) if self.accumulation > 1 else (False,)
            self.graphed.prepare(
                [(inputs[aligned], later) for aligned in phases for later in accumulate]
            )
        return self.graphed(*inputs[weight > 0], accumulate=not first)

    @property
    def grad_norm(self) -> Tensor | float:
        """Global gradient norm of the last step, before clipping; on the device where DeepSpeed leaves it there."""
        norm = self.engine.get_global_grad_norm()
        return self.engine.optimizer.grad_norm if norm is None else norm

    def refresh_teacher(self, state: list[float] | None = None) -> None:
        """Teacher weights <- EMA, however that changed; ``state`` is that of the teacher of a run that is gone on with."""
        if self.teacher is not None:
            self.teacher.refresh(state)
        self._settle()

    def after_step(self, teacher_runs: bool) -> None:
        """EMA and, if the next step runs the teacher, its weights follow the optimizer step just taken."""
        self.ema.update()
        if self.teacher is not None:
            self.teacher.after_step(teacher_runs)
        self._settle()

    def _settle(self) -> None:
        """Stage 3 gathers parameters in a stream of its own, which does not wait for what was written to the partitions."""
        if self.stage == 3 and self.device.type == "cuda":
            torch.cuda.current_stream().synchronize()

    def state_dict(self, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        """A state dict in the reference's order and names from gathered parameters; adds the position embedding."""
        full = {**parameters, "pos_embed": self.student.make_pos_embed()}
        return {name: full[name] for name in self.student.state_dict()}


def _networks(
    cfg: Config, weights: dict[str, Tensor] | None, stage: int, device: torch.device
) -> tuple[SiT, Backbone | None]:
    """Student (the same on every process: one seed) and the teacher with its weights, in fp32.

    They are initialised on the device: on one CPU core the initialisation of SiT-XL/2 and its teacher takes 13 s.
    """
    torch.manual_seed(cfg.train.seed)
    teacher = None
    with device:
        student = cfg.model.build()
        if cfg.align.target == "ema_teacher":
            teacher = cfg.model.build_teacher(cfg.align.teacher_layer).eval()
    if weights is not None:
        student.load_state_dict(weights, strict=True)
    if dist.get_world_size() > 1:  # GPUs of two kinds draw other numbers from one seed
        for p in student.parameters():
            dist.broadcast(p.data, 0)
    for network in filter(None, (student, teacher)):
        network.residual_dtype = torch.float32 if cfg.train.residual == "fp32" else None
        for block in network.blocks:
            block.pend_bias = stage < 3
    for block in student.blocks:
        block.recompute = cfg.train.recompute
    if teacher is not None:
        state = student.state_dict()
        teacher.load_state_dict({name: state[name] for name in teacher.state_dict()})
    return student, teacher


def _initial_masters(student: SiT, stage: int) -> dict[str, Tensor]:
    """A copy of the fp32 weights, of which DeepSpeed keeps bf16; in host memory where a GPU need not hold all of them (stage 3)."""
    place = torch.device("cpu") if stage == 3 else None
    return {name: p.detach().to(place, copy=True) for name, p in student.named_parameters()}


def _teacher_kinds(cfg: Config, teacher: Backbone | None) -> list[set[str]]:
    """Names of the teacher's parameters, those of each dtype in a set."""
    if teacher is None:
        return []
    names = {name for name, _ in teacher.named_parameters()}
    fp8 = set(fp8_layers(teacher)) if cfg.align.teacher_dtype == "fp8" else set()
    return [fp8, names - fp8] if fp8 else [names]


def _make_teacher(
    cfg: Config, teacher: Backbone | None, ema: ShardedEMA, optimizer: torch.optim.Optimizer
) -> ReplicatedTeacher | PartitionedTeacher | None:
    """What refreshes the teacher in this ZeRO stage, or None without a teacher."""
    if teacher is None:
        return None
    if not ema.shards.groups:
        return PartitionedTeacher(teacher, ema)
    fp8, dtype = {}, torch.float32
    if cfg.train.precision == "bf16" and cfg.align.teacher_dtype != "fp32":
        dtype = torch.bfloat16
    if cfg.align.teacher_dtype == "fp8":
        use_fp8(teacher)  # only now: DeepSpeed casts what it is given to bf16
        fp8 = fp8_layers(teacher)
    return ReplicatedTeacher(teacher, ema, optimizer, dtype, fp8)


def _restore_fp32(shards: MasterShards, engine, initial: dict[str, Tensor]) -> None:
    """DeepSpeed clones bf16 masters from rounded weights, and stage 0 takes an AdamW step while it is built: undo both."""
    getattr(engine.optimizer, "optimizer", engine.optimizer).state.clear()
    shards.scatter(initial, shards.flats)


def choose_attention(cfg: Config, micro: int, device: torch.device) -> None:
    """Measure attention's backends for the shapes of student and teacher: impossible once a compiler traces."""
    a = cfg.model.arguments()
    tokens, dtype = (
        (a["input_size"] // a["patch_size"]) ** 2,
        torch.bfloat16 if cfg.train.precision == "bf16" else torch.float32,
    )
    for images, training in ((micro, True), (round(micro * cfg.align.fraction), False)):
        shape = (images, tokens, 3, a["num_heads"], a["hidden_size"] // a["num_heads"])
        qkv = torch.zeros(shape, dtype=dtype, device=device, requires_grad=training)
        with torch.set_grad_enabled(training):
            ops.attention(*qkv.unbind(2))


def restore_linear() -> None:
    """Undo what an earlier stage 3 of this process has left: DeepSpeed's ``linear`` in the place of PyTorch's.

    Compiled it gives wrong gradients (torch 2.11), under selective checkpointing as well: in silence, both.
    """
    if torch.nn.functional.linear.__module__ == "deepspeed.runtime.zero.linear":
        torch.nn.functional.linear = torch._C._nn.linear


def _set_step(cfg: Config, engine, optimizer: torch.optim.Optimizer, stage: int) -> None:
    """One pass in the place of DeepSpeed's step where there is one, else clipping before DeepSpeed's where it is ours."""
    ours = isinstance(optimizer, AdamWEMA)
    # with fp32 accumulation of bf16 gradients stage 1 has another optimizer of DeepSpeed's, which keeps its own step
    if ours and stage in (1, 2) and hasattr(engine.optimizer, "bit16_groups_flat"):
        PartitionedStep(engine, cfg.optim.clip)
    elif ours and stage == 3:
        Stage3Step(engine, cfg.optim.clip)
    elif ours and stage == 0 and cfg.train.precision == "bf16":
        ReplicatedStep(engine, cfg.optim.clip)
    elif clips_itself(stage, cfg):
        clip_before_step(engine, cfg.optim.clip)


def _make_graphed(
    cfg: Config, engine, student: SiT, stage: int, accumulation: int, ds_config: dict
) -> GraphedGradients | None:
    """What replays forward and backward pass as a graph, or None where DeepSpeed runs them.

    ValueError if a graph is asked for and DeepSpeed stands in its way; where it is only the default, that is logged.
    """
    if cfg.train.graph is False or (cfg.train.graph is None and cfg.align.teacher_graph):
        return None
    one_gpu = next(student.parameters()).is_cuda and dist.get_world_size() == 1
    if not one_gpu or stage == 3 or cfg.optim.implementation != "fused":
        return None  # check_device has refused what was asked for and cannot be
    graphed = graphed_step(engine.module, student, accumulation)
    obstacle = _graph_obstacle(engine, stage, ds_config, graphed)
    if obstacle is None:
        return graphed
    if cfg.train.graph:
        raise ValueError(f"train.graph true cannot be: {obstacle}")
    log.warning("no CUDA graph of the step, the host launches every kernel: %s", obstacle)
    return None


def _graph_obstacle(engine, stage: int, ds_config: dict, graphed: GraphedGradients) -> str | None:
    """What of DeepSpeed's stands in the way of a graph on one GPU, or None."""
    if stage > 0 and not getattr(engine.optimizer.step, "alone", False):
        return "DeepSpeed's JSON lets it convert the gradients"
    watched = {
        "flops_profiler": ds_config.get("flops_profiler", {}).get("enabled"),
        "wall_clock_breakdown": ds_config.get("wall_clock_breakdown"),
        "timers.throughput": ds_config.get("timers", {}).get("throughput", {}).get("enabled"),
    }
    for name, value in watched.items():
        if value:
            return f"{name} of DeepSpeed's JSON looks into forward and backward passes"
    graphed.let_go()
    held = held_accumulators(graphed.parameters)
    return (
        f"this version of DeepSpeed holds autograd's nodes of {held} parameters" if held else None
    )


def graphed_step(
    objective: SRAObjective, student: SiT, accumulation: int, graphs: bool = True
) -> GraphedGradients:
    """The objective's loss, as a mean over ``accumulation`` micro-batches, and its gradients.

    Without ``graphs`` the same is run eagerly.
    """

    def fn(x0, y, noise, t, t_teacher, drop, weight=0.0):
        loss, parts = objective(x0, y, noise, (t, t_teacher), drop, weight)
        return loss / accumulation, {"loss": loss.detach(), **parts}

    parameters = list(student.parameters())
    return GraphedGradients(fn, parameters, graphs, lambda: let_go_of_accumulators(parameters))


def build(
    cfg: Config,
    device: torch.device,
    ds_json: str | None = None,
    weights: dict[str, Tensor] | None = None,
) -> Trainer:
    """Build model, teacher, optimizer and engine.

    Args:
        cfg: a checked configuration.
        device: of this process.
        ds_json: path of DeepSpeed's JSON, or None.
        weights: state dict to start from instead of a fresh initialisation.

    Raises:
        ValueError: the batch does not divide, or the JSON contradicts the configuration.
        RuntimeError: DeepSpeed's memory layout is not the one this engine knows.
    """
    rank, world, bf16 = dist.get_rank(), dist.get_world_size(), cfg.train.precision == "bf16"
    micro, accumulation = split_batch(cfg, world)
    ds_config = deepspeed_config(cfg, micro, accumulation, ds_json, device.type == "cuda")
    stage = zero_stage(ds_config, cfg)
    check_device(cfg, stage, device.type == "cuda", world)
    if stage < 3:
        restore_linear()
    student, teacher = _networks(cfg, weights, stage, device)
    if cfg.train.compile:
        choose_attention(cfg, micro, device)
        for network in filter(None, (student, teacher)):
            network.compile_blocks()
    initial = _initial_masters(student, stage) if bf16 else {}
    objective = SRAObjective(student, teacher, make_process(cfg), cfg.align).to(device)
    if (
        stage == 3
    ):  # a block's operators read the weights of several layers: gathered and given back together
        deepspeed.utils.set_z3_leaf_modules(objective, [Block])
    optimizer = make_optimizer(cfg, student, _teacher_kinds(cfg, teacher), device.type == "cuda")
    engine = deepspeed.initialize(model=objective, optimizer=optimizer, config=ds_config)[0]

    parameters = dict(student.named_parameters())
    shards = MasterShards(engine, parameters)
    if bf16:
        _restore_fp32(shards, engine, initial)
    shards.verify(parameters)
    _set_step(cfg, engine, optimizer, stage)
    ema = ShardedEMA(shards, cfg.train.ema_decay, optimizer)
    trained = _make_teacher(cfg, teacher, ema, optimizer)
    if trained is not None:
        objective.teacher_pass.ready = trained.wait
    graphed = _make_graphed(cfg, engine, student, stage, accumulation, ds_config)
    return Trainer(
        cfg,
        engine,
        student,
        shards,
        ema,
        trained,
        device,
        stage,
        micro,
        accumulation,
        rank,
        world,
        ds_config,
        graphed,
    )
