"""Where the time of a step goes: by phase, with events around functions, and by family of kernels, with the profiler."""

import functools
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parents[1]


class HostEvent:
    """The part of torch.cuda.Event that is used here, on the host's clock."""

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, later: "HostEvent") -> float:
        return 1e3 * (later.at - self.at)


def recorded(cuda: bool):
    event = torch.cuda.Event(enable_timing=True) if cuda else HostEvent()
    event.record()
    return event


def time_steps(step: Callable[[int], None], steps: range, cuda: bool) -> list[float]:
    """Milliseconds of every ``step(i)``: on the device, without a synchronisation in between."""
    events = [recorded(cuda)]
    for i in steps:
        step(i)
        events.append(recorded(cuda))
    if cuda:
        torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in pairwise(events)]


def time_host(step: Callable[[int], None], steps: range) -> list[float]:
    """Milliseconds until ``step(i)`` returns, on an idle GPU: less than the step's own where the host runs ahead of the device."""
    times = []
    for i in steps:
        torch.cuda.synchronize()
        begin = recorded(cuda=False)
        step(i)
        times.append(begin.elapsed_time(recorded(cuda=False)))
    return times


class Phases:
    """Times of functions inside a step, on the device.

    Args:
        cuda: whether the device's clock counts, or the host's.
    """

    def __init__(self, cuda: bool):
        self.cuda, self.spans = cuda, {}

    def around(self, owner: object, attribute: str, name: str) -> None:
        """Time every call of ``owner.attribute`` from now on."""
        function = getattr(owner, attribute)

        @functools.wraps(function)
        def timed(*args, **kw):
            begin = recorded(self.cuda)
            out = function(*args, **kw)
            self.spans.setdefault(name, []).append([begin, recorded(self.cuda)])
            return out

        setattr(owner, attribute, timed)

    def measure(self, step: Callable[[int], None], steps: range) -> dict[str, float]:
        """Mean milliseconds per step of each phase.  The optimizer's lasts to the end of the step; the teacher's, if it is one,
        is taken from the forward."""
        for i in steps:
            step(i)
            self.spans["optimizer"][-1][1] = recorded(self.cuda)
        if self.cuda:
            torch.cuda.synchronize()
        ms = {
            name: sum(begin.elapsed_time(end) for begin, end in spans) / len(steps)
            for name, spans in self.spans.items()
        }
        if "forward" in ms:
            ms["forward"] -= ms.get("teacher", 0.0)
        return ms


@functools.cache
def our_kernels() -> frozenset[str]:
    """Names of the Triton kernels of this repository."""
    texts = (path.read_text() for path in (ROOT / "kernels").glob("*.py"))
    return frozenset(
        name for text in texts for name in re.findall(r"@triton\.jit[^\n]*\ndef (\w+)\(", text)
    )


# the first family whose pattern is found in a kernel's (on a CPU: an operator's) name has it
FAMILIES = {
    "communication": r"nccl|gloo|c10d|all_?reduce|all_?gather|reduce_?scatter",
    "attention": r"flash|fmha|attention|sdpa",
    "optimizer": r"adam|multi_tensor_apply|foreach|lerp",
    "matmul": r"gemm|nvjet|cutlass|xmma|triton_tem|conv|::(add|ba)?b?mm\b|matmul|dot_kernel",
    "compiled": r"^triton_|inductor|compiledf",
    "copy": r"memcpy|memset|copy",
}


def family(kernel: str) -> str:
    """ "ours" with the kernel's name, a key of ``FAMILIES``, or "other"."""
    if kernel in our_kernels() or "sra_fast" in kernel:
        return f"ours: {kernel}"
    return next(
        (name for name, pattern in FAMILIES.items() if re.search(pattern, kernel, re.IGNORECASE)),
        "other",
    )


def kernel_times(step: Callable[[int], None], steps: range, cuda: bool) -> dict[str, float]:
    """Milliseconds per step of every kernel (on a CPU: every operator), the longest first."""
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as run:
        for i in steps:
            step(i)
        if cuda:
            torch.cuda.synchronize()
    times = Counter(dict(_self_times(run, DeviceType.CUDA if cuda else DeviceType.CPU)))
    return {name: us / 1e3 / len(steps) for name, us in times.most_common()}


def _self_times(run: profile, kind: DeviceType) -> Iterator[tuple[str, float]]:
    for event in run.key_averages():
        # an operator's row repeats the time of its kernels, which have rows of their own
        if event.device_type == kind:
            us = (
                event.self_device_time_total
                if kind == DeviceType.CUDA
                else event.self_cpu_time_total
            )
            if us > 0:
                yield event.key, us


def by_family(kernels: dict[str, float]) -> dict[str, float]:
    times = Counter()
    for name, ms in kernels.items():
        times[family(name)] += ms
    return dict(times.most_common())
