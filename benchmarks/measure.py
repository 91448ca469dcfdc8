"""Checking a variant against the reference, and timing it with a cold L2."""

import contextlib
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator

import torch
from registry import Entry, Shape, random
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

PASSES = ("forward", "backward", "both")
# 1.7-2.0 GHz on today's devices: this many cycles last at least a second
CYCLES_PER_SECOND = 2_000_000_000


def as_tuple(out) -> tuple:
    return out if isinstance(out, tuple) else (out,)


def as_leaves(entry: Entry, inputs: tuple) -> tuple:
    """Inputs of a variant's own: leaves that want a gradient where there is one, strides kept."""
    return tuple(
        x.detach().requires_grad_() if i in entry.grads else x for i, x in enumerate(inputs)
    )


def like_outputs(out: tuple, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Random gradients of the outputs, the same for every variant and every dtype of the outputs."""
    randn = random(1, device)
    return [randn(o.shape, dtype=dtype).to(o.dtype) for o in out]


def results(
    entry: Entry, function: Callable, inputs: tuple, dtype: torch.dtype, device: str
) -> list[Tensor]:
    """Everything that a call computes: outputs and gradients, or the inputs that it changed."""
    if entry.written:
        function(*inputs)
        return tree_leaves([inputs[i] for i in entry.written])
    inputs = as_leaves(entry, inputs)
    out = as_tuple(function(*inputs))
    wanted = [inputs[i] for i in entry.grads]
    grads = torch.autograd.grad(out, wanted, like_outputs(out, dtype, device)) if wanted else ()
    return [*(o.detach() for o in out), *grads]


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """new_empty() gives NaN, so that what a kernel leaves unwritten is found."""
    empty = torch.Tensor.new_empty

    def new_empty(self, *shape, **kw):
        t = empty(self, *shape, **kw)
        return (
            t.fill_(float("nan"))
            if t.is_floating_point() and not torch.compiler.is_compiling()
            else t
        )

    torch.Tensor.new_empty = new_empty
    try:
        yield
    finally:
        torch.Tensor.new_empty = empty


def _errors(actual: Tensor, truth: Tensor) -> list[float]:
    """The largest error and the root of the mean square error."""
    difference = actual.float() - truth.float()
    return [
        difference.abs().max().item(),
        (difference.norm() / math.sqrt(difference.numel())).item(),
    ]


class Oracle:
    """The fp32 reference's results for one operator, shape and dtype, and how far plain PyTorch is from them."""

    def __init__(self, entry: Entry, shape: Shape, dtype: torch.dtype, device: str):
        self.entry, self.shape, self.dtype, self.device = entry, shape, dtype, device
        inputs = self.inputs()
        if not entry.written:
            inputs = tree_map_only(Tensor, lambda x: x.float(), inputs)
        self.truth = results(entry, entry.reference, inputs, dtype, device)
        plain = results(entry, entry.eager, self.inputs(), dtype, device)
        self.scale = [_errors(t, torch.zeros_like(t)) for t in self.truth]
        self.plain = [_errors(a, t) for a, t in zip(plain, self.truth, strict=True)]

    def inputs(self, seed: int = 0) -> tuple:
        return self.entry.make(self.shape, self.dtype, random(seed, self.device))

    def complaint(self, function: Callable) -> str | None:
        """What is wrong with a variant; None if nothing is.

        Every result may be twice as far from the truth as plain PyTorch's, and one unit in the last place of the
        largest value more, in the maximum and in the mean square; in fp32 5e-5 of it where there are sums, whose order
        is free, else 4e-6.
        """
        with poisoned():
            actual = results(self.entry, function, self.inputs(), self.dtype, self.device)
        if len(actual) != len(self.truth):
            return f"{len(actual)} results instead of {len(self.truth)}"
        for i, (a, truth, scale, plain) in enumerate(
            zip(actual, self.truth, self.scale, self.plain, strict=True)
        ):
            if a.shape != truth.shape:
                return f"result {i} has shape {[*a.shape]} instead of {[*truth.shape]}"
            slack = max(torch.finfo(a.dtype).eps, 5e-5 if self.entry.grads else 4e-6)
            for error, size, allowed in zip(_errors(a, truth), scale, plain, strict=True):
                # written so that NaN is an error too
                if not error <= 2 * allowed + slack * size:
                    return f"result {i} is off by {error:.2e}, plain PyTorch by {allowed:.2e} (size {size:.2e})"
        return None


def num_sets(inputs: tuple, device: str) -> int:
    """Sets of inputs to rotate so that none is in L2 when its turn comes."""
    if device == "cpu":
        return 2
    size = sum(x.nbytes for x in tree_leaves(inputs))
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    # one pass over 16 times L2 leaves next to nothing of its own beginning; more than 48 sets would fill the queue of
    # launches, and outputs, which stay too, make up for what is missing then
    return 1 if size > 16 * l2 else min(2 + math.ceil(2 * l2 / size), 48)


def steps_of(
    entry: Entry, function: Callable, which: str, dtype: torch.dtype, device: str
) -> tuple:
    """What runs before the clock starts, and what is timed; both take a set of inputs."""
    forward = lambda inputs: as_tuple(function(*inputs))
    if which == "forward":
        return lambda inputs: inputs, forward
    wanted = lambda inputs: [inputs[i] for i in entry.grads]
    douts: list[Tensor] = []

    def gradient(inputs_and_out):
        inputs, out = inputs_and_out
        if not douts:
            douts.extend(like_outputs(out, dtype, device))
        return torch.autograd.grad(out, wanted(inputs), douts)

    if which == "backward":
        return lambda inputs: (inputs, forward(inputs)), gradient
    return lambda inputs: inputs, lambda inputs: gradient((inputs, forward(inputs)))


def milliseconds(
    sets: list, prepare: Callable, timed: Callable, device: str, budget_s: float
) -> float:
    """Median time of ``timed(prepare(x))``, ``prepare`` not counted, over the sets in turn."""
    return (_device_ms if device == "cuda" else _host_ms)(sets, prepare, timed, budget_s)


def _host_ms(sets: list, prepare: Callable, timed: Callable, budget_s: float) -> float:
    timed(prepare(sets[0]))
    times, deadline = [], time.perf_counter() + budget_s
    while len(times) < 3 or (len(times) < 30 and time.perf_counter() < deadline):
        state = prepare(sets[len(times) % len(sets)])
        begin = time.perf_counter()
        timed(state)
        times.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times)


def _device_ms(sets: list, prepare: Callable, timed: Callable, budget_s: float) -> float:
    """Time on the device of one call, of a round over all sets: calls follow each other as in a training step, so that what a
    launch costs beside the one before is in it, and what two events cost is not.  The device sleeps until the round is
    queued, or the time of the host, which a step hides, would be counted."""
    for x in sets[:3] * 3:
        timed(prepare(x))
    states = [prepare(x) for x in sets]
    torch.cuda.synchronize()
    begin = time.perf_counter()
    outputs = deque((timed(state) for state in states), maxlen=len(sets))
    sleep = int(1.5 * (time.perf_counter() - begin) * CYCLES_PER_SECOND) + 200_000
    states.clear()
    times, deadline = [], time.perf_counter() + budget_s
    while len(times) < 3 or (len(times) < 200 and time.perf_counter() < deadline):
        states = [prepare(x) for x in sets]
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(min(sleep, CYCLES_PER_SECOND // 10))
        begin.record()
        while states:
            # held while the other sets run: memory that is used again at once would still be in L2
            outputs.append(timed(states.pop(0)))
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / len(sets))
    return statistics.median(times)


def peak_bytes(x, prepare: Callable, timed: Callable, device: str) -> int | None:
    """Device memory that one call takes beyond what is there when it starts."""
    if device == "cpu":
        return None
    state = prepare(x)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    timed(state)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def copy_bandwidth(device: str) -> tuple[float, float]:
    """Milliseconds and GB/s (read and written) of a copy much larger than the caches."""
    size = 1 << (30 if device == "cuda" else 25)
    source, target = (
        torch.empty(size, dtype=torch.uint8, device=device).random_() for _ in range(2)
    )
    ms = milliseconds([0], lambda x: x, lambda x: target.copy_(source), device, 0.5)
    return ms, 2 * size / ms / 1e6


def matmul_rate(device: str, dtype: torch.dtype) -> tuple[float, float]:
    """Milliseconds and TFLOP/s of a large square product of random numbers."""
    n = 8192 if device == "cuda" else 512
    a, b = (random(seed, device)(n, n, dtype=dtype) for seed in range(2))
    ms = milliseconds([0], lambda x: x, lambda x: a @ b, device, 0.5)
    return ms, 2 * n**3 / ms / 1e9
