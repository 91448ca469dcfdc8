"""Batches that are read ahead by processes, which outlive the signals that stop a run.

Launchers and schedulers send their signals to every process that they find, and the training
process still needs batches on the way to its last checkpoint. It alone says when loader processes
end.
"""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from sra_fast.data.order import ShuffledBatches
from sra_fast.data.training_data import TrainingData

# how long a loader process that was told to end may need: one that waits for work ends at once
GRACE = 1.0
# after this time it is killed: it is in a library's call that lets no other thread run
STUCK = 3.0
# how often a loader process looks whether the training process is there
LOOK_EVERY = 1.0

# this process's ends of the pipes to loader processes
_open_ends: set[int] = set()


def _as_is(batch):
    # a data set's __getitems__ makes whole batches
    return batch


class Batches(Iterator[tuple[Tensor, ...]]):
    """The batches of a data set in the order of ``order``. A context manager.

    Args:
        data: read by the loader processes; by this one if it is in memory.
        order: which images make a batch.
        num_workers: loader processes; at most one per CPU.
        cuda: pin the batches.
    """

    def __init__(self, data: TrainingData, order: ShuffledBatches, num_workers: int, cuda: bool):
        workers = 0 if data.in_memory else min(num_workers, len(os.sched_getaffinity(0)))
        # nothing is written: loader processes see the end of the pipe when this one closes it
        read, write = os.pipe()
        _open_ends.add(write)
        processes: list[BaseProcess] = []
        # each runs once: when it is called, when nobody refers to the batches, or at exit, there
        # before Python waits for its child processes
        self._tell = Finalize(self, _close_end, (write,), exitpriority=0)
        self._end = Finalize(self, _end, (self._tell, processes), exitpriority=0)
        others = multiprocessing.active_children()
        try:
            loader = DataLoader(
                data,
                batch_sampler=order,
                num_workers=workers,
                collate_fn=_as_is,
                pin_memory=cuda,
                worker_init_fn=partial(_begin, os.getpid(), read),
                # they have to inherit the pipe
                multiprocessing_context="fork" if workers else None,
                generator=torch.Generator(),
            )
            self._batches = iter(loader)
        finally:
            os.close(read)
            processes += [p for p in multiprocessing.active_children() if p not in others]

    def __next__(self) -> tuple[Tensor, ...]:
        return next(self._batches)

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def close(self) -> None:
        """End the loader processes, and wait for that; there are no batches afterwards."""
        self._tell()
        # if no traceback refers to PyTorch's iterator, this ends those that wait for work
        self._batches = iter(())
        self._end()


def _close_end(write: int) -> None:
    """Tell loader processes to end."""
    _open_ends.remove(write)
    os.close(write)


def _end(tell: Callable[[], None], processes: Sequence[BaseProcess]) -> None:
    """End loader processes, and wait for that."""
    tell()
    until = time.monotonic() + STUCK
    for process in processes:
        process.join(max(0.0, until - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()


def _begin(parent: int, read: int, worker: int) -> None:
    """What a loader process does first: leave it to its parent when it ends.

    Not by a signal: one that is ignored is lost, and one that is not can end this process by any
    thread that a library has started. So all are ignored, and a pipe tells.
    """
    # copies, also of other loaders' pipes, which have an end only when all copies are closed
    for write in _open_ends:
        os.close(write)
    arguments = (parent, read)
    threading.Thread(target=_end_with, args=arguments, name="parent", daemon=True).start()
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    # the training process's, copied by the fork
    signal.set_wakeup_fd(-1)


def _end_with(parent: int, read: int) -> None:
    """End this process when its parent asks for that or is gone."""
    while os.getppid() == parent:
        if wait([read], LOOK_EVERY):
            # PyTorch may end it in an orderly way
            time.sleep(GRACE)
            break
    os._exit(0)
