"""scikit-learn's digits: the data set that needs no download and no GPU."""

import functools
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from sra_fast.config.schema import DataConfig
from sra_fast.data.facts import DataFacts
from sra_fast.data.features import StoredFeatures
from sra_fast.data.pixels import PackedPixels
from sra_fast.data.training_data import TrainingData, fingerprint_of
from sra_fast.utils.checks import require_that
from sra_fast.utils.registry import DATASETS


@functools.cache
def _read() -> tuple[np.ndarray, np.ndarray]:
    """Images ``[1797, 8, 8]`` in [0, 16] and labels, read once per process."""
    # only this data set needs scikit-learn
    from sklearn.datasets import load_digits

    digits = load_digits()
    return digits.images, digits.target


class Digits(TrainingData):
    """1797 real 8x8 digits, pixels in [-1, 1]. Every fifth image is held out for evaluation.

    Args:
        held_out: the held-out images instead of the training ones.
        path: folder of the same digits, packed in the same order, for ``open_features`` only.
    """

    name = "digits"
    shape = (1, 8, 8)
    num_classes = 10
    in_memory = True
    evaluation = "digits"

    def __init__(self, held_out: bool = False, path: str | None = None):
        self.path = path
        images, labels = _read()
        keep = (np.arange(len(labels)) % 5 == 0) == held_out
        self.images = torch.from_numpy(images[keep]).float()[:, None] / 8 - 1
        self.labels = torch.from_numpy(labels[keep]).long()
        self.fingerprint = fingerprint_of(self.images.numpy(), self.labels.numpy())

    def facts(self) -> DataFacts:
        # the images come with scikit-learn; in the folder lie their features only
        return replace(super().facts(), path=None)

    def open_features(self, name: str, verify: bool = False) -> None:
        """Features that preprocess.py has stored beside the packed digits in ``path``.

        Raises:
            ValueError: there are none, or the folder holds other images.
        """
        require_that(
            self.path is not None,
            f"data.features {name} of the digits needs data.path, the folder of the packed digits "
            "(examples/digits_features.py makes one), got nothing",
        )
        packed = PackedPixels(self.path)
        require_that(
            len(packed) == len(self),
            f"data.path {self.path} must hold the {len(self)} training digits, it has "
            f"{len(packed)} images",
        )
        require_that(
            torch.equal(packed.labels, self.labels),
            f"data.path {self.path} must hold the training digits in their order, it has other "
            "labels",
        )
        self.features = StoredFeatures(packed.path, name, packed.fingerprint, verify)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, ...]:
        return self.complete(indices, self.images[indices])

    def held_out_split(self) -> list[tuple[TrainingData, np.ndarray]]:
        return [(part, np.arange(len(part))) for part in (self, Digits(held_out=True))]


@DATASETS.register("digits")
def make_digits(data: DataConfig) -> Digits:
    # they need no path, but stored features do
    require_that(
        data.path is None or data.features is not None,
        f"data.path is not for the digits, got {data.path}",
    )
    return Digits(path=data.path)
