"""When, how strongly and for which images the alignment loss counts."""

import functools
import itertools
import sys
from collections.abc import Iterable
from fractions import Fraction

import torch
from torch import Tensor

from sra_fast.config.schema import AlignConfig, Config


def align_weight(cfg: AlignConfig, step: int, epoch: int) -> float:
    """lambda at an optimizer step (0-based) of a data epoch.

    ``schedule`` says how it changes. ``epochs``: as published, ``weight`` up to epoch ``hold``,
    then a factor of ten less every ``decay`` epochs. ``steps``: the same in optimizer steps.
    ``milestones``: piecewise constant. From ``stop_at_step`` on it is zero. With ``every`` k it is
    k times as large at each k-th step and zero at the others.
    """
    stopped = cfg.stop_at_step is not None and step >= cfg.stop_at_step
    if not cfg.active or stopped or step % cfg.every:
        return 0.0
    # times ``every``: the mean over all steps is that of alignment in each step
    return cfg.every * _scheduled(cfg, step, epoch)


def align_weights(cfg: Config, step: int, epoch: int) -> dict[str, float]:
    """``align_weight`` of every target of a run, by its section."""
    return {name: align_weight(align, step, epoch) for name, align in cfg.alignments.items()}


def is_over(cfg: AlignConfig, step: int) -> bool:
    """Whether no step from this one on (0-based) computes the target."""
    if not cfg.active or (cfg.stop_at_step is not None and step >= cfg.stop_at_step):
        return True
    later = [weight for start, weight in cfg.milestones.items() if start > step]
    return not any([_scheduled(cfg, step, 0), *later])


def _scheduled(cfg: AlignConfig, step: int, epoch: int) -> float:
    if cfg.schedule == "milestones":
        reached = [milestone for milestone in cfg.milestones if milestone <= step]
        return cfg.milestones[max(reached)] if reached else cfg.weight
    if cfg.schedule == "constant":
        return cfg.weight
    # the exponent is 0 up to ``hold``, then grows by 1 every ``decay`` epochs or steps
    now = epoch if cfg.schedule == "epochs" else step
    decayed = cfg.weight * 0.1 ** (max(0, now - cfg.hold) / cfg.decay)
    # a float underflows to 0, which ``alignment_phases`` has no step for
    return max(decayed, sys.float_info.min) if cfg.weight else 0.0


def alignment_phases(cfg: AlignConfig) -> set[bool]:
    """Whether a run has steps with alignment (True), steps without (False), or both."""
    if not cfg.active:
        return {False}
    weights = set(cfg.milestones.values())
    # until the first milestone lambda is ``weight``
    if not cfg.milestones or min(cfg.milestones) > 0:
        weights.add(cfg.weight)
    phases = set()
    if max(weights) > 0:
        phases.add(True)
    # the other schedules decay, but never reach zero
    if cfg.every > 1 or cfg.stop_at_step is not None or 0 in weights:
        phases.add(False)
    return phases


def phases_of(alignments: Iterable[AlignConfig]) -> list[tuple[bool, ...]]:
    """Which of a run's targets may be computed in one step, for every kind of step."""
    return sorted(itertools.product(*(alignment_phases(cfg) for cfg in alignments)))


def images_per_cycle(
    fraction: float, batch: int, option: str = "align.fraction"
) -> tuple[int, int]:
    """``(p, q)``: the first p of every q images are aligned.

    They are the same images for every split of the batch into micro-batches.

    Raises:
        ValueError: a micro-batch of ``batch`` images cannot be divided like that.
    """
    # 0.3 is no binary fraction: take the nearest p/q that a micro-batch of this size can have
    cycle = Fraction(fraction).limit_denominator(max(batch, 1))
    exact = abs(float(cycle) - fraction) <= 1e-6
    if not 0 < cycle <= 1 or batch % cycle.denominator or not exact:
        raise ValueError(
            f"{option} of the {batch} images of a micro-batch must be a whole number of "
            f"images, got {fraction}"
        )
    return cycle.numerator, cycle.denominator


def aligned_numbers(fraction: float, batch: int) -> list[int] | None:
    """The images of a micro-batch that are aligned; None: all of them."""
    if fraction == 1:
        return None
    p, q = images_per_cycle(fraction, batch)
    return [i for i in range(batch) if i % q < p]


@functools.cache
def aligned_images(fraction: float, batch: int, device: torch.device) -> Tensor | None:
    """``aligned_numbers`` as int64 ``[batch * fraction]`` on the device."""
    numbers = aligned_numbers(fraction, batch)
    # cached: a copy from the host in every step would wait, and a CUDA graph forbids it
    return None if numbers is None else torch.tensor(numbers).to(device)
