"""What the loss of a micro-batch is computed from, and its noisy inputs.

A patch may have a noise level of its own. To the diffusion process such a patch is an image of p x
p pixels, so that every process can do it.
"""

from dataclasses import dataclass

from torch import Tensor

from sra_fast.diffusion.process import Noised, Process
from sra_fast.models import Conditioning, TokenGroups
from sra_fast.models.layers import images_of, patches_of


@dataclass(frozen=True)
class Times:
    """Times of B images, in the units of the process.

    Attributes:
        student: ``[B]``, or with groups ``[B, G]``, one for each group of tokens.
        teacher: ``[B]``: the teacher sees whole images at one time; or ``[B, G]``: it has the
            student's groups.
        groups: of the student's tokens; None: one time per image.
    """

    student: Tensor
    teacher: Tensor
    groups: TokenGroups | None = None

    @property
    def teacher_groups(self) -> TokenGroups | None:
        """The groups of the teacher's tokens."""
        return self.groups if self.teacher.dim() == 2 else None


@dataclass(frozen=True)
class MicroBatch:
    """B images with everything that was drawn for them.

    Attributes:
        x0: ``[B, C, H, W]`` clean latents.
        condition: B of them, for all networks.
        noise: ``[B, C, H, W]``, shared by both inputs.
        times: of student and teacher.
        external: ``[B, T, D_ext]`` features of the images by another model, or None.
        mean: ``[B, C, H, W]``, the means of the posterior that x0 was drawn from, or None.
    """

    x0: Tensor
    condition: Conditioning
    noise: Tensor
    times: Times
    external: Tensor | None = None
    mean: Tensor | None = None

    def __len__(self) -> int:
        """B."""
        return len(self.x0)

    def tensors(self) -> tuple[Tensor, ...]:
        """Everything it holds: the inputs of a CUDA graph."""
        times = (self.times.student, self.times.teacher)
        groups = () if self.times.groups is None else self.times.groups.tensors()
        more = tuple(item for item in (self.external, self.mean) if item is not None)
        return (self.x0, self.noise, *times, *groups, *more, *self.condition.tensors())

    def with_tensors(self, tensors: tuple[Tensor, ...]) -> "MicroBatch":
        """The same kind of batch with other tensors, in the order of ``tensors``."""
        x0, noise, student, teacher, *rest = tensors
        groups = self.times.groups
        if groups is not None:
            count = len(groups.tensors())
            groups = groups.with_tensors(*rest[:count])
            rest = rest[count:]
        external = None if self.external is None else rest.pop(0)
        mean = None if self.mean is None else rest.pop(0)
        condition = self.condition.with_tensors(*rest)
        return MicroBatch(x0, condition, noise, Times(student, teacher, groups), external, mean)


@dataclass(frozen=True)
class NoisyImages:
    """A micro-batch with its noise.

    Attributes:
        batch: what it was made from.
        x, x_teacher: ``[B, C, H, W]`` inputs of student and teacher.
        noised: what the process has made: of B images, or of their B T patches.
        patch_size: side p of a patch.
    """

    batch: MicroBatch
    x: Tensor
    x_teacher: Tensor
    noised: Noised
    patch_size: int

    @classmethod
    def make(cls, process: Process, batch: MicroBatch, patch_size: int) -> "NoisyImages":
        """Add the noise: to whole images, or to each patch as much as its group has."""
        times = batch.times
        if times.groups is None:
            noised = process.corrupt(batch.x0, batch.noise, times.student, times.teacher)
            return cls(batch, noised.x, noised.x_teacher, noised, patch_size)
        cut = lambda images: _to_patches(images, patch_size)
        student = times.groups.per_token(times.student)
        # a teacher without groups has one for all tokens
        per_group = (
            times.teacher
            if times.teacher.dim() == 2
            else times.teacher[:, None].expand(times.student.shape)
        )
        teacher = times.groups.per_token(per_group)
        noised = process.corrupt(
            cut(batch.x0), cut(batch.noise), student.flatten(), teacher.flatten()
        )
        x, x_teacher = (
            images_of(patches.unflatten(0, student.shape))
            for patches in (noised.x, noised.x_teacher)
        )
        return cls(batch, x, x_teacher, noised, patch_size)

    def losses(self, process: Process, prediction: Tensor) -> dict[str, Tensor]:
        """Terms of the loss, scalars: means over the images.

        ``prediction``: ``[B, C_out, H, W]``.
        """
        if self.batch.times.groups is not None:
            prediction = _to_patches(prediction, self.patch_size)
        losses = process.losses(prediction, self.noised)
        return {name: value.mean() for name, value in losses.items()}


def _to_patches(images: Tensor, patch_size: int) -> Tensor:
    """``[B, C, H, W]`` -> ``[B T, C, p, p]``."""
    return patches_of(images, patch_size).flatten(0, 1)
