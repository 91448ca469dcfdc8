"""MS-COCO as U-ViT's scripts leave it, which REPA's text-to-image code reads too.

``train/0.npy``, ``train/1.npy``, ... are moments ``[2C, h, w]``, the mean and then the logarithm of
the variance; ``train/0_0.npy``, ``train/0_1.npy``, ... the features ``[L, E]`` of the captions of
image 0; ``val/`` likewise; ``empty_context.npy`` those of the empty prompt. REPA adds the images,
``train/0.png``. The captions themselves are not there.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sra_fast.data.batch import Batch
from sra_fast.data.packed import load_npy
from sra_fast.utils.checks import require_that
from sra_fast.utils.files import why_unreadable

TRAIN = "train"
VAL = "val"
EMPTY = "empty_context.npy"
# 0.npy, or 0_0.npy
NAME = re.compile(r"(0|[1-9]\d*)(?:_(0|[1-9]\d*))?\.npy")
# bounds that Stable Diffusion's autoencoder gives the logarithm of the variance
LOG_VARIANCE = (-30.0, 20.0)
# how many images are looked at when the folder is opened
LOOKED_AT = 16


def holds_coco_features(path: Path) -> bool:
    """Whether a folder is one of these."""
    return (path / EMPTY).is_file() and (path / TRAIN / "0.npy").is_file()


def in_order_of_names(numbers: Iterable[int]) -> list[int]:
    """Numbers of images in the order of the images of a folder, 0.png, 1.png, 10.png, ..."""
    return sorted(numbers, key=lambda number: f"{number}.png")


def _read(path: Path) -> np.ndarray:
    """The array of a file, without leading dimensions of 1."""
    try:
        array = load_npy(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path} is no readable .npy file: {why_unreadable(error)}") from None
    require_that(
        array.dtype.kind == "f", f"{path} must hold floating-point numbers, got {array.dtype}"
    )
    return array


def _read_like(path: Path, shape: tuple[int, ...], what: str) -> np.ndarray:
    """An array of this shape; a batch dimension of 1 is left out."""
    array = _read(path)
    if array.ndim == len(shape) + 1 and array.shape[0] == 1:
        array = array[0]
    require_that(array.shape == shape, f"{path} must hold {what} {[*shape]}, got {[*array.shape]}")
    return array


class CocoPart:
    """The files of ``train`` or ``val``.

    Images are in the order of their files' names as text (0, 1, 10, 100, ...), which is the order
    of the images of a folder: features of its .png files fit.

    Args:
        folder: of the files.

    Attributes:
        images: the number in the files' names of every image.
        counts: how many captions each has.
        fingerprint: SHA-256 of the names.

    Raises:
        ValueError: a number is missing, or an image has no captions.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        found: dict[int, set[int]] = {}
        contexts: dict[int, set[int]] = {}
        for entry in os.scandir(folder):
            match = NAME.fullmatch(entry.name)
            if match and match[2] is None:
                found[int(match[1])] = set()
            elif match:
                contexts.setdefault(int(match[1]), set()).add(int(match[2]))
        self._check(found.keys(), contexts)
        self.images = in_order_of_names(found)
        self.counts = [len(contexts[number]) for number in self.images]
        listing = json.dumps([*zip(self.images, self.counts, strict=True)])
        self.fingerprint = hashlib.sha256(listing.encode()).hexdigest()

    def _check(self, images, contexts: dict[int, set[int]]) -> None:
        missing = set(range(max(images, default=0))) - set(images)
        require_that(
            not missing and bool(images),
            f"{self.folder} lacks {len(missing) or 'all'} moments, the first is "
            f"{min(missing, default=0)}.npy",
        )
        without = sorted(set(images) - contexts.keys())
        require_that(
            not without,
            f"{self.folder} has no captions of {len(without)} images, the first is "
            f"{without[0] if without else 0}",
        )
        strangers = sorted(contexts.keys() - set(images))
        require_that(
            not strangers,
            f"{self.folder} has captions of {len(strangers)} images that are not there, the first "
            f"is {strangers[0] if strangers else 0}",
        )
        for image, numbers in contexts.items():
            require_that(
                numbers == set(range(len(numbers))),
                f"{self.folder} lacks captions of image {image}: it has {sorted(numbers)}",
            )


class CocoMoments:
    """The moments of a part, with standard deviations instead of logarithms of variances.

    Attributes:
        moments_shape: (2C, h, w).
        labels: zeros, ``[N]``: there are no classes.

    Raises:
        ValueError: the files hold no such moments; ``read`` raises it for a later one.
    """

    num_classes = 1

    def __init__(self, part: CocoPart):
        self.part = part
        self.labels = torch.zeros(len(part.images), dtype=torch.int64)
        self.fingerprint = part.fingerprint
        self.notes = ["no classes: all images are of one class"]
        first = part.folder / f"{part.images[0]}.npy"
        shape = _read(first).shape[-3:]
        require_that(
            len(shape) == 3 and shape[0] % 2 == 0 and shape[1] == shape[2],
            f"{first} must hold moments [2C, h, h], got {[*shape]}",
        )
        self.moments_shape = tuple(shape)
        some = [self._file(n) for n in range(min(LOOKED_AT, len(self)))]
        logarithms = np.stack([array[shape[0] // 2 :] for array in some])
        require_that(
            bool((logarithms < 0).any()),
            f"{part.folder}: the second half of the moments' channels must be logarithms of "
            f"variances, none of {len(some)} images has a negative one: are these deviations?",
        )

    def __len__(self) -> int:
        return len(self.part.images)

    def _file(self, number: int) -> np.ndarray:
        path = self.part.folder / f"{self.part.images[number]}.npy"
        return _read_like(path, self.moments_shape, "moments")

    def read(self, numbers: list[int]) -> Batch:
        """Moments ``[B, 2C, h, w]`` fp32."""
        moments = torch.from_numpy(np.stack([self._file(n) for n in numbers])).float()
        mean, logarithm = moments.chunk(2, dim=1)
        deviation = torch.exp(0.5 * logarithm.clamp(*LOG_VARIANCE))
        return Batch(torch.cat([mean, deviation], 1), numbers, len(numbers))


class CocoContexts:
    """The features of a part's captions as rows (see ``stored_text.py``): a ``TextSource``.

    Args:
        part: the files.
        empty: features of the empty prompt, ``[L, E]``.
    """

    copies = 1
    texts = None

    def __init__(self, part: CocoPart, empty: Tensor):
        self.part = part
        self.shape = tuple(empty.shape)
        self.num_classes = len(part.images)
        counts = torch.tensor(part.counts)
        self.labels = torch.arange(len(counts)).repeat_interleave(counts)
        self._firsts = counts.cumsum(0) - counts
        self.image_labels = torch.zeros(len(counts), dtype=torch.int64)
        # the files are too many to be read for that, but another encoder has another empty prompt
        identity = part.fingerprint.encode() + empty.numpy().tobytes()
        self.fingerprint = hashlib.sha256(identity).hexdigest()

    def __len__(self) -> int:
        return len(self.labels)

    def _file(self, number: int) -> np.ndarray:
        image = int(self.labels[number])
        k = number - int(self._firsts[image])
        path = self.part.folder / f"{self.part.images[image]}_{k}.npy"
        return _read_like(path, self.shape, "features")

    def read(self, numbers: list[int]) -> Batch:
        """Features ``[B, L, E]`` fp32."""
        features = torch.from_numpy(np.stack([self._file(n) for n in numbers])).float()
        return Batch(features, numbers, len(numbers))


def read_empty(root: Path) -> Tensor:
    """Features of the empty prompt, ``[L, E]`` fp32."""
    array = _read(root / EMPTY)
    if array.ndim == 3 and array.shape[0] == 1:
        array = array[0]
    require_that(array.ndim == 2, f"{root / EMPTY} must hold features [L, E], got {[*array.shape]}")
    return torch.from_numpy(array).float()
