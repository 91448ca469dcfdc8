"""Step time of one GPU, by phase: from measured rows, from an assumed MFU, or predicted by arithmetic."""

from dataclasses import dataclass, replace

import torch

from benchmarks.cost_model.flops import step_flops
from sra_fast.alignment.objective import add_heads
from sra_fast.config.schema import Config
from sra_fast.training.flops import aligned_share, forward_flops
from sra_fast.training.logger import PEAK
from sra_fast.utils.registry import TARGETS

# assumed of an H100, not measured
PEAK_FLOPS = PEAK["H100"][0]
MEMORY_SPEED = 3e12
# share of the peak that products reach, and of the memory's speed that passes over memory reach
PRODUCT_SHARE = 0.70
PASS_SHARE = 0.85
# FLOP/s of attention
ATTENTION_RATE = 250e12
# time of attention inside runs of a quarter and three quarters of the tokens over that of attention
# to all, by their number: tiles of 128 tokens do not fit short runs. Predicted in docs/lab-notes.md
RUNS_TIME = {256: 1.2, 1024: 0.9}
# fp8 speeds up three of a block's four products; all four together become this much faster
FP8_SPEED = 1.5
# gaps between kernels
OTHER_SECONDS = 1.5e-3
# bytes of the optimizer's pass, per parameter
UPDATE_BYTES = 42


@dataclass(frozen=True)
class Sizes:
    """Parameters of the student (all heads included) and of the teacher."""

    student: int
    teacher: int

    @classmethod
    def of(cls, cfg: Config) -> "Sizes":
        with torch.device("meta"):
            student = cfg.model.build()
            add_heads(student, cfg)
            depths = teacher_depths(cfg).values()
            teachers = [cfg.model.build_teacher(depth) for depth in depths]
        return cls(_num_parameters(student), sum(map(_num_parameters, teachers)))


def teacher_depths(cfg: Config) -> dict[str, int]:
    """Blocks of the teacher by the section of its target; at most one target has a teacher."""
    depths = {
        section: TARGETS[align.target].network_depth(align)
        for section, align in cfg.alignments.items()
    }
    return {section: depth for section, depth in depths.items() if depth is not None}


def _num_parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@dataclass(frozen=True)
class Times:
    """Seconds of a step on one GPU: its phases, and the rest."""

    forward: float
    teacher: float
    backward: float
    optimizer: float
    other: float = 0.0

    @property
    def total(self) -> float:
        return self.forward + self.teacher + self.backward + self.optimizer + self.other


def measured(rows: list[dict], case: dict, cfg: Config) -> tuple[Times, int | None, str]:
    """Times, peak bytes and device of the newest rows of a case.

    Phases inside a CUDA graph cannot be timed. The time of a graph is split in the proportions of
    ``predicted``.

    Args:
        rows: of ``train_step``, the oldest first.
        case: fields that a row must have: model, resolution, batch, variant.
        cfg: the configuration of the case.

    Raises:
        ValueError: there are no such rows.
    """
    matching = [
        row
        for row in rows
        if row["device"] != "cpu" and all(row.get(k) == v for k, v in case.items())
    ]
    steps = [row for row in matching if row["kind"] == "train_step"]
    if not steps:
        raise ValueError(
            f"expected rows of a GPU for {case}, got none: "
            "run benchmarks.step.train_step there, or give --assume-mfu"
        )
    step = steps[-1]
    same_run = (step["device"], step["commit"])
    phases = {
        row["name"]: row["ms"] / 1e3
        for row in matching
        if row["kind"] == "phase" and (row["device"], row["commit"]) == same_run
    }
    if "graph" in phases:
        guess = predicted(cfg)
        scale = phases["graph"] / (guess.forward + guess.teacher + guess.backward)
        phases["forward"] = scale * guess.forward
        phases["teacher"] = scale * guess.teacher
        phases["backward"] = scale * guess.backward
    if not {"forward", "backward", "optimizer"} <= set(phases):
        raise ValueError(
            f"the rows of {case} hold no phases: run benchmarks.step.train_step without --profile 0"
        )
    times = Times(
        phases["forward"], phases.get("teacher", 0.0), phases["backward"], phases["optimizer"]
    )
    other = max(0.0, step["ms"] / 1e3 - times.total)
    return replace(times, other=other), step.get("peak_bytes"), step["device"]


def assumed(cfg: Config, mfu: float) -> Times:
    """Times of an H100 that reaches a fraction of its peak, with 40 bytes per parameter for the update."""
    flops = step_flops(cfg)
    speed = mfu * PEAK_FLOPS / cfg.train.global_batch
    # one of the student's three passes is the forward pass
    forward = float(flops["student"]) / 3 / speed
    teacher = float(flops["teacher"]) / speed
    update = 40 * Sizes.of(cfg).student / MEMORY_SPEED
    return Times(forward, teacher, 2 * forward, update)


def predicted(cfg: Config) -> Times:
    """Times of an H100 by arithmetic: FLOPs over the rate of products, bytes over the rate of passes.

    Bytes per element of [B, T, D] and block are those of the operators' docstrings: a half-block takes 8
    forward and 12 backward, GELU 16 and 24, and the gradients of queries, keys and values side by side 12.
    A teacher's GELU is part of its product. Only the products of heads and distances are counted.
    """
    arguments = cfg.model.arguments()
    images = cfg.train.global_batch
    tokens = cfg.model.num_tokens
    elements = images * tokens * arguments["hidden_size"]
    blocks = arguments["depth"]
    flops = step_flops(cfg)
    products = PRODUCT_SHARE * PEAK_FLOPS
    memory = PASS_SHARE * MEMORY_SPEED

    # attention's two products per block are slower than the others, with which they are counted
    counted = images * float(forward_flops(cfg)["attention"]) / blocks
    everything = 4 * tokens * elements
    time_share = 1.0
    if counted < everything:
        time_share = RUNS_TIME.get(tokens, counted / everything)
    slow = time_share * everything / ATTENTION_RATE - counted / products
    student = images * float(flops["student"]) / 3 / products
    forward = student + blocks * (elements * 32 / memory + slow)
    # five products in attention's backward pass
    backward = 2 * student + blocks * (elements * 60 / memory + 2.5 * slow)
    teacher = 0.0
    for section, depth in teacher_depths(cfg).items():
        align = cfg.alignments[section]
        rate = products * (FP8_SPEED if align.teacher_dtype == "fp8" else 1)
        passes = depth * (elements * 16 / memory + slow)
        teacher = images * float(flops["teacher"]) / rate + float(aligned_share(align)) * passes
    optimizer = UPDATE_BYTES * Sizes.of(cfg).student / memory
    return Times(forward, teacher, backward, optimizer, OTHER_SECONDS)
