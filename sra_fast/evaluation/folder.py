"""Images to be scored that lie in a folder as PNG or JPEG files, read as a stream."""

import hashlib
import logging
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from sra_fast.data.folders import Files
from sra_fast.data.packed import INDEX
from sra_fast.evaluation.npz import NpzImages
from sra_fast.evaluation.packed import SAMPLES, PackedImages

log = logging.getLogger(__name__)

SUFFIXES = (".png", ".jpg", ".jpeg")
# modes of Pillow that hold 8 bits a channel and no transparency
GREY = ("L",)
COLOUR = ("RGB", "P", "CMYK", "YCbCr")
# grids that a run's monitor draws, named after a step
MONITOR = re.compile(r"step_\d{8}\.png")
DECODERS = 4
# where a PNG says how many bits a channel has
BIT_DEPTH = 24


class FolderImages:
    """All PNG and JPEG files below a folder, of one size; the same interface as ``NpzImages``.

    Files of one folder are in the order of their names. Files of several folders, which often are
    classes, are in a fixed random order: the Inception score and ``manifold_images`` take
    consecutive images. Grey images become colour ones if any image has colours. Pixels are taken as
    they are stored: orientation tags are not applied.

    Attributes:
        path: of the folder.
        count: number of images.
        shape: [H, W, C], C being 1 or 3.

    Raises:
        ValueError: there are no such files, or one is damaged, has another size than the first,
            has transparency or more than 8 bits, or is animated.
    """

    def __init__(self, path: str):
        self.path = path
        # links are followed and hidden files left out, as by preprocess.py
        names = [name for name in Files(path).names if not name.endswith("/")]
        found = sorted(Path(path) / name for name in names)
        self.files = [file for file in found if file.suffix.lower() in SUFFIXES]
        self._check_names(found)
        folders = {file.parent for file in self.files}
        if len(folders) > 1:
            order = np.random.default_rng(0).permutation(len(self.files))
            self.files = [self.files[i] for i in order]
        self.count = len(self.files)
        self.shape = self._read_headers()

    def _check_names(self, found: list[Path]) -> None:
        if not self.files:
            raise ValueError(
                f"{self.path} holds no images: expected {', '.join(SUFFIXES)} or {SAMPLES}, "
                f"found {len(found)} other files"
            )
        grids = [file for file in self.files if MONITOR.fullmatch(file.name)]
        if grids:
            raise ValueError(
                f"{grids[0]} is a grid of samples from training, expected single images: "
                "make some with sample.py"
            )
        others = [file for file in found if file not in set(self.files)]
        if others:
            log.warning(
                "%s: %d files are left out, they are no %s: %s ...",
                self.path,
                len(others),
                ", ".join(SUFFIXES),
                others[0].name,
            )

    def _read_headers(self) -> list[int]:
        """The shape of all images; nothing is decoded."""
        size = None
        grey = True
        for file in self.files:
            with _opened(file) as image:
                _check_mode(file, image)
                grey = grey and image.mode in GREY
                size = size or image.size
                if image.size != size:
                    raise ValueError(
                        f"images must have one size: {self.files[0]} is {_text(size)}, "
                        f"{file} is {_text(image.size)}; preprocess.py --source {self.path} "
                        "--pixels true --resolution N crops them as papers do"
                    )
        width, height = size
        return [height, width, 1 if grey else 3]

    def _decode(self, file: Path) -> np.ndarray:
        mode = "L" if self.shape[2] == 1 else "RGB"
        with _opened(file) as image:
            return np.asarray(image.convert(mode)).reshape(self.shape)

    def batches(self, size: int) -> Iterator[np.ndarray]:
        """The images in order, writable uint8 ``[<= size, H, W, C]``."""
        with ThreadPoolExecutor(DECODERS) as pool:
            for first in range(0, self.count, size):
                yield np.stack([*pool.map(self._decode, self.files[first : first + size])])

    def state(self) -> str:
        """Changes when a file is added, removed or written."""
        digest = hashlib.sha256()
        for file in self.files:
            stat = file.stat()
            digest.update(f"{file} {stat.st_size} {stat.st_mtime_ns}\n".encode())
        return digest.hexdigest()


@contextmanager
def _opened(file: Path):
    """An image whose damage, also that of its pixels, is one ValueError."""
    try:
        with Image.open(file) as image:
            yield image
    # Pillow raises SyntaxError for a broken PNG
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{file} is no readable image: {error}") from None


def _check_mode(file: Path, image: Image.Image) -> None:
    transparent = image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info
    if transparent:
        raise ValueError(f"{file} has transparency, expected opaque images")
    if image.mode not in (*GREY, *COLOUR):
        raise ValueError(
            f"{file} must have 8 bits a channel, grey or colour; its mode is {image.mode}"
        )
    # Pillow opens colours of 16 bits as ones of 8
    if image.format == "PNG" and _bit_depth(file) > 8:
        raise ValueError(f"{file} must have 8 bits a channel, it has {_bit_depth(file)}")
    # a JPEG of a camera may have a preview behind the image
    if image.format != "MPO" and getattr(image, "is_animated", False):
        raise ValueError(f"{file} is animated, expected single images")


def _bit_depth(file: Path) -> int:
    with open(file, "rb") as f:
        return f.read(BIT_DEPTH + 1)[BIT_DEPTH]


def _text(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"


def open_images(path: str) -> NpzImages | FolderImages | PackedImages:
    """Images to be scored.

    Args:
        path: an ``.npz`` with ``arr_0``, a folder with ``samples.npz`` (``sample.py`` writes it), a
            folder of packed pixels, or one of PNG or JPEG files.

    Raises:
        ValueError: see ``NpzImages``, ``PackedImages`` and ``FolderImages``.
    """
    if not Path(path).is_dir():
        return NpzImages(path)
    if (Path(path) / INDEX).exists():
        return PackedImages(path)
    npz = Path(path) / SAMPLES
    return NpzImages(str(npz)) if npz.exists() else FolderImages(path)
