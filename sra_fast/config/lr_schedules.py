"""How the learning rate falls after its warm-up: schedules by name.

A schedule is a function of the progress between warm-up and the last step, in [0, 1). It returns
the share of the way from ``optim.min_lr`` to ``optim.lr``:

    @LR_SCHEDULES.register("linear")
    def linear(progress): ...
"""

import math

from sra_fast.config.schema import OptimConfig
from sra_fast.utils.checks import require_that
from sra_fast.utils.registry import LR_SCHEDULES


@LR_SCHEDULES.register("constant")
def constant(progress: float) -> float:
    return 1.0


@LR_SCHEDULES.register("linear")
def linear(progress: float) -> float:
    return 1.0 - progress


@LR_SCHEDULES.register("cosine")
def cosine(progress: float) -> float:
    """Half a period (SGDR, arXiv 1608.03983, without restarts)."""
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def scheduled_lr(optim: OptimConfig, step: int, steps: int) -> float:
    """The learning rate at a 0-based step of a run of ``steps`` steps, without the warm-up factor.

    Raises:
        ValueError: a schedule gave a share outside [0, 1].
    """
    left = max(1, steps - optim.warmup_steps)
    progress = min(max(0.0, (step - optim.warmup_steps) / left), 1.0)
    share = LR_SCHEDULES[optim.schedule](progress)
    require_that(
        0.0 <= share <= 1.0,
        f"optim.schedule {optim.schedule} must give shares in [0, 1], got {share} at {progress}",
    )
    return optim.min_lr + share * (optim.lr - optim.min_lr)
