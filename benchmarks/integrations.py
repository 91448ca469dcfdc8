"""Time other people's models with one line of ours:  python -m benchmarks.integrations --model NAME

NAME is a model of diffusers (``--list``), unmodified. ``--checkout PATH`` times the model of a
checkout of DiT, SiT, REPA, SRA or LightningDiT instead, and ``--model`` is one of its sizes, such
as SiT-B/2.

Three programs run the same weights: as they are (eager), through torch.compile (compile), and
through ``sra_fast.integrations.compile`` (ours). For each: milliseconds of the forward pass and of
forward and backward pass, the memory of the latter, and the largest difference from the first,
relative to the size of the result. A program whose outputs or gradients are too far from the truth
is RED and has no time. On a GPU also how long the host needs to start a forward and backward pass,
and the kernels that take longest in it. With --untimed every program only runs once, which fills
the compilers' caches.
"""

import argparse
import itertools
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.other_models import checkouts, diffusers_models
from benchmarks.other_models.diffusers_models import DEFAULT, RECIPES, TINY
from benchmarks.other_models.results import (
    Results,
    backward,
    difference,
    distance,
    forward,
    in_dtype,
    run,
)
from benchmarks.record import RowFile, command_line, environment, make_row, row_file, variables_set
from benchmarks.step.kernel_families import kernel_times
from benchmarks.timing import milliseconds, peak_bytes
from sra_fast import integrations

VARIANTS = ("eager", "compile", "ours")
PASSES = ("forward", "both")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
# the truth is computed with more digits than the programs have
TRUTHS = {torch.bfloat16: torch.float32, torch.float32: torch.float64}
# twice eager's distance from the truth, and this much for rounding
SLACK = {torch.bfloat16: 2**-9, torch.float32: 2e-6}
# where the truth cannot be computed: the largest difference from eager
LARGEST = {torch.bfloat16: 0.1, torch.float32: 1e-4}
THEN = ("inductor", "aot_eager", "eager")
# options that are sizes of the inputs
SIZES = ("batch", "side", "frames", "text")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The arguments. Unknown names end the program with a message."""
    words = lambda text: text.split(",")
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", help="a model of diffusers, or of the checkout")
    add("--list", action="store_true", help="print the models of diffusers, and end")
    add("--checkout", type=Path, help="DiT, SiT, REPA, SRA or LightningDiT, cloned")
    add("--size", choices=("tiny", "default"), help="default: tiny on a CPU, default on a GPU")
    add(
        "--layers", type=int, help="blocks of each kind, 0 for all; default: 4 of diffusers, or all"
    )
    add("--batch", type=int, help="samples")
    add("--side", type=int, help="of the square latents")
    add("--frames", type=int, help="of the latents of a video")
    add("--text", type=int, help="tokens of the prompt")
    add("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, float32 on a CPU")
    add("--variants", type=words, help=f"of {','.join(VARIANTS)}; default: all on a GPU")
    add("--then", choices=THEN, help="compiler after ours; default: inductor on a GPU")
    per_token = "ours takes vectors per token from inductor, too"
    add("--per-token", action="store_true", help=per_token)
    add("--device", choices=("cuda", "cpu"), default=default_device)
    add("--budget", type=float, default=1.0, help="seconds for one median (default 1)")
    add("--untimed", action="store_true", help="run every program once; no rows")
    add("--kernels", type=int, default=12, help="of the longest to print, on a GPU (default 12)")
    add("--json", type=row_file, help="default: benchmarks/results/<gpu>-<commit>.json")
    args = parser.parse_args(argv)
    if wrong := variables_set():
        parser.error(wrong)
    on_cpu = args.device == "cpu"
    args.size = args.size or ("tiny" if on_cpu else "default")
    args.dtype = DTYPES[args.dtype or ("float32" if on_cpu else "bfloat16")]
    # inductor's C++ compiles slowly: on a CPU only if it is asked for
    args.then = args.then or ("aot_eager" if on_cpu else "inductor")
    args.variants = args.variants or (["eager", "ours"] if on_cpu else list(VARIANTS))
    unknown = [name for name in args.variants if name not in VARIANTS]
    if unknown:
        parser.error(f"--variants: expected {', '.join(VARIANTS)}; got {', '.join(unknown)}")
    # 0 layers are all layers
    for name, least in (*((name, 1) for name in SIZES), ("layers", 0), ("kernels", 0)):
        given = getattr(args, name)
        if given is not None and given < least:
            parser.error(f"--{name}: expected {least} or more, got {given}")
    if not args.list and args.model is None and args.checkout is None:
        parser.error("expected --model, --checkout or --list")
    args.command = command_line("benchmarks.integrations", sys.argv[1:] if argv is None else argv)
    return args


@dataclass(frozen=True)
class Case:
    """A model, its inputs, and how its rows call it.

    Attributes:
        name: of the model.
        model: to be measured.
        inputs: arguments of its ``forward``.
        resolution: pixels.
        batch: samples.
        autocast: dtype of ``torch.autocast``; None if the weights have the dtype of the rows.
    """

    name: str
    model: nn.Module
    inputs: dict
    resolution: int
    batch: int
    autocast: torch.dtype | None = None

    def forward(self) -> tuple[dict[str, Tensor], list[Tensor]]:
        """A forward pass."""
        return forward(self.model, self.inputs, self.autocast)

    def both(self) -> dict[str, Tensor]:
        """A forward and backward pass."""
        return backward(*self.forward())

    def run(self) -> Results:
        """What a forward and backward pass gives."""
        return run(self.model, self.inputs, self.autocast)


def build(args: argparse.Namespace) -> Case:
    """The model that the arguments ask for.

    Raises:
        ValueError: there is none of that name, or it cannot be imported.
    """
    tiny = args.size == "tiny"
    given = {"batch": args.batch, "frames": args.frames, "text": args.text}
    given |= {"height": args.side, "width": args.side}
    given = {name: value for name, value in given.items() if value is not None}
    sizes = replace(TINY if tiny else DEFAULT, **given)
    if args.checkout:
        # latents of 256 pixels, unless asked otherwise
        stride = checkouts.recognise(args.checkout).stride
        side = args.side or (4 if tiny else 256 // stride)
        name, model, inputs = checkouts.build(
            args.checkout,
            None if tiny else args.model,
            side,
            sizes.batch,
            args.device,
            args.layers,
        )
        autocast = None if args.dtype == torch.float32 else args.dtype
        return Case(name, model, inputs, stride * side, sizes.batch, autocast)
    layers = args.layers
    if layers is None and not tiny:
        layers = 4
    model, inputs = diffusers_models.build(
        args.model, tiny, sizes, args.device, args.dtype, layers or None
    )
    name = f"{args.model}, {args.size}" + (f", {layers} layers" if layers else "")
    return Case(name, model, inputs, 8 * sizes.height, sizes.batch)


class Judge:
    """Says whether a program computes what the model does.

    Args:
        case: its model is not compiled yet.
        dtype: of the programs.
    """

    def __init__(self, case: Case, dtype: torch.dtype):
        self.dtype = dtype
        self.eager = case.run()
        try:
            self.truth = run(*in_dtype(case.model, case.inputs, TRUTHS[dtype]))
        # some models fix the dtype of a part
        except RuntimeError as error:
            reason = str(error).partition("\n")[0][:100]
            print(f"no truth in {TRUTHS[dtype]}, eager is taken for it: {reason}")
            self.truth = None

    def difference(self, results: Results) -> float:
        """From eager, relative to the size of the result."""
        return difference(results, self.eager)

    def complaint(self, results: Results) -> str | None:
        """What is wrong with the results, or None."""
        if self.truth is None:
            largest = self.difference(results)
            # written so that NaN is an error as well
            if not largest <= LARGEST[self.dtype]:
                return f"differs from eager by {largest:.1e}"
            return None
        ours = distance(results, self.truth)
        theirs = distance(self.eager, self.truth)
        if not ours <= 2 * theirs + SLACK[self.dtype]:
            return f"is {ours:.1e} from the truth, eager {theirs:.1e}"
        return None


def compile_variant(model: nn.Module, variant: str, then: str, per_token: bool = False) -> None:
    """Make the model the program of that name, in place.

    ``per_token``: ours replaces patterns with a vector per token whatever ``then`` is.
    """
    torch._dynamo.reset()
    integrations.undo(model)
    if variant == "compile":
        model.compile(dynamic=False)
    elif variant == "ours":
        options = {"options": {"vectors_per_token": True}} if per_token else {}
        integrations.compile(model, then=then, dynamic=False, **options)


def time_variant(case: Case, device: str, budget: float) -> dict[str, dict]:
    """``{pass: fields of its row}``"""
    steps: dict[str, Callable] = {"forward": Case.forward, "both": Case.both}
    unchanged = lambda case: case
    fields = {}
    for which in PASSES:
        timed = steps[which]
        ms = milliseconds([case], unchanged, timed, device, budget)
        peak = peak_bytes(case, unchanged, timed, device)
        fields[which] = {"ms": ms, "peak_bytes": peak}
    return fields


def host_milliseconds(case: Case) -> float:
    """What the host needs to start a forward and backward pass. If that is longer than the device
    needs to run it, the device waits.
    """
    times = []
    for _ in range(3):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        case.both()
        times.append(1e3 * (time.perf_counter() - begin))
    torch.cuda.synchronize()
    return min(times)


def kernels_of(case: Case, longest: int) -> str:
    """What the host and the longest kernels of a forward and backward pass take, in lines."""
    try:
        kernels, idle = kernel_times(lambda i: case.both(), range(2), True)
        host = host_milliseconds(case)
    # the times that have been measured must not be lost
    except Exception as error:
        return f"{'':8} no kernels: {type(error).__name__}: {str(error)[:200]}"
    lines = [f"{'':8} host {host:.3f} ms, idle device {idle:.3f} ms"]
    for name, ms in itertools.islice(kernels.items(), longest):
        lines.append(f"{'':8} {ms:8.3f} ms  {name[:110]}")
    return "\n".join(lines)


def run_variant(case: Case, judge: Judge, variant: str, args: argparse.Namespace) -> dict | None:
    """Check a program, then time it. The first pass compiles it.

    Returns:
        ``{pass: fields}``; None if it is wrong or cannot run.
    """
    try:
        begin = time.perf_counter()
        compile_variant(case.model, variant, args.then, args.per_token)
        results = case.run()
        seconds = time.perf_counter() - begin
        complaint = judge.complaint(results)
        difference_from_eager = judge.difference(results)
        fields = None if complaint else time_variant(case, args.device, args.budget)
    # a compiler that fails, or too little memory, must not end the run
    except Exception as error:
        reason = str(error).strip().partition("\n")[0][:200]
        print(f"{variant:8} cannot run: {type(error).__name__}: {reason}")
        return None
    if fields is None:
        print(f"{variant:8} RED: {complaint}")
        return None
    line = f"{variant:8} forward {fields['forward']['ms']:10.3f} ms"
    line += f"   forward and backward {fields['both']['ms']:10.3f} ms"
    if fields["both"]["peak_bytes"] is not None:
        line += f"   peak {fields['both']['peak_bytes'] / 2**30:7.3f} GiB"
    line += f"   first pass {seconds:.1f} s"
    print(f"{line}   largest difference {difference_from_eager:.1e}")
    if args.device == "cuda":
        print(kernels_of(case, args.kernels))
    if variant == "ours":
        counts = integrations.report(case.model).rewrites
        words = ", ".join(f"{kind} {count}" for kind, count in sorted(counts.items()) if count)
        print(f"{'':8} put in: {words or 'nothing'}")
    return fields


def run_untimed(case: Case, variant: str, args: argparse.Namespace) -> bool:
    """Run a program once. Returns whether it ran."""
    try:
        compile_variant(case.model, variant, args.then, args.per_token)
        case.both()
    except Exception as error:
        print(f"{variant:8} cannot run: {type(error).__name__}: {str(error)[:200]}")
        return False
    return True


def speedups(measured: dict[str, dict]) -> str:
    """How many times as long as ours the others take, forward and backward."""
    ms = {variant: fields["both"]["ms"] for variant, fields in measured.items()}
    ours = ms.pop("ours")
    return "  ".join(f"{rival} {time / ours:.2f}x" for rival, time in ms.items())


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0, or 1 if ours was wrong or failed, or 2 for bad arguments or without a GPU."""
    args = parse(argv)
    if args.list:
        print("\n".join(RECIPES))
        return 0
    if args.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: --device cpu runs tiny models", file=sys.stderr)
        return 2
    # the truth is not computed in TF32
    torch.backends.cudnn.allow_tf32 = False
    try:
        case = build(args)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    where = environment(args.device, args.command)
    print(where["device"], where["versions"], where["commit"])
    dtype = str(args.dtype).removeprefix("torch.")
    print(f"{case.name}, {case.resolution} px, batch {case.batch}, {dtype}")
    if args.device == "cpu":
        print("on a CPU ours runs the references, and its times say nothing about the kernels")
    if args.untimed:
        ran = [run_untimed(case, variant, args) for variant in args.variants]
        return 0 if all(ran) else 1
    judge = Judge(case, args.dtype)
    if args.device == "cuda":
        # what the truth took
        torch.cuda.empty_cache()
    file = RowFile(args.json, where)
    measured = {}
    for variant in args.variants:
        fields = run_variant(case, judge, variant, args)
        # rows of a wrong program have no time
        for which in PASSES:
            row = {"name": which, "variant": variant, "model": case.name, "dtype": dtype}
            row |= {"resolution": case.resolution, "batch": case.batch}
            file.add(make_row(kind="model", **where, **row, **(fields or {}).get(which, {})))
        if fields is not None:
            measured[variant] = fields
        if args.device == "cuda":
            torch.cuda.empty_cache()
    if len(measured) == len(args.variants) > 1 and "ours" in measured:
        print(f"forward and backward, times ours: {speedups(measured)}")
    print(f"{len(file.rows)} rows in {os.path.relpath(file.path)}")
    return 1 if "ours" in args.variants and "ours" not in measured else 0


if __name__ == "__main__":
    sys.exit(main())
