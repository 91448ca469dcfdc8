"""Data sets and the order of their images.

A data set has ``shape`` (C, H, W of the latent), ``posterior`` (whether images are moments to sample from), ``labels``,
``__getitems__`` (a list of indices -> one batch) and ``to_latent`` (a batch on the device -> clean latents).
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sra_fast.config.schema import Config
from sra_fast.data.latents import Latents, PackedLatents, open_latents
from sra_fast.data.permutation import Permutation


class Digits(Dataset):
    """scikit-learn's 1797 real 8x8 digits, pixels in [-1, 1]; every fifth image is held out for evaluation.

    Args:
        held_out: the held-out images instead of the training ones.
    """

    shape, posterior, num_classes = (1, 8, 8), False, 10

    def __init__(self, held_out: bool = False):
        from sklearn.datasets import load_digits  # only this data set needs scikit-learn

        digits = load_digits()
        keep = (np.arange(len(digits.target)) % 5 == 0) == held_out
        self.images = torch.from_numpy(digits.images[keep]).float()[:, None] / 8 - 1
        self.labels = torch.from_numpy(digits.target[keep]).long()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        return self.images[indices], self.labels[indices]

    def to_latent(self, images: Tensor, noise: Tensor | None) -> Tensor:
        return images

    def held_out_split(self) -> list[tuple[Dataset, np.ndarray]]:
        """Training and held-out images, each as a data set and its rows."""
        return [(part, np.arange(len(part))) for part in (self, Digits(held_out=True))]


def make_dataset(cfg: Config) -> Digits | Latents | PackedLatents:
    """The configured training set; ValueError if it does not fit the model or the batch."""
    d = cfg.data
    data = Digits() if d.name == "digits" else open_latents(d.path, d.latent_scale, d.verify)
    model = cfg.model
    expected = (model.in_channels, model.input_size, model.input_size)
    if data.shape != expected:
        raise ValueError(
            f"the model takes latents {expected} (in_channels, input_size), the data has {data.shape}"
        )
    if int(data.labels.min()) < 0 or data.num_classes > model.num_classes:
        raise ValueError(
            f"labels must lie in [0, {model.num_classes}) (model.num_classes), "
            f"the data has {int(data.labels.min())} .. {data.num_classes - 1}"
        )
    if len(data) < cfg.train.global_batch:
        raise ValueError(
            f"train.global_batch {cfg.train.global_batch} is larger than the data set ({len(data)} images)"
        )
    return data


class ShuffledBatches:
    """Indices of this process's micro-batches from ``step`` on: a function of (seed, epoch), not of the processes.

    Every epoch is one permutation, cut into global batches; what does not fill a last one is dropped.  It is computed
    batch by batch: neither memory nor the time to resume grow with the data set.

    Args:
        num_images: size of the data set.
        seed: of the run.
        micro: images per process and micro-step.
        accumulation: micro-steps per optimizer step.
        rank, world: this process and their number.
        step: first optimizer step; ``steps``: one past the last.
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
        self.num_images, self.seed, self.micro, self.accumulation = (
            num_images,
            seed,
            micro,
            accumulation,
        )
        self.rank, self.world, self.step, self.steps = rank, world, step, steps
        self.global_batch = micro * accumulation * world
        self.steps_per_epoch = num_images // self.global_batch

    def epoch(self, step: int) -> int:
        return step // self.steps_per_epoch

    def first(self, micro_step: int) -> int:
        """Index, within its global batch, of the first image of this process's ``micro_step``."""
        return (micro_step * self.world + self.rank) * self.micro

    def __len__(self) -> int:
        return (self.steps - self.step) * self.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        epoch, order = None, None
        for step in range(self.step, self.steps):
            if self.epoch(step) != epoch:
                epoch = self.epoch(step)
                order = Permutation(self.num_images, self.seed, epoch, -1)
            start = step % self.steps_per_epoch * self.global_batch
            for micro_step in range(self.accumulation):
                first = start + self.first(micro_step)
                yield order(np.arange(first, first + self.micro)).tolist()


def _as_is(batch):
    return batch  # __getitems__ makes whole batches


def make_loader(
    data: Dataset, batches: ShuffledBatches, num_workers: int, cuda: bool
) -> DataLoader:
    """Batches in the order of ``batches``, read ahead by ``num_workers`` processes, pinned for CUDA."""
    return DataLoader(
        data,
        batch_sampler=batches,
        num_workers=0 if isinstance(data, Digits) else num_workers,
        collate_fn=_as_is,
        pin_memory=cuda,
        generator=torch.Generator(),
    )
