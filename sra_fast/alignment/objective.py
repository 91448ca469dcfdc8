"""The objective of SRA (Eq. 6): denoising, plus alignment of the student's shallow features."""

import torch
from torch import Tensor, nn

from sra_fast import ops
from sra_fast.alignment.schedule import aligned_images
from sra_fast.alignment.target import Target
from sra_fast.config.schema import AlignConfig
from sra_fast.diffusion.process import Noised, Process
from sra_fast.models import Backbone, Conditioning, SiT
from sra_fast.models.layers import timestep_features


class SRAObjective(nn.Module):
    """Student, alignment target and the loss of one micro-batch: the module that DeepSpeed wraps.

    Args:
        student: the network that is trained.
        target: what its features are aligned to.
        process: noises both inputs and compares the prediction.
        align: student layer m, head, distance, and the fraction of images that is aligned.
    """

    def __init__(self, student: SiT, target: Target, process: Process, align: AlignConfig):
        super().__init__()
        self.student = student
        self.target = target
        self.process = process
        self.align = align

    @property
    def teacher(self) -> Backbone | None:
        """The target's network that follows the EMA, if it has one."""
        return self.target.network

    def forward(
        self,
        x0: Tensor,
        condition: Conditioning,
        noise: Tensor,
        times: tuple[Tensor, Tensor],
        weight: float | Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a micro-batch and its parts.

        Args:
            x0: ``[B, C, H, W]`` clean latents.
            condition: B of them, for both networks.
            noise: ``[B, C, H, W]``, shared by both inputs.
            times: student's and teacher's ``[B]``.
            weight: lambda; at 0 the target is not computed. A tensor ``[]`` is not read on the
                host: the target is computed whatever its value.

        Returns:
            ``(loss [], parts)``: fp32 scalars ``denoise``, ``vb`` (DiT), ``align``, and the mean
            token norms ``student_norm`` (projected features) and ``teacher_norm``.

        Raises:
            ValueError: in training, a conditioning that leaves dropping to the network.
        """
        # one noise for both inputs: they differ in their times only (SRA, Sec. 3.2)
        if self.student.training and not condition.is_decided:
            # the student would draw its dropped entries, and the teacher would drop none
            raise ValueError(
                "expected a conditioning that says which entries are dropped (`dropped`), "
                "got one that leaves it to each network"
            )
        noised = self.process.corrupt(x0, noise, *times)
        # a tensor is not compared: that would wait for the device, and a CUDA graph cannot branch
        if not isinstance(weight, Tensor) and weight == 0:
            return self._plain(noised, condition)

        images = aligned_images(self.align.fraction, len(x0), x0.device)
        t, t_teacher = _sinusoids(noised)
        # before the student's forward, so that the target may be computed at the same time
        self.target.start(noised, t_teacher, condition, images)
        prediction, features = self.student(
            noised.x,
            t,
            condition,
            align_depth=self.align.student_layer,
            align_images=images,
            project=self.align.head == "mlp",
        )
        target = self.target.result()

        parts = self._denoising(prediction, noised)
        distance = ops.align_distance(features, target, self.align.distance, beta=self.align.beta)
        align = distance.mean()
        # Eq. 6: denoising + lambda * alignment
        loss = sum(parts.values()) + weight * align
        if self.align.head == "none":
            loss = loss + self._no_gradient_for_the_head(prediction)
        # logged without lambda, which the log has as align_weight
        parts["align"] = align
        parts["student_norm"] = _mean_norm(features)
        parts["teacher_norm"] = _mean_norm(target)
        return loss, _detached(parts)

    def _plain(self, noised: Noised, condition: Conditioning) -> tuple[Tensor, dict[str, Tensor]]:
        """A step without alignment."""
        prediction = self.student(noised.x, noised.t, condition)
        parts = self._denoising(prediction, noised)
        loss = sum(parts.values()) + self._no_gradient_for_the_head(prediction)
        return loss, _detached(parts)

    def _denoising(self, prediction: Tensor, noised: Noised) -> dict[str, Tensor]:
        losses = self.process.losses(prediction, noised)
        return {name: value.mean() for name, value in losses.items()}

    def _no_gradient_for_the_head(self, prediction: Tensor) -> Tensor:
        """Zero, with a zero gradient for the projection head.

        Every parameter then has a gradient in every step, which all ZeRO stages handle alike.
        """
        # one token of zeros is enough to give every weight of the head a gradient
        features = prediction.new_zeros(1, 1, self.student.hidden_size)
        return 0.0 * self.student.ap_head(features).sum()


def _sinusoids(noised: Noised) -> tuple[Tensor, Tensor]:
    """``timestep_features`` ``[B, 256]`` of the student's and the teacher's times, in one pass."""
    student, teacher = timestep_features(torch.cat([noised.t, noised.t_teacher])).chunk(2)
    return student, teacher


def _mean_norm(features: Tensor) -> Tensor:
    """Mean length of the tokens ``[b, T, D]``, fp32."""
    return torch.linalg.vector_norm(features.detach(), dim=-1, dtype=torch.float32).mean()


def _detached(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in parts.items()}
