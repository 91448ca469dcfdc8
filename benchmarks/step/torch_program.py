"""SRA training in plain PyTorch, without DeepSpeed: the programs that the engine is compared with.

One program with ``variants.Switches``. With all of them off it does what the published code does: the teacher is the
fp32 EMA itself and runs to its last layer, everything is eager, and the EMA takes a pair of kernels per
tensor. ``strong`` in ``variants.py`` is the best that we know of without this repository's kernels.

Weights are fp32 under autocast. Draws and losses are the engine's, so every program takes the same steps.
"""

import copy

import torch
from torch import Tensor

from benchmarks.step.variants import Switches
from sra_fast import ops
from sra_fast.config.schema import Config
from sra_fast.diffusion.draws import draw
from sra_fast.diffusion.process import make_process
from sra_fast.models import Conditioning, DiffusionTransformer
from sra_fast.training.trainer import choose_attention
from sra_fast.utils.cuda_graph import GraphedGradients

# arguments of torch.optim.AdamW
ADAMW = {"fused": {"fused": True}, "foreach": {"foreach": True}}


def full_depth_features(
    model: DiffusionTransformer, x: Tensor, t: Tensor, condition: Conditioning, depth: int
) -> Tensor:
    """The residual stream [B, T, D] after block ``depth`` of a model that runs to its last layer.

    The published teacher does the same: it computes the prediction and throws it away.
    """
    stream = model.begin(x, t, condition)
    for i, block in enumerate(model.blocks, start=1):
        stream.through(block, last=i == model.depth)
        if i == depth:
            features = stream.features()
    model.final_layer(stream.tokens, stream.conditioning, stream.pending)
    return features


class Program:
    """Student, teacher, optimizer and one training step.

    Args:
        cfg: the engine's configuration; model, layers, loss, optimizer, precision and seed are read.
        switches: how it is done.
        data: a data set that gives the same batch forever (``batch``, ``to_latent``, ``posterior``).
        device: to run on.
    """

    def __init__(self, cfg: Config, switches: Switches, data, device: torch.device):
        self.cfg = cfg
        self.switches = switches
        self.data = data
        self.device = device
        self.bf16 = cfg.train.precision == "bf16"
        # the published code lets the fp32 teacher's products round their inputs to TF32
        torch.backends.cuda.matmul.allow_tf32 = self.bf16
        torch.backends.cudnn.allow_tf32 = self.bf16

        torch.manual_seed(cfg.train.seed)
        with device:
            self.student = cfg.model.build().train()
        self.ema = copy.deepcopy(self.student).eval().requires_grad_(False)
        self.teacher = self._make_teacher()
        self.process = make_process(cfg)
        self.params = list(self.student.parameters())
        self.averages = list(self.ema.parameters())
        self.optimizer = torch.optim.AdamW(
            self.params,
            lr=cfg.optim.lr,
            betas=tuple(cfg.optim.betas),
            eps=cfg.optim.eps,
            weight_decay=cfg.optim.weight_decay,
            **ADAMW[switches.adamw],
        )
        # holds the student's weights while it is the teacher
        self.backup = [torch.empty_like(p) for p in self.params] if switches.swap else []
        self.loss_sum = torch.zeros((), device=device)

        if switches.measured_attention:
            images = cfg.train.global_batch
            choose_attention(cfg, [(images, None, True), (images, None, False)], device)
        self._compile()
        self.condition: Conditioning | None = None
        self.graphed = None
        if switches.graph:
            self.graphed = GraphedGradients(self.loss_of, self.params, device.type == "cuda")

    @property
    def phases(self) -> list[tuple[object, str, str]]:
        """(owner, attribute, phase) of the functions whose time is that of a phase."""
        update = (self, "update", "optimizer")
        # parts of a CUDA graph cannot be timed
        if self.graphed is not None:
            return [(self, "graphed", "graph"), update]
        found = [(self, "forward", "forward")]
        # compiled as a whole, the teacher is part of the forward graph
        if self.switches.compile != "whole":
            found.append((self, "features", "teacher"))
        return [*found, (self, "backward", "backward"), update]

    def _make_teacher(self) -> torch.nn.Module:
        """The student, the EMA, or a copy of the EMA's blocks that run; sets ``self.copied`` to (copies, sources)."""
        self.copied: tuple[list[Tensor], list[Tensor]] = ([], [])
        if self.switches.swap:
            return self.student
        if not self.switches.teacher_copy:
            return self.ema
        with self.device:
            if self.switches.truncated:
                teacher = self.cfg.model.build_teacher(self.cfg.align.teacher_layer)
            else:
                teacher = self.cfg.model.build()
        dtype = torch.bfloat16 if self.bf16 else torch.float32
        teacher = teacher.to(dtype).eval().requires_grad_(False)
        ema = dict(self.ema.named_parameters())
        # a truncated teacher has only some of the parameters
        sources = [ema[name] for name, _ in teacher.named_parameters()]
        self.copied = (list(teacher.parameters()), sources)
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
            student = [*self.student.blocks, self.student.final_layer, self.student.ap_head]
            teacher = [] if self.teacher is self.student else self.teacher.blocks
            # block by block, as the engine compiles them
            for module in (*student, *teacher):
                module.compile(**settings)
            self.losses = torch.compile(self.losses, **settings)

    def features(self, x: Tensor, t: Tensor, condition: Conditioning) -> Tensor:
        """The teacher's features [B, T, D] after the aligned block."""
        if self.switches.swap:
            return self.swapped_features(x, t, condition)
        layer = self.cfg.align.teacher_layer
        # a copy has the training precision already; the EMA itself runs in fp32
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            if self.switches.truncated:
                return self.teacher.features(x, t, condition, layer)
            return full_depth_features(self.teacher, x, t, condition, layer)

    @torch.no_grad()
    def swapped_features(self, x: Tensor, t: Tensor, condition: Conditioning) -> Tensor:
        """Features of the student with the EMA's weights, run to its last layer under autocast."""
        torch._foreach_copy_(self.backup, self.params)
        torch._foreach_copy_(self.params, self.averages)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            self.student.eval()
            layer = self.cfg.align.teacher_layer
            features = full_depth_features(self.student, x, t, condition, layer)
        self.student.train()
        torch._foreach_copy_(self.params, self.backup)
        return features

    def losses(self, prediction: Tensor, projected: Tensor, features: Tensor, noised) -> Tensor:
        """Denoising loss plus the weighted alignment loss."""
        align = self.cfg.align
        denoise = sum(loss.mean() for loss in self.process.losses(prediction, noised).values())
        distance = ops.align_distance(projected, features, align.distance, beta=align.beta)
        return denoise + align.weight * distance.mean()

    def forward(self, noised, condition: Conditioning) -> Tensor:
        """The loss of one batch."""
        target = None
        if self.switches.swap:
            # before the student: swapping weights would change what its backward pass reads
            target = self.features(noised.x_teacher, noised.t_teacher, condition)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            layer = self.cfg.align.student_layer
            prediction, found = self.student(noised.x, noised.t, condition, depths=(layer,))
            projected = self.student.ap_head(found.after[layer])
        if target is None:
            target = self.features(noised.x_teacher, noised.t_teacher, condition)
        return self.losses(prediction, projected, target, noised)

    def loss_of(
        self, x0: Tensor, noise: Tensor, t: Tensor, t_teacher: Tensor, *told: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The loss, and the same detached. ``told``: the tensors of the conditioning."""
        noised = self.process.corrupt(x0, noise, t, t_teacher)
        loss = self.forward(noised, self.condition.with_tensors(*told))
        return loss, loss.detach()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def update(self) -> None:
        """Clip, AdamW, EMA, and the teacher's copy of the EMA."""
        # 0 switches clipping off
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
        cfg = self.cfg
        batch, told, _ = self.data.split(self.data.batch)
        draws = draw(
            cfg.train.seed,
            i,
            0,
            (len(batch), *self.data.shape),
            self.device,
            drop_prob=cfg.model.class_dropout_prob,
            posterior=self.data.posterior,
        )
        x0 = self.data.to_latent(batch, draws.posterior)
        t, t_teacher = self.process.times(draws.uniform, draws.gap)
        # a graph needs the kind of conditioning beside its tensors
        self.condition = self.data.condition(told).dropped(draws.drop)
        inputs = (x0, draws.noise, t, t_teacher, *self.condition.tensors())
        if self.graphed is not None:
            loss = self.graphed(*inputs)
        else:
            for_backward, loss = self.loss_of(*inputs)
            self.backward(for_backward)
        self.update()
        self.loss_sum += loss
