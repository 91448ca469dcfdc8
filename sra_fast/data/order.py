"""The order of the images during training."""

from collections.abc import Iterable, Iterator

import numpy as np

from sra_fast.data.permutation import Permutation


class ImageNumbers(list[int]):
    """The images of a micro-batch, and what decides anything else that is drawn for them, such as
    which of its captions an image gets.

    Args:
        numbers: of the images.
        seed: of the run.
        step: optimizer step that they are for.
    """

    def __init__(self, numbers: Iterable[int] = (), seed: int = 0, step: int = 0):
        super().__init__(numbers)
        self.seed = seed
        self.step = step


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

    def numbers(self, step: int, micro_step: int) -> ImageNumbers:
        """The images of this process in a micro-step of an optimizer step."""
        epoch = self.epoch(step)
        if self._epoch != epoch:
            self._epoch = epoch
            self._order = Permutation(self.num_images, self.seed, epoch, -1)
        first = step % self.steps_per_epoch * self.global_batch + self.first(micro_step)
        numbers = self._order(np.arange(first, first + self.micro)).tolist()
        return ImageNumbers(numbers, self.seed, step)

    def __iter__(self) -> Iterator[ImageNumbers]:
        for step in range(self.step, self.steps):
            for micro_step in range(self.accumulation):
                yield self.numbers(step, micro_step)
