"""Many samples from many processes: parts of a fixed size, each made and kept by one process, joined into one .npz.

An image depends only on its number, so the result is the same for any number of processes and after
an interruption. The processes share only the folder and form no process group. Only the first one
waits for the others, to join the parts.
"""

import json
import shutil
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from sra_fast.utils.files import write_atomic, write_first

# images per part: what an interruption can cost
PART = 256


def open_parts(folder: Path, identity: dict) -> None:
    """Make ``folder``, or resume in it.

    Args:
        folder: of the parts.
        identity: what the images depend on; JSON.

    Raises:
        ValueError: it holds parts of other samples, or cannot be made.
    """
    file = folder / "identity.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # of several processes that start together, one writes the file and all read it
        if not file.exists():
            write_first(file, identity)
        held = json.loads(file.read_text())
    except OSError as error:
        raise ValueError(f"out {folder.parent} cannot be written: {error.strerror}") from None
    # through JSON and back: tuples become lists, as in the file
    wanted = json.loads(json.dumps(identity))
    for key, value in wanted.items():
        if held.get(key) != value:
            raise ValueError(
                f"{folder} holds unfinished samples with {key} {held.get(key)}, this run has {value}: "
                "delete it or choose another --out"
            )


def open_pngs(folder: Path, count: int) -> Path | None:
    """Make the folder of the ``count`` PNGs and return it; None if there are to be none.

    Raises:
        ValueError: it holds images of an earlier set, which would be taken for images of this one.
    """
    numbers = [int(file.stem) for file in folder.glob("*.png") if file.stem.isdigit()]
    extra = sum(number >= count for number in numbers)
    if extra:
        these = f"these {count}" if count else "these samples, which get none (--png true)"
        raise ValueError(
            f"{folder} holds {extra} images that are not of {these}: delete it or choose another "
            "--out"
        )
    if count == 0:
        return None
    folder.mkdir(exist_ok=True)
    return folder


def num_parts(count: int) -> int:
    """How many parts ``count`` images are."""
    return -(-count // PART)


def _part_file(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.npy"


def _save_array(path: Path, images: np.ndarray) -> None:
    # through an open file: given a path, numpy would add a suffix
    with open(path, "wb") as f:
        np.save(f, images)


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
) -> int:
    """Make those parts of this process that are still missing.

    Args:
        make: ``(first, end)`` image numbers -> uint8 ``[end - first, H, W, C]``.
        count: images of all processes together.
        folder: opened by ``open_parts``.
        rank, world: this process and the number of processes.
        png: folder for a PNG of every image as well.

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
        # the last part may be smaller
        first = number * PART
        end = min(first + PART, count)
        images = make(first, end)
        # the PNGs come first: a part that exists is never made again
        if png:
            for i, image in enumerate(images, start=first):
                _save_png(png / f"{i:06d}.png", image)
        write_atomic(file, lambda p, images=images: _save_array(p, images))
        made += end - first
    return made


def join_parts(folder: Path, count: int, labels: np.ndarray, out: Path, keep: int) -> np.ndarray:
    """Wait for all parts, stream them into one ``.npz``, delete them.

    Args:
        folder: of the parts.
        count: images of all processes together.
        labels: ``[count]``.
        out: the file to write: ``arr_0`` uint8 ``[count, H, W, C]``, ``arr_1`` the labels.
        keep: how many images to return.

    Returns:
        The first ``keep`` images, uint8.
    """
    # the processes share nothing but the folder, so the first one looks until the parts are there
    parts = [_part_file(folder, number) for number in range(num_parts(count))]
    while not all(part.exists() for part in parts):
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
    # the images that the caller shows
    first = np.concatenate([np.load(part) for part in parts[: num_parts(keep)]])[:keep]
    # the identity is deleted last: parts without one would be taken for parts of the next samples
    for part in parts:
        part.unlink()
    shutil.rmtree(folder)
    return first
