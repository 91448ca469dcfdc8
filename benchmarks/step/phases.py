"""Times of steps and of their phases, with events around functions; no synchronisation within a step."""

import functools
import time
from collections.abc import Callable
from itertools import pairwise

import torch


class HostEvent:
    """The part of ``torch.cuda.Event`` that is used here, on the host's clock."""

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, later: "HostEvent") -> float:
        """Milliseconds from this event to a later one."""
        return 1e3 * (later.at - self.at)


def recorded(cuda: bool):
    """An event that has just been recorded."""
    event = torch.cuda.Event(enable_timing=True) if cuda else HostEvent()
    event.record()
    return event


def time_steps(step: Callable[[int], None], steps: range, cuda: bool) -> list[float]:
    """Milliseconds of every ``step(i)``, on the device's clock if ``cuda``."""
    events = [recorded(cuda)]
    for i in steps:
        step(i)
        events.append(recorded(cuda))
    # events can be read only after they have happened
    if cuda:
        torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in pairwise(events)]


def time_host(step: Callable[[int], None], steps: range) -> list[float]:
    """Milliseconds until ``step(i)`` returns, on an idle GPU.

    If the host runs ahead of the device this is less than the time of the step.
    """
    times = []
    for i in steps:
        torch.cuda.synchronize()
        begin = recorded(cuda=False)
        step(i)
        times.append(begin.elapsed_time(recorded(cuda=False)))
    return times


class Phases:
    """Times of functions inside a step.

    Args:
        cuda: whether the device's clock counts, or the host's.
    """

    def __init__(self, cuda: bool):
        self.cuda = cuda
        # phase to the [begin, end] events of its calls
        self.spans: dict[str, list[list]] = {}

    def around(self, owner: object, attribute: str, name: str) -> None:
        """Time every later call of ``owner.attribute`` as part of the phase ``name``."""
        function = getattr(owner, attribute)

        @functools.wraps(function)
        def timed(*args, **kw):
            begin = recorded(self.cuda)
            out = function(*args, **kw)
            self.spans.setdefault(name, []).append([begin, recorded(self.cuda)])
            return out

        setattr(owner, attribute, timed)

    def measure(self, step: Callable[[int], None], steps: range) -> dict[str, float]:
        """Mean milliseconds per step of each phase.

        The optimizer's phase lasts to the end of the step. The teacher runs inside the forward phase,
        so its time is subtracted there.
        """
        for i in steps:
            step(i)
            # replaces the end of the last optimizer call
            self.spans["optimizer"][-1][1] = recorded(self.cuda)
        if self.cuda:
            torch.cuda.synchronize()
        ms = {}
        for name, spans in self.spans.items():
            ms[name] = sum(begin.elapsed_time(end) for begin, end in spans) / len(steps)
        if "forward" in ms:
            ms["forward"] -= ms.get("teacher", 0.0)
        return ms
