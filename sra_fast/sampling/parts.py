"""Many samples from many processes: parts of a fixed size, each made and kept by one process, joined into one .npz.

An image depends only on its number, so the result is the same for any number of processes and after
an interruption. The processes share only the folder and form no process group. Only the first one
waits for the others, to join the parts.
"""

import math
import shutil
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from sra_fast.utils.files import why_unreadable, write_atomic
from sra_fast.utils.outputs import save_npy

# images per part: what an interruption can cost
PART = 256


def num_parts(count: int) -> int:
    """How many parts ``count`` images are."""
    return -(-count // PART)


def _part_file(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.npy"


def _save_png(path: Path, image: np.ndarray) -> None:
    grey = image.shape[-1] == 1
    picture = Image.fromarray(image[..., 0] if grey else image)
    write_atomic(path, lambda p: picture.save(p, format="PNG"))


def make_parts(
    make: Callable[[int, int], np.ndarray],
    count: int,
    folder: Path,
    rank: int,
    world: int,
    png: Path | None = None,
    finished: Callable[[], bool] = lambda: False,
) -> int:
    """Make those parts of this process that are still missing.

    Args:
        make: ``(first, end)`` image numbers -> uint8 ``[end - first, H, W, C]``.
        count: images of all processes together.
        folder: of the parts, see ``SampleFolder``.
        rank, world: this process and the number of processes.
        png: folder for a PNG of every image as well.
        finished: whether the parts of all processes have been joined.

    Returns:
        How many images were made.

    Raises:
        OSError: the disk is full, or the folder was deleted. Finished parts are kept.
    """
    made = 0
    for number in range(rank, num_parts(count), world):
        file = _part_file(folder, number)
        if file.exists():
            continue
        # of a resumed command, a fast first process has joined the parts before this one looked
        if finished():
            break
        # the last part may be smaller
        first = number * PART
        end = min(first + PART, count)
        images = make(first, end)
        # the PNGs come first: a part that exists is never made again
        if png:
            for i, image in enumerate(images, start=first):
                _save_png(png / f"{i:06d}.png", image)
        write_atomic(file, lambda p, images=images: save_npy(p, images))
        made += end - first
    return made


def join_parts(
    folder: Path,
    count: int,
    labels: np.ndarray,
    out: Path,
    finished: Callable[[], bool] = lambda: False,
) -> None:
    """Wait for all parts, stream them into one ``.npz``, delete them.

    Args:
        folder: of the parts.
        count: images of all processes together.
        labels: ``[count]``.
        out: the file to write: ``arr_0`` uint8 ``[count, H, W, C]``, ``arr_1`` the labels.
        finished: whether somebody else, who was given the same command, has joined them.
    """
    # the processes share nothing but the folder, so the first one looks until the parts are there
    parts = [_part_file(folder, number) for number in range(num_parts(count))]
    while not all(part.exists() for part in parts):
        if finished():
            return
        time.sleep(0.2)
    shape = (count, *np.load(parts[0], mmap_mode="r").shape[1:])
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}

    def write(path: Path) -> None:
        # part by part: 50 000 images of 256x256 are 9.8 GB
        with zipfile.ZipFile(path, "w") as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as f:
                np.lib.format.write_array_header_1_0(f, header)
                for part in parts:
                    f.write(np.load(part).tobytes())
            with archive.open("arr_1.npy", "w") as f:
                np.lib.format.write_array(f, labels)

    write_atomic(out, write)
    delete_parts(folder)


def delete_parts(folder: Path) -> None:
    """Delete parts that have been joined, and their folder."""
    # the identity is deleted last: parts without one would be taken for parts of the next samples
    for part in folder.glob("*.npy"):
        part.unlink()
    shutil.rmtree(folder)


def first_images(file: Path, count: int) -> np.ndarray:
    """The first images of an ``.npz`` of ``join_parts``, at most ``count``, uint8 ``[n, H, W, C]``;
    ValueError if it is damaged.
    """
    # np.load would read all of them
    try:
        with zipfile.ZipFile(file) as archive, archive.open("arr_0.npy") as f:
            np.lib.format.read_magic(f)
            (total, *shape), _, _ = np.lib.format.read_array_header_1_0(f)
            data = f.read(min(count, total) * math.prod(shape))
            return np.frombuffer(data, np.uint8).reshape(-1, *shape)
    except (EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{file} is damaged: {why_unreadable(error)}; delete it, and the same command makes it "
            "again"
        ) from None
