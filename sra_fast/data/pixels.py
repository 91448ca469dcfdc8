"""Images themselves as training data: uint8 on disk, [-1, 1] on the device, no VAE."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sra_fast.data.facts import DataFacts
from sra_fast.data.packed import HELD_OUT_FOLDER
from sra_fast.data.training_data import InShards, TrainingData, fingerprint_of
from sra_fast.utils.files import why_unreadable


class Pixels(TrainingData):
    """Base class of data sets of uint8 images ``[C, H, W]``.

    Attributes:
        path: what was given.
        class_names: of every class, or None.
        fingerprint: SHA-256 that tells the images apart from others.
    """

    name = "pixels"
    path: Path
    class_names: list[str] | None = None
    fingerprint: str

    def to_latent(self, images: Tensor, noise: Tensor | None) -> Tensor:
        """uint8 ``[B, C, H, W]`` -> fp32 in [-1, 1]."""
        return images.float() / 127.5 - 1

    def facts(self) -> DataFacts:
        return replace(super().facts(), class_names=self.class_names, pixels=True)

    def open_held_out(self) -> TrainingData | None:
        folder = self.path / HELD_OUT_FOLDER
        return PackedPixels(folder) if folder.is_dir() else None


class PackedPixels(InShards, Pixels):
    """Images in shards (see ``packed.py``), as `preprocess.py --pixels` writes them.

    Args:
        path: folder that holds ``index.json``.
        flip: see ``TrainingData``.
        verify: see ``Shards``.

    Raises:
        ValueError: see ``Shards``.
    """

    self_checked = True

    def __init__(self, path: str | Path, flip: bool = False, verify: bool = False):
        self.path = Path(path)
        self.flip = flip
        self._open_shards(path, "pixels", verify)
        self.shape = self.shards.row_shape


class PixelArray(Pixels):
    """Images of an ``.npz`` in memory: ``arr_0`` uint8 ``[N, H, W, C]`` and, unless all are of one
    class, ``arr_1`` labels ``[N]``: the layout that ``sample.py`` and the ADM suite write.

    Raises:
        ValueError: the file cannot be read, or holds other arrays.
    """

    in_memory = True
    counted_classes = True

    def __init__(self, path: str | Path, flip: bool = False):
        self.path = Path(path)
        self.flip = flip
        images, labels = read_image_array(self.path)
        self.images = torch.from_numpy(images).permute(0, 3, 1, 2)
        self.shape = tuple(self.images.shape[1:])
        self.labels = torch.from_numpy(labels)
        self.num_classes = int(self.labels.max()) + 1
        self.fingerprint = fingerprint_of(images, labels)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """uint8 ``[B, C, H, W]`` and labels ``[B]``."""
        return self.images[indices], self.labels[indices]


def read_image_array(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """``arr_0`` and ``arr_1`` of an ``.npz``.

    Returns:
        uint8 images ``[N, H, W, C]`` and int64 labels ``[N]``, zeros if the file has none.

    Raises:
        ValueError: the file cannot be read, or holds other arrays.
    """
    try:
        with np.load(path, allow_pickle=False) as held:
            arrays = {name: held[name] for name in ("arr_0", "arr_1") if name in held}
    except Exception as error:
        # numpy and zipfile raise many types
        raise ValueError(f"{path} is no readable .npz file: {why_unreadable(error)}") from None
    images = arrays.get("arr_0")
    if images is None or images.dtype != np.uint8 or images.ndim != 4 or not images.size:
        got = "nothing" if images is None else f"{images.dtype} {[*images.shape]}"
        raise ValueError(f"{path} must hold arr_0, uint8 [N, H, W, C], got {got}")
    labels = arrays.get("arr_1", np.zeros(len(images), np.int64))
    if labels.shape != (len(images),) or labels.dtype.kind not in "iu" or labels.min() < 0:
        raise ValueError(
            f"{path} must hold arr_1, {len(images)} labels from 0 on, got "
            f"{labels.dtype} {[*labels.shape]}"
        )
    return np.ascontiguousarray(images), labels.astype(np.int64)
