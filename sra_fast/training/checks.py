"""Checks of a configuration before anything large is allocated.

Each failure is one ValueError that says what was expected and what came.
"""

import math
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import torch

from sra_fast.config.averages import check_averages, check_weights
from sra_fast.config.schema import AlignConfig, Config
from sra_fast.data.normalization import check_scale, check_shift
from sra_fast.diffusion.process import make_process
from sra_fast.diffusion.samplers import check_sampling
from sra_fast.utils.checks import require_that
from sra_fast.utils.registry import TARGETS
from sra_fast.zero.deepspeed_config import MergedConfig, refuse_for_graph


def check_config(cfg: Config) -> None:
    """Everything that does not depend on the machine."""
    check_finite(cfg)
    # the constructor checks its sizes; on meta it allocates nothing
    with torch.device("meta"):
        model = cfg.model.build()
    _check_execution(cfg)
    for section, align in cfg.alignments.items():
        named_as(section, lambda align=align: _check_align(align, cfg))
    _check_two_targets(cfg)
    # raises for settings that the process does not have
    make_process(cfg)
    require_that(
        cfg.sample.guidance == 1 or model.has_null,
        f"sample.guidance {cfg.sample.guidance} needs a model that knows the null class: "
        "model.class_dropout_prob > 0",
    )
    _check_numbers(cfg)
    check_averages(cfg.train)
    check_weights("sample.weights", cfg.sample.weights, cfg.train)
    _check_monitor(cfg)
    check_sampling(cfg.sample, cfg.model)


def _check_execution(cfg: Config) -> None:
    """Options that say how the network runs, and that a family of someone's own need not have."""
    options = {
        "recompute": cfg.train.recompute != "none",
        "residual_dtype": cfg.train.residual == "fp32",
    }
    for argument, wanted in options.items():
        require_that(
            not wanted or cfg.model.takes(argument),
            f"train.{argument.removesuffix('_dtype')} means nothing to a {cfg.model.family}, "
            f"whose backbone takes no {argument}: leave it out",
        )


def check_finite(cfg: Config) -> None:
    """Every number of the alignment targets, lists included, before a target computes with it."""
    for section, align in cfg.alignments.items():
        for option in fields(align):
            value = getattr(align, option.name)
            numbers = [value]
            if isinstance(value, list | tuple):
                numbers = value
            elif isinstance(value, dict):
                numbers = value.values()
            require_that(
                all(math.isfinite(number) for number in numbers if isinstance(number, float)),
                f"{section}.{option.name} must be finite, got {value}",
            )


def check_device(cfg: Config, stage: int, cuda: bool) -> None:
    """What needs a GPU, or parameters that stay where they are (ZeRO 0 to 2)."""
    require_that(
        not cfg.train.compile or stage < 3,
        f"train.compile needs a ZeRO stage below 3, got {stage}",
    )
    for section, align in cfg.alignments.items():
        check = TARGETS[align.target].check_device
        named_as(section, lambda align=align, check=check: check(align, cfg, stage, cuda))


def check_graph(cfg: Config, ds_config: MergedConfig, stage: int, world: int) -> None:
    """ValueError for what keeps forward and backward pass from being one CUDA graph."""
    # at stage 0 DeepSpeed adds up the gradients of several processes in hooks
    stages = (0, 1, 2) if world == 1 else (1, 2)
    require_that(
        stage in stages,
        f"train.graph on {world} process{'es' if world > 1 else ''} needs ZeRO stage "
        f"{', '.join(map(str, stages[:-1]))} or 2, got {stage}",
    )
    require_that(
        cfg.optim.implementation == "fused",
        f"train.graph needs optim.implementation fused, got {cfg.optim.implementation}",
    )
    for section, align in cfg.alignments.items():
        require_that(
            not getattr(align, "teacher_graph", False),
            f"train.graph captures the teacher too: it excludes {section}.teacher_graph",
        )
        require_that(
            world == 1 or getattr(align, "over", None) != "all",
            f"train.graph captures nothing that processes send: it excludes {section}.over all",
        )
    refuse_for_graph(ds_config, cfg.train.precision, world)


def _check_numbers(cfg: Config) -> None:
    train = cfg.train
    optim = cfg.optim
    for name in ("steps", "save_every", "log_every", "skip_limit"):
        value = getattr(train, name)
        require_that(value >= 1, f"train.{name} must be at least 1, got {value}")
    require_that(
        -(2**63) <= train.seed < 2**64,
        f"train.seed must lie in [-2^63, 2^64), got {train.seed}",
    )
    require_that(
        0 <= train.ema_decay <= 1,
        f"train.ema_decay must lie in [0, 1], got {train.ema_decay}",
    )
    require_that(
        0 < optim.lr < math.inf and 0 < optim.eps < math.inf,
        f"optim.lr and optim.eps must be positive and finite, got {optim.lr} and {optim.eps}",
    )
    require_that(
        0 <= optim.min_lr <= optim.lr,
        f"optim.min_lr must lie in [0, optim.lr], got {optim.min_lr} and optim.lr {optim.lr}",
    )
    require_that(
        all(0 <= beta < 1 for beta in optim.betas),
        f"optim.betas must lie in [0, 1), got {list(optim.betas)}",
    )
    not_negative = {
        "optim.clip": optim.clip,
        "optim.weight_decay": optim.weight_decay,
        "optim.warmup_steps": optim.warmup_steps,
        "train.save_minutes": train.save_minutes,
        "train.keep": train.keep,
        "train.keep_every": train.keep_every,
        "train.spike": train.spike,
        "train.stall_minutes": train.stall_minutes,
        "data.num_workers": cfg.data.num_workers,
    }
    for section, align in cfg.alignments.items():
        not_negative[f"{section}.hold"] = align.hold
    for name, value in not_negative.items():
        # a count has to fit into 64 bits
        require_that(
            0 <= value < 2**63,
            f"{name} must not be negative nor infinite, got {value}",
        )
    require_that(
        train.spike == 0 or train.spike > 1, f"train.spike must be 0 or above 1, got {train.spike}"
    )
    channels = cfg.model.arguments()["in_channels"]
    if cfg.data.latent_scale is not None:
        check_scale("data.latent_scale", cfg.data.latent_scale, channels)
    if cfg.data.latent_shift is not None:
        check_shift("data.latent_shift", cfg.data.latent_shift, channels)


def named_as(section: str, check: Callable[[], object]) -> None:
    """Run checks of a target, whose messages say ``align``, for another section."""
    try:
        check()
    except ValueError as error:
        raise ValueError(re.sub(r"\balign\b", section, str(error))) from None


def _check_two_targets(cfg: Config) -> None:
    """What two alignment losses cannot have in common."""
    if not cfg.align2.active:
        return
    require_that(
        cfg.align.active,
        "align2 is a second target: it needs align, which is none (a plain run: --align2 none)",
    )
    sections = (cfg.align, cfg.align2)
    targets = [align.target for align in sections]
    require_that(targets[0] != targets[1], f"align and align2 are the same target {targets[0]}")
    # every target with groups of tokens has a teacher too
    teachers = [TARGETS[align.target].has_network(align) for align in sections]
    require_that(
        not all(teachers),
        f"only one of two targets can have an EMA teacher, got {' and '.join(targets)}",
    )


def _check_align(align: AlignConfig, cfg: Config) -> None:
    depth = cfg.model.arguments()["depth"]
    TARGETS[align.target].check(align, cfg)
    require_that(
        cfg.model.takes_groups or not TARGETS[align.target].has_groups,
        f"align.target {align.target} gives the tokens of an image two times, which a "
        f"{cfg.model.family} does not take",
    )
    require_that(
        1 <= align.student_layer <= depth,
        f"align.student_layer must lie in [1, {depth}], got {align.student_layer}",
    )
    require_that(
        all(weight >= 0 for weight in (align.weight, *align.milestones.values())),
        f"align.weight and align.milestones must not be negative, got {align.weight} and "
        f"{align.milestones}",
    )
    beta = getattr(align, "beta", 1.0)
    require_that(beta > 0, f"align.beta must be positive, got {beta}")
    require_that(0 < align.share <= 1, f"align.fraction must lie in (0, 1], got {align.share}")
    stop = align.stop_at_step
    require_that(stop is None or stop >= 1, f"align.stop_at_step must be at least 1, got {stop}")
    require_that(align.every >= 1, f"align.every must be at least 1, got {align.every}")
    require_that(align.decay >= 1, f"align.decay must be at least 1, got {align.decay}")
    # an epoch has any number of steps
    of_epochs = {"hold": AlignConfig.hold, "decay": AlignConfig.decay}
    require_that(
        align.schedule != "steps"
        or {name: getattr(align, name) for name in of_epochs} != of_epochs,
        "align.schedule steps needs align.hold and align.decay in steps, got "
        f"{align.hold} and {align.decay}, which are the paper's epochs",
    )
    require_that(
        (align.schedule == "milestones") == bool(align.milestones),
        "align.milestones go with align.schedule: milestones, "
        f"got schedule {align.schedule} and milestones {align.milestones}",
    )


def _check_monitor(cfg: Config) -> None:
    monitor = cfg.monitor
    require_that(monitor.every >= 0, f"monitor.every must not be negative, got {monitor.every}")
    if monitor.every == 0:
        return
    # one image has no statistics, and no picture to speak of
    for name, what in {"count": "samples", "held_out": "held-out loss"}.items():
        value = getattr(monitor, name)
        require_that(
            value in (None, 0) or value >= 2,
            f"monitor.{name} must be at least 2, or 0 for no {what}, got {value}",
        )
    for name in ("grid", "batch"):
        value = getattr(monitor, name)
        require_that(value >= 1, f"monitor.{name} must be at least 1, got {value}")
    require_that(
        monitor.count > 0 or monitor.held_out != 0,
        "monitor.every needs something to look at, got monitor.count 0 and monitor.held_out 0",
    )
    require_that(
        monitor.count > 0 or monitor.reference is None,
        "monitor.reference is for samples, got monitor.count 0",
    )
    require_that(
        (monitor.reference is None) == (monitor.inception is None),
        "monitor.reference and monitor.inception go together, "
        f"got {monitor.reference} and {monitor.inception}",
    )
    for name in ("vae", "reference", "inception"):
        path = getattr(monitor, name)
        require_that(path is None or Path(path).exists(), f"monitor.{name}: there is no {path}")


def split_batch(cfg: Config, world_size: int) -> tuple[int, int]:
    """Cut the global batch into micro-batches.

    Returns:
        Images per process and forward pass, and how many such passes an optimizer step accumulates.

    Raises:
        ValueError: the batch does not divide, or ``align.fraction`` does not divide a micro-batch.
    """
    total = cfg.train.global_batch
    micro = cfg.train.micro_batch
    require_that(
        total >= 1 and (micro is None or micro >= 1),
        f"train.global_batch and train.micro_batch must be at least 1, got {total} and {micro}",
    )
    if micro is None:
        require_that(
            total % world_size == 0,
            f"train.global_batch must be a multiple of the {world_size} processes, got {total}",
        )
        micro = total // world_size
    require_that(
        total % (micro * world_size) == 0,
        f"train.global_batch must be a multiple of micro_batch {micro} x {world_size} processes, "
        f"got {total}",
    )
    # raises unless every micro-batch has the same whole number of aligned images
    for section, align in cfg.alignments.items():
        named_as(section, lambda align=align: TARGETS[align.target].check_batch(align, micro))
    return micro, total // (micro * world_size)
