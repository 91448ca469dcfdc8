"""Batches that are read ahead by processes, which end with the training process and never before."""

import os
import select
import signal
import threading
import time
import weakref
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from sra_fast.data.order import ShuffledBatches
from sra_fast.data.training_data import TrainingData

# how long a loader process that was told to end may need: one that waits for work ends at once
GRACE = 1.0
# how often a loader process looks whether the training process is there
LOOK_EVERY = 1.0


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
        # nothing is written: loader processes see the end of the pipe when its other end is closed.
        # a finalizer also runs at exit, before Python waits for the loader processes
        read, write = os.pipe()
        self._tell_to_end = weakref.finalize(self, os.close, write)
        loader = DataLoader(
            data,
            batch_sampler=order,
            num_workers=workers,
            collate_fn=_as_is,
            pin_memory=cuda,
            worker_init_fn=partial(_begin, os.getpid(), read, write),
            # they have to inherit the pipe
            multiprocessing_context="fork" if workers else None,
            generator=torch.Generator(),
        )
        try:
            self._batches = iter(loader)
        finally:
            os.close(read)

    def __next__(self) -> tuple[Tensor, ...]:
        return next(self._batches)

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def close(self) -> None:
        """End the loader processes; there are no batches after that."""
        self._tell_to_end()
        # PyTorch ends them, and waits for them, when nobody refers to its iterator any more
        self._batches = iter(())


def _begin(parent: int, read: int, write: int, worker: int) -> None:
    """What a loader process does first: leave it to the training process when it ends.

    Launchers and schedulers send their signals to every process that they find, and the training
    process still needs batches on the way to its last checkpoint. Nor can a signal be the way in
    which the training process asks: one that is ignored is lost, and one that is not can end this
    process by any thread that a library has started. So all are ignored, and a pipe tells.
    """
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    # the training process's, copied by the fork
    signal.set_wakeup_fd(-1)
    # a copy, too: the pipe has an end only when all copies are closed
    os.close(write)
    arguments = (parent, read)
    threading.Thread(target=_end_with, args=arguments, name="parent", daemon=True).start()


def _end_with(parent: int, read: int) -> None:
    """End this process when its parent asks for that or is gone."""
    while os.getppid() == parent:
        if select.select([read], [], [], LOOK_EVERY)[0]:
            # what is idle is ended by PyTorch; what hangs in reading is not
            time.sleep(GRACE)
            break
    os._exit(0)
