"""Timing of one call with a cold L2, its peak memory, and the ceilings that it is compared with."""

import math
import os
import statistics
import time
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

# no GPU runs faster than 2 GHz under load, so sleeping for this many cycles takes at least a second
CYCLES_PER_SECOND = 2_000_000_000
# the longest sleep, a tenth of a second at least. A host that needs longer than that is measured with the device
MOST_CYCLES = CYCLES_PER_SECOND // 10


def make_randn(seed: int, device: str) -> Callable[..., Tensor]:
    """``randn(*size, dtype=torch.float32)`` with its own generator. Draws are fp32, then rounded to the dtype."""
    generator = torch.Generator(device).manual_seed(seed)

    def randn(*size, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*size, generator=generator, device=device).to(dtype)

    return randn


def nvidia_smi() -> list[str]:
    """The beginning of a command that asks the driver about the GPU of this process only."""
    program = "nvidia-smi"
    if not torch.cuda.is_available():
        return [program]
    device = torch.cuda.current_device()
    # older versions of torch do not have it
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    if uuid is not None:
        return [program, "-i", "GPU-" + str(uuid).removeprefix("GPU-")]
    # the driver numbers all GPUs, torch only those that are visible
    if "CUDA_VISIBLE_DEVICES" not in os.environ:
        return [program, "-i", str(device)]
    return [program]


def num_sets(inputs: tuple, device: str) -> int:
    """How many sets of inputs to rotate, so that none is still in L2 when its turn comes."""
    if device == "cpu":
        return 2
    size = sum(x.nbytes for x in tree_leaves(inputs))
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    # inputs of more than 16 times L2 evict their own beginning
    if size > 16 * l2:
        return 1
    # more than 48 sets would fill the launch queue; the outputs, which are kept as well, evict L2 then
    return min(2 + math.ceil(2 * l2 / size), 48)


def milliseconds(
    sets: list, set_up: Callable, timed: Callable, device: str, budget_s: float
) -> float:
    """Median time of ``timed(set_up(x))`` over the sets in turn, without the time of ``set_up``.

    Args:
        sets: arguments of ``set_up``, used in rotation.
        set_up: runs before the clock starts.
        timed: what is timed.
        device: "cuda" for the device's clock, "cpu" for the host's.
        budget_s: seconds to spend on repetitions; at least three are made.

    Returns:
        Milliseconds of one call.
    """
    measure = _device_ms if device == "cuda" else _host_ms
    return measure(sets, set_up, timed, budget_s)


def _host_ms(sets: list, set_up: Callable, timed: Callable, budget_s: float) -> float:
    # warm-up
    timed(set_up(sets[0]))
    times = []
    deadline = time.perf_counter() + budget_s
    while len(times) < 3 or (len(times) < 30 and time.perf_counter() < deadline):
        state = set_up(sets[len(times) % len(sets)])
        begin = time.perf_counter()
        timed(state)
        times.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times)


def _device_ms(sets: list, set_up: Callable, timed: Callable, budget_s: float) -> float:
    """Device time of one call, from the time of a round over all sets.

    In a round the calls follow each other as in a training step. So launch gaps are included, and the
    cost of two events per call is not. The device sleeps until the whole round is queued: otherwise it
    would wait for the host, whose time a training step hides. A round in which it woke too early does not
    count, and the next sleep is longer.
    """
    # warm-up: compiles, autotunes and fills the allocator
    for x in sets[:3] * 3:
        timed(set_up(x))

    # the host's time for one round gives the length of the sleep
    states = [set_up(x) for x in sets]
    torch.cuda.synchronize()
    host_begin = time.perf_counter()
    outputs = deque((timed(state) for state in states), maxlen=len(sets))
    host_seconds = time.perf_counter() - host_begin
    sleep_cycles = min(int(1.5 * host_seconds * CYCLES_PER_SECOND) + 200_000, MOST_CYCLES)
    states.clear()

    times = []
    deadline = time.perf_counter() + budget_s
    while len(times) < 3 or (len(times) < 200 and time.perf_counter() < deadline):
        states = [set_up(x) for x in sets]
        begin = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(sleep_cycles)
        begin.record()
        while states:
            # outputs are kept for a round: memory that is reused at once would still be in L2
            outputs.append(timed(states.pop(0)))
        end.record()
        too_early = begin.query() and sleep_cycles < MOST_CYCLES
        torch.cuda.synchronize()
        if too_early:
            sleep_cycles = min(2 * sleep_cycles, MOST_CYCLES)
            continue
        times.append(begin.elapsed_time(end) / len(sets))
    return statistics.median(times)


def peak_bytes(x, set_up: Callable, timed: Callable, device: str) -> int | None:
    """Device memory that one call needs on top of what is allocated when it starts; None on a CPU."""
    if device == "cpu":
        return None
    state = set_up(x)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    timed(state)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def copy_bandwidth(device: str) -> tuple[float, float]:
    """Milliseconds and GB/s (bytes read plus bytes written) of a copy much larger than the caches."""
    size = 1 << (30 if device == "cuda" else 25)
    # random bytes: constant memory may be compressed on its way
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source).random_()
    ms = milliseconds([0], lambda x: x, lambda x: target.copy_(source), device, 0.5)
    return ms, 2 * size / ms / 1e6


def matmul_rate(device: str, dtype: torch.dtype) -> tuple[float, float]:
    """Milliseconds and TFLOP/s of a large square matrix product of random numbers."""
    n = 8192 if device == "cuda" else 512
    a = make_randn(0, device)(n, n, dtype=dtype)
    b = make_randn(1, device)(n, n, dtype=dtype)
    ms = milliseconds([0], lambda x: x, lambda x: a @ b, device, 0.5)
    return ms, 2 * n**3 / ms / 1e9
