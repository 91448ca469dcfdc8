"""The order of the images during training, and the loader that follows it."""

import os
import signal
import threading
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader

from sra_fast.data.permutation import Permutation
from sra_fast.data.training_data import TrainingData


class ShuffledBatches:
    """Indices of this process's micro-batches from optimizer step ``step`` on.

    Every epoch is one permutation, a function of (seed, epoch), cut into global batches; images
    that do not fill the last one are left out. The order therefore does not depend on the number of
    processes. It is computed batch by batch: neither memory nor the time to resume grow with the
    data set.

    Args:
        num_images: size of the data set.
        seed: of the run.
        micro: images per process and micro-step.
        accumulation: micro-steps per optimizer step.
        rank, world: this process and their number.
        step: first optimizer step.
        steps: one past the last optimizer step.
    """

    def __init__(
        self,
        num_images: int,
        seed: int,
        micro: int,
        accumulation: int,
        rank: int,
        world: int,
        step: int,
        steps: int,
    ):
        self.num_images = num_images
        self.seed = seed
        self.micro = micro
        self.accumulation = accumulation
        self.rank = rank
        self.world = world
        self.step = step
        self.steps = steps
        self.global_batch = micro * accumulation * world
        self.steps_per_epoch = num_images // self.global_batch
        # the order of the epoch that was asked for last
        self._epoch: int | None = None
        self._order: Permutation

    def epoch(self, step: int) -> int:
        """The epoch that an optimizer step lies in."""
        return step // self.steps_per_epoch

    def first(self, micro_step: int) -> int:
        """Index, within its global batch, of the first image of this process's ``micro_step``."""
        return (micro_step * self.world + self.rank) * self.micro

    def __len__(self) -> int:
        return (self.steps - self.step) * self.accumulation

    def numbers(self, step: int, micro_step: int) -> list[int]:
        """The images of this process in a micro-step of an optimizer step."""
        epoch = self.epoch(step)
        if self._epoch != epoch:
            self._epoch = epoch
            self._order = Permutation(self.num_images, self.seed, epoch, -1)
        first = step % self.steps_per_epoch * self.global_batch + self.first(micro_step)
        return self._order(np.arange(first, first + self.micro)).tolist()

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.step, self.steps):
            for micro_step in range(self.accumulation):
                yield self.numbers(step, micro_step)


def _as_is(batch):
    # a data set's __getitems__ makes whole batches
    return batch


def outlive_stop_signals(worker: int) -> None:
    """Leave it to the training process when this loader process ends.

    Launchers and schedulers send their signals to every process that they find, and the training
    process still needs batches on the way to its last checkpoint. SIGTERM counts only if it comes
    from the training process, which ends a loader process in that way if it does not react.
    """
    # SIGTERM too: a library's thread that does not block it would end the process. While the main
    # thread blocks it, it can still be waited for
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    # the training process's, copied by the fork
    signal.set_wakeup_fd(-1)
    # the threads that are started later block it too
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    arguments = (os.getppid(),)
    threading.Thread(target=_end_with, args=arguments, name="parent", daemon=True).start()


def _end_with(parent: int) -> None:
    """End this process when its parent asks for that or is gone."""
    while True:
        received = signal.sigtimedwait({signal.SIGTERM}, 1.0)
        if os.getppid() != parent or (received is not None and received.si_pid == parent):
            os._exit(0)


def make_loader(
    data: TrainingData, batches: ShuffledBatches, num_workers: int, cuda: bool
) -> DataLoader:
    """Batches in the order of ``batches``, read ahead by ``num_workers`` processes (at most one per
    CPU), pinned for CUDA.
    """
    num_workers = min(num_workers, len(os.sched_getaffinity(0)))
    return DataLoader(
        data,
        batch_sampler=batches,
        num_workers=0 if data.in_memory else num_workers,
        collate_fn=_as_is,
        pin_memory=cuda,
        worker_init_fn=outlive_stop_signals,
        generator=torch.Generator(),
    )
