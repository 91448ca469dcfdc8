"""Dual times with attention separation (arXiv 2607.02508): an image is cut into two groups of
tokens, each with a time of its own, and attention may stay inside a group.

The EMA teacher has the same groups, at times that are earlier as in SRA.
"""

import functools
from dataclasses import dataclass

import torch

from sra_fast.alignment.ema_teacher import EMATeacher, EMATeacherConfig
from sra_fast.alignment.schedule import aligned_numbers, images_per_cycle
from sra_fast.config.schema import Config, Distance, choice
from sra_fast.diffusion.draws import Draws
from sra_fast.diffusion.micro_batch import Times
from sra_fast.diffusion.process import Process
from sra_fast.models import TokenGroups
from sra_fast.models.token_groups import Segments
from sra_fast.utils.checks import require_that
from sra_fast.utils.registry import TARGETS


@dataclass
class DualTimeConfig(EMATeacherConfig):
    """Two groups of tokens with independent times, separate in attention."""

    target: str = choice(TARGETS, "dual_time")
    """where the target features come from"""
    distance: Distance = "cosine_patch"
    """distance between the features; the published code computes cosine_token"""
    weight: float = 0.5
    """lambda: weight of the alignment loss"""
    first_share: float = 0.25
    """share of the tokens in the first group, exactly; which ones is drawn for each image"""
    two_times: bool = True
    """the groups have independent times; false: the time of their image (the teacher's are earlier
    by two gaps all the same, as published)"""
    separate: bool = True
    """attention stays inside a group, in student and teacher"""
    full_share: float = 0.0
    """share of the images, the same number in every micro-batch, that are not cut: one group, one
    time, full attention (0.25 in the paper's variant); with all images aligned only"""


@TARGETS.register("dual_time")
class DualTime(EMATeacher):
    """Groups of fixed sizes. With separation the tokens are permuted so that each group is a run of
    the sequence, and attention costs the squares of the groups.
    """

    config = DualTimeConfig
    has_groups = True
    align: DualTimeConfig

    @classmethod
    def check(cls, align: DualTimeConfig, cfg: Config) -> None:
        super().check(align, cfg)
        require_that(
            align.two_times or align.separate,
            "align.two_times and align.separate are both false: that is target ema_teacher",
        )
        require_that(
            0 <= align.full_share < 1,
            f"align.full_share must lie in [0, 1), got {align.full_share}",
        )
        # both would take the first images of a cycle
        whole = all(other.share == 1 for other in cfg.alignments.values())
        require_that(
            not align.full_share or whole,
            f"align.full_share {align.full_share} needs all images to be aligned (fraction 1)",
        )
        tokens = cfg.model.num_tokens
        first = _first_group(align, tokens)
        require_that(
            0 < first < tokens,
            f"align.first_share of the {tokens} tokens must leave both groups at least one token, "
            f"got {align.first_share}",
        )

    @classmethod
    def check_batch(cls, align: DualTimeConfig, micro: int) -> None:
        super().check_batch(align, micro)
        if align.full_share:
            images_per_cycle(align.full_share, micro, "align.full_share")

    def times(self, process: Process, draws: Draws) -> Times:
        uniform = torch.stack([draws.uniform, draws.second[:, 0]], dim=1)
        gap = torch.stack([draws.gap, draws.second[:, 1]], dim=1)
        if not self.align.two_times:
            uniform = uniform[:, :1].expand(-1, 2)
        student, teacher = process.times(uniform, gap)
        return Times(student, teacher, self._groups(draws))

    def segments(self, batch: int, tokens: int) -> Segments | None:
        if not self.align.separate:
            return None
        return _segments(_first_group(self.align, tokens), batch, tokens, self.align.full_share)

    def _groups(self, draws: Draws) -> TokenGroups:
        """The first group holds the tokens with the smallest numbers of their image."""
        B, T = draws.tokens.shape
        first = _first_group(self.align, T)
        layout = _group_of_rank(first, B, T, self.align.full_share, draws.tokens.device)
        order = draws.tokens.argsort(1)
        if self.align.separate:
            return TokenGroups(layout, order, self.segments(B, T))
        # full attention needs no permutation
        return TokenGroups(torch.empty_like(layout).scatter_(1, order, layout))


def _first_group(align: DualTimeConfig, tokens: int) -> int:
    """How many tokens the first group has."""
    return int(align.first_share * tokens + 0.5)


@functools.cache
def _segments(first: int, batch: int, tokens: int, full_share: float) -> Segments:
    """Runs of the sequence that attend among themselves."""
    cut = (first, tokens - first)
    full = set(aligned_numbers(full_share, batch) or ()) if full_share else set()
    if not full:
        return cut
    return tuple((tokens,) if i in full else cut for i in range(batch))


@functools.cache
def _group_of_rank(
    first: int, batch: int, tokens: int, full_share: float, device: torch.device
) -> torch.Tensor:
    """``[B, T]`` int32, the groups of tokens that are ordered by their drawn numbers.

    An image that is not cut is its second group.
    """
    index = torch.ones(batch, tokens, dtype=torch.int32)
    index[:, :first] = 0
    if full_share:
        index[aligned_numbers(full_share, batch)] = 1
    # cached: a copy from the host in every step would wait, and a CUDA graph forbids it
    return index.to(device)
