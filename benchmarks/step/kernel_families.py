"""Which kernels a step spends its time in, from torch's profiler, and the family of each kernel."""

import functools
import re
from collections import Counter
from collections.abc import Callable

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.record import ROOT

# a kernel (on a CPU: an operator) belongs to the first family whose pattern its name matches
FAMILIES = {
    "communication": r"nccl|gloo|c10d|all_?reduce|all_?gather|reduce_?scatter",
    "attention": r"flash|fmha|attention|sdpa",
    "optimizer": r"adam|multi_tensor_apply|foreach|lerp",
    "matmul": r"gemm|nvjet|cutlass|xmma|triton_tem|conv|::(add|ba)?b?mm\b|matmul|dot_kernel",
    "compiled": r"^triton_|inductor|compiledf",
    "copy": r"memcpy|memset|copy",
}


@functools.cache
def our_kernels() -> frozenset[str]:
    """Names of this repository's Triton kernels."""
    names = set()
    for path in (ROOT / "kernels").glob("*.py"):
        names.update(re.findall(r"@triton\.jit[^\n]*\ndef (\w+)\(", path.read_text()))
    return frozenset(names)


def family(kernel: str) -> str:
    """``ours: <kernel>``, a key of ``FAMILIES``, or "other"."""
    if kernel in our_kernels() or "sra_fast" in kernel:
        return f"ours: {kernel}"
    for name, pattern in FAMILIES.items():
        if re.search(pattern, kernel, re.IGNORECASE):
            return name
    return "other"


def idle_time(spans: list[tuple[float, float]]) -> float:
    """Time between the first begin and the last end in which none of the ``(begin, end)`` runs."""
    idle = 0.0
    reached = min((begin for begin, _ in spans), default=0.0)
    for begin, end in sorted(spans):
        idle += max(0.0, begin - reached)
        reached = max(reached, end)
    return idle


def kernel_times(
    step: Callable[[int], None], steps: range, cuda: bool
) -> tuple[dict[str, float], float | None]:
    """Milliseconds per step of every kernel (on a CPU: every operator), the longest first; and of
    the time in which the device runs none (on a CPU: None).
    """
    activity = ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        for i in steps:
            step(i)
        if cuda:
            torch.cuda.synchronize()

    times = Counter()
    wanted = DeviceType.CUDA if cuda else DeviceType.CPU
    for event in profiler.key_averages():
        # an operator's row repeats the time of its kernels, which have rows themselves
        if event.device_type != wanted:
            continue
        us = event.self_device_time_total if cuda else event.self_cpu_time_total
        if us > 0:
            times[event.key] = us
    per_step = {name: us / 1e3 / len(steps) for name, us in times.most_common()}
    if not cuda:
        return per_step, None
    spans = [
        (event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == wanted
    ]
    return per_step, idle_time(spans) / 1e3 / len(steps)


def by_family(kernels: dict[str, float]) -> dict[str, float]:
    """Milliseconds of every family, the longest first."""
    times = Counter()
    for name, ms in kernels.items():
        times[family(name)] += ms
    return dict(times.most_common())
