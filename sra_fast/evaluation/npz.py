"""Images and statistics of the ADM suite's ``.npz`` files. Images are a stream: 50 000 of 256x256 are 9.8 GB."""

import math
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.lib import format as npy

from sra_fast.evaluation.scores import Gaussian
from sra_fast.utils.files import why_unreadable, write_atomic

MEMBER = "arr_0.npy"


@contextmanager
def _readable(path: str):
    """Turn what zip files and decompressors raise into one ValueError."""
    try:
        yield
    except FileNotFoundError:
        raise ValueError(
            f"there is no {path}, expected an .npz file or a folder of images"
        ) from None
    # zipfile raises RuntimeError where damage looks like a password or another compression
    except (OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is no readable .npz file: {error}") from None
    except ValueError as error:
        if path in str(error):
            raise
        raise ValueError(f"{path} is no readable .npz file: {why_unreadable(error)}") from None


def members(path: str) -> set[str]:
    """Names of the arrays in an ``.npz``; ValueError if it is none."""
    with _readable(path), zipfile.ZipFile(path) as archive:
        return {name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")}


class NpzImages:
    """``arr_0`` of an ``.npz``: uint8 ``[N, H, W, C]``, C order, one or three channels.

    Attributes:
        count: N.
        shape: [H, W, C].

    Raises:
        ValueError: the file cannot be read, or ``arr_0`` is another array. ``batches`` raises it if
            the file is damaged or cut off.
    """

    def __init__(self, path: str):
        # the name that np.savez gives to its first array
        if "arr_0" not in members(path):
            raise ValueError(f"{path} holds no images (arr_0), only {sorted(members(path))}")
        self.path = path
        with _readable(path), zipfile.ZipFile(path) as archive, archive.open(MEMBER) as f:
            self.count, *self.shape = self._header(f)

    def _header(self, f: BinaryIO) -> tuple[int, ...]:
        """Read up to the first pixel; the shape ``(N, H, W, C)``."""
        # numpy's two formats; pickled objects are refused by the dtype
        readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
        try:
            shape, fortran_order, dtype = readers[npy.read_magic(f)](f)
        except (KeyError, ValueError) as error:
            raise ValueError(f"{self.path}: arr_0 is no plain array: {error}") from None
        right_shape = len(shape) == 4 and shape[3] in (1, 3) and 0 not in shape
        if dtype != np.uint8 or not right_shape or fortran_order:
            order = " in Fortran order" if fortran_order else ""
            raise ValueError(
                f"{self.path}: arr_0 must be uint8 [N, H, W, 1 or 3], it is {dtype} {list(shape)}{order}"
            )
        return shape

    def state(self) -> str:
        """Changes when the file does."""
        # size and date: a hash of the file itself would take seconds
        stat = Path(self.path).stat()
        return f"{stat.st_size} {stat.st_mtime_ns}"

    def batches(self, size: int) -> Iterator[np.ndarray]:
        """The images in order, writable uint8 ``[<= size, H, W, C]``."""
        with _readable(self.path), zipfile.ZipFile(self.path) as archive, archive.open(MEMBER) as f:
            # skip the header
            self._header(f)
            for first in range(0, self.count, size):
                images = np.empty((min(size, self.count - first), *self.shape), np.uint8)
                # straight into the array: no second copy of the batch
                if f.readinto(memoryview(images).cast("B")) != math.prod(images.shape):
                    raise ValueError(f"{self.path}: arr_0 ends before its {self.count} images")
                yield images


@dataclass(frozen=True)
class Statistics:
    """What an FID reference says of a data set.

    Attributes:
        pool: Gaussian of the pool features (``mu``, ``sigma``).
        spatial: of the spatial features (``mu_s``, ``sigma_s``), or None.
        extractor: name of the extractor, in a file that ``evaluate.py`` has written; None: the ADM
            suite's Inception.
        count: number of images, or 0 if it is not known.
        shape: [H, W, C] of the images, or None if it is not known.
    """

    pool: Gaussian
    spatial: Gaussian | None = None
    extractor: str | None = None
    count: int = 0
    shape: list[int] | None = None


def read_statistics(path: str) -> Statistics | None:
    """The statistics in an FID reference; None if the file has none.

    Raises:
        ValueError: the arrays are not finite real numbers ``[D]`` and ``[D, D]``.
    """
    held = members(path)
    if not {"mu", "sigma"} <= held:
        return None
    with _readable(path), np.load(path) as arrays:
        spatial = None
        if {"mu_s", "sigma_s"} <= held:
            spatial = _gaussian(path, arrays, "mu_s", "sigma_s")
        try:
            extractor = str(arrays["extractor"]) if "extractor" in held else None
            count = int(arrays["count"]) if "count" in held else 0
            shape = arrays["shape"].tolist() if "shape" in held else None
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{path}: extractor, count and shape must be a name and whole numbers: "
                f"{why_unreadable(error)}"
            ) from None
        pool = _gaussian(path, arrays, "mu", "sigma")
        return Statistics(pool, spatial, extractor, count, shape)


def statistics_arrays(statistics: Statistics) -> dict:
    """The arrays of an FID reference, from which ``read_statistics`` makes the same statistics."""
    arrays = {"count": statistics.count}
    if statistics.extractor is not None:
        arrays["extractor"] = statistics.extractor
    if statistics.shape is not None:
        arrays["shape"] = statistics.shape
    for suffix, gaussian in (("", statistics.pool), ("_s", statistics.spatial)):
        if gaussian is not None:
            arrays["mu" + suffix] = gaussian.mean
            arrays["sigma" + suffix] = gaussian.cov
    return arrays


def save_arrays(path: Path, arrays: dict) -> None:
    """Write an ``.npz`` atomically, under exactly this name."""

    def write(temporary: Path) -> None:
        # through an open file: given a path, numpy would add a suffix
        with open(temporary, "wb") as f:
            np.savez(f, **arrays)

    write_atomic(path, write)


def _gaussian(path: str, arrays, mean: str, cov: str) -> Gaussian:
    """The Gaussian of two arrays, checked; float64."""
    try:
        # same_kind: complex numbers and strings are refused, fp32 is not
        mu, sigma = (arrays[name].astype(np.float64, casting="same_kind") for name in (mean, cov))
    except (ValueError, TypeError) as error:
        reason = why_unreadable(error)
        raise ValueError(f"{path}: {mean} and {cov} must be real numbers: {reason}") from None
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise ValueError(f"{path}: {mean} and {cov} must be finite, they are not")
    if mu.ndim != 1 or sigma.shape != mu.shape * 2:
        raise ValueError(
            f"{path}: {mean} and {cov} must be [D] and [D, D], they are {[*mu.shape]} and {[*sigma.shape]}"
        )
    return Gaussian(mu, sigma)
