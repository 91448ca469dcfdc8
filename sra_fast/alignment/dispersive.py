"""The dispersive loss (arXiv 2506.09027): the images of a batch repel each other at one block.

There is no target and no head: features of different images shall differ.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from sra_fast.alignment.target import Inputs, Target, mean_norm
from sra_fast.config.schema import AlignConfig, Config, ModelConfig, choice
from sra_fast.models import DiffusionTransformer, Features
from sra_fast.utils.checks import require_that
from sra_fast.utils.registry import TARGETS


@dataclass
class DispersiveConfig(AlignConfig):
    """Repulsion between the images of a batch (dispersive loss, InfoNCE with l2 distances)."""

    target: str = choice(TARGETS, "dispersive")
    """where the target features come from"""
    weight: float = 0.5
    """lambda: weight of the loss (the authors' PyTorch code: 0.25)"""
    temperature: float = 0.5
    """tau: squared distances, as means over the features' elements, are divided by it (the authors'
    PyTorch code: 1)"""
    over: Literal["process", "all"] = "process"
    """the images that repel each other: a process's micro-batch, as published, or the micro-batches
    of all processes. More images are another loss, so that train.micro_batch matters (by default
    the global batch over the number of processes), and for `all` also the number of processes"""


@TARGETS.register("dispersive")
class Dispersive(Target):
    """``log mean_ij exp(-|h_i - h_j|^2 / (N tau))`` over all pairs of images, an image and itself
    among them; h_i are the N = T D features of image i after the student's block m.
    """

    config = DispersiveConfig
    may_be_negative = True
    align: DispersiveConfig

    @classmethod
    def layers(cls, model: ModelConfig) -> tuple[int, int]:
        # the paper's choice: a quarter of the depth, rounded down
        layer = max(1, model.arguments()["depth"] // 4)
        return layer, layer

    @classmethod
    def check_batch(cls, align: DispersiveConfig, micro: int) -> None:
        require_that(
            micro > 1,
            f"align.target dispersive needs at least 2 images per micro-batch, got {micro}",
        )

    @classmethod
    def images_compared(cls, align: DispersiveConfig, micro: int, world: int) -> int:
        return micro * world if align.over == "all" else micro

    @classmethod
    def check(cls, align: DispersiveConfig, cfg: Config) -> None:
        require_that(
            0 < align.temperature < float("inf"),
            f"align.temperature must be positive and finite, got {align.temperature}",
        )

    def loss(
        self, student: DiffusionTransformer, features: Features, inputs: Inputs
    ) -> dict[str, Tensor]:
        h = self.projected(student, features, inputs)
        if features.groups is not None:
            # each image's tokens are permuted by themselves: patches are compared with patches
            h = features.groups.restore(h)
        over_all = self.align.over == "all" and dist.is_initialized() and dist.get_world_size() > 1
        value = dispersion(h, self.align.temperature, dist.group.WORLD if over_all else None)
        return {"align": value, "student_norm": mean_norm(h)}


def dispersion(h: Tensor, temperature: float, group: dist.ProcessGroup | None = None) -> Tensor:
    """``log mean_ij exp(-|h_i - h_j|^2 / (N temperature))``, fp32 ``[]`` (arXiv 2506.09027,
    InfoNCE-based, l2).

    Args:
        h: ``[B, ...]``, N elements per image, any float dtype.
        temperature: tau.
        group: over whose images i and j run, B per process; None: over these B. The gradient is
            such that the mean over the processes is that of the whole loss.
    """
    rows = h.flatten(1).float()
    everyone = rows.detach()
    world = 1
    if group is not None:
        world = dist.get_world_size(group)
        everyone = torch.cat(_gather(everyone, world, group))
    # distances do not change when all features move; far from zero their squares would lose digits
    centre = everyone.mean(0)
    rows = rows - centre
    everyone = everyone - centre
    squares = rows.square().sum(1)[:, None] + everyone.square().sum(1) - 2 * rows @ everyone.t()
    similar = torch.exp(squares.clamp(min=0) / (-h[0].numel() * temperature)).sum()
    total = similar.detach()
    if group is not None:
        dist.all_reduce(total, group=group)
    value = (total / len(everyone) ** 2).log()
    # a pair stands in the row of either image, and only the row's image has a gradient here
    gradient = 2 * world * similar / total
    return value + (gradient - gradient.detach())


def _gather(rows: Tensor, world: int, group: dist.ProcessGroup) -> list[Tensor]:
    everyone = [torch.empty_like(rows) for _ in range(world)]
    dist.all_gather(everyone, rows.contiguous(), group=group)
    return everyone
