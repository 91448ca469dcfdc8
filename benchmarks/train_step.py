"""Time of a whole training step, of this engine and of its rivals:  python benchmarks/train_step.py --batch 32 256

Variants (`ladder` and `depths` stand for several; settings go behind a +, as in sra+train.compile=true):
  plain, sra, sra_fp8   this engine: without alignment, with it, with an fp8 teacher
  strong                plain PyTorch at its best: truncated bf16 teacher, torch.compile, fused AdamW, foreach EMA
  reference             the published code, from the checkout that --reference names
  ladder                from the published code to the fp8 teacher, one change per row
  depths                sra with the teacher stopped at a quarter, a half, three quarters and all of the depth

Rows of kind "host" are the host's time: "start-up" from the first line of building to the end of the first step, and "step"
until a step has been launched; where that is shorter than the step itself, Python is hidden behind the device.

Latents are random moments on the device; the rest of the step is the training loop's own.  Every case runs in a process of
its own, so that its peak memory is its own and one that does not fit stops nothing; rows are written as they come.
"""
import argparse
import itertools
import math
import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from record import RowFile, environment, make_row  # noqa: E402
from variants import Variant, expand  # noqa: E402

OUT_OF_MEMORY = "OutOfMemoryError"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["SiT-XL/2"])
    parser.add_argument("--resolution", type=int, nargs="+", default=[256])
    parser.add_argument("--batch", type=int, nargs="+", default=[32, 256], help="images per GPU, up to what fits")
    parser.add_argument("--variants", default="plain,sra")
    parser.add_argument("--reference", help="a checkout of the published code, for the variant reference")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--profile", type=int, default=3, help="steps for the phases and for the kernels; 0: neither")
    parser.add_argument("--repeat", type=int, default=1, help="processes per case, alternating; the median time counts")
    parser.add_argument("--time-limit", type=float, default=240, help="seconds for one process")
    parser.add_argument("--json", type=Path, help="default: benchmarks/results/<device>-<commit>.json")
    parser.add_argument("--plot", type=Path, help="draw the ladder, and the overhead against the teacher's depth")
    parser.add_argument("--one", nargs=4, metavar=("VARIANT", "MODEL", "PIXELS", "BATCH"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    counts = (*args.batch, *args.resolution, args.steps, args.repeat)
    if min(counts) < 1 or min(args.warmup, args.profile) < 0:
        parser.error(f"batches, pixels, steps and repetitions must be at least 1, got {counts}")
    if args.warmup == 0 and args.device == "cuda":
        parser.error("the first steps on a GPU measure and compile: --warmup must be at least 1")
    try:
        args.names = {m: expand(args.variants.split(","), m, args.reference is not None) for m in args.model}
    except ValueError as error:
        parser.error(str(error))
    return args


class Failure(Exception):
    """A case that gave no time; the message says why."""


def run_case(argv: list[str], name: str, case: tuple, limit: float, device: str) -> dict:
    """``step_case.measure`` in a fresh process."""
    command = [sys.executable, str(Path(__file__)), *argv, "--one", name, *map(str, case)]
    environ = {**os.environ, **({} if name == "ceilings" else Variant.parse(name).environment)}
    if device == "cpu":
        environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        raise Failure(f"not finished in {limit:.0f} s") from None
    if done.returncode:
        # libraries still warn after the error
        lines = done.stderr.strip().splitlines() or ["?"]
        raise Failure(next((line for line in reversed(lines) if re.search(r"(Error|error)\b", line)), lines[-1]))
    return json.loads(next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{")))


class Session:
    """One run: its ceilings, its rows, what failed."""

    def __init__(self, args: argparse.Namespace, argv: list[str]):
        self.args, self.argv, self.failed, self.tflops = args, argv, 0, math.nan
        self.where = environment(args.device, "python benchmarks/train_step.py " + " ".join(argv))
        self.file = RowFile(args.json, self.where)
        self.too_large: dict[tuple, int] = {}

    def run(self, name: str, case: tuple) -> dict | None:
        try:
            return run_case(self.argv, name, case, self.args.time_limit, self.args.device)
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
        print(f"copy {gbps:.1f} GB/s, matmul {self.tflops:.2f} TFLOP/s")

    def record(self, name: str, case: tuple, found: dict) -> None:
        """The rows of one variant: the step, its phases, its families of kernels, the host's time."""
        fields = dict(zip(("model", "resolution", "batch"), case), variant=name, dtype=found["dtype"], **self.where)
        step = {k: found.get(k) for k in ("ms", "images_per_s", "mfu", "mfu_with_teacher", "peak_bytes")}
        ceiling = None if math.isnan(self.tflops) else found["flops_per_s"] / self.tflops / 1e10
        self.file.add(make_row(kind="train_step", name="step", percent_of_ceiling=ceiling, **step, **fields))
        for kind, part in (("phase", "phases"), ("kernel_share", "kernels"), ("host", "host")):
            for label, ms in found.get(part, {}).items():
                self.file.add(make_row(kind=kind, name=label, ms=ms, **fields))

    def run_case(self, case: tuple) -> None:
        model, resolution, batch = case
        names, found = self.args.names[model], {}
        for _, name in itertools.product(range(self.args.repeat), names):
            if batch >= self.too_large.get((name, model, resolution), math.inf):
                continue
            result = self.run(name, case)
            if result is not None:
                found.setdefault(name, []).append(result)
                # the process with the median time stands for all
                median = sorted(found[name], key=lambda each: each["ms"])[(len(found[name]) - 1) // 2]
                self.record(name, case, median)
                first = found.get("plain", next(iter(found.values())))[0]["ms"]
                print_result(name, case, result, first, "plain" in found)


def describe(case: tuple) -> str:
    model, resolution, batch = case
    return f"{model} {resolution} px, {batch} images" if model else ""


def print_result(name: str, case: tuple, found: dict, first: float, has_plain: bool) -> None:
    mfu = f", MFU {found['mfu']:.1%} ({found['mfu_with_teacher']:.1%} with the teacher)" if "mfu" in found else ""
    memory = f", {found['peak_bytes'] / 2**30:.1f} GiB" if found["peak_bytes"] else ""
    print(f"{name:16} {describe(case)}: {found['ms']:.1f} ms, {found['images_per_s']:.1f} images/s{mfu}{memory}, "
          f"{found['ms'] / first:.3f} of {'plain' if has_plain else 'the first'} {found.get('note', '')}", flush=True)
    parts = {"host": found.get("host"), "phases": found.get("phases"), "kernels": found.get("kernels"), "longest": found.get("longest")}
    for label, times in parts.items():
        if times:
            print(f"  {label}: " + ", ".join(f"{part[:60]} {ms:.2f}" for part, ms in times.items()), flush=True)


def main(argv: list[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    args = parse(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: --device cpu runs small models", file=sys.stderr)
        return 2
    if args.one:
        from step_case import ceilings, measure

        name, model, resolution, batch = args.one
        case = (model, int(resolution), int(batch))
        print(json.dumps(ceilings(args.device) if name == "ceilings" else measure(args, name, case)))
        return 0
    session = Session(args, argv)
    session.measure_ceilings()
    for case in itertools.product(args.model, args.resolution, sorted(args.batch)):
        session.run_case(case)
    print(f"{len(session.file.rows)} rows in {session.file.path}")
    if args.plot:
        from plot import draw_steps

        draw_steps(session.file.rows, args.plot)
    return 1 if session.failed else 0


if __name__ == "__main__":
    sys.exit(main())
