"""Many samples by many processes: parts of a fixed size, each made by one process and kept, joined into one .npz.

What an image is depends on its number alone, so neither the number of processes nor an interruption shows.  Processes meet
in the folder, not in a process group: none waits for another but the first, which joins the parts.
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

PART = 256


def open_parts(folder: Path, identity: dict) -> None:
    """Make ``folder``, or go on with the one that is there.

    Raises:
        ValueError: it holds parts of other samples, or cannot be made.
    """
    file = folder / "identity.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            write_first(file, identity)
        held = json.loads(file.read_text())
    except OSError as error:
        raise ValueError(f"out {folder.parent} cannot be written: {error.strerror}") from None
    for key, value in json.loads(json.dumps(identity)).items():
        if held.get(key) != value:
            raise ValueError(
                f"{folder} holds unfinished samples with {key} {held.get(key)}, this run has {value}: delete it or choose another --out"
            )


def open_pngs(folder: Path, count: int) -> None:
    """Make ``folder``; ValueError if it holds images of an earlier, larger set, which these ``count`` would not replace."""
    folder.mkdir(exist_ok=True)
    more = [
        file for file in folder.glob("*.png") if file.stem.isdigit() and int(file.stem) >= count
    ]
    if more:
        raise ValueError(
            f"{folder} holds {len(more)} images more than these {count}: delete it or choose another --out"
        )


def num_parts(count: int) -> int:
    return -(-count // PART)


def _part(folder: Path, i: int) -> Path:
    return folder / f"{i:06d}.npy"


def _save(path: Path, images: np.ndarray) -> None:
    with open(path, "wb") as f:  # an open file: save would add a suffix to the name
        np.save(f, images)


def make_parts(
    make: Callable[[int, int], np.ndarray],
    count: int,
    folder: Path,
    rank: int,
    world: int,
    png: Path | None = None,
) -> int:
    """Make this process's share of the parts that are missing; returns the number of images made.

    Args:
        make: ``(first, end)`` image numbers -> uint8 ``[end - first, H, W, C]``.
        count: images altogether.
        folder: opened by ``open_parts``.
        png: folder for a PNG per image as well.

    Raises:
        OSError: the disk is full, or the folder has gone; finished parts stay.
    """
    made = 0
    for i in range(rank, num_parts(count), world):
        if _part(folder, i).exists():
            continue
        first, end = i * PART, min((i + 1) * PART, count)
        images = make(first, end)
        for number, image in enumerate(images if png else (), start=first):
            picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
            write_atomic(
                png / f"{number:06d}.png", lambda p, picture=picture: picture.save(p, format="PNG")
            )
        write_atomic(_part(folder, i), lambda p, images=images: _save(p, images))
        made += end - first
    return made


def join_parts(folder: Path, count: int, labels: np.ndarray, out: Path, keep: int) -> np.ndarray:
    """Wait for every part, stream them into ``out`` (``arr_0`` uint8 ``[count, H, W, C]``, ``arr_1`` labels), delete them.

    Returns:
        The first ``keep`` images.
    """
    parts = [_part(folder, i) for i in range(num_parts(count))]
    while not all(part.exists() for part in parts):
        time.sleep(0.2)
    shape = np.load(parts[0], mmap_mode="r").shape[1:]

    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as f:
                np.lib.format.write_array_header_1_0(
                    f, {"descr": "|u1", "fortran_order": False, "shape": (count, *shape)}
                )
                for part in parts:
                    f.write(np.load(part).tobytes())
            with archive.open("arr_1.npy", "w") as f:
                np.lib.format.write_array(f, labels)

    write_atomic(out, write)
    first = np.concatenate([np.load(part) for part in parts[: num_parts(keep)]])[:keep]
    for part in (
        parts
    ):  # before the identity: parts without one would be taken for those of the next samples
        part.unlink()
    shutil.rmtree(folder)
    return first
