"""Predict steps on 1 to 4096 GPUs: python -m benchmarks.cost_model.scaling --batch 32

Step time, memory per GPU and cost, for ZeRO 0 to 3.

The prediction starts from the single-GPU rows of ``benchmarks.step.train_step`` (step, phases, peak memory), or
from --assume-mfu if there are none. It adds the bytes that every ZeRO stage sends, which tests count in two
processes, and the speed of the links. Images per GPU stay the same, so the global batch grows.

Assumed, not measured: ring collectives that reach a fraction of the links' speed, the latency of a hop,
gradients that are sent during the backward pass except for the last bucket, ZeRO-3's gathers during the
forward pass, and an H100's memory at 3 TB/s. With --graph (train.graph true, ZeRO 1 and 2)
nothing is sent beside computation: a replay waits for the teacher's weights, and the gradients are
sent after it.

The host's time is that of the rows, in which it launches one graph. Without --graph it launches
every kernel on several GPUs: where that takes longer than the device, start from rows of
--variant sra+train.graph=false.
"""

import argparse
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.cost_model.one_gpu import MEMORY_SPEED, Sizes, Times, assumed, measured
from benchmarks.record import RowFile, command_line, environment, load_results, make_row, row_file
from benchmarks.step.variants import ENGINE, Variant
from sra_fast.config.schema import Config

# bytes per second that one GPU sends (vendors' figures): half of NVLink's two-way sum, or one network
# adapter per GPU
LINKS = {
    "nvlink3": 300e9,
    "nvlink4": 450e9,
    "nvlink5": 900e9,
    "pcie4": 32e9,
    "pcie5": 64e9,
    "ib200": 25e9,
    "ib400": 50e9,
    "ib800": 100e9,
    "eth100": 12.5e9,
}
HOP_SECONDS = 3e-6
# bytes per parameter that DeepSpeed copies around a collective of bf16 gradients, by stage: into the
# bucket, the mean, and out of the bucket. Counted in two processes; one process copies nothing.
GRADIENT_COPIES = (12, 16, 16, 16)
# with a graph they are copied once, to where they are sent from
GRAPH_COPIES = 4
# stages in which a graph runs on several GPUs
GRAPH_STAGES = (1, 2)
# elements: what the engine configures, and DeepSpeed's limit of gathered parameters that it keeps
REDUCE_BUCKET = 50_000_000
GATHER_BUCKET = 200_000_000
MAX_LIVE = 1_000_000_000
IMAGENET = 1_281_167
HEADER = "ZeRO  GPUs       ms  images/s efficiency    GiB  MB sent GPU-hours      cost"
GPUS = tuple(2**i for i in range(13))


@dataclass(frozen=True)
class Cluster:
    """GPUs in nodes.

    Attributes:
        intra: bytes per second that one GPU sends inside its node.
        inter: bytes per second that one GPU sends out of its node.
        per_node: GPUs of a node.
        efficiency: fraction of the links' speed that collectives reach.
    """

    intra: float
    inter: float
    per_node: int = 8
    efficiency: float = 0.8

    def seconds(self, kind: str, size: float, gpus: int, bucket: float) -> float:
        """Time of a collective over ``size`` bytes, sent in buckets of ``bucket`` bytes."""
        if gpus == 1 or size == 0:
            return 0.0
        speed = self.intra
        if gpus > self.per_node:
            # one ring per adapter: all adapters of a node share every collective
            speed = min(self.intra, self.per_node * self.inter)
        # up and down a tree for an all-reduce, around the ring for the others
        hops = 2 * math.log2(gpus) if kind == "all_reduce" else gpus - 1
        transfer = wire_bytes(kind, size, gpus) / (self.efficiency * speed)
        latency = math.ceil(size / bucket) * hops * HOP_SECONDS
        return transfer + latency


def wire_bytes(kind: str, size: float, gpus: int) -> float:
    """Bytes that each GPU sends in a ring; ``size`` is what all GPUs hold together."""
    rounds = 2 if kind == "all_reduce" else 1
    return rounds * (gpus - 1) / gpus * size


def collectives(
    stage: int, sizes: Sizes, element: int = 2, graph: bool = False
) -> dict[str, tuple[str, int]]:
    """What one step sends in each ZeRO stage, ``{purpose: (kind, bytes)}``; tests count it in two processes.

    DeepSpeed's stages 1 and 2 average gradients by all-reduce, as stage 0 does; with a graph this
    engine's step adds them up by reduce-scatter. Stage 3 gathers the weights once if they stay
    below its limit of live parameters. Otherwise it gathers them again for the backward pass.
    """
    student = element * sizes.student
    teacher = element * sizes.teacher
    # at stage 0 every rank holds the whole EMA
    if stage == 0:
        return {"gradients": ("all_reduce", student)}
    if stage < 3:
        return {
            "gradients": ("reduce_scatter" if graph else "all_reduce", student),
            "weights": ("all_gather", student),
            "teacher": ("all_gather", teacher),
        }
    gathers = 2 if sizes.student + sizes.teacher > MAX_LIVE else 1
    return {
        "gradients": ("reduce_scatter", student),
        "weights": ("all_gather", gathers * student),
        "teacher": ("all_gather", teacher),
    }


def step_seconds(
    stage: int, gpus: int, sizes: Sizes, times: Times, cluster: Cluster, graph: bool = False
) -> float:
    """Step time with the same number of images on every GPU; ``graph``: of ``GRAPH_STAGES``."""
    spent = {"weights": 0.0, "teacher": 0.0}
    for purpose, (kind, size) in collectives(stage, sizes, graph=graph).items():
        # bf16
        bucket = 2 * (REDUCE_BUCKET if purpose == "gradients" else GATHER_BUCKET)
        if graph and purpose == "gradients":
            # all at once
            bucket = max(size, 1)
        spent[purpose] = cluster.seconds(kind, size, gpus, bucket)
    exposed = lambda communication, computation: max(0.0, communication - computation)

    if graph:
        waiting = spent["gradients"]
    else:
        # the last bucket of gradients cannot overlap with the backward pass
        last_bucket = spent["gradients"] * min(1.0, REDUCE_BUCKET / sizes.student)
        waiting = last_bucket + exposed(spent["gradients"] - last_bucket, times.backward)
    if stage == 3:
        gathers = spent["weights"] + spent["teacher"]
        waiting += exposed(gathers, times.forward + times.teacher)
    else:
        # the teacher's weights arrive while the student runs; a replay begins after that
        hidden = 0.0 if graph else times.forward
        waiting += spent["weights"] + exposed(spent["teacher"], hidden)
    if gpus > 1:
        copies = GRAPH_COPIES if graph else GRADIENT_COPIES[stage]
        waiting += copies * sizes.student / MEMORY_SPEED

    # stages 1 to 3 partition the optimizer's state and its work
    update = times.optimizer / (gpus if stage else 1)
    return times.forward + times.teacher + times.backward + update + times.other + waiting


def state_bytes(stage: int, gpus: int, sizes: Sizes, graph: bool = False) -> dict[str, float]:
    """Bytes per GPU of everything but activations.

    Weights, gradients and the teacher are bf16; master weights, both moments ("optimizer") and the EMA fp32.
    With a graph several GPUs keep the whole gradient twice: as autograd leaves it, in the graph's
    memory, and as it is sent.
    """
    P = sizes.student
    partitions = gpus if stage else 1
    found = {
        "weights": 2 * P,
        "gradients": 2 * P,
        "optimizer": 12 * P / partitions,
        "ema": 4 * P / partitions,
        "teacher": 2 * sizes.teacher,
    }
    if graph and gpus > 1:
        found["gradients"] = 4 * P
    elif stage >= 2 and not graph:
        # a rank's share of the gradients and the bucket that is being sent
        found["gradients"] = min(2 * P, 2 * P / gpus + 2 * REDUCE_BUCKET)
    if stage == 3:
        found["weights"] = 2 * P / gpus
        found["teacher"] = 2 * sizes.teacher / gpus
        found["gathered"] = 2 * min(P + sizes.teacher, MAX_LIVE)
    return found


def predictions(
    cfg: Config,
    times: Times,
    peak: int | None,
    cluster: Cluster,
    gpus: tuple[int, ...],
    graph: bool = False,
) -> Iterator[dict]:
    """One prediction for every stage and number of GPUs; with a graph for ``GRAPH_STAGES`` only.

    Args:
        cfg: of the step.
        times: of one GPU.
        peak: measured peak bytes of one GPU; None leaves activations out of the memory.
        cluster: its links.
        gpus: numbers of GPUs.
    """
    sizes = Sizes.of(cfg)
    activations = 0.0
    if peak:
        activations = max(0.0, peak - sum(state_bytes(1, 1, sizes).values()))
    one_gpu = step_seconds(0, 1, sizes, times, cluster)
    for stage in GRAPH_STAGES if graph else range(4):
        for n in gpus:
            seconds = step_seconds(stage, n, sizes, times, cluster, graph)
            each = collectives(stage, sizes, graph=graph).values()
            sent = sum(wire_bytes(kind, size, n) for kind, size in each)
            yield {
                "stage": stage,
                "gpus": n,
                "ms": 1e3 * seconds,
                "images_per_s": n * cfg.train.global_batch / seconds,
                "efficiency": one_gpu / seconds,
                "sent": sent,
                "peak_bytes": sum(state_bytes(stage, n, sizes, graph).values()) + activations,
            }


def other_variants(rows: list[dict], case: dict) -> list[str]:
    """Variants of this engine whose step was measured on a GPU in the same case."""
    wanted = {**case, "kind": "train_step", "name": "step"}
    del wanted["variant"]
    found = [
        row["variant"]
        for row in rows
        if row["device"] != "cpu" and all(row.get(k) == v for k, v in wanted.items())
    ]
    ours = [name for name in found if name.partition("+")[0] in ENGINE and name != case["variant"]]
    return list(dict.fromkeys(ours))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="SiT-XL/2", help="default: SiT-XL/2")
    add("--resolution", type=int, default=256, help="pixels (default 256)")
    add("--batch", type=int, default=32, help="images per GPU (default 32)")
    add("--variant", default="sra", help="default: sra")
    add("--graph", action="store_true", help="with train.graph true: ZeRO 1 and 2")
    add("--assume-mfu", type=float, help="instead of rows: fraction of an H100's peak")
    add("--gpus", type=int, nargs="+", default=GPUS, help="default: 1 2 4 .. 4096")
    add("--intra", choices=LINKS, default="nvlink4", help="inside a node (default nvlink4)")
    add("--inter", choices=LINKS, default="ib400", help="out of a node, per GPU (default ib400)")
    add("--per-node", type=int, default=8, help="GPUs of a node (default 8)")
    add("--efficiency", type=float, default=0.8, help="fraction of the links' speed (default 0.8)")
    add("--price", type=float, default=2.5, help="of a GPU for an hour, any currency")
    add("--epochs", type=float, default=80, help="of ImageNet, for the cost (default 80)")
    add("--json", type=row_file, help="write the predictions as rows too")
    args = parser.parse_args(argv)
    if min(*args.gpus, args.batch, args.per_node) < 1:
        parser.error("expected --gpus, --batch and --per-node of at least 1")
    mfu = 1 if args.assume_mfu is None else args.assume_mfu
    if not 0 < args.efficiency <= 1 or not 0 < mfu <= 1:
        parser.error("expected --efficiency and --assume-mfu in (0, 1]")
    return args


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0, or 2 if there are no rows to start from."""
    args = parse(argv)
    cfg = Variant.parse(args.variant).configuration(args.model, args.resolution, args.batch, "cuda")
    case = {
        "model": args.model,
        "resolution": args.resolution,
        "batch": args.batch,
        "variant": args.variant,
    }
    if args.assume_mfu is not None:
        times = assumed(cfg, args.assume_mfu)
        peak = None
        device = f"an H100 at {args.assume_mfu} of its peak (assumed)"
    else:
        rows = []
        try:
            rows = load_results()
            times, peak, device = measured(rows, case, cfg)
        except ValueError as error:
            others = other_variants(rows, case)
            known = f"; there are rows of the variants {', '.join(others)}" if others else ""
            print(f"{error}{known}", file=sys.stderr)
            return 2

    command = command_line("benchmarks.cost_model.scaling", argv or sys.argv[1:])
    where = {**environment("cpu", command), "device": device}
    file = RowFile(args.json, where) if args.json else None
    cluster = Cluster(LINKS[args.intra], LINKS[args.inter], args.per_node, args.efficiency)
    print(
        f"predicted from {device}; memory {'with' if peak else 'without'} activations; "
        f"{args.intra}, {args.inter}"
    )
    print(HEADER)
    for found in predictions(cfg, times, peak, cluster, tuple(args.gpus), args.graph):
        hours = args.epochs * IMAGENET / found["images_per_s"] * found["gpus"] / 3600
        print(
            f"{found['stage']:4} {found['gpus']:5} {found['ms']:8.1f} "
            f"{found['images_per_s']:9.0f} {found['efficiency']:10.3f} "
            f"{found['peak_bytes'] / 2**30:6.1f} {found['sent'] / 1e6:8.0f} "
            f"{hours:9.0f} {args.price * hours:9.0f}"
        )
        if file:
            fields = {k: found[k] for k in ("ms", "images_per_s", "peak_bytes")}
            name = f"zero{found['stage']}, {found['gpus']} GPUs{', graph' if args.graph else ''}"
            file.add(make_row(kind="prediction", name=name, **case, **fields, **where))
    return 0


if __name__ == "__main__":
    sys.exit(main())
