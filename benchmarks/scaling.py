"""Predicted step time, memory per GPU and cost on 1 to 4096 GPUs, ZeRO 0-3:  python benchmarks/scaling.py --batch 32

From the single-GPU rows of train_step.py (step, phases, peak memory), the bytes that every stage sends (tests count them in
two processes) and the speed of the links.  --assume-mfu takes the place of rows where there are none.  Every GPU keeps its
number of images, so the global batch grows.

Assumed, not measured: ring collectives at a fraction of the links' speed, the latency of a hop, gradients sent behind the
backward pass up to the last bucket, ZeRO-3's gathers behind the forward pass, an H100's memory at 3 TB/s.
"""

import argparse
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from counting import step_flops  # noqa: E402
from record import RowFile, environment, load_results, make_row  # noqa: E402
from variants import Variant  # noqa: E402

from sra_fast.config.schema import Config  # noqa: E402
from sra_fast.training.logger import PEAK  # noqa: E402

# bytes per second that one GPU sends (vendors' figures): half of NVLink's two-way sum; a 400 Gb/s adapter per GPU
LINKS = {"nvlink3": 300e9, "nvlink4": 450e9, "nvlink5": 900e9, "pcie4": 32e9, "pcie5": 64e9,
         "ib200": 25e9, "ib400": 50e9, "ib800": 100e9, "eth100": 12.5e9}  # fmt: skip
HOP_SECONDS = 3e-6
MEMORY_SPEED = 3e12
# what ``predicted`` assumes of an H100: products and attention, passes over memory, the three of four products that fp8 speeds up, gaps
PRODUCT_SHARE, ATTENTION_RATE, PASS_SHARE, FP8_SPEED, OTHER_SECONDS = (
    0.70,
    250e12,
    0.85,
    1.5,
    1.5e-3,
)
# bytes per parameter that DeepSpeed moves around a collective of bf16 gradients, by stage: into a bucket, the mean, and out of it
# (counted in two processes; one process moves none of them)
GRADIENT_COPIES = (12, 16, 16, 16)
# elements: what the engine sets for DeepSpeed, and DeepSpeed's own limit of gathered parameters that it keeps
REDUCE_BUCKET, GATHER_BUCKET, MAX_LIVE = 50_000_000, 200_000_000, 1_000_000_000
IMAGENET = 1_281_167
HEADER = "ZeRO  GPUs       ms  images/s efficiency    GiB  MB sent GPU-hours      cost"
GPUS = tuple(2**i for i in range(13))


@dataclass(frozen=True)
class Sizes:
    """Parameters of the student (head included) and of the teacher."""

    student: int
    teacher: int

    @classmethod
    def of(cls, cfg: Config) -> "Sizes":
        count = lambda model: sum(p.numel() for p in model.parameters())
        with torch.device("meta"):
            aligned = cfg.align.target != "none"
            return cls(
                count(cfg.model.build()),
                count(cfg.model.build_teacher(cfg.align.teacher_layer)) if aligned else 0,
            )


@dataclass(frozen=True)
class Times:
    """Seconds of one GPU: its phases, and what they leave over."""

    forward: float
    teacher: float
    backward: float
    optimizer: float
    other: float = 0.0


@dataclass(frozen=True)
class Cluster:
    """GPUs in nodes; ``intra`` and ``inter``: bytes per second that one GPU sends inside and out of its node."""

    intra: float
    inter: float
    per_node: int = 8
    efficiency: float = 0.8

    def seconds(self, kind: str, size: float, gpus: int, bucket: float) -> float:
        """Time of a collective over ``size`` bytes, cut into buckets of that many bytes."""
        if gpus == 1 or size == 0:
            return 0.0
        # one ring per adapter: all of a node's adapters carry a part of every collective
        speed = self.intra if gpus <= self.per_node else min(self.intra, self.per_node * self.inter)
        hops = 2 * math.log2(gpus) if kind == "all_reduce" else gpus - 1
        return (
            wire_bytes(kind, size, gpus) / (self.efficiency * speed)
            + math.ceil(size / bucket) * hops * HOP_SECONDS
        )


def wire_bytes(kind: str, size: float, gpus: int) -> float:
    """Bytes that each GPU sends in a ring: ``size`` is what all of them have or get together."""
    return (2 if kind == "all_reduce" else 1) * (gpus - 1) / gpus * size


def collectives(stage: int, sizes: Sizes, element: int = 2) -> dict[str, tuple[str, int]]:
    """What one step sends in each stage: ``{purpose: (kind, bytes)}``; tests count it in two processes.

    DeepSpeed's stages 1 and 2 average gradients by all-reduce, as stage 0 does.  Stage 3 gathers the weights once as long as
    all of them stay below its limit of live parameters, else for the backward pass again.
    """
    student, teacher = element * sizes.student, element * sizes.teacher
    if stage == 0:  # every rank holds the whole EMA
        return {"gradients": ("all_reduce", student)}
    if stage < 3:
        return {
            "gradients": ("all_reduce", student),
            "weights": ("all_gather", student),
            "teacher": ("all_gather", teacher),
        }
    again = sizes.student + sizes.teacher > MAX_LIVE
    return {"gradients": ("reduce_scatter", student), "weights": ("all_gather", (1 + again) * student),
            "teacher": ("all_gather", teacher)}  # fmt: skip


def step_seconds(stage: int, gpus: int, sizes: Sizes, times: Times, cluster: Cluster) -> float:
    """Step time with every GPU's images unchanged."""
    spent = {}
    for purpose, (kind, size) in collectives(stage, sizes).items():
        bucket = 2 * (REDUCE_BUCKET if purpose == "gradients" else GATHER_BUCKET)
        spent[purpose] = cluster.seconds(kind, size, gpus, bucket)
    behind = lambda communication, computation: max(0.0, communication - computation)
    last_bucket = spent["gradients"] * min(1.0, REDUCE_BUCKET / sizes.student)
    exposed = last_bucket + behind(spent["gradients"] - last_bucket, times.backward)
    weights, teacher = spent.get("weights", 0.0), spent.get("teacher", 0.0)
    if stage == 3:
        exposed += behind(weights + teacher, times.forward + times.teacher)
    else:  # the teacher's weights arrive while the student runs
        exposed += weights + behind(teacher, times.forward)
    update = times.optimizer / (gpus if stage else 1)
    if gpus > 1:
        exposed += GRADIENT_COPIES[stage] * sizes.student / MEMORY_SPEED
    return times.forward + times.teacher + times.backward + update + times.other + exposed


def state_bytes(stage: int, gpus: int, sizes: Sizes) -> dict[str, float]:
    """Bytes per GPU of everything but activations: bf16 weights and gradients, fp32 masters, moments and EMA, bf16 teacher."""
    P, share = sizes.student, gpus if stage else 1
    found = {
        "weights": 2 * P,
        "gradients": 2 * P,
        "optimizer": 12 * P / share,
        "ema": 4 * P / share,
    }
    found["teacher"] = 2 * sizes.teacher
    if stage >= 2:
        found["gradients"] = min(2 * P, 2 * P / gpus + 2 * REDUCE_BUCKET)
    if stage == 3:
        live = min(P + sizes.teacher, MAX_LIVE)
        found |= {
            "weights": 2 * P / gpus,
            "teacher": 2 * sizes.teacher / gpus,
            "gathered": 2 * live,
        }
    return found


def measured(rows: list[dict], case: dict, cfg: Config) -> tuple[Times, int | None, str]:
    """Times, peak bytes and device of the newest rows of a case; ValueError if there are none.

    A graph's time is split in the proportions that arithmetic gives: its parts cannot be told apart.
    """
    mine = [
        row
        for row in rows
        if row["device"] != "cpu" and all(row.get(k) == v for k, v in case.items())
    ]
    step = next((row for row in reversed(mine) if row["kind"] == "train_step"), None)
    if step is None:
        raise ValueError(
            f"no rows of a GPU for {case}: run train_step.py there, or give --assume-mfu"
        )
    run = (step["device"], step["commit"])
    phases = {
        row["name"]: row["ms"] / 1e3
        for row in mine
        if row["kind"] == "phase" and (row["device"], row["commit"]) == run
    }
    if "graph" in phases:
        guess = predicted(cfg)
        share = phases["graph"] / (guess.forward + guess.teacher + guess.backward)
        phases |= {
            name: share * getattr(guess, name) for name in ("forward", "teacher", "backward")
        }
    if not {"forward", "backward", "optimizer"} <= set(phases):
        raise ValueError(
            f"the rows of {case} hold no phases: run train_step.py without --profile 0"
        )
    times = Times(
        phases["forward"], phases.get("teacher", 0.0), phases["backward"], phases["optimizer"]
    )
    known = times.forward + times.teacher + times.backward + times.optimizer
    return (
        replace(times, other=max(0.0, step["ms"] / 1e3 - known)),
        step.get("peak_bytes"),
        step["device"],
    )


def assumed(cfg: Config, mfu: float) -> Times:
    """Times of an H100 at a fraction of its peak; the update at 40 bytes per parameter."""
    flops, speed = step_flops(cfg), mfu * PEAK["H100"][0] / cfg.train.global_batch
    update = 40 * Sizes.of(cfg).student / MEMORY_SPEED
    forward, teacher = float(flops["student"]) / 3 / speed, float(flops["teacher"]) / speed
    return Times(forward, teacher, 2 * forward, update)


def predicted(cfg: Config) -> Times:
    """Times of an H100 by arithmetic: FLOPs over what its products reach, bytes over what passes over memory reach.

    Bytes per element of [B, T, D] and block are those of the operators' docstrings: a half-block 8 forward and 12 backward, GELU 16
    and 24, the gradients of queries, keys and values side by side 12.  A teacher's GELU is part of its product.
    """
    a, images = cfg.model.arguments(), cfg.train.global_batch
    tokens = (a["input_size"] // a["patch_size"]) ** 2
    elements, blocks = images * tokens * a["hidden_size"], a["depth"]
    flops, products = step_flops(cfg), PRODUCT_SHARE * PEAK["H100"][0]
    memory = PASS_SHARE * MEMORY_SPEED
    # two products, or five backward; counted as products above
    slow = 4 * tokens * elements * (1 / ATTENTION_RATE - 1 / products)
    student = images * float(flops["student"]) / 3 / products
    forward = student + blocks * (elements * 32 / memory + slow)
    backward = 2 * student + blocks * (elements * 60 / memory + 2.5 * slow)
    teacher = 0.0
    if flops["teacher"]:
        rate = products * (FP8_SPEED if cfg.align.teacher_dtype == "fp8" else 1)
        teacher = images * float(flops["teacher"]) / rate + cfg.align.teacher_layer * (
            elements * 16 / memory + slow
        )
    return Times(forward, teacher, backward, 42 * Sizes.of(cfg).student / memory, OTHER_SECONDS)


def predictions(
    cfg: Config, times: Times, peak: int | None, cluster: Cluster, gpus: tuple[int, ...]
) -> Iterator[dict]:
    """One prediction for every stage and number of GPUs; without a measured peak, memory is that of the states."""
    sizes = Sizes.of(cfg)
    activations = max(0.0, peak - sum(state_bytes(1, 1, sizes).values())) if peak else 0.0
    alone = step_seconds(0, 1, sizes, times, cluster)
    for stage in range(4):
        for n in gpus:
            seconds = step_seconds(stage, n, sizes, times, cluster)
            sent = sum(wire_bytes(*each, n) for each in collectives(stage, sizes).values())
            yield {
                "stage": stage, "gpus": n, "ms": 1e3 * seconds, "images_per_s": n * cfg.train.global_batch / seconds,
                "efficiency": alone / seconds, "sent": sent,
                "peak_bytes": sum(state_bytes(stage, n, sizes).values()) + activations,
            }  # fmt: skip


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="SiT-XL/2")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--batch", type=int, default=32, help="images per GPU")
    parser.add_argument("--variant", default="sra")
    parser.add_argument(
        "--assume-mfu",
        type=float,
        help="instead of rows: the fraction of an H100's peak that is reached",
    )
    parser.add_argument("--gpus", type=int, nargs="+", default=GPUS)
    parser.add_argument("--intra", choices=LINKS, default="nvlink4", help="inside a node")
    parser.add_argument("--inter", choices=LINKS, default="ib400", help="out of a node, per GPU")
    parser.add_argument("--per-node", type=int, default=8)
    parser.add_argument(
        "--efficiency", type=float, default=0.8, help="fraction of the links' speed that is reached"
    )
    parser.add_argument(
        "--price",
        type=float,
        default=2.5,
        help="of a GPU for an hour, in the currency that you like",
    )
    parser.add_argument("--epochs", type=float, default=80, help="of ImageNet, for the cost")
    parser.add_argument("--json", type=Path, help="write the predictions as rows too")
    args = parser.parse_args(argv)
    if (
        min(*args.gpus, args.batch, args.per_node) < 1
        or not 0 < args.efficiency <= 1
        or not 0 < (args.assume_mfu or 1) <= 1
    ):
        parser.error("GPUs, images and GPUs per node must be at least 1, fractions in (0, 1]")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    cfg = Variant.parse(args.variant).configuration(args.model, args.resolution, args.batch, "cuda")
    case = {
        "model": args.model,
        "resolution": args.resolution,
        "batch": args.batch,
        "variant": args.variant,
    }
    try:
        if args.assume_mfu:
            times, peak, device = (
                assumed(cfg, args.assume_mfu),
                None,
                f"an H100 at {args.assume_mfu} of its peak (assumed)",
            )
        else:
            times, peak, device = measured(load_results(), case, cfg)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    where = {
        **environment("cpu", "python benchmarks/scaling.py " + " ".join(argv or sys.argv[1:])),
        "device": device,
    }
    file = RowFile(args.json, where) if args.json else None
    cluster = Cluster(LINKS[args.intra], LINKS[args.inter], args.per_node, args.efficiency)
    print(
        f"predicted from {device}; memory {'with' if peak else 'without'} activations; {args.intra}, {args.inter}"
    )
    print(HEADER)
    for found in predictions(cfg, times, peak, cluster, tuple(args.gpus)):
        hours = args.epochs * IMAGENET / found["images_per_s"] * found["gpus"] / 3600
        print(
            f"{found['stage']:4} {found['gpus']:5} {found['ms']:8.1f} {found['images_per_s']:9.0f} {found['efficiency']:10.3f} "
            f"{found['peak_bytes'] / 2**30:6.1f} {found['sent'] / 1e6:8.0f} {hours:9.0f} {args.price * hours:9.0f}"
        )
        if file:
            fields = {k: found[k] for k in ("ms", "images_per_s", "peak_bytes")}
            name = f"zero{found['stage']}, {found['gpus']} GPUs"
            file.add(make_row(kind="prediction", name=name, **case, **fields, **where))
    return 0


if __name__ == "__main__":
    sys.exit(main())
