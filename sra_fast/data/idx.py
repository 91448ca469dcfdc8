"""MNIST's file format (IDX) as a source of preprocessing: MNIST, Fashion-MNIST, KMNIST and their
kin.
"""

import gzip
import math
import re
import zlib
from pathlib import Path

import numpy as np

from sra_fast.data.arrays import ArraySource
from sra_fast.data.images import Crop

# train-images-idx3-ubyte.gz, as it is published, or unpacked; some programs write a dot
IMAGES = re.compile(r"(train|t10k)-images[-.]idx3-ubyte(\.gz)?")
PARTS = {"train": "training", "t10k": "held-out"}
# the type of the elements: unsigned bytes
UINT8 = 8


def holds_idx(folder: Path) -> bool:
    """Whether a folder holds images in MNIST's format."""
    return folder.is_dir() and any(IMAGES.fullmatch(path.name) for path in folder.iterdir())


def read_idx(path: Path, ndim: int) -> np.ndarray:
    """The array of a file, uint8, of ``ndim`` dimensions.

    Two zero bytes, the type, the number of dimensions, each dimension as a big-endian uint32, then
    the elements in C order (http://yann.lecun.com/exdb/mnist).

    Raises:
        ValueError: the file is damaged or holds something else.
    """
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    header = 4 + 4 * ndim
    magic = bytes([0, 0, UINT8, ndim])
    if len(content) < header:
        raise ValueError(
            f"{path} must be an IDX file of {ndim} dimensions, whose header has {header} bytes, it has "
            f"{len(content)} bytes in all"
        )
    if content[:4] != magic:
        raise ValueError(
            f"{path} must be an IDX file of unsigned bytes with {ndim} dimensions, which begins with "
            f"{[*magic]}, it begins with {[*content[:4]]}"
        )
    shape = np.frombuffer(content, ">u4", ndim, 4).tolist()
    # NumPy's product wraps around
    expected = math.prod(shape)
    if len(content) - header != expected:
        raise ValueError(
            f"{path} must hold {shape} bytes, {expected}, it has {len(content) - header}"
        )
    if expected == 0:
        raise ValueError(f"{path} holds nothing: its dimensions are {shape}")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _read_part(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Images uint8 ``[N, H, W, 1]`` and labels int64 ``[N]`` of ``train`` or ``t10k``; None: not
    there.

    Raises:
        ValueError: a file is damaged, there are no labels, or not one for each image.
    """
    found = [path for path in sorted(folder.iterdir()) if IMAGES.fullmatch(path.name)]
    found = [path for path in found if path.name.startswith(part)]
    if not found:
        return None
    images_file = found[0]
    labels_file = folder / images_file.name.replace("images", "labels").replace("idx3", "idx1")
    if not labels_file.exists():
        raise ValueError(f"{folder} has {images_file.name} and no {labels_file.name}")
    images = read_idx(images_file, 3)
    labels = read_idx(labels_file, 1)
    if len(images) != len(labels):
        raise ValueError(
            f"{folder} must have a label for each image, got {len(images)} {PARTS[part]} images of "
            f"{images.shape[1]} x {images.shape[2]} and {len(labels)} labels"
        )
    return images[..., None], labels.astype(np.int64)


def image_side(folder: Path) -> int:
    """Height of the training images."""
    part = _read_part(folder, "train")
    if part is None:
        raise ValueError(f"{folder} has no train-images-idx3-ubyte(.gz)")
    return part[0].shape[1]


def open_idx(
    path: str | Path, crop: Crop, num_classes: int | None = None, mirror: bool = False
) -> tuple[ArraySource, ArraySource | None]:
    """The images of ``train-images-idx3-ubyte`` and, held out, those of ``t10k-images-idx3-ubyte``.

    Raises:
        ValueError: a file is missing or damaged; see ``ArraySource``.
    """
    folder = Path(path)
    train_part = _read_part(folder, "train")
    if train_part is None:
        raise ValueError(f"{folder} has no train-images-idx3-ubyte(.gz), only held-out images")
    train = ArraySource(str(folder), *train_part, crop, num_classes, mirror)
    held_out_part = _read_part(folder, "t10k")
    if held_out_part is None:
        return train, None
    train.notes.append("t10k-images is held out")
    return train, ArraySource(str(folder), *held_out_part, crop, train.num_classes)
