"""Checks of a configuration before anything large is allocated: each failure is one ValueError that says what is wrong."""

import math
from pathlib import Path

import torch

from sra_fast.alignment.teacher_pass import images_per_cycle
from sra_fast.config.schema import Config, ModelConfig, SampleConfig
from sra_fast.diffusion.gaussian_diffusion import NUM_TIMES
from sra_fast.diffusion.samplers import METHODS
from sra_fast.models import SiT


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def check(cfg: Config) -> None:
    """Everything that does not depend on the machine."""
    with torch.device("meta"):
        cfg.model.build()
    family = cfg.model.family
    _check_align(cfg)
    _require(
        family == "SiT" or (cfg.diffusion.path, cfg.diffusion.time) == ("linear", "uniform"),
        f"diffusion.path and diffusion.time are SiT's; DiT has neither, got {cfg.diffusion.path}, {cfg.diffusion.time}",
    )
    _require(
        cfg.sample.guidance == 1 or cfg.model.class_dropout_prob > 0,
        f"sample.guidance {cfg.sample.guidance} needs model.class_dropout_prob > 0",
    )
    _check_numbers(cfg)
    _check_monitor(cfg)
    check_sampling(cfg.sample, cfg.model)


def check_device(cfg: Config, stage: int, cuda: bool, world: int = 1) -> None:
    """What needs a GPU, or parameters that stay where they are."""
    a, wanted = cfg.align, ("align.teacher_graph", "align.teacher_stream", "train.compile")
    for name, value in zip(
        wanted, (a.teacher_graph, a.teacher_stream, cfg.train.compile), strict=True
    ):
        _require(not value or stage < 3, f"{name} needs a ZeRO stage below 3, got {stage}")
        _require(not value or cuda or name == "train.compile", f"{name} needs a CUDA device")
    if cfg.train.graph:
        _require(cuda, "train.graph needs a CUDA device")
        _require(
            world == 1 and stage < 3,
            f"train.graph needs one process and a ZeRO stage below 3, got {world} and {stage}",
        )
        _require(
            cfg.optim.implementation == "fused",
            f"train.graph needs optim.implementation fused, got {cfg.optim.implementation}",
        )
        _require(
            not a.teacher_graph,
            "train.graph holds the teacher too: it goes without align.teacher_graph",
        )
    if a.teacher_dtype == "fp8" and a.target != "none":
        _require(
            stage < 3 and cfg.train.precision == "bf16",
            "align.teacher_dtype fp8 needs train.precision bf16 and a ZeRO stage below 3",
        )
        width = cfg.model.arguments()["hidden_size"]
        _require(
            width % 16 == 0,
            f"align.teacher_dtype fp8 needs a model.hidden_size that is a multiple of 16, got {width}",
        )
        _require(
            not cuda or torch.cuda.get_device_capability() >= (9, 0),
            "align.teacher_dtype fp8 needs compute capability 9.0",
        )


def check_sampling(sample: SampleConfig, model: ModelConfig | SiT) -> None:
    """Sampler settings against the model's family and channels: also what ``sample.py`` checks before it samples."""
    family, method = model.family, sample.resolved_method(model.family)
    _require(
        method in METHODS[family],
        f"sample.method for {family} must be one of {METHODS[family]}, got {method}",
    )
    low, high = (2, NUM_TIMES) if family == "DiT" else (1, 10**6)
    _require(
        low <= sample.steps <= high,
        f"sample.steps for {family} must lie in [{low}, {high}], got {sample.steps}",
    )
    low, high = sample.interval
    _require(
        0 <= low <= high <= 1, f"sample.interval must be 0 <= low <= high <= 1, got {[low, high]}"
    )
    n, high = sample.guided_channels, model.in_channels
    _require(0 <= n <= high, f"sample.guided_channels must lie in [0, {high}], got {n}")


def _check_numbers(cfg: Config) -> None:
    t, o, d = cfg.train, cfg.optim, cfg.data
    for name, value in dict(steps=t.steps, save_every=t.save_every, log_every=t.log_every).items():
        _require(value >= 1, f"train.{name} must be at least 1, got {value}")
    _require(-(2**63) <= t.seed < 2**64, f"train.seed must lie in [-2^63, 2^64), got {t.seed}")
    _require(0 <= t.ema_decay <= 1, f"train.ema_decay must lie in [0, 1], got {t.ema_decay}")
    _require(
        0 < o.lr < math.inf and 0 < o.eps < math.inf,
        f"optim.lr and optim.eps must be positive and finite, got {o.lr} and {o.eps}",
    )
    _require(
        all(0 <= beta < 1 for beta in o.betas),
        f"optim.betas must lie in [0, 1), got {list(o.betas)}",
    )
    for name, value in {
        "optim.clip": o.clip,
        "optim.weight_decay": o.weight_decay,
        "optim.warmup_steps": o.warmup_steps,
        "data.num_workers": d.num_workers,
        "align.hold": cfg.align.hold,
    }.items():
        _require(0 <= value < math.inf, f"{name} must not be negative nor infinite, got {value}")
    _require(d.latent_scale > 0, f"data.latent_scale must be positive, got {d.latent_scale}")


def _check_align(cfg: Config) -> None:
    a, depth = cfg.align, cfg.model.arguments()["depth"]
    if a.target == "none":
        return
    _require(
        1 <= a.student_layer <= a.teacher_layer <= depth,
        f"align needs 1 <= student_layer <= teacher_layer <= depth ({depth}), "
        f"got student_layer {a.student_layer} and teacher_layer {a.teacher_layer}",
    )
    _require(0 <= a.t_max <= 1, f"align.t_max must lie in [0, 1], got {a.t_max}")
    _require(
        min(a.weight, *a.milestones.values()) >= 0 if a.milestones else a.weight >= 0,
        f"align.weight and align.milestones must not be negative, got {a.weight} and {a.milestones}",
    )
    _require(a.beta > 0, f"align.beta must be positive, got {a.beta}")
    _require(0 < a.fraction <= 1, f"align.fraction must lie in (0, 1], got {a.fraction}")
    _require(a.every >= 1, f"align.every must be at least 1, got {a.every}")
    _require(a.decay >= 1, f"align.decay must be at least 1, got {a.decay}")
    _require(
        (a.schedule == "milestones") == bool(a.milestones),
        f"align.milestones go with align.schedule: milestones, got schedule {a.schedule} and milestones {a.milestones}",
    )


def _check_monitor(cfg: Config) -> None:
    m = cfg.monitor
    _require(m.every >= 0, f"monitor.every must not be negative, got {m.every}")
    if m.every == 0:
        return
    for name, value, least in (("count", m.count, 2), ("grid", m.grid, 1), ("batch", m.batch, 1)):
        _require(value >= least, f"monitor.{name} must be at least {least}, got {value}")
    channels = cfg.model.in_channels
    _require(
        m.vae is not None or channels in (1, 3),
        f"monitor.every needs monitor.vae to decode latents of {channels} channels",
    )
    _require(
        (m.reference is None) == (m.inception is None),
        f"monitor.reference and monitor.inception go together, got {m.reference} and {m.inception}",
    )
    for name, path in (("vae", m.vae), ("reference", m.reference), ("inception", m.inception)):
        _require(path is None or Path(path).exists(), f"monitor.{name}: there is no {path}")


def split_batch(cfg: Config, world_size: int) -> tuple[int, int]:
    """``(micro batch per process, accumulation steps)`` of a global batch; ValueError if it or align.fraction does not divide."""
    total, micro = cfg.train.global_batch, cfg.train.micro_batch
    _require(
        total >= 1 and (micro is None or micro >= 1),
        f"batches must be at least 1, got {total} and {micro}",
    )
    if micro is None:
        _require(
            total % world_size == 0,
            f"train.global_batch must be a multiple of the {world_size} processes, got {total}",
        )
        micro = total // world_size
    _require(
        total % (micro * world_size) == 0,
        f"train.global_batch must be a multiple of micro_batch {micro} x {world_size} processes, got {total}",
    )
    images_per_cycle(cfg.align.fraction, micro)
    return micro, total // (micro * world_size)
