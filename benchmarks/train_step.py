"""Time of a whole training step, of this engine and of its rivals:  python benchmarks/train_step.py --batch 32 256

Variants (`ladder` and `depths` stand for several; settings go behind a +, as in sra+train.compile=true):
  plain, sra, sra_fp8   this engine: without alignment, with it, with an fp8 teacher
  strong                plain PyTorch at its best: truncated bf16 teacher, torch.compile, fused AdamW, foreach EMA
  reference             the published code, from the checkout that --reference names
  ladder                from the published code to the fp8 teacher, one change per row
  depths                sra with the teacher stopped at a quarter, a half, three quarters and all of the depth

Rows of kind "host" are the host's time: "start-up" from the first line of building to the end of the first step, and "step"
until a step has been launched; where that is shorter than the step itself, Python is hidden behind the device.

Latents are random moments on the device; the rest of the step is the training loop's own.  All cases run in one process, one
after the other, so that start-up is paid for once; memory is given back between them and peaks are each case's own (--separate
gives every case a process).  A case that fails, or does not fit, stops no other; rows are written as they come.  A name given
twice is built and timed twice: the median counts, and the spread is written beside it.
"""

import argparse
import itertools
import math
import os
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from clocks import Clocks  # noqa: E402
from record import RowFile, environment, make_row  # noqa: E402
from variants import expand  # noqa: E402
from worker import Failure, Worker, serve  # noqa: E402

OUT_OF_MEMORY = "OutOfMemoryError"
Case = tuple[str, int, int]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", nargs="+", default=["SiT-XL/2"])
    parser.add_argument("--resolution", type=int, nargs="+", default=[256])
    parser.add_argument(
        "--batch", type=int, nargs="+", default=[32, 256], help="images per GPU, up to what fits"
    )
    parser.add_argument("--variants", default="plain,sra")
    parser.add_argument(
        "--case", nargs=4, action="append", metavar=("MODEL", "PIXELS", "BATCH", "VARIANTS"),
        help="instead of the four above, as often as wanted: cases in this order",
    )  # fmt: skip
    parser.add_argument(
        "--reference", help="a checkout of the published code, for the variant reference"
    )
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument(
        "--seconds",
        type=float,
        default=math.inf,
        help="of timed steps at most; at least 8 steps are timed",
    )
    parser.add_argument(
        "--profile",
        type=int,
        default=3,
        help="steps for the phases and for the kernels; 0: neither",
    )
    parser.add_argument(
        "--repeat", type=int, default=1, help="times that the variants of a case are gone through"
    )
    parser.add_argument("--separate", action="store_true", help="a process for every case")
    parser.add_argument("--time-limit", type=float, default=240, help="seconds for one case")
    parser.add_argument(
        "--budget",
        type=float,
        default=math.inf,
        help="seconds after which no case starts, and the last one is ended",
    )
    parser.add_argument(
        "--untimed",
        action="store_true",
        help="run two steps of each variant and write no rows: fills the compilers' caches",
    )
    parser.add_argument(
        "--shrink",
        action="store_true",
        help="try what does not fit with half of the images, until it does",
    )
    parser.add_argument(
        "--json", type=Path, help="default: benchmarks/results/<device>-<commit>.json"
    )
    parser.add_argument(
        "--plot", type=Path, help="draw the ladder, and the overhead against the teacher's depth"
    )
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.warmup == 0 and args.device == "cuda":
        parser.error("the first steps on a GPU measure and compile: --warmup must be at least 1")
    try:
        args.cases = cases_of(args)
    except ValueError as error:
        parser.error(str(error))
    counts = (*(n for (_, *sizes), _ in args.cases for n in sizes), args.steps, args.repeat)
    if min(counts) < 1 or min(args.warmup, args.profile) < 0:
        parser.error(f"batches, pixels, steps and repetitions must be at least 1, got {counts}")
    return args


def cases_of(args: argparse.Namespace) -> list[tuple[Case, list[str]]]:
    """Every (model, pixels, images) with its variants, in the order in which they run.  ValueError for unknown variants."""
    given = args.case
    if given is None:
        given = [
            (*case, args.variants)
            for case in itertools.product(args.model, args.resolution, sorted(args.batch))
        ]
    found = []
    for model, pixels, batch, names in given:
        variants = expand(names.split(","), model, args.reference is not None)
        found.append(((model, int(pixels), int(batch)), variants))
    return found


class Session:
    """One run: its ceilings, its rows, what failed."""

    def __init__(self, args: argparse.Namespace, argv: list[str]):
        self.args, self.failed, self.tflops = args, 0, math.nan
        self.end = time.monotonic() + args.budget
        self.where = environment(args.device, "python benchmarks/train_step.py " + " ".join(argv))
        self.file = RowFile(args.json, self.where)
        self.clocks = (
            Clocks(self.file.path.with_suffix(".clocks.csv") if args.json else None)
            if args.device == "cuda"
            else None
        )
        # inductor's mix-order reductions give wrong gradients for chained adaLN (pytorch #193061)
        environ = {**os.environ, "TORCHINDUCTOR_MIX_ORDER_REDUCTION": "0"}
        if args.device == "cpu":
            environ["CUDA_VISIBLE_DEVICES"] = ""
        self.worker = Worker(
            [sys.executable, str(Path(__file__)), *argv, "--serve"], environ, args.separate
        )
        self.too_large: dict[tuple, int] = {}

    def run(self, name: str, case: Case, profile: bool = True) -> dict | None:
        limit = min(self.args.time_limit, self.end - time.monotonic())
        if limit <= 0:
            print(f"{name:16} {describe(case)}: not run, no time is left", flush=True)
            self.failed += 1
            return None
        try:
            return self.worker.ask([name, *case, profile], limit)
        except Failure as failure:
            if OUT_OF_MEMORY in str(failure):
                self.too_large[name, *case[:2]] = case[2]
            self.failed += OUT_OF_MEMORY not in str(failure)
            print(f"{name:16} {describe(case)}: failed: {failure}", flush=True)
            return None

    def measure_ceilings(self) -> None:
        found = self.run("ceilings", ("", 0, 0))
        if found is None:
            return
        (copy_ms, gbps), (matmul_ms, self.tflops) = found["copy"], found["matmul"]
        common = {"kind": "train_step", "variant": "torch", **self.where}
        self.file.add(make_row(name="copy", ms=copy_ms, gbps=gbps, **common))
        self.file.add(make_row(name="matmul", ms=matmul_ms, **common))
        print(f"copy {gbps:.1f} GB/s, matmul {self.tflops:.2f} TFLOP/s", flush=True)

    def record(self, name: str, case: Case, found: dict, spread: float | None) -> None:
        """The rows of one variant: the step, its phases, its families of kernels, the host's time."""
        fields = dict(
            zip(("model", "resolution", "batch"), case, strict=True),
            variant=name,
            dtype=found["dtype"],
            **self.where,
        )
        step = {
            k: found.get(k) for k in ("ms", "images_per_s", "mfu", "mfu_with_teacher", "peak_bytes")
        }
        ceiling = None if math.isnan(self.tflops) else found["flops_per_s"] / self.tflops / 1e10
        clocks = found.get("clocks", {})
        self.file.add(
            make_row(
                kind="train_step",
                name="step",
                percent_of_ceiling=ceiling,
                spread=spread,
                **clocks,
                **step,
                **fields,
            )
        )
        for kind, part in (
            ("phase", "phases"),
            ("kernel_share", "kernels"),
            ("host", "host"),
            ("kernel", "longest"),
        ):
            for label, ms in found.get(part, {}).items():
                self.file.add(make_row(kind=kind, name=label, ms=ms, **fields))

    def fits(self, name: str, case: Case) -> bool:
        """Whether nothing smaller has been too large."""
        return case[2] < self.too_large.get((name, *case[:2]), math.inf)

    def run_case(self, case: Case, names: list[str]) -> None:
        found: dict[str, list[dict]] = {}
        for _, name in itertools.product(range(self.args.repeat), names):
            if not self.fits(name, case):
                continue
            result = self.run(name, case, profile=name not in found)
            if not self.fits(name, case) and self.args.shrink and case[2] > 1:
                self.run_case((*case[:2], case[2] // 2), [name])
            if result is None or self.args.untimed:
                continue
            if self.clocks is not None:
                result["clocks"] = self.clocks.between(*result["when"])
            found.setdefault(name, []).append(result)
            self.record(name, case, *summary(found[name]))
            first = found.get("plain", next(iter(found.values())))[0]["ms"]
            print_result(name, case, result, first, "plain" in found)

    def close(self) -> None:
        self.worker.stop()
        if self.clocks is not None:
            self.clocks.stop()


def summary(repeated: list[dict]) -> tuple[dict, float | None]:
    """One result for all repetitions, with the median time and its rates, and their spread, relative; None of a single one.

    Only the first repetition is taken apart into phases and kernels.
    """
    times = [each["ms"] for each in repeated]
    median = statistics.median(times)
    closest = min(repeated, key=lambda each: abs(each["ms"] - median))
    apart = {k: repeated[0][k] for k in ("phases", "kernels", "longest") if k in repeated[0]}
    names = ("images_per_s", "mfu", "mfu_with_teacher", "flops_per_s")
    rates = {name: closest[name] * closest["ms"] / median for name in names if name in closest}
    return {**closest, **apart, **rates, "ms": median}, (max(times) - min(times)) / median if len(
        times
    ) > 1 else None


def describe(case: Case) -> str:
    model, resolution, batch = case
    return f"{model} {resolution} px, {batch} images" if model else ""


def print_result(name: str, case: Case, found: dict, first: float, has_plain: bool) -> None:
    mfu = (
        f", MFU {found['mfu']:.1%} ({found['mfu_with_teacher']:.1%} with the teacher)"
        if "mfu" in found
        else ""
    )
    memory = f", {found['peak_bytes'] / 2**30:.1f} GiB" if found["peak_bytes"] else ""
    print(
        f"{name:16} {describe(case)}: {found['ms']:.1f} ms, {found['images_per_s']:.1f} images/s{mfu}{memory}, "
        f"{found['ms'] / first:.3f} of {'plain' if has_plain else 'the first'} {found.get('note', '')}",
        flush=True,
    )
    parts = {
        "host": found.get("host"),
        "phases": found.get("phases"),
        "kernels": found.get("kernels"),
        "longest": found.get("longest"),
    }
    for label, times in parts.items():
        if times:
            print(
                f"  {label}: "
                + ", ".join(
                    f"{part[:60]} {ms:.2f}" for part, ms in itertools.islice(times.items(), 20)
                ),
                flush=True,
            )


def main(argv: list[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    args = parse(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: --device cpu runs small models", file=sys.stderr)
        return 2
    if args.serve:
        from step_case import handle, release

        serve(lambda request: handle(args, request), lambda: release(args.device == "cuda"))
        return 0
    session = Session(args, argv)
    try:
        if not args.untimed:
            session.measure_ceilings()
        for case, names in args.cases:
            session.run_case(case, names)
    finally:
        session.close()
    print(f"{len(session.file.rows)} rows in {session.file.path}")
    if args.plot:
        from plot import draw_steps

        draw_steps(session.file.rows, args.plot)
    return 1 if session.failed else 0


if __name__ == "__main__":
    sys.exit(main())
