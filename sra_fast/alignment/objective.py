"""SRA's objective: denoising plus alignment of the student's shallow features to the teacher's deep ones (SRA, Eq. 6)."""

import torch
from torch import Tensor, nn

from sra_fast import ops
from sra_fast.alignment.teacher_pass import TeacherPass, chosen_images
from sra_fast.config.schema import AlignConfig, Config
from sra_fast.diffusion.flow_matching import FlowMatching
from sra_fast.diffusion.gaussian_diffusion import GaussianDiffusion
from sra_fast.models import Backbone, SiT
from sra_fast.models.layers import timestep_features


def make_process(cfg: Config) -> FlowMatching | GaussianDiffusion:
    """The diffusion process of the configured model family."""
    if cfg.model.family == "DiT":
        return GaussianDiffusion(cfg.align.t_max)
    return FlowMatching(cfg.diffusion.path, cfg.diffusion.time, cfg.align.t_max)


def align_weight(cfg: AlignConfig, step: int, epoch: int) -> float:
    """lambda at an optimizer step (0-based) and the data epoch it lies in.

    ``epochs``: the reference's schedule, ``weight`` up to epoch ``hold``, then a factor of ten down every ``decay`` epochs.
    ``steps``: the same in optimizer steps.  ``milestones``: piecewise constant.  Zero from ``stop_at_step`` on.  With
    ``every`` k: k times that at each k-th step, zero in between.
    """
    if (
        cfg.target == "none"
        or (cfg.stop_at_step is not None and step >= cfg.stop_at_step)
        or step % cfg.every
    ):
        return 0.0
    return cfg.every * _scheduled(cfg, step, epoch)


def alignment_phases(cfg: AlignConfig) -> set[bool]:
    """Whether there are steps with a teacher, and whether there are steps without."""
    if cfg.target == "none":
        return {False}
    weights = set(cfg.milestones.values())
    if not cfg.milestones or min(cfg.milestones) > 0:
        weights.add(cfg.weight)
    rests = cfg.every > 1 or cfg.stop_at_step is not None or 0 in weights
    return ({True} if max(weights) > 0 else set()) | ({False} if rests else set())


def _scheduled(cfg: AlignConfig, step: int, epoch: int) -> float:
    if cfg.schedule == "milestones":
        reached = [s for s in cfg.milestones if s <= step]
        return cfg.milestones[max(reached)] if reached else cfg.weight
    if cfg.schedule == "constant":
        return cfg.weight
    now = epoch if cfg.schedule == "epochs" else step
    return cfg.weight * 0.1 ** (max(0, now - cfg.hold) / cfg.decay)


class SRAObjective(nn.Module):
    """Student, teacher and the loss of one micro-batch: the module that DeepSpeed wraps.

    Args:
        student: SiT or DiT.
        teacher: a frozen ``Backbone`` of depth n with the EMA's weights, or None for training without alignment.
        process: noises both inputs and compares the prediction.
        align: student layer m, distance and its parameters, and how the teacher runs.

    Attributes:
        teacher_pass: runs the teacher.
    """

    def __init__(self, student: SiT, teacher: Backbone | None, process, align: AlignConfig):
        super().__init__()
        self.student, self.teacher, self.process, self.align = student, teacher, process, align
        if teacher is not None:
            self.teacher_pass = TeacherPass(teacher.requires_grad_(False), align)

    def forward(
        self,
        x0: Tensor,
        y: Tensor,
        noise: Tensor,
        times: tuple[Tensor, Tensor],
        drop: Tensor,
        weight: float | Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a micro-batch and its parts.

        Args:
            x0: ``[B, C, H, W]`` clean latents.
            y: ``[B]`` labels.
            noise: ``[B, C, H, W]``, shared by both branches.
            times: student's and teacher's ``[B]``.
            drop: ``[B]`` bool: labels replaced by the null class, in both branches.
            weight: lambda; at 0 the teacher does not run.  A tensor ``[]`` is not looked at: it does run.

        Returns:
            ``(loss [], parts)``: fp32 scalars ``denoise``, ``vb`` (DiT), ``align``, and the mean token norms
            ``student_norm`` (projected features) and ``teacher_norm``.
        """
        noised = self.process.corrupt(x0, noise, *times)
        if not isinstance(weight, Tensor) and weight == 0:
            prediction, align = self.student(noised.x, noised.t, y, drop=drop), {}
        else:
            chosen = chosen_images(self.align.fraction, len(x0), x0.device)
            t, t_teacher = timestep_features(torch.cat([noised.t, noised.t_teacher])).chunk(2)
            self.teacher_pass.start(noised.x_teacher, t_teacher, y, drop, chosen=chosen)
            prediction, features = self.student(
                noised.x,
                t,
                y,
                drop=drop,
                align_depth=self.align.student_layer,
                align_images=chosen,
                project=self.align.head == "mlp",
            )
            align = self._compare(features, self.teacher_pass.result())
        losses = {
            name: value.mean() for name, value in self.process.losses(prediction, noised).items()
        }
        loss = sum(losses.values())
        if align:
            loss = loss + weight * align["align"]
        if not align or self.align.head == "none":
            # every stage of ZeRO then sees a (zero) gradient for every parameter, and steps alike
            loss = (
                loss
                + 0.0
                * self.student.ap_head(prediction.new_zeros(1, 1, self.student.hidden_size)).sum()
            )
        return loss, {name: value.detach() for name, value in {**losses, **align}.items()}

    def _compare(self, features: Tensor, target: Tensor) -> dict[str, Tensor]:
        distance = ops.align_distance(
            features, target, self.align.distance, beta=self.align.beta
        ).mean()
        norms = (
            torch.linalg.vector_norm(f.detach(), dim=-1, dtype=torch.float32).mean()
            for f in (features, target)
        )
        return dict(zip(("align", "student_norm", "teacher_norm"), (distance, *norms), strict=True))
