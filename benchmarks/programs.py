"""SRA training in plain PyTorch, without DeepSpeed: the programs that the engine is compared with.

One program with switches.  All of them off is what the published code does (fp32 teacher that is the EMA itself and runs
to its last layer, eager, one pair of kernels per tensor for the EMA); ``strong`` in variants.py is the best that is known
without this repository's kernels.  Weights are fp32 under autocast; draws and losses are the engine's, so that every
program takes the same steps.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from sra_fast import ops
from sra_fast.config.schema import Config
from sra_fast.diffusion.draws import draw
from sra_fast.diffusion.process import make_process
from sra_fast.models import SiT
from sra_fast.models.layers import settle
from sra_fast.training.trainer import choose_attention
from sra_fast.utils.cuda_graph import GraphedGradients


@dataclass(frozen=True)
class Switches:
    """What a program does differently from the published code.

    Attributes:
        teacher_copy: the teacher is a copy of the EMA in the training precision, refreshed after every step.
        truncated: the teacher stops at block n.
        swap: there is no teacher beside the student: the EMA is copied into the live weights, the student runs as teacher, and its
            weights are copied back.
        kernels: the operators may run their kernels; else SRA_FAST_BACKEND=torch (read by whoever starts the process).
        compile: "blocks" (every block, the layers behind them and the losses), "whole" (forward and losses as one graph).
        backend, mode: of torch.compile.
        adamw: "foreach" or "fused".
        ema: "each" parameter on its own, or "foreach".
        graph: forward and backward pass are replayed as one CUDA graph, as the engine's are.
        measured_attention: the fastest of attention's backends, measured; else PyTorch picks.
    """

    teacher_copy: bool = False
    truncated: bool = False
    swap: bool = False
    kernels: bool = False
    compile: str = "no"
    backend: str = "inductor"
    mode: str | None = None
    adamw: str = "foreach"
    ema: str = "each"
    graph: bool = False
    measured_attention: bool = False


def full_depth_features(
    model: SiT, x: Tensor, t: Tensor, y: Tensor, drop: Tensor, depth: int
) -> Tensor:
    """The residual stream after block ``depth`` of a model that runs to its end, as the published teacher does."""
    (tokens, c), pending = model.embed(x, t, y, drop), None
    for i, block in enumerate(model.blocks, start=1):
        tokens, pending = block(tokens, c, pending)
        if i == depth:
            features = settle(tokens, pending)
    model.final_layer(tokens, c, pending)
    return features


class Program:
    """Student, teacher, optimizer and one training step.

    Args:
        cfg: the engine's configuration: model, layers, loss, optimizer, precision and seed are read.
        switches: what is done how.
        data: a data set of one endless batch (``batch``, ``to_latent``, ``posterior``).
        device: to run on.
    """

    def __init__(self, cfg: Config, switches: Switches, data, device: torch.device):
        self.cfg, self.switches, self.data, self.device = cfg, switches, data, device
        torch.manual_seed(cfg.train.seed)
        with device:
            self.student = cfg.model.build().train()
        self.ema = copy.deepcopy(self.student).eval().requires_grad_(False)
        self.teacher = self._make_teacher()
        self.process = make_process(cfg)
        self.bf16 = cfg.train.precision == "bf16"
        # the published code lets the fp32 teacher's products round their inputs
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = self.bf16
        o, named = (
            cfg.optim,
            {"fused": {"fused": True}, "foreach": {"foreach": True}}[switches.adamw],
        )
        self.params, self.averages = list(self.student.parameters()), list(self.ema.parameters())
        self.optimizer = torch.optim.AdamW(
            self.params,
            lr=o.lr,
            betas=tuple(o.betas),
            eps=o.eps,
            weight_decay=o.weight_decay,
            **named,
        )
        # where the student's weights wait while it is the teacher
        self.backup = [torch.empty_like(p) for p in self.params] if switches.swap else []
        self.loss_sum = torch.zeros((), device=device)
        if switches.measured_attention:
            choose_attention(cfg, cfg.train.global_batch, device)
        self._compile()
        self.graphed = (
            GraphedGradients(self.loss_of, self.params, device.type == "cuda")
            if switches.graph
            else None
        )

    def _make_teacher(self) -> torch.nn.Module:
        """The EMA itself, or a copy of the part of it that runs; ``self.copied`` pairs the copy with its source."""
        self.copied: tuple[list[Tensor], list[Tensor]] = ([], [])
        if self.switches.swap:
            return self.student
        if not self.switches.teacher_copy:
            return self.ema
        cfg, source = self.cfg, dict(self.ema.named_parameters())
        with self.device:
            teacher = (
                cfg.model.build_teacher(cfg.align.teacher_layer)
                if self.switches.truncated
                else cfg.model.build()
            )
        dtype = torch.bfloat16 if cfg.train.precision == "bf16" else torch.float32
        teacher = teacher.to(dtype).eval().requires_grad_(False)
        self.copied = (
            [*teacher.parameters()],
            [source[name] for name, _ in teacher.named_parameters()],
        )
        torch._foreach_copy_(*self.copied)
        return teacher

    def _compile(self) -> None:
        settings = {
            "fullgraph": True,
            "dynamic": False,
            "backend": self.switches.backend,
            "mode": self.switches.mode,
        }
        if self.switches.compile == "whole":
            self.forward = torch.compile(self.forward, **settings)
        elif self.switches.compile == "blocks":
            teacher = () if self.teacher is self.student else self.teacher.blocks
            for module in (
                *self.student.blocks,
                self.student.final_layer,
                self.student.ap_head,
                *teacher,
            ):
                module.compile(**settings)
            self.losses = torch.compile(self.losses, **settings)

    def features(self, x: Tensor, t: Tensor, y: Tensor, drop: Tensor) -> Tensor:
        """The teacher's, after block n."""
        if self.switches.swap:
            return self.swapped_features(x, t, y, drop)
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            if self.switches.truncated:
                return self.teacher.features(x, t, y, self.cfg.align.teacher_layer, drop)
            return full_depth_features(self.teacher, x, t, y, drop, self.cfg.align.teacher_layer)

    @torch.no_grad()
    def swapped_features(self, x: Tensor, t: Tensor, y: Tensor, drop: Tensor) -> Tensor:
        """Those of the student with the EMA's weights, run to its end under the student's autocast."""
        torch._foreach_copy_(self.backup, self.params)
        torch._foreach_copy_(self.params, self.averages)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            features = full_depth_features(
                self.student.eval(), x, t, y, drop, self.cfg.align.teacher_layer
            )
        self.student.train()
        torch._foreach_copy_(self.params, self.backup)
        return features

    def losses(self, prediction: Tensor, projected: Tensor, features: Tensor, noised) -> Tensor:
        align, denoise = (
            self.cfg.align,
            sum(loss.mean() for loss in self.process.losses(prediction, noised).values()),
        )
        return (
            denoise
            + align.weight
            * ops.align_distance(projected, features, align.distance, beta=align.beta).mean()
        )

    def forward(self, noised, y: Tensor, drop: Tensor) -> Tensor:
        # first the teacher where it borrows the student's weights: what the backward pass will read must not change
        target = (
            self.features(noised.x_teacher, noised.t_teacher, y, drop)
            if self.switches.swap
            else None
        )
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            prediction, projected = self.student(
                noised.x, noised.t, y, drop=drop, align_depth=self.cfg.align.student_layer
            )
        if target is None:
            target = self.features(noised.x_teacher, noised.t_teacher, y, drop)
        return self.losses(prediction, projected, target, noised)

    def loss_of(
        self, x0: Tensor, noise: Tensor, t: Tensor, t_teacher: Tensor, y: Tensor, drop: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The loss, and the same without its graph of gradients."""
        loss = self.forward(self.process.corrupt(x0, noise, t, t_teacher), y, drop)
        return loss, loss.detach()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def update(self) -> None:
        """Clip, AdamW, EMA, and the teacher's copy of it."""
        if self.cfg.optim.clip:
            torch.nn.utils.clip_grad_norm_(self.params, self.cfg.optim.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.update_ema()

    @torch.no_grad()
    def update_ema(self) -> None:
        decay = self.cfg.train.ema_decay
        if self.switches.ema == "foreach":
            torch._foreach_lerp_(self.averages, self.params, 1 - decay)
        else:
            for average, p in zip(self.averages, self.params, strict=True):
                average.mul_(decay).add_(p, alpha=1 - decay)
        if self.copied[0]:
            torch._foreach_copy_(*self.copied)

    def step(self, i: int) -> None:
        """Optimizer step ``i`` on the engine's draws."""
        (batch, y), cfg = self.data.batch, self.cfg
        d = draw(
            cfg.train.seed,
            i,
            0,
            (len(y), *self.data.shape),
            self.device,
            drop_prob=cfg.model.class_dropout_prob,
            posterior=self.data.posterior,
        )
        x0 = self.data.to_latent(batch, d.posterior)
        inputs = x0, d.noise, *self.process.times(d.uniform, d.gap), y, d.drop
        if self.graphed is not None:
            loss = self.graphed(*inputs)
        else:
            for_backward, loss = self.loss_of(*inputs)
            self.backward(for_backward)
        self.update()
        self.loss_sum += loss
