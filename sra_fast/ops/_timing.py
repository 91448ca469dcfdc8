"""The device's time for a call, to choose between implementations while a program runs."""

from collections.abc import Callable

import torch

# cycles that keep the device busy while a round of calls is queued: 20 ms at 2 GHz, and at most 160
_BUSY_CYCLES = 40_000_000
_MOST_BUSY_CYCLES = 8 * _BUSY_CYCLES


def milliseconds(run: Callable[[], object], calls: int = 10, rounds: int = 3) -> float:
    """Device time of one call of ``run``: the median of ``rounds``, after three unmeasured calls.

    The host takes longer for a call than the device. The device therefore waits until all calls of
    a round are queued; otherwise the host's time would be measured. A round in which it began too
    early is repeated with a longer wait.
    """
    for _ in range(3):
        run()
    times = []
    busy = _BUSY_CYCLES
    while len(times) < rounds:
        begin = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        # the device spins while the host queues the calls
        torch.cuda._sleep(busy)
        begin.record()
        for _ in range(calls):
            run()
        end.record()
        too_early = begin.query() and busy < _MOST_BUSY_CYCLES
        torch.cuda.synchronize()
        if too_early:
            busy *= 2
            continue
        times.append(begin.elapsed_time(end) / calls)
    return sorted(times)[rounds // 2]
