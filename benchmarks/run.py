"""Measure the operators:  python benchmarks/run.py [--ops adaln,...] [--device cpu] [--json FILE] [--plot FILE]

Every operator, shape, pass and variant, most valuable first: time on the device with a cold L2, GB/s of the bytes that
the operator needs, percent of the copy bandwidth measured in the same run.  Before any speed is printed the results are
checked against the fp32 reference; a variant that is wrong is RED and has no speed.  Rows are written as they come, to
benchmarks/results/<gpu>-<commit>.json unless --json names a file.

Variants: ours, eager, compile, and where installed apex, liger, quack (their LayerNorm, PyTorch's modulation); if asked
for, compile_nomix, without inductor's mix-order reductions, which give wrong gradients in some versions.
"""

import argparse
import math
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch
from measure import (
    PASSES,
    Oracle,
    as_leaves,
    copy_bandwidth,
    matmul_rate,
    milliseconds,
    num_sets,
    peak_bytes,
    steps_of,
)  # fmt: skip
from record import RowFile, environment, make_row
from registry import ENTRIES, MODELS, TINY, Entry, Shape, cases, random
from rivals import installed_norms

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
VARIANTS = ("ours", "eager", "compile", "compile_nomix", "apex", "liger", "quack")
HEADER = f"{'op':30} {'model':9} {'px':>4} {'batch':>5} {'variant':13} {'ms':>9} {'GB/s':>7} {'ceiling':>8}"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    words = lambda text: text.split(",")
    numbers = lambda text: [int(word) for word in text.split(",")]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ops", type=words, help=f"of {', '.join(ENTRIES)}; default: all")
    parser.add_argument(
        "--models", type=words, help=f"of {', '.join((*MODELS, TINY))}; default: all but the last"
    )
    parser.add_argument("--resolution", type=numbers, help="pixels, such as 256,512")
    parser.add_argument("--batch", type=numbers, help="images, such as 32,64,256")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, float32 on a CPU"
    )
    parser.add_argument("--passes", type=words, default=list(PASSES), help=",".join(PASSES))
    parser.add_argument("--variants", type=words, help=f"of {', '.join(VARIANTS)}")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument(
        "--budget", type=float, default=0.25, help="seconds for one median (default 0.25)"
    )
    parser.add_argument(
        "--time-limit", type=float, default=math.inf, help="seconds after which nothing new starts"
    )
    parser.add_argument("--json", type=Path, help="default: benchmarks/results/<gpu>-<commit>.json")
    parser.add_argument(
        "--plot", type=Path, help="draw percent of the copy bandwidth of every operator"
    )
    args = parser.parse_args(argv)
    known = {"ops": ENTRIES, "models": (*MODELS, TINY), "passes": PASSES, "variants": VARIANTS}
    for option, allowed in known.items():
        unknown = [word for word in getattr(args, option) or () if word not in allowed]
        if unknown:
            parser.error(f"--{option}: expected {', '.join(allowed)}, got {', '.join(unknown)}")
    if args.device == "cpu":
        args.models, args.resolution, args.batch = (
            args.models or [TINY],
            args.resolution or [64],
            args.batch or [4],
        )
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    args.command = "python benchmarks/run.py " + " ".join(sys.argv[1:] if argv is None else argv)
    return args


def variants_of(entry: Entry, asked: list[str] | None, device: str) -> dict:
    """What runs, by name; compilation happens at the first call."""
    default = [
        "ours",
        "eager",
        *(["compile"] if entry.compiles and device == "cuda" else []),
        *VARIANTS[4:],
    ]
    asked = default if asked is None else asked
    compiled = partial(torch.compile, entry.to_compile or entry.eager, dynamic=False)
    found = {"ours": entry.ours, "eager": entry.eager}
    if "compile" in asked:
        found["compile"] = compiled()
    if "compile_nomix" in asked:
        try:
            found["compile_nomix"] = compiled(options={"triton.mix_order_reduction": False})
        except RuntimeError as error:
            print(f"compile_nomix: this version has no such option: {error}")
    if entry.with_norm and set(asked) & set(VARIANTS[4:]):
        found |= {name: partial(entry.eager, norm=norm) for name, norm in installed_norms().items()}
    return {name: found[name] for name in VARIANTS if name in asked and name in found}


def clocks() -> str:
    """Clocks of the device as its driver reports them."""
    query = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,power.draw", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip()
    except OSError:
        return "unknown"


class Bench:
    """One run: its ceilings, its rows, what went wrong."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.begin, self.failed = args, time.perf_counter(), []
        self.where = environment(args.device, args.command)
        self.file = RowFile(args.json, self.where)

    def out_of_time(self) -> bool:
        return time.perf_counter() - self.begin > self.args.time_limit

    def record(self, **fields) -> None:
        self.file.add(make_row(kind="op", **self.where, **fields))

    def measure_ceilings(self) -> None:
        ms, self.copy_gbps = copy_bandwidth(self.args.device)
        self.record(name="copy", variant="torch", ms=ms, gbps=self.copy_gbps)
        ms, self.tflops = matmul_rate(self.args.device, DTYPES[self.args.dtype])
        self.record(name="matmul", variant="torch", dtype=self.args.dtype, ms=ms)
        if self.args.device == "cuda":
            print(f"clocks (SM, memory), power: {clocks()}")
        print(
            f"copy {self.copy_gbps:.1f} GB/s, matmul {self.tflops:.2f} TFLOP/s ({self.args.dtype})"
        )

    def throughput(
        self, entry: Entry, shape: Shape, dtype: torch.dtype, which: str, ms: float
    ) -> dict:
        """GB/s and percent of the copy bandwidth; of the matmul rate where the operator is bound by arithmetic."""
        count = entry.flops(shape) if entry.bytes is None else entry.bytes(shape, dtype.itemsize)
        rate = {"forward": count[0], "backward": count[1], "both": sum(count)}[which] / ms / 1e6
        if entry.bytes is None:
            return {"percent_of_ceiling": 100 * rate / 1e3 / self.tflops}
        return {"gbps": rate, "percent_of_ceiling": 100 * rate / self.copy_gbps}

    def time_variant(
        self, entry: Entry, shape: Shape, dtype: torch.dtype, function, passes: list[str]
    ) -> dict:
        """Fields of a row for every pass."""
        make = lambda seed: entry.make(shape, dtype, random(seed, self.args.device))
        sets = [make(0)]
        sets += [make(seed) for seed in range(1, num_sets(sets[0], self.args.device))]
        sets, fields = [as_leaves(entry, inputs) for inputs in sets], {}
        for which in passes:
            prepare, timed = steps_of(entry, function, which, dtype, self.args.device)
            ms = milliseconds(sets, prepare, timed, self.args.device, self.args.budget)
            peak = peak_bytes(sets[0], prepare, timed, self.args.device)
            fields[which] = {
                "ms": ms,
                "peak_bytes": peak,
                **self.throughput(entry, shape, dtype, which, ms),
            }
        return fields

    def run_variant(
        self, name: str, shape: Shape, dtype: torch.dtype, oracle: Oracle, variant: str, function
    ) -> dict:
        """Check, then time; a wrong variant gets rows without a time, one that cannot run gets none."""
        entry = ENTRIES[name]
        passes = [which for which in self.args.passes if entry.grads or which == "forward"]
        try:
            complaint = oracle.complaint(function)
            fields = {which: {} for which in passes}
            if complaint is None:
                fields = self.time_variant(entry, shape, dtype, function, passes)
        except Exception as error:  # a rival that cannot run, or memory that does not suffice, must not end the run
            print(
                f"{name} {variant}: cannot run: {type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
            )
            if variant == "ours" and not isinstance(error, torch.OutOfMemoryError):
                self.failed.append(name)
            return {}
        if complaint is not None:
            print(f"{name} {variant}: RED: {complaint}")
            if variant == "ours":
                self.failed.append(name)
        for which, values in fields.items():
            common = {"model": shape.model, "resolution": shape.resolution, "batch": shape.batch}
            label = f"{name}.{which}" if entry.grads else name
            self.record(
                name=label,
                variant=variant,
                **common,
                dtype=str(dtype).removeprefix("torch."),
                **values,
            )
        return fields

    def run_case(self, name: str, shape: Shape) -> None:
        entry = ENTRIES[name]
        dtype = entry.dtype or DTYPES[self.args.dtype]
        # a second shape would be compiled for any shape, which is slower code
        torch._dynamo.reset()
        try:
            oracle = Oracle(entry, shape, dtype, self.args.device)
        except torch.OutOfMemoryError:
            print(f"{name} {shape.model} {shape.resolution} px, {shape.batch} images: does not fit")
            return
        measured = {}
        for variant, function in variants_of(entry, self.args.variants, self.args.device).items():
            if self.out_of_time():
                break
            measured[variant] = self.run_variant(name, shape, dtype, oracle, variant, function)
            if self.args.device == "cuda":
                torch.cuda.empty_cache()
        print_case(name, shape, measured, bool(entry.grads))


def speedups(measured: dict, which: str) -> str:
    """The time of each rival over ours; only where both were found right."""
    ms = {variant: fields.get(which, {}).get("ms") for variant, fields in measured.items()}
    ours = ms.pop("ours", None)
    return (
        "  ".join(f"{rival} {t / ours:.2f}x" for rival, t in ms.items() if t is not None)
        if ours
        else ""
    )


def print_case(name: str, shape: Shape, measured: dict, has_passes: bool) -> None:
    passes = dict.fromkeys(which for fields in measured.values() for which in fields)
    for which in passes:
        for variant, fields in measured.items():
            if which not in fields:
                continue
            values, label = fields[which], f"{name}.{which}" if has_passes else name
            line = f"{label:30} {shape.model:9} {shape.resolution or '':>4} {shape.batch or '':>5} {variant:13} "
            if not values:
                print(line + f"{'RED':>9}")
                continue
            gbps = f"{values['gbps']:7.1f}" if "gbps" in values else " " * 7
            line += f"{values['ms']:9.4f} {gbps} {values['percent_of_ceiling']:6.1f} %"
            print(line + ("  " + speedups(measured, which) if variant == "ours" else ""))


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: --device cpu runs small shapes", file=sys.stderr)
        return 2
    bench = Bench(args)
    print(bench.where["device"], bench.where["versions"], bench.where["commit"])
    if args.device == "cpu":
        print("on a CPU ours is the reference, and its times say nothing about the kernels")
    bench.measure_ceilings()
    print(HEADER + "  speed of ours against")
    todo = cases(args.ops, args.models, args.resolution, args.batch)
    for done, (name, shape) in enumerate(todo):
        if bench.out_of_time():
            print(f"time limit reached: {len(todo) - done} of {len(todo)} cases not measured")
            break
        bench.run_case(name, shape)
    print(f"{len(bench.file.rows)} rows in {os.path.relpath(bench.file.path)}")
    if args.plot:
        from plot import draw

        draw(bench.file.rows, args.plot)
    if bench.failed:
        print("wrong or failing: " + ", ".join(dict.fromkeys(bench.failed)), file=sys.stderr)
    return 1 if bench.failed else 0


if __name__ == "__main__":
    sys.exit(main())
