"""From a plan to a DeepSpeed engine with its sharded EMA and the network that follows it."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

from sra_fast import ops
from sra_fast.alignment.objective import SRAObjective, add_heads, make_objective
from sra_fast.alignment.schedule import phases_of
from sra_fast.config.schema import Config
from sra_fast.diffusion.micro_batch import MicroBatch
from sra_fast.models import ALIGN_HEADS, Backbone, DiffusionTransformer
from sra_fast.models.fp8 import fp8_layers, use_fp8
from sra_fast.models.token_groups import Segments
from sra_fast.training.graphed_step import make_graphed
from sra_fast.training.plan import Plan
from sra_fast.utils.cuda_graph import GraphedGradients
from sra_fast.utils.registry import TARGETS
from sra_fast.zero.deepspeed_config import clips_itself, refusals_named
from sra_fast.zero.deepspeed_names import import_muon_uncompiled, restore_linear
from sra_fast.zero.ema import PartitionedTeacher, ReplicatedTeacher, ShardedAverage, ShardedEMA
from sra_fast.zero.fused_step import PartitionedStep, ReplicatedStep, Stage3Step
from sra_fast.zero.guard import UpdateGuard
from sra_fast.zero.guarded_step import GuardedStep
from sra_fast.zero.master_weights import MasterWeights
from sra_fast.zero.optimizer import AdamWEMA, inner_optimizer, make_optimizer
from sra_fast.zero.process_group import printed_as_reports

log = logging.getLogger("sra_fast")


@dataclass
class Trainer:
    """What the training loop and a checkpoint need.

    Attributes:
        plan: what it was built from.
        engine: DeepSpeed's; its module is the ``SRAObjective``.
        student: the network that is trained.
        masters: where ZeRO keeps the fp32 weights.
        guard: decides on the device which updates are taken, and counts them.
        ema: their sharded average, which the teacher follows.
        teacher: keeps the weights of the target's network up to date; None without such a network.
        device: of this process.
        rank: of this process.
        graphed: replays forward and backward pass as a CUDA graph, or runs the same on a CPU; None:
            DeepSpeed runs them.
        averages: ``train.averages``, for evaluation only.
    """

    plan: Plan
    engine: deepspeed.DeepSpeedEngine
    student: DiffusionTransformer
    masters: MasterWeights
    guard: UpdateGuard
    ema: ShardedEMA
    teacher: ReplicatedTeacher | PartitionedTeacher | None
    device: torch.device
    rank: int
    graphed: GraphedGradients | None = None
    averages: dict[str, ShardedAverage] = field(default_factory=dict)

    @property
    def cfg(self) -> Config:
        return self.plan.cfg

    def micro_step(
        self,
        batch: MicroBatch,
        weights: Sequence[float],
        first: bool,
    ) -> dict[str, Tensor]:
        """Forward and backward pass of a micro-batch.

        Its gradients are added to those of the optimizer step's earlier micro-batches.

        Args:
            batch, weights: see ``SRAObjective.forward``.
            first: whether it is the first of the optimizer step's micro-batches.

        Returns:
            The ``loss`` and its parts, scalars on the device.
        """
        if self.graphed is None:
            # engine.backward divides the loss by the number of micro-batches
            loss, parts = self.engine(batch, weights)
            self.engine.backward(loss)
            return {"loss": loss.detach(), **parts}

        phases = phases_of(self.cfg.alignments.values())
        if any(self.teacher_runs(phase) for phase in phases):
            # outside of the graph: a replay would not wait for the all-gather
            self.teacher.wait()
        loss = self.graphed.fn
        if not self.graphed.captured:
            # capture every kind of step that this run will take
            accumulate = (False, True) if self.plan.accumulation > 1 else (False,)
            self.graphed.capture_all(
                [
                    (loss.inputs(batch, weights, phase), later)
                    for phase in phases
                    for later in accumulate
                ]
            )
        phase = tuple(weight > 0 for weight in weights)
        return self.graphed(*loss.inputs(batch, weights, phase), accumulate=not first)

    def teacher_runs(self, weights: Sequence[float]) -> bool:
        """Whether the teacher runs in a step with these lambdas of the targets."""
        targets = self.engine.module.targets
        return any(
            weight > 0 and target.network is not None
            for weight, target in zip(weights, targets, strict=True)
        )

    @property
    def grad_norm(self) -> Tensor | float:
        """Global gradient norm of the last step before clipping; on the device if DeepSpeed leaves
        it there.
        """
        # None in stage 0 with fp32: GuardedStep leaves the norm on the optimizer
        norm = self.engine.get_global_grad_norm()
        return self.engine.optimizer.grad_norm if norm is None else norm

    def refresh_teacher(self, state: list[float] | None = None) -> None:
        """Copy the EMA into the teacher. ``state`` restores the fp8 scales when resuming."""
        if self.teacher is not None:
            self.teacher.refresh(state)
        self._wait_for_partitions()

    def after_step(self, teacher_runs: bool) -> None:
        """Update the averages after an optimizer step, and the teacher if the next step runs it."""
        # nothing where the optimizer's own pass did it
        self.ema.update()
        if self.teacher is not None:
            # first: an all-gather that it starts runs beside the other averages
            self.teacher.after_step(teacher_runs)
        for average in self.averages.values():
            average.update()
        self._wait_for_partitions()

    def _wait_for_partitions(self) -> None:
        """Stage 3 gathers parameters in a second stream, which does not wait for writes to the
        partitions.
        """
        if self.plan.stage == 3 and self.device.type == "cuda":
            torch.cuda.current_stream().synchronize()

    def weights(self, name: str) -> dict[str, Tensor]:
        """``{parameter: fp32 tensor on the CPU}`` of the whole model; collective.

        Args:
            name: as in ``sample.weights``: ``ema``, ``model`` for the student's own, or one of
                ``train.averages``.

        Raises:
            ValueError: there are no such weights; ``power:SIGMA`` is made of a run's snapshots.
        """
        if name == "ema":
            return self.ema.full()
        if name == "model":
            return self.masters.gather(self.masters.flats)
        if name not in self.averages:
            known = ", ".join(("ema", "model", *self.averages))
            raise ValueError(f"expected weights of this training, {known}, got {name!r}")
        return self.averages[name].full()

    def state_dict(self, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        """Gathered parameters as a state dict of the model, in the published order, with the
        position embedding.
        """
        full = {**parameters, "pos_embed": self.student.make_pos_embed()}
        # heads of single targets are no part of the model
        names = [name for name in self.student.state_dict() if not name.startswith(ALIGN_HEADS)]
        return {name: full[name] for name in names}


def build(plan: Plan, device: torch.device, weights: dict[str, Tensor] | None = None) -> Trainer:
    """Build networks, optimizer, engine, EMA and teacher.

    Args:
        plan: from ``make_plan``.
        device: of this process.
        weights: state dict to start from instead of a fresh initialisation; it may be a part.

    Raises:
        ValueError: the plan is for another number of processes, or DeepSpeed stands in the way of a
            CUDA graph that was asked for.
        RuntimeError: DeepSpeed's memory layout is not the one this engine knows.
    """
    cfg = plan.cfg
    if plan.world != dist.get_world_size():
        # the batches of the processes would overlap, or leave images out
        raise ValueError(
            f"expected a plan for {dist.get_world_size()} processes, got one for {plan.world}"
        )
    if plan.stage < 3:
        restore_linear()
    # networks in fp32; DeepSpeed casts them to bf16 in place, so the fp32 values are copied
    student, network = make_networks(plan, weights, device)
    initial = _initial_masters(student, plan.stage) if cfg.train.precision == "bf16" else {}
    # the module that DeepSpeed wraps: student, alignment targets, loss
    objective = make_objective(cfg, student, network).to(device)
    if plan.stage == 3:
        # a block's operators read the weights of several layers: gather and free them together
        kinds_of_block = {type(block) for block in student.blocks}
        deepspeed.utils.set_z3_leaf_modules(objective, list(kinds_of_block))
    # what the teacher keeps in one dtype is one parameter group, and one all-gather
    kinds = _parameter_kinds(cfg, network)
    optimizer = make_optimizer(cfg, student, kinds)
    import_muon_uncompiled()
    with refusals_named(plan.ds_config), printed_as_reports():
        built = deepspeed.initialize(model=objective, optimizer=optimizer, config=plan.ds_config)
    engine = built[0]

    # find the masters in ZeRO's flat tensors, make them fp32 again, and verify that each is in the
    # place where it was found
    parameters = dict(student.named_parameters())
    masters = MasterWeights(engine, parameters)
    if initial:
        _restore_fp32(masters, engine, initial)
    masters.verify(parameters)
    guard = UpdateGuard(masters, optimizer, cfg.optim.warmup_steps)
    # from here on engine.step() is the fused step, in the stages that have one
    _replace_step(plan, engine, optimizer, guard)
    # all start from the unrounded masters
    ema = ShardedEMA(masters, cfg.train.ema_decay, optimizer, guard)
    averages = {
        name: ShardedAverage(masters, rule, guard) for name, rule in cfg.train.averages.items()
    }
    teacher = _make_teacher(cfg, network, ema, optimizer)
    if teacher is not None:
        for target in objective.targets:
            target.follow(teacher.wait)
    if cfg.train.compile:
        # after the fp8 blocks are made, which replace blocks. Compilation itself comes with the
        # first forward
        choose_attention(cfg, _attention_calls(objective, plan.micro), device)
        student.compile_blocks()
        if network is not None:
            network.compile_blocks()
    # last: a graph keeps the addresses of all that it reads
    graphed = make_graphed(plan, engine, student)
    if graphed is not None and graphed.graphs:
        for target in objective.targets:
            target.will_be_captured()
    rank = dist.get_rank()
    return Trainer(
        plan, engine, student, masters, guard, ema, teacher, device, rank, graphed, averages
    )


def make_networks(
    plan: Plan, weights: dict[str, Tensor] | None, device: torch.device
) -> tuple[DiffusionTransformer, Backbone | None]:
    """The student, and the network that follows its EMA if the alignment target needs one; fp32.

    Both have the same weights, on every process. They are initialised on the device: on one CPU
    core the initialisation of SiT-XL/2 and its teacher takes 13 s.
    """
    cfg = plan.cfg
    execution = {
        "residual_dtype": torch.float32 if cfg.train.residual == "fp32" else None,
        # stage 3 gathers blocks one by one: the next block must not read this one's bias
        "defer_bias": plan.stage < 3,
    }
    # the student is drawn first: its weights are the same with and without alignment
    torch.manual_seed(cfg.train.seed)
    network = None
    with device:
        student = cfg.model.build(recompute=cfg.train.recompute, **execution)
        add_heads(student, cfg)
        for align in cfg.alignments.values():
            depth = TARGETS[align.target].network_depth(align)
            if depth is not None:
                network = cfg.model.build_teacher(depth, **execution).eval()
    if weights is not None:
        # what they lack keeps its fresh values: training/initial.py has listed it
        student.load_state_dict(weights, strict=False)
    if plan.world > 1:
        # GPUs of two kinds draw different numbers from one seed
        for p in student.parameters():
            dist.broadcast(p.data, 0)
    if network is not None:
        # overwrites the network's own initialisation
        state = student.state_dict()
        network.load_state_dict({name: state[name] for name in network.state_dict()})
    return student, network


def _initial_masters(student: DiffusionTransformer, stage: int) -> dict[str, Tensor]:
    """A copy of the fp32 weights, which DeepSpeed replaces by bf16.

    In stage 3 it is in host memory: a GPU need not hold all of them.
    """
    place = torch.device("cpu") if stage == 3 else None
    return {name: p.detach().to(place, copy=True) for name, p in student.named_parameters()}


def _restore_fp32(masters: MasterWeights, engine, initial: dict[str, Tensor]) -> None:
    """Make the master weights the fp32 ones.

    DeepSpeed clones them from weights that are rounded to bf16, and stage 0 takes an AdamW step
    while it is built: undo both.
    """
    inner_optimizer(engine).state.clear()
    masters.scatter(initial, masters.flats)


def _network_dtype(cfg: Config) -> str:
    """``auto``, ``fp32`` or ``fp8``: the option ``teacher_dtype``, which not every target has."""
    found = [getattr(align, "teacher_dtype", "auto") for align in cfg.alignments.values()]
    return next((dtype for dtype in found if dtype != "auto"), "auto")


def _parameter_kinds(cfg: Config, network: Backbone | None) -> list[set[str]]:
    """Names of the parameters that the EMA's network has too, one set for each dtype it keeps them
    in.
    """
    if network is None:
        return []
    names = {name for name, _ in network.named_parameters()}
    if _network_dtype(cfg) != "fp8":
        return [names]
    fp8 = set(fp8_layers(network))
    return [fp8, names - fp8]


def _make_teacher(
    cfg: Config, network: Backbone | None, ema: ShardedEMA, optimizer: torch.optim.Optimizer
) -> ReplicatedTeacher | PartitionedTeacher | None:
    """What copies the EMA into the network in this ZeRO stage, or None without a network."""
    if network is None:
        return None
    if not ema.masters.groups:
        return PartitionedTeacher(network, ema)
    dtype = torch.float32
    if cfg.train.precision == "bf16" and _network_dtype(cfg) != "fp32":
        dtype = torch.bfloat16
    fp8 = {}
    if _network_dtype(cfg) == "fp8":
        # not earlier: DeepSpeed casts every parameter that it is given to bf16
        use_fp8(network)
        fp8 = fp8_layers(network)
    return ReplicatedTeacher(network, ema, optimizer, dtype, fp8)


# a shape of attention: images, runs of tokens inside which it stays, whether there is a backward pass
AttentionCall = tuple[int, Segments | None, bool]


def choose_attention(cfg: Config, calls: Iterable[AttentionCall], device: torch.device) -> None:
    """Measure attention's backends for these shapes of the model, before a compiler traces them."""
    model = cfg.model.arguments()
    heads = model["num_heads"]
    dtype = torch.bfloat16 if cfg.train.precision == "bf16" else torch.float32
    for images, segments, training in calls:
        shape = (images, cfg.model.joint_tokens, 3, heads, model["hidden_size"] // heads)
        qkv = torch.zeros(shape, dtype=dtype, device=device, requires_grad=training)
        with torch.set_grad_enabled(training):
            q, k, v = qkv.unbind(2)
            if cfg.model.context_tokens is None:
                ops.attention(q, k, v, segments=segments)
                continue
            ops.attention(q, k, v)
            # in a network's last block the caption has no queries
            ops.attention(q[:, cfg.model.context_tokens :], k, v)


def _attention_calls(objective: SRAObjective, micro: int) -> list[AttentionCall]:
    """The calls of student and teacher in a micro-batch of ``micro`` images."""
    segments = objective.segments(micro)
    calls: list[AttentionCall] = [(micro, segments, True)]
    for target in objective.targets:
        if target.network is not None:
            # the teacher sees the aligned images only, and has no backward pass
            calls.append((round(micro * target.align.share), segments, False))
    return calls


def _replace_step(plan: Plan, engine, optimizer: torch.optim.Optimizer, guard: UpdateGuard) -> None:
    """Put the fused step in place of DeepSpeed's where there is one; else clip and guard DeepSpeed's
    step.
    """
    cfg = plan.cfg
    fused = isinstance(optimizer, AdamWEMA)
    # with fp32 accumulation of bf16 gradients stage 1 has another optimizer of DeepSpeed's, which
    # keeps its own step
    flat_groups = hasattr(engine.optimizer, "bit16_groups_flat")
    if fused and plan.stage in (1, 2) and flat_groups:
        # a graph runs no hooks of DeepSpeed's
        PartitionedStep(engine, cfg.optim.clip, guard, reduces=bool(cfg.train.graph))
    elif fused and plan.stage == 3:
        Stage3Step(engine, cfg.optim.clip, guard)
    elif fused and plan.stage == 0 and cfg.train.precision == "bf16":
        ReplicatedStep(engine, cfg.optim.clip, guard)
    else:
        GuardedStep(engine, cfg.optim.clip if clips_itself(plan.stage, cfg) else 0.0, guard)
