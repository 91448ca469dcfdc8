"""Packed data sets: one array per shard, with an index that says how they were made.

A packed data set is ``<path>/index.json``, ``labels.npy`` (int64 ``[N]``) and ``shards/00000.npy``,
``shards/00001.npy``, ... A shard holds as many rows as its entry in the index says: moments
``[n, 2C, H, W]``, the mean and then the standard deviation, pixels ``[n, C, H, W]`` in uint8, or
features ``[n, T, D]`` (see ``features.py``). The index is written last. It records how the rows were
made, and the size and SHA-256 of every other file; ``missing`` are the numbers of the images that
could not be read, as the source counts them. Rows of kind text are flat and belong to
captions (see ``stored_text.py``); ``images`` then counts captions. The .npy format has no bf16, so bf16 is stored as
its bits in uint16.
"""

import hashlib
import io
import json
import threading
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sra_fast.data.reasons import why
from sra_fast.utils.files import sha256, why_unreadable

# 1: every shard but the last is full, no statistics and no class names
VERSIONS = (1, 2)
INDEX = "index.json"
LABELS = "labels.npy"
# written when preprocessing starts: a folder with this file and no index is unfinished
RECIPE = "preprocess.json"
STORAGE = {
    "uint8": np.uint8,
    "float16": np.float16,
    "bfloat16": np.uint16,
    "float32": np.float32,
}
# what mends a data set that was damaged
REPAIR = "Run the command that made the folder again to repair it"
# images that no run trains on: a data set of its own in this folder
HELD_OUT_FOLDER = "held_out"
_parsing = threading.Lock()


def load_npy(file: Path | io.BytesIO, **options) -> np.ndarray:
    """``numpy.load``, for one thread at a time.

    NumPy parses the header as Python source. Two threads that do so at once may get a SystemError
    (CPython 3.11.7, gh-106905).
    """
    with _parsing:
        return np.load(file, **options)


def shard_name(number: int) -> str:
    """File name of a shard, relative to the data set's folder."""
    return f"shards/{number:05d}.npy"


def file_entry(root: Path, name: str) -> dict:
    """The index's entry of a file: name, size and SHA-256."""
    path = root / name
    return {"file": name, "bytes": path.stat().st_size, "sha256": sha256(path)}


def check_finished(root: Path) -> None:
    """ValueError if preprocessing has begun this folder, or the held-out part in it, and not ended."""
    for folder in (root, root / HELD_OUT_FOLDER):
        # either of these two files is written last
        finished = (folder / INDEX).exists() or (folder / "vae-sd/dataset.json").exists()
        if (folder / RECIPE).exists() and not finished:
            raise ValueError(
                f"the preprocessing of {root} is not finished: run the same command again to resume it"
            )


def read_index(root: Path) -> dict:
    """The index of a packed data set; ValueError if there is none that this version can read."""
    file = root / INDEX
    check_finished(root)
    if not file.exists():
        raise ValueError(f"no packed data set at {root}: there is no {file}")
    try:
        index = json.loads(file.read_bytes())
        if index["version"] not in VERSIONS:
            expected = " or ".join(map(str, VERSIONS))
            raise ValueError(f"version {expected} was expected, got {index['version']}")
        return index
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is no index of a packed data set: {why(error)}") from None


class Shards:
    """The rows of a packed data set. Opening reads only the index and the labels; a shard is
    memory-mapped when it is first used.

    Args:
        path: folder that holds ``index.json``.
        kind: ``"moments"``, ``"pixels"``, ``"features"`` or ``"text"``, what the rows must be.
        verify: compare a shard's SHA-256 with the index when a batch first uses it. This happens
            once, however many loader processes there are.

    Attributes:
        index: the content of ``index.json``.
        fingerprint: SHA-256 of the hashes of labels and shards.
        labels: int64 ``[N]``.
        num_classes: labels lie in [0, num_classes).
        row_shape: shape of a row.

    Raises:
        ValueError: the index is unreadable or of another kind, or the labels or a shard are missing,
            cut short or (labels only) altered. ``read`` raises it for a shard that was altered.
    """

    def __init__(self, path: str | Path, kind: str, verify: bool = False):
        self.root = Path(path)
        # sizes are compared now, contents only with verify: hashing 21 GB would delay every start
        self.index = read_index(self.root)
        self._read_layout(kind)
        self._check_files()
        # mode c (copy on write): PyTorch has no read-only tensors
        self.labels = torch.from_numpy(np.load(self.root / LABELS, mmap_mode="c"))
        right_length = self.labels.shape == (self.length,)
        if not right_length or not 0 <= self.labels.min() <= self.labels.max() < self.num_classes:
            raise ValueError(
                f"{self.root / LABELS} must hold {self.length} labels in [0, {self.num_classes})"
            )
        # in shared memory, so that what one loader process has verified is known to all
        self.unchecked = torch.full((len(self.entries),), verify).share_memory_()
        self._maps: dict[int, np.ndarray] = {}

    def _read_layout(self, kind: str) -> None:
        index = self.index
        file = self.root / INDEX
        # an index of version 1 is one of moments
        found = index.get("kind", "moments")
        if found != kind:
            raise ValueError(f"{self.root} holds {found}, {kind} were expected")
        try:
            self.row_shape = tuple(index["shape"])
            self.dtype = getattr(torch, index["dtype"])
            self.storage = STORAGE[index["dtype"]]
            self.length = index["num_images"]
            self.num_classes = index["num_classes"]
            self.entries = index["shards"]
            self.label_entry = index["labels"]
            self.rows = _rows_of_shards(index)
            if sum(self.rows) != self.length:
                raise ValueError(
                    f"its {len(self.rows)} shards hold {sum(self.rows)} images, not {self.length}"
                )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file} is no index of a packed data set: {why(error)}") from None
        # number of the first row of every shard
        self.first_rows = np.cumsum([0, *self.rows[:-1]])
        # of the contents only: the same images, packed elsewhere, are the same data
        contents = [
            kind,
            self.num_classes,
            *(e["sha256"] for e in (self.label_entry, *self.entries)),
        ]
        self.fingerprint = hashlib.sha256(json.dumps(contents).encode()).hexdigest()

    def _check_files(self) -> None:
        """Compare the size of every file with the index, and the labels' SHA-256 (8 bytes an image: quick)."""
        wrong = []
        for entry in (self.label_entry, *self.entries):
            path = self.root / entry["file"]
            if not path.exists():
                wrong.append(f"{entry['file']} is missing")
            elif path.stat().st_size != entry["bytes"]:
                size = path.stat().st_size
                wrong.append(f"{entry['file']} has {size} bytes instead of {entry['bytes']}")
        if not wrong and sha256(self.root / LABELS) != self.label_entry["sha256"]:
            wrong.append(f"{LABELS} was altered")
        if wrong:
            # the first three are enough to see what happened
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise ValueError(f"{self.root}: {'; '.join(wrong[:3])}{more}. {REPAIR}")

    def _shard(self, number: int) -> np.ndarray:
        if number not in self._maps:
            self._maps[number] = self._open(number)
        return self._maps[number]

    def _open(self, number: int) -> np.ndarray:
        entry = self.entries[number]
        path = self.root / entry["file"]
        try:
            if self.unchecked[number] and sha256(path) != entry["sha256"]:
                raise ValueError(f"its SHA-256 is not the index's {entry['sha256']}")
            # as a plain array: indexing a memmap costs more than the read itself
            shard = load_npy(path, mmap_mode="r").view(np.ndarray)
        except (OSError, ValueError) as error:
            reason = why_unreadable(error)
            raise ValueError(f"{path} was altered or cannot be read: {reason}. {REPAIR}") from None
        expected = (self.rows[number], *self.row_shape)
        if (shard.shape, shard.dtype) != (expected, self.storage):
            raise ValueError(
                f"{path} must hold {expected} of {self.storage}, got {shard.shape} of {shard.dtype}"
            )
        self.unchecked[number] = False
        return shard

    def __getstate__(self) -> dict:
        # a loader process maps the shards itself: pickling a map would copy the whole shard
        return {**self.__dict__, "_maps": {}}

    def locate(self, number: int) -> str:
        """Shard and row of an image: ``shards/00002.npy, row 17``."""
        shard = int(np.searchsorted(self.first_rows, number, side="right")) - 1
        return f"{self.entries[shard]['file']}, row {number - self.first_rows[shard]}"

    def read(self, indices: list[int]) -> Tensor:
        """Rows ``[B, *row_shape]`` in the stored dtype, in the order of ``indices``."""
        rows = np.empty((len(indices), *self.row_shape), self.storage)
        shards = np.searchsorted(self.first_rows, indices, side="right") - 1
        # read in the order of the disk, write to the asked position
        for position in np.argsort(indices):
            number = int(shards[position])
            rows[position] = self._shard(number)[indices[position] - self.first_rows[number]]
        return torch.from_numpy(rows).view(self.dtype)


def _rows_of_shards(index: dict) -> list[int]:
    """How many rows every shard holds."""
    entries = index["shards"]
    if index["version"] > 1:
        return [entry["images"] for entry in entries]
    # all full but the last
    size = index["shard_size"]
    starts = range(0, index["num_images"], size)
    if len(entries) != len(starts):
        raise ValueError(
            f"{len(entries)} shards of {size} cannot hold {index['num_images']} images"
        )
    return [min(size, index["num_images"] - start) for start in starts]
