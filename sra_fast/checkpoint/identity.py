"""What must be the same for a resumed run to be the uninterrupted one."""

from dataclasses import asdict

from sra_fast.config.schema import Config
from sra_fast.utils.registry import TARGETS


def identity_of(cfg: Config, world_size: int, zero_stage: int) -> dict:
    """Everything that a checkpoint's layout or the run's arithmetic depends on."""
    target = TARGETS[cfg.align.target]
    return {
        "seed": cfg.train.seed,
        "global_batch": cfg.train.global_batch,
        "world_size": world_size,
        "zero_stage": zero_stage,
        "precision": cfg.train.precision,
        "residual": cfg.train.residual,
        "model": asdict(cfg.model),
        "target": cfg.align.target,
        **target.identity(cfg.align),
    }
