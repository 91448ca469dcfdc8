"""The device's time for a call, to choose between implementations while a program runs."""

from collections.abc import Callable

import torch

# cycles that keep the device busy while a round of calls is queued: 20 ms at 2 GHz
_BUSY_CYCLES = 40_000_000


def milliseconds(run: Callable[[], object], calls: int = 10, rounds: int = 3) -> float:
    """Device time of one call of ``run``: the median of ``rounds``, after three unmeasured calls.

    The host takes longer for a call than the device. The device therefore waits until all calls of
    a round are queued; otherwise the host's time would be measured.
    """
    for _ in range(3):
        run()
    times = []
    for _ in range(rounds):
        begin = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        # the device spins while the host queues the calls
        torch.cuda._sleep(_BUSY_CYCLES)
        begin.record()
        for _ in range(calls):
            run()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / calls)
    return sorted(times)[rounds // 2]
