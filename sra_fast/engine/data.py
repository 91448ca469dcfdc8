"""Data sets and the order of their images.

A data set has ``shape`` (C, H, W of the latent), ``posterior`` (whether images are moments to sample from), ``labels``,
``__getitems__`` (a list of indices -> one batch) and ``to_latent`` (a batch on the device -> clean latents).
"""
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sra_fast.engine.config import Config
from sra_fast.engine.draws import block_seed


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


class Latents(Dataset):
    """VAE moments in the reference's layout: ``<path>/vae-sd/**/*.npy`` (mean and std, ``[2C, H, W]``) and ``dataset.json``.

    Args:
        path: folder that holds ``vae-sd``.
        scale: multiplies the sampled latents.

    Raises:
        ValueError: the folder, its ``dataset.json``, images or labels are missing, or the moments have no [2C, H, W].
    """

    posterior = True

    def __init__(self, path: str, scale: float = 0.18215):
        self.root, self.scale = Path(path) / "vae-sd", scale
        if not self.root.is_dir():
            raise ValueError(f"data.path must hold a folder vae-sd with VAE moments, found none at {self.root}")
        self.files = sorted(str(f.relative_to(self.root)) for f in self.root.rglob("*.npy"))
        if not self.files:
            raise ValueError(f"no .npy file under {self.root}")
        self.labels = torch.tensor(self._read_labels(), dtype=torch.int64)
        self.num_classes = int(self.labels.max()) + 1
        moments = self._read(self.files[0])
        self.shape = (moments.shape[0] // 2, *moments.shape[1:])

    def _read_labels(self) -> list[int]:
        index = self.root / "dataset.json"
        try:
            labels = dict(json.loads(index.read_text())["labels"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f'{index} must hold {{"labels": [[file, label], ...]}}: {error!r}') from None
        missing = [f for f in self.files if Path(f).as_posix() not in labels]
        if missing:
            raise ValueError(f"{index} has no label for {len(missing)} files, the first is {missing[0]}")
        found = [labels[Path(f).as_posix()] for f in self.files]
        wrong = next((i for i, label in enumerate(found) if type(label) is not int), None)
        if wrong is not None:
            raise ValueError(f"{index}: the label of {self.files[wrong]} must be an integer, got {found[wrong]!r}")
        return found

    def _read(self, name: str) -> np.ndarray:
        try:
            moments = np.load(self.root / name, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"{self.root / name} is no readable .npy file: {error}") from None
        if moments.ndim == 4 and moments.shape[0] == 1:  # the reference's encoder leaves a batch dimension
            moments = moments[0]
        expected = (2 * self.shape[0], *self.shape[1:]) if hasattr(self, "shape") else moments.shape
        if moments.ndim != 3 or moments.shape[0] % 2 or moments.shape != expected:
            raise ValueError(f"{self.root / name} must hold moments [2C, H, W] like the others, got {moments.shape}")
        return moments

    def __len__(self) -> int:
        return len(self.files)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        moments = np.stack([self._read(self.files[i]) for i in indices])
        return torch.from_numpy(moments), self.labels[indices]

    def to_latent(self, moments: Tensor, noise: Tensor) -> Tensor:
        """``[B, 2C, H, W]`` moments and ``[B, C, H, W]`` normals -> latents ``(mean + std * noise) * scale``, fp32."""
        mean, std = moments.float().chunk(2, dim=1)
        return (mean + std * noise) * self.scale


def make_dataset(cfg: Config) -> Digits | Latents:
    """The configured training set; ValueError if it does not fit the model or the batch."""
    data = Digits() if cfg.data.name == "digits" else Latents(cfg.data.path, cfg.data.latent_scale)
    model = cfg.model
    expected = (model.in_channels, model.input_size, model.input_size)
    if data.shape != expected:
        raise ValueError(f"the model takes latents {expected} (in_channels, input_size), the data has {data.shape}")
    if int(data.labels.min()) < 0 or data.num_classes > model.num_classes:
        raise ValueError(
            f"labels must lie in [0, {model.num_classes}) (model.num_classes), "
            f"the data has {int(data.labels.min())} .. {data.num_classes - 1}"
        )
    if len(data) < cfg.train.global_batch:
        raise ValueError(f"train.global_batch {cfg.train.global_batch} is larger than the data set ({len(data)} images)")
    return data


class ShuffledBatches:
    """Indices of this process's micro-batches from ``step`` on: a function of (seed, epoch), not of the processes.

    Every epoch is one permutation, cut into global batches; what does not fill a last one is dropped.

    Args:
        num_images: size of the data set.
        seed: of the run.
        micro: images per process and micro-step.
        accumulation: micro-steps per optimizer step.
        rank, world: this process and their number.
        step: first optimizer step; ``steps``: one past the last.
    """

    def __init__(
        self, num_images: int, seed: int, micro: int, accumulation: int, rank: int, world: int, step: int, steps: int
    ):
        self.num_images, self.seed, self.micro, self.accumulation = num_images, seed, micro, accumulation
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
                order = np.random.default_rng(block_seed(self.seed, epoch, -1)).permutation(self.num_images)
            start = step % self.steps_per_epoch * self.global_batch
            for micro_step in range(self.accumulation):
                first = start + self.first(micro_step)
                yield order[first : first + self.micro].tolist()


def _as_is(batch):
    return batch  # __getitems__ makes whole batches


def make_loader(data: Dataset, batches: ShuffledBatches, num_workers: int, cuda: bool) -> DataLoader:
    """Batches in the order of ``batches``, read ahead by ``num_workers`` processes, pinned for CUDA."""
    return DataLoader(
        data,
        batch_sampler=batches,
        num_workers=0 if isinstance(data, Digits) else num_workers,
        collate_fn=_as_is,
        pin_memory=cuda,
        generator=torch.Generator(),
    )
