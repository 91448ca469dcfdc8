"""Measure the operators: python -m benchmarks.operators.run [--ops adaln,...] [--device cpu] [--json FILE]

For every operator, shape, pass and variant, most valuable first: the time on the device with a cold
L2, GB/s of the bytes that the operator needs, and the percentage of the copy bandwidth (or of the
matmul rate, if arithmetic is the limit) measured in the same run.

The results of a variant are checked against the fp32 reference first. A variant that is wrong is RED
and has no speed; so is ours if it fails. Rows are written as they come.

Variants: ours, eager and compile; apex, liger and quack where they are installed (their LayerNorm with
PyTorch's modulation); and, only if asked for, compile_nomix: torch.compile without inductor's mix-order
reductions, which give wrong gradients in some versions.
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

from benchmarks.operators import third_party_norms
from benchmarks.operators.correctness import Oracle, as_leaves, as_tuple, output_gradients
from benchmarks.operators.entry import Operator
from benchmarks.operators.registry import OPERATORS, cases
from benchmarks.operators.shapes import MODELS, TINY, Shape
from benchmarks.record import RowFile, command_line, environment, make_row, row_file, variables_set
from benchmarks.timing import (
    copy_bandwidth,
    make_randn,
    matmul_rate,
    milliseconds,
    num_sets,
    nvidia_smi,
    peak_bytes,
)

PASSES = ("forward", "backward", "both")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
VARIANTS = ("ours", "eager", "compile", "compile_nomix", *third_party_norms.NAMES)
HEADER = (
    f"{'op':30} {'model':9} {'px':>4} {'batch':>5} {'variant':13} {'ms':>9} {'GB/s':>7} {'ceiling':>8}"
    "  speed of ours against"
)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The arguments. Unknown names end the program with a message."""
    words = lambda text: text.split(",")
    numbers = lambda text: [int(word) for word in text.split(",")]
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--ops", type=words, help=f"of {', '.join(OPERATORS)}; default: all")
    add("--models", type=words, help=f"of {', '.join((*MODELS, TINY))}; default: all but {TINY}")
    add("--resolution", type=numbers, help="pixels, such as 256,512")
    add("--batch", type=numbers, help="images, such as 32,64,256")
    add("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, float32 on a CPU")
    add("--passes", type=words, default=list(PASSES), help=f"of {','.join(PASSES)}; default: all")
    add("--variants", type=words, help=f"of {', '.join(VARIANTS)}")
    add("--device", choices=("cuda", "cpu"), default=default_device)
    add("--budget", type=float, default=0.25, help="seconds for one median (default 0.25)")
    add("--time-limit", type=float, default=math.inf, help="seconds after which no case starts")
    add("--json", type=row_file, help="default: benchmarks/results/<gpu>-<commit>.json")
    add("--plot", type=Path, help="draw every operator's percentage of the copy bandwidth")
    args = parser.parse_args(argv)
    if wrong := variables_set():
        parser.error(wrong)

    known = {"ops": OPERATORS, "models": (*MODELS, TINY), "passes": PASSES, "variants": VARIANTS}
    for option, allowed in known.items():
        unknown = [word for word in getattr(args, option) or () if word not in allowed]
        if unknown:
            parser.error(f"--{option}: expected {', '.join(allowed)}, got {', '.join(unknown)}")
    if min(args.batch or [1]) < 1:
        parser.error(f"--batch: expected 1 or more images, got {min(args.batch)}")
    # a token covers 16 pixels of a side
    wrong = [pixels for pixels in args.resolution or () if pixels < 16 or pixels % 16]
    if wrong:
        parser.error(f"--resolution: expected multiples of 16 pixels, got {wrong[0]}")
    # sizes that a CPU can do in seconds
    if args.device == "cpu":
        args.models = args.models or [TINY]
        args.resolution = args.resolution or [64]
        args.batch = args.batch or [4]
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    given = sys.argv[1:] if argv is None else argv
    args.command = command_line("benchmarks.operators.run", given)
    return args


def functions_of(operator: Operator, asked: list[str] | None, device: str) -> dict:
    """``{variant: function}`` in the order of ``VARIANTS``. Compilation happens at the first call.

    Args:
        operator: from the registry.
        asked: names of variants, or None for those that usually run.
        device: on a CPU nothing is compiled unless it is asked for.
    """
    if asked is None:
        # inductor's C++ compiles slowly: on a CPU only if it is asked for
        compiled_too = operator.compiles and device == "cuda"
        asked = ["ours", "eager", *(["compile"] if compiled_too else []), *third_party_norms.NAMES]
    found = {"ours": operator.ours, "eager": operator.eager}
    compiled = partial(torch.compile, operator.to_compile or operator.eager, dynamic=False)
    if "compile" in asked:
        found["compile"] = compiled()
    if "compile_nomix" in asked:
        try:
            found["compile_nomix"] = compiled(options={"triton.mix_order_reduction": False})
        except RuntimeError as error:
            print(f"compile_nomix: this version of torch has no such option: {error}")
    # other packages are imported only if they are asked for
    if operator.with_norm and set(asked) & set(third_party_norms.NAMES):
        for name, norm in third_party_norms.installed_norms().items():
            found[name] = partial(operator.eager, norm=norm)
    return {name: found[name] for name in VARIANTS if name in asked and name in found}


def steps_of(operator: Operator, function, which: str, dtype: torch.dtype, device: str) -> tuple:
    """The two steps of timing one pass.

    Returns:
        set_up: takes a set of inputs and runs before the clock starts.
        timed: takes what ``set_up`` returned.
    """

    def forward(inputs: tuple) -> tuple:
        return as_tuple(function(*inputs))

    # drawn once, at the first call
    gradients_out: list[torch.Tensor] = []

    def backward(inputs_and_out: tuple) -> tuple:
        inputs, out = inputs_and_out
        if not gradients_out:
            gradients_out.extend(output_gradients(out, dtype, device))
        wanted = [inputs[i] for i in operator.grads]
        return torch.autograd.grad(out, wanted, gradients_out)

    unchanged = lambda inputs: inputs
    if which == "forward":
        return unchanged, forward
    if which == "backward":
        return lambda inputs: (inputs, forward(inputs)), backward
    return unchanged, lambda inputs: backward((inputs, forward(inputs)))


def driver_clocks() -> str:
    """Clocks (SM, memory) and power of the GPU as its driver reports them."""
    fields = "--query-gpu=clocks.sm,clocks.mem,power.draw"
    query = [*nvidia_smi(), fields, "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=3).stdout.strip()
    # no driver, or one that does not answer
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def device_error(device: str) -> str | None:
    """Release cached memory. Returns the error of a device that takes no more calls, or None."""
    if device == "cpu":
        return None
    try:
        # what a kernel has done wrong shows here, before the next variant gets the blame
        torch.cuda.synchronize()
        # what one variant has cached must not leave the next one without memory
        torch.cuda.empty_cache()
    except RuntimeError as error:
        return reason(error)
    return None


def reason(error: Exception) -> str:
    """An exception in one line."""
    first_line = str(error).strip().partition("\n")[0][:200]
    return f"{type(error).__name__}: {first_line}"


class Bench:
    """One run: its ceilings, its rows, and the operators that were wrong or failed."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.begin = time.perf_counter()
        self.failed: list[str] = []
        # an illegal memory access makes every later call of the process fail
        self.device_lost = False
        self.where = environment(args.device, args.command)
        self.file = RowFile(args.json, self.where)

    def out_of_time(self) -> bool:
        return time.perf_counter() - self.begin > self.args.time_limit

    def record(self, **fields) -> None:
        self.file.add(make_row(kind="op", **self.where, **fields))

    def measure_ceilings(self) -> None:
        device = self.args.device
        copy_ms, self.copy_gbps = copy_bandwidth(device)
        self.record(name="copy", variant="torch", ms=copy_ms, gbps=self.copy_gbps)
        matmul_ms, self.tflops = matmul_rate(device, DTYPES[self.args.dtype])
        self.record(name="matmul", variant="torch", dtype=self.args.dtype, ms=matmul_ms)
        if device == "cuda":
            print(f"clocks (SM, memory), power: {driver_clocks()}")
        print(
            f"copy {self.copy_gbps:.1f} GB/s, matmul {self.tflops:.2f} TFLOP/s ({self.args.dtype})"
        )

    def throughput(
        self, operator: Operator, shape: Shape, dtype: torch.dtype, which: str, ms: float
    ) -> dict:
        """GB/s and the percentage of the copy bandwidth, or the percentage of the matmul rate."""
        bound_by_arithmetic = operator.bytes is None
        if bound_by_arithmetic:
            forward, backward = operator.flops(shape)
        else:
            forward, backward = operator.bytes(shape, dtype.itemsize)
        count = {"forward": forward, "backward": backward, "both": forward + backward}[which]
        # per second, in units of 1e9
        rate = count / ms / 1e6
        if bound_by_arithmetic:
            return {"percent_of_ceiling": 100 * rate / 1e3 / self.tflops}
        return {"gbps": rate, "percent_of_ceiling": 100 * rate / self.copy_gbps}

    def time_function(
        self, operator: Operator, shape: Shape, dtype: torch.dtype, function, passes: list[str]
    ) -> dict[str, dict]:
        """``{pass: fields of its row}``"""
        device = self.args.device
        make = lambda seed: operator.make(shape, dtype, make_randn(seed, device))
        # the size of the first set says how many more are needed
        first = make(0)
        others = [make(seed) for seed in range(1, num_sets(first, device))]
        sets = [as_leaves(operator, inputs) for inputs in (first, *others)]
        fields = {}
        for which in passes:
            set_up, timed = steps_of(operator, function, which, dtype, device)
            ms = milliseconds(sets, set_up, timed, device, self.args.budget)
            peak = peak_bytes(sets[0], set_up, timed, device)
            rates = self.throughput(operator, shape, dtype, which, ms)
            fields[which] = {"ms": ms, "peak_bytes": peak, **rates}
        return fields

    def run_variant(
        self, name: str, shape: Shape, dtype: torch.dtype, oracle: Oracle, variant: str, function
    ) -> dict[str, dict]:
        """Check a variant, then time it.

        Returns:
            ``{pass: fields}``, with empty fields if the results are wrong or ours fails; empty if a
            rival cannot run or memory is too small.
        """
        operator = OPERATORS[name]
        # without gradients there is only a forward pass
        passes = [which for which in self.args.passes if operator.grads or which == "forward"]
        # rows of a wrong variant have no time
        fields = {which: {} for which in passes}
        try:
            complaint = oracle.complaint(function)
            if complaint is None:
                fields = self.time_function(operator, shape, dtype, function, passes)
        # a rival that cannot run, or too little memory, must not end the run
        except Exception as error:
            print(f"{name} {variant}: cannot run: {reason(error)}")
            if variant != "ours" or isinstance(error, torch.OutOfMemoryError):
                return {}
            # without rows the tables would go on showing an older commit's times
            self.failed.append(name)
        else:
            if complaint is not None:
                print(f"{name} {variant}: RED: {complaint}")
                if variant == "ours":
                    self.failed.append(name)
        for which, values in fields.items():
            self.record(
                name=label(name, which),
                variant=variant,
                model=shape.model,
                resolution=shape.resolution,
                batch=shape.batch,
                dtype=str(dtype).removeprefix("torch."),
                **values,
            )
        return fields

    def run_case(self, name: str, shape: Shape) -> None:
        """All variants of one operator at one shape."""
        operator = OPERATORS[name]
        device = self.args.device
        dtype = operator.dtype or DTYPES[self.args.dtype]
        # otherwise a second shape makes torch.compile generate slower code for any shape
        torch._dynamo.reset()
        case = f"{name} {shape.model} {shape.resolution} px, {shape.batch} images"
        try:
            oracle = Oracle(operator, shape, dtype, device)
            functions = functions_of(operator, self.args.variants, device)
        except torch.OutOfMemoryError:
            print(f"{case}: does not fit")
            return
        # a reference, eager or another package that fails must not end the run
        except Exception as error:
            print(f"{case}: cannot be checked: {reason(error)}")
            self.failed.append(name)
            self.check_device(f"the reference of {name}")
            return
        measured = {}
        for variant, function in functions.items():
            if self.out_of_time():
                break
            measured[variant] = self.run_variant(name, shape, dtype, oracle, variant, function)
            self.check_device(f"{name} {variant}")
            if self.device_lost:
                break
        print_case(name, shape, measured)

    def check_device(self, after: str) -> None:
        """Release cached memory, and notice and say that the device takes no more calls."""
        error = device_error(self.args.device)
        if error is not None:
            print(f"the device takes no more calls after {after}: {error}")
            self.device_lost = True


def label(name: str, which: str) -> str:
    """The name of a row: with the pass, if the operator has a backward pass."""
    return f"{name}.{which}" if OPERATORS[name].grads else name


def speedups(measured: dict, which: str) -> str:
    """How many times as long as ours every rival takes, as far as both are right."""
    ms = {variant: fields.get(which, {}).get("ms") for variant, fields in measured.items()}
    ours = ms.pop("ours", None)
    if ours is None:
        return ""
    return "  ".join(f"{rival} {t / ours:.2f}x" for rival, t in ms.items() if t is not None)


def print_case(name: str, shape: Shape, measured: dict[str, dict]) -> None:
    """A line for every pass and variant of a case."""
    case = f"{shape.model:9} {shape.resolution or '':>4} {shape.batch or '':>5}"
    # in the order in which they were measured
    passes = dict.fromkeys(which for fields in measured.values() for which in fields)
    for which in passes:
        for variant, fields in measured.items():
            if which not in fields:
                continue
            values = fields[which]
            line = f"{label(name, which):30} {case} {variant:13} "
            if not values:
                print(line + f"{'RED':>9}")
                continue
            gbps = f"{values['gbps']:7.1f}" if "gbps" in values else " " * 7
            line += f"{values['ms']:9.4f} {gbps} {values['percent_of_ceiling']:6.1f} %"
            if variant == "ours":
                line += "  " + speedups(measured, which)
            print(line)


def main(argv: list[str] | None = None) -> int:
    """Exit code: 1 if an operator of ours was wrong or failed, a reference failed or the device was
    lost; 2 without a GPU; else 0. Rivals may be wrong or fail.
    """
    args = parse(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: --device cpu runs small shapes", file=sys.stderr)
        return 2
    bench = Bench(args)
    print(bench.where["device"], bench.where["versions"], bench.where["commit"])
    if args.device == "cpu":
        print("on a CPU ours is the reference, and its times say nothing about the kernels")
    bench.measure_ceilings()
    print(HEADER)
    todo = cases(args.ops, args.models, args.resolution, args.batch)
    for done, (name, shape) in enumerate(todo):
        if bench.out_of_time():
            print(f"time limit reached: {len(todo) - done} of {len(todo)} cases not measured")
            break
        bench.run_case(name, shape)
        if bench.device_lost:
            print(f"{len(todo) - done - 1} of {len(todo)} cases not measured")
            break
    print(f"{len(bench.file.rows)} rows in {os.path.relpath(bench.file.path)}")
    if args.plot:
        # matplotlib is needed only here
        from benchmarks.report.plot import draw_operators

        draw_operators(bench.file.rows, args.plot)
    if bench.failed:
        print("wrong or failing: " + ", ".join(dict.fromkeys(bench.failed)), file=sys.stderr)
    return 1 if bench.failed or bench.device_lost else 0


if __name__ == "__main__":
    sys.exit(main())
