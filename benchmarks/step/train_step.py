"""Time a training step of this engine and of its rivals: python -m benchmarks.step.train_step --batch 32 256

Variants; `ladder` and `depths` stand for several, and settings follow a +, as in sra+train.compile=true:
  plain, sra, sra_fp8   this engine: without alignment, with it, with an fp8 teacher
  self_flow, dual_time, vae_latent, layer_sync, dispersive, cached_features
                        this engine with another alignment target; teachers have SRA's layers,
                        and the stored features are random
  strong                plain PyTorch at its best: truncated bf16 teacher, torch.compile, fused AdamW, foreach EMA
  reference             the published code, from the checkout that --published names
  ladder                from the published code to the fp8 teacher, one change per row
  depths                sra with the teacher stopped at a quarter, a half, three quarters and all of the depth

Rows of the kind "host" are the host's time: "start-up" from the beginning of building to the end of the
first step, and "step" until a step is launched. If that is shorter than the step, Python is hidden. "idle" is
the time of a step in which the device runs no kernel.

Latents are random moments on the device; the rest is the training loop's own step. All cases run in one
process, one after another, so start-up is paid for once. Memory is released between them, and the peak is that
of the case (--separate starts a process for every case). A case that fails or does not fit stops no other.
Rows are written as they come. A variant named twice is built and timed twice: its row has the median and
the spread.
"""

import argparse
import itertools
import math
import os
import statistics
import sys
import time
from pathlib import Path

import torch

from benchmarks.record import RowFile, command_line, environment, make_row, row_file
from benchmarks.step.gpu_clocks import Clocks
from benchmarks.step.variants import Variant, expand
from benchmarks.step.worker import Failure, Worker, serve

MODULE = "benchmarks.step.train_step"
# as torch's allocator, the driver and cuBLAS say it
OUT_OF_MEMORY = ("OutOfMemoryError", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
# kernels that a printed line names
SHOWN = 20
# model, resolution in pixels, images
Case = tuple[str, int, int]


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The arguments, with ``cases`` from ``cases_of``. Wrong ones end the program with a message."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    add = parser.add_argument
    add("--model", nargs="+", default=["SiT-XL/2"], help="default: SiT-XL/2")
    add("--resolution", type=int, nargs="+", default=[256], help="pixels (default 256)")
    add(
        "--batch",
        type=int,
        nargs="+",
        default=[32, 256],
        help="images per GPU, up to what fits (default 32 256)",
    )
    add("--variants", default="plain,sra", help="default: plain,sra")
    add(
        "--case",
        nargs=4,
        action="append",
        metavar=("MODEL", "PIXELS", "BATCH", "VARIANTS"),
        help="instead of the four above, may be repeated: cases run in this order",
    )
    add("--published", help="a checkout of the published code, for the variant reference")
    add("--device", choices=("cuda", "cpu"), default=default_device)
    add("--warmup", type=int, default=5, help="steps before the timed ones (default 5)")
    add("--steps", type=int, default=20, help="timed steps (default 20)")
    add(
        "--seconds",
        type=float,
        default=math.inf,
        help="limit of the timed steps together; at least 8 steps are timed",
    )
    add(
        "--profile",
        type=int,
        default=3,
        help="steps for the phases and for the kernels (default 3); 0: neither",
    )
    add("--repeat", type=int, default=1, help="how often to run all variants of a case")
    add("--separate", action="store_true", help="a process for every case")
    add("--time-limit", type=float, default=240, help="seconds for one case (default 240)")
    add(
        "--budget",
        type=float,
        default=math.inf,
        help="seconds for the run: then no case starts, and the last one is ended",
    )
    add(
        "--untimed",
        action="store_true",
        help="run two steps of each variant and write no rows: fills the compilers' caches",
    )
    add(
        "--shrink",
        action="store_true",
        help="run a case that does not fit with half of the images, until it fits",
    )
    add("--json", type=row_file, help="default: benchmarks/results/<device>-<commit>.json")
    add("--plot", type=Path, help="draw the ladder, and the time against the teacher's depth")
    add("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)

    if args.warmup == 0 and args.device == "cuda":
        parser.error("expected --warmup of at least 1 on a GPU: the first steps compile, got 0")
    try:
        args.cases = cases_of(args)
    except ValueError as error:
        parser.error(str(error))
    sizes = [size for (_, pixels, batch), _ in args.cases for size in (pixels, batch)]
    if min(*sizes, args.steps, args.repeat) < 1 or min(args.warmup, args.profile) < 0:
        parser.error(
            "expected batches, pixels, steps and repetitions of at least 1, "
            f"got {(*sizes, args.steps, args.repeat)}"
        )
    return args


def cases_of(args: argparse.Namespace) -> list[tuple[Case, list[str]]]:
    """Every case with its variants, in the order in which they run.

    Every variant's options are parsed once, so that a misspelt one ends the program before anything
    is measured.

    Raises:
        ValueError: an unknown variant.
        SystemExit: the configuration has no such option or refuses its value.
    """
    given = args.case
    if given is None:
        grid = itertools.product(args.model, args.resolution, sorted(args.batch))
        given = [(*case, args.variants) for case in grid]
    found = []
    for model, pixels, batch, names in given:
        variants = expand(names.split(","), model, args.published is not None)
        case = (model, int(pixels), int(batch))
        for name in variants:
            Variant.parse(name).configuration(*case, args.device)
        found.append((case, variants))
    return found


class Session:
    """One run: the process that measures, its ceilings, its rows, and how many cases failed."""

    def __init__(self, args: argparse.Namespace, argv: list[str]):
        self.args = args
        self.failed = 0
        self.tflops = math.nan
        self.end = time.monotonic() + args.budget
        self.where = environment(args.device, command_line(MODULE, argv))
        self.file = RowFile(args.json, self.where)
        self.clocks = None
        if args.device == "cuda":
            readings = self.file.path.with_suffix(".clocks.csv") if args.json else None
            self.clocks = Clocks(readings)

        # inductor's mix-order reductions give wrong gradients for chained adaLN (pytorch #193061)
        environ = {**os.environ, "TORCHINDUCTOR_MIX_ORDER_REDUCTION": "0"}
        if args.device == "cpu":
            environ["CUDA_VISIBLE_DEVICES"] = ""
        command = [sys.executable, "-m", MODULE, *argv, "--serve"]
        # the process starts in the root of the checkout, so the path must be absolute
        if args.published:
            command += ["--published", str(Path(args.published).resolve())]
        self.worker = Worker(command, environ, args.separate)
        # the smallest batch of (variant, model, resolution) that did not fit
        self.too_large: dict[tuple, int] = {}

    def run(self, name: str, case: Case, profile: bool = True) -> dict | None:
        """What the process measures of a variant, or None if it fails; the reason is printed."""
        limit = min(self.args.time_limit, self.end - time.monotonic())
        if limit <= 0:
            print(f"{name:16} {describe(case)}: not run, no time is left", flush=True)
            self.failed += 1
            return None
        try:
            return self.worker.ask([name, *case, profile], limit)
        except Failure as failure:
            # too little memory is an answer, not a failure
            if any(text in str(failure) for text in OUT_OF_MEMORY):
                self.too_large[name, *case[:2]] = case[2]
            else:
                self.failed += 1
            print(f"{name:16} {describe(case)}: failed: {failure}", flush=True)
            return None

    def measure_ceilings(self) -> None:
        found = self.run("ceilings", ("", 0, 0))
        if found is None:
            return
        copy_ms, gbps = found["copy"]
        matmul_ms, self.tflops = found["matmul"]
        common = {"kind": "train_step", "variant": "torch", **self.where}
        self.file.add(make_row(name="copy", ms=copy_ms, gbps=gbps, **common))
        self.file.add(make_row(name="matmul", ms=matmul_ms, **common))
        print(f"copy {gbps:.1f} GB/s, matmul {self.tflops:.2f} TFLOP/s", flush=True)

    def record(self, name: str, case: Case, found: dict, spread: float | None) -> None:
        """Write the rows of a variant: the step, its phases, its kernels, the host's time."""
        model, resolution, batch = case
        fields = {
            "model": model,
            "resolution": resolution,
            "batch": batch,
            "variant": name,
            "dtype": found["dtype"],
            **self.where,
        }
        numbers = ("ms", "images_per_s", "mfu", "mfu_with_teacher", "peak_bytes")
        step = {k: found.get(k) for k in numbers}
        if not math.isnan(self.tflops):
            # FLOP/s over TFLOP/s, in percent
            step["percent_of_ceiling"] = found["flops_per_s"] / self.tflops / 1e10
        step |= {"spread": spread, **found.get("clocks", {})}
        self.file.add(make_row(kind="train_step", name="step", **step, **fields))

        kinds = {
            "phase": "phases",
            "kernel_share": "kernels",
            "host": "host",
            "idle": "idle",
            "kernel": "longest",
        }
        for kind, part in kinds.items():
            for label, ms in found.get(part, {}).items():
                self.file.add(make_row(kind=kind, name=label, ms=ms, **fields))

    def fits(self, name: str, case: Case) -> bool:
        """Whether no smaller batch has been too large."""
        return case[2] < self.too_large.get((name, *case[:2]), math.inf)

    def run_case(self, case: Case, names: list[str]) -> None:
        """Measure the variants of a case, as often as they are asked for."""
        model, resolution, batch = case
        found: dict[str, list[dict]] = {}
        for _, name in itertools.product(range(self.args.repeat), names):
            if not self.fits(name, case):
                continue
            # one profile per variant is enough
            result = self.run(name, case, profile=name not in found)
            if self.args.shrink and batch > 1 and not self.fits(name, case):
                self.run_case((model, resolution, batch // 2), [name])
            if result is None or self.args.untimed:
                continue
            # clock and power of the timed steps
            if self.clocks is not None:
                result["clocks"] = self.clocks.between(*result["when"])
            found.setdefault(name, []).append(result)
            self.record(name, case, *summary(found[name]))
            # "plain" is what the others are compared with, if it is among them
            first = found.get("plain", next(iter(found.values())))[0]["ms"]
            print_result(name, case, result, first, "plain" in found)

    def close(self) -> None:
        self.worker.stop()
        if self.clocks is not None:
            self.clocks.stop()


def summary(repeated: list[dict]) -> tuple[dict, float | None]:
    """One result for all repetitions of a variant.

    Returns:
        The repetition closest to the median, with the median time and its rates, and the profile of the
        first repetition. And the relative spread of the times; None for a single repetition.
    """
    times = [each["ms"] for each in repeated]
    median = statistics.median(times)
    closest = min(repeated, key=lambda each: abs(each["ms"] - median))
    profile = {k: repeated[0][k] for k in ("phases", "kernels", "longest") if k in repeated[0]}
    rates = {}
    for name in ("images_per_s", "mfu", "mfu_with_teacher", "flops_per_s"):
        if name in closest:
            rates[name] = closest[name] * closest["ms"] / median
    spread = (max(times) - min(times)) / median if len(times) > 1 else None
    return {**closest, **profile, **rates, "ms": median}, spread


def describe(case: Case) -> str:
    model, resolution, batch = case
    return f"{model} {resolution} px, {batch} images" if model else ""


def print_result(name: str, case: Case, found: dict, first: float, has_plain: bool) -> None:
    """A line for the step, then one for each part of it.

    Args:
        name: of the variant.
        case: that was measured.
        found: what was measured.
        first: milliseconds of the step that it is compared with.
        has_plain: whether that is "plain".
    """
    mfu = ""
    if "mfu" in found:
        mfu = f", MFU {found['mfu']:.1%} ({found['mfu_with_teacher']:.1%} with the teacher)"
    memory = f", {found['peak_bytes'] / 2**30:.1f} GiB" if found["peak_bytes"] else ""
    other = "plain" if has_plain else "the first"
    print(
        f"{name:16} {describe(case)}: {found['ms']:.1f} ms, {found['images_per_s']:.1f} images/s"
        f"{mfu}{memory}, {found['ms'] / first:.3f} of {other} {found.get('note', '')}",
        flush=True,
    )
    # parts that were not measured have no line
    for part in ("host", "idle", "phases", "kernels", "longest"):
        times = found.get(part)
        if times:
            shown = itertools.islice(times.items(), SHOWN)
            words = ", ".join(f"{label[:60]} {ms:.2f}" for label, ms in shown)
            print(f"  {part}: {words}", flush=True)


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0, or 1 if a case failed for another reason than memory, or 2 without a GPU."""
    argv = list(sys.argv[1:] if argv is None else argv)
    args = parse(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: --device cpu runs small models", file=sys.stderr)
        return 2
    if args.serve:
        # only the process that measures imports the engine
        from benchmarks.step.measure_case import handle, release

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
        # matplotlib is needed only here
        from benchmarks.report.plot import draw_steps

        draw_steps(session.file.rows, args.plot)
    return 1 if session.failed else 0


if __name__ == "__main__":
    sys.exit(main())
