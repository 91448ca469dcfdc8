"""Measure one variant of a training step in this process: build, time and profile it, and release it."""

import argparse
import contextlib
import gc
import itertools
import math
import os
import statistics
import time
from collections.abc import Iterator

import torch

from benchmarks.record import VARIABLES
from benchmarks.step.kernel_families import by_family, kernel_times
from benchmarks.step.phases import Phases, recorded, time_host, time_steps
from benchmarks.step.steps import make_step
from benchmarks.step.variants import Variant
from benchmarks.timing import copy_bandwidth, matmul_rate
from sra_fast.config.schema import Config
from sra_fast.training.flops import training_flops
from sra_fast.training.logger import peak_flops
from sra_fast.utils.cuda_graph import hidden_bytes
from sra_fast.zero.deepspeed_names import restore_linear
from sra_fast.zero.process_group import init_distributed

# device memory that a case may leave behind for the next one: what libraries keep (256 MiB)
LEFT_BYTES = 1 << 28
# steps for the median of the host's time
HOST_STEPS = 5
# fewer steps give no useful median
LEAST_STEPS = 8
LONGEST_KERNELS = 40
DTYPES = {"bf16": "bfloat16", "fp32": "float32"}


def rates(cfg: Config, device: torch.device, ms: float) -> dict:
    """Images per second, FLOP/s, and MFU where the device's peak is known.

    ``mfu`` counts three passes of the student. ``mfu_with_teacher`` and ``flops_per_s`` also count the
    projection head and the truncated teacher.
    """
    images_per_s = 1e3 * cfg.train.global_batch / ms
    plain, aligned = training_flops(cfg)
    found = {"images_per_s": images_per_s}
    peak = peak_flops(device, cfg.train.precision, cfg.train.tf32)
    if peak:
        found["mfu"] = images_per_s * plain / peak
        found["mfu_with_teacher"] = images_per_s * aligned / peak
    found["flops_per_s"] = images_per_s * aligned
    return found


def profile_step(run, first: int, steps: int, cuda: bool) -> dict:
    """Milliseconds per step of kernel families (``kernels``), of the longest kernels, of the phases, and of the
    ``idle`` device.

    Args:
        run: what ``make_step`` returned.
        first: number of the first step; twice as many as ``steps`` are run.
        steps: to profile, and again to time the phases of.
        cuda: whether the device's clock counts.
    """
    kernels, idle = kernel_times(run.step, range(first, first + steps), cuda)
    families = by_family(kernels)
    phases = Phases(cuda)
    for owner, attribute, name in run.phases:
        phases.around(owner, attribute, name)
    times = phases.measure(run.step, range(first + steps, first + 2 * steps))
    # all of it, whether the backward pass hides it or not
    times["communication"] = families.get("communication", 0.0)
    longest = dict(itertools.islice(kernels.items(), LONGEST_KERNELS))
    idle_times = {} if idle is None else {"device": idle}
    return {"kernels": families, "longest": longest, "phases": times, "idle": idle_times}


@contextlib.contextmanager
def environment_of(variant: Variant) -> Iterator[None]:
    """Meanwhile the variant's variables are set: operators read them when they are called or traced.

    Those of the shell do not count: a row would not show them.
    """
    before = dict(os.environ)
    for name in VARIABLES:
        os.environ.pop(name, None)
    os.environ.update(variant.environment)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def handle(args: argparse.Namespace, request: list) -> dict:
    """The answer to a request of the parent process: the ceilings, or a variant of a case.

    Args:
        args: of ``train_step``.
        request: variant or "ceilings", then model, resolution, batch, and whether to profile.
    """
    name, *case, profile = request
    if name == "ceilings":
        return ceilings(args.device)
    variant = Variant.parse(name)
    with environment_of(variant):
        return measure_variant(args, variant, tuple(case), profile)


def release(cuda: bool) -> bool:
    """Release what the last case held.

    Returns:
        Whether the next case finds this process as good as new. It does not if a kernel has broken the
        CUDA context or memory is still held (a ZeRO-3 engine cannot be released).
    """
    restore_linear()
    torch._dynamo.reset()
    gc.collect()
    if not cuda:
        return True
    try:
        torch.cuda.synchronize()
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
        # after a failed capture random numbers fail in every later call
        torch.rand(1, device="cuda")
    except RuntimeError:
        return False
    return torch.cuda.memory_allocated() <= LEFT_BYTES


def measure_variant(
    args: argparse.Namespace, variant: Variant, case: tuple[str, int, int], profile: bool
) -> dict:
    """Everything that is measured of one variant of a case (model, resolution, batch)."""
    cfg = variant.configuration(*case, args.device)
    device = init_distributed(cfg.train.tf32)
    begin = recorded(cuda=False)
    # the little that earlier cases have left does not count
    left = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    run = make_step(variant, cfg, device, args.published)
    try:
        return time_run(args, run, cfg, device, begin, left, profile)
    finally:
        if hasattr(run, "close"):
            run.close()


def time_run(
    args: argparse.Namespace,
    run,
    cfg: Config,
    device: torch.device,
    begin,
    left: int,
    profile: bool,
) -> dict:
    """Times, rates, memory and profile of a built step.

    Args:
        args: of ``train_step``.
        run: what ``make_step`` returned.
        cfg: its configuration.
        device: it runs on.
        begin: event at the start of building.
        left: bytes that were allocated before building.
        profile: whether to profile it.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    cuda = device.type == "cuda"
    host = {}
    # the first step compiles and allocates
    time_steps(run.step, range(min(args.warmup, 1)), cuda)
    if args.warmup:
        host["start-up"] = begin.elapsed_time(recorded(cuda=False))
    if args.untimed:
        time_steps(run.step, range(1, 2), cuda)
        return {}

    warm = time_steps(run.step, range(1, args.warmup), cuda)
    end = args.warmup + steps_within(args.seconds, args.steps, warm)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    wall_begin = time.time()
    ms = statistics.median(time_steps(run.step, range(args.warmup, end), cuda))
    found = {"ms": ms, "when": [wall_begin, time.time()], "host": host}
    found |= rates(cfg, device, ms)

    found["peak_bytes"] = None
    if cuda:
        # memory of CUDA graphs is not in the allocator's count
        found["peak_bytes"] = torch.cuda.max_memory_allocated() + hidden_bytes() - left
        host["step"] = statistics.median(time_host(run.step, range(end, end + HOST_STEPS)))
    found["dtype"] = getattr(run, "dtype", DTYPES[cfg.train.precision])
    found["loss"] = float(run.loss_sum)
    if not math.isfinite(found["loss"]):
        raise FloatingPointError(
            f"the loss is {found['loss']}: no time of a wrong step is reported"
        )
    if args.profile and profile:
        try:
            found |= profile_step(run, end + HOST_STEPS, args.profile, cuda)
        # the time is worth having even where the machine does not allow profiling
        except RuntimeError as error:
            found["note"] = f"neither phases nor kernels: {error}".partition("\n")[0]
    return found


def steps_within(seconds: float, steps: int, warm: list[float]) -> int:
    """How many steps to time: all, or at least 8 as far as the seconds last.

    Args:
        seconds: for all timed steps.
        steps: that were asked for.
        warm: milliseconds of warm-up steps; the last one counts.
    """
    if not warm or seconds == math.inf:
        return steps
    return min(steps, max(LEAST_STEPS, int(1e3 * seconds / warm[-1])))


def ceilings(device: str) -> dict:
    """What a copy and a matrix product reach: ``{name: [ms, GB/s or TFLOP/s]}``."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return {"copy": copy_bandwidth(device), "matmul": matmul_rate(device, dtype)}
