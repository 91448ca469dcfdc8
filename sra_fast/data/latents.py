"""VAE moments on disk: one file per image as the published code has them, or packed in shards.

The packed layout is ``<path>/index.json``, ``labels.npy`` (int64 ``[N]``) and ``shards/00000.npy``,
``shards/00001.npy``, ... Each shard is ``[shard_size, 2C, H, W]``, the mean and then the standard
deviation; the last shard may be shorter. The index is written last. It records how the latents were
made, and the size and SHA-256 of every other file. The .npy format has no bf16, so bf16 is stored
as its bits in uint16.
"""

import hashlib
import io
import json
import logging
import threading
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sra_fast.data.training_data import TrainingData

log = logging.getLogger(__name__)

VERSION = 1
INDEX = "index.json"
LABELS = "labels.npy"
# written when preprocessing starts: a folder with this file and no index is unfinished
RECIPE = "preprocess.json"
STORAGE = {"float16": np.float16, "bfloat16": np.uint16, "float32": np.float32}
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


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def file_entry(root: Path, name: str) -> dict:
    """The index's entry of a file: name, size and SHA-256."""
    path = root / name
    return {"file": name, "bytes": path.stat().st_size, "sha256": sha256(path)}


class MomentDataset(TrainingData):
    """Base class of data sets of means and standard deviations of latents.

    Attributes:
        labels: int64 ``[N]``.
        moments_shape: (2C, H, W).
        num_classes: labels lie in [0, num_classes).
        fingerprint: SHA-256 of names and labels, or of the index.
        vae: ``vae_identity`` of the VAE that made the moments, or None if unknown.
        scale: multiplies the sampled latents.
    """

    posterior = True
    labels: Tensor
    moments_shape: tuple[int, int, int]
    num_classes: int
    fingerprint: str
    vae: dict | None
    scale: float

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a latent."""
        channels, height, width = self.moments_shape
        return (channels // 2, height, width)

    def __len__(self) -> int:
        return len(self.labels)

    def to_latent(self, moments: Tensor, noise: Tensor) -> Tensor:
        """Sample the posterior: ``(mean + std * noise) * scale``.

        Args:
            moments: ``[B, 2C, H, W]``, any floating dtype.
            noise: ``[B, C, H, W]`` standard normals.

        Returns:
            Latents ``[B, C, H, W]``, fp32.
        """
        # the stored dtype may be fp16; the sum is computed in fp32
        mean, std = moments.float().chunk(2, dim=1)
        return (mean + std * noise) * self.scale


class Latents(MomentDataset):
    """The published code's layout: ``<path>/vae-sd/**/*.npy`` (``[2C, H, W]``) and ``vae-sd/dataset.json``.

    Args:
        path: folder that holds ``vae-sd``.
        scale: multiplies the sampled latents.

    Raises:
        ValueError: the folder, its ``dataset.json``, images or labels are missing, or the moments
            are not [2C, H, W].
    """

    def __init__(self, path: str, scale: float = 0.18215):
        self.root = Path(path) / "vae-sd"
        self.scale = scale
        if not self.root.is_dir():
            raise ValueError(
                f"data.path must hold a folder vae-sd with VAE moments, or {INDEX} of packed ones; "
                f"found none at {path}"
            )
        # sorted, so that an image has the same number on every machine
        self.files = sorted(f.relative_to(self.root).as_posix() for f in self.root.rglob("*.npy"))
        if not self.files:
            raise ValueError(f"no .npy file under {self.root}")
        labels = self._read_labels()
        self.labels = torch.tensor(labels, dtype=torch.int64)
        self.num_classes = int(self.labels.max()) + 1
        self.moments_shape = self._read(self.files[0], first=True).shape
        self.fingerprint = hashlib.sha256(json.dumps([self.files, labels]).encode()).hexdigest()

    def _read_labels(self) -> list[int]:
        """The label of every file in ``files``, and ``self.vae``."""
        index = self.root / "dataset.json"
        try:
            content = json.loads(index.read_text())
            labels = dict(content["labels"])
            self.vae = content.get("vae")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f'{index} must hold {{"labels": [[file, label], ...]}}: {error!r}'
            ) from None

        # the list and the folder must hold the same files
        unlabelled = [f for f in self.files if f not in labels]
        if unlabelled:
            raise ValueError(
                f"{index} has no label for {len(unlabelled)} files, the first is {unlabelled[0]}"
            )
        absent = labels.keys() - set(self.files)
        if absent:
            first = min(absent, key=str)
            raise ValueError(
                f"{index} lists {len(absent)} files that are not there, the first is {first}"
            )

        for name in self.files:
            # bool is a subclass of int, but true is no label
            if type(labels[name]) is not int:
                raise ValueError(
                    f"{index}: the label of {name} must be an integer, got {labels[name]!r}"
                )
        return [labels[name] for name in self.files]

    def _read(self, name: str, first: bool = False) -> np.ndarray:
        """Moments ``[2C, H, W]`` of one file; ``first``: the file that decides the shape."""
        path = self.root / name
        try:
            moments = load_npy(io.BytesIO(path.read_bytes()), allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"{path} is no readable .npy file: {error}") from None
        # the published encoder leaves a batch dimension of 1
        if moments.ndim == 4 and moments.shape[0] == 1:
            moments = moments[0]
        expected = moments.shape if first else self.moments_shape
        if moments.ndim != 3 or moments.shape[0] % 2 or moments.shape != expected:
            raise ValueError(
                f"{path} must hold moments [2C, H, W] like the others, got {moments.shape}"
            )
        return moments

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """Moments ``[B, 2C, H, W]`` in the stored dtype and labels ``[B]``."""
        moments = np.stack([self._read(self.files[i]) for i in indices])
        return torch.from_numpy(moments), self.labels[indices]


class PackedLatents(MomentDataset):
    """Moments in shards. Opening reads only the index and the labels; a shard is memory-mapped when it is first used.

    Args:
        path: folder that holds ``index.json``.
        scale: multiplies the sampled latents.
        verify: compare a shard's SHA-256 with the index when a batch first uses it. This happens
            once, however many loader processes there are.

    Raises:
        ValueError: the index is unreadable, or the labels or a shard are missing, cut short or
            (labels only) altered. ``__getitems__`` raises it for a shard that was altered.
    """

    def __init__(self, path: str, scale: float = 0.18215, verify: bool = False):
        self.root = Path(path)
        self.scale = scale
        # sizes are compared now, contents only with verify: hashing 21 GB would delay every start
        self._read_index()
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

    def _read_index(self) -> None:
        file = self.root / INDEX
        try:
            text = file.read_bytes()
            index = json.loads(text)
            if index["version"] != VERSION:
                raise ValueError(f"version {VERSION} was expected, got {index['version']}")
            self.index = index
            self.moments_shape = tuple(index["shape"])
            self.dtype = getattr(torch, index["dtype"])
            self.storage = STORAGE[index["dtype"]]
            self.shard_size = int(index["shard_size"])
            self.length = index["num_images"]
            self.num_classes = index["num_classes"]
            self.vae = index["vae"]
            self.entries = index["shards"]
            self.label_entry = index["labels"]
            if len(self.entries) != -(-self.length // self.shard_size):
                raise ValueError(
                    f"{len(self.entries)} shards of {self.shard_size} cannot hold {self.length} images"
                )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file} is no index of packed latents: {error!r}") from None
        self.fingerprint = hashlib.sha256(text).hexdigest()

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
            raise ValueError(
                f"{self.root}: {'; '.join(wrong[:3])}{more}. "
                "Run the command that made the folder again to repair it"
            )

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
            raise ValueError(f"{path} was altered or cannot be read: {error}") from None
        # the last shard may be shorter
        rows = min(self.shard_size, self.length - number * self.shard_size)
        expected = (rows, *self.moments_shape)
        if (shard.shape, shard.dtype) != (expected, self.storage):
            raise ValueError(
                f"{path} must hold {expected} of {self.storage}, got {shard.shape} of {shard.dtype}"
            )
        self.unchecked[number] = False
        return shard

    def __getstate__(self) -> dict:
        # a loader process maps the shards itself: pickling a map would copy the whole shard
        return {**self.__dict__, "_maps": {}}

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """Moments ``[B, 2C, H, W]`` in the stored dtype and labels ``[B]``, in the order of ``indices``."""
        moments = np.empty((len(indices), *self.moments_shape), self.storage)
        # read in the order of the disk, write to the asked position
        for position in np.argsort(indices):
            number, row = divmod(indices[position], self.shard_size)
            moments[position] = self._shard(number)[row]
        return torch.from_numpy(moments).view(self.dtype), self.labels[indices]


def open_latents(
    path: str, scale: float = 0.18215, verify: bool = False
) -> Latents | PackedLatents:
    """Open moments in either layout.

    Args:
        path: folder that holds ``index.json`` or ``vae-sd``.
        scale: multiplies the sampled latents. A warning says if the VAE that made them has another.
        verify: see ``PackedLatents``.

    Raises:
        ValueError: there are no moments, or preprocessing has not finished.
    """
    root = Path(path)
    # either of these two files is written last
    packed = (root / INDEX).exists()
    finished = packed or (root / "vae-sd/dataset.json").exists()
    if (root / RECIPE).exists() and not finished:
        raise ValueError(
            f"the preprocessing of {root} is not finished: run the same command again to resume it"
        )
    data = PackedLatents(path, scale, verify) if packed else Latents(path, scale)
    if data.vae and data.vae["scaling_factor"] != scale:
        log.warning(
            "data.latent_scale is %s, the scaling_factor of the VAE that made %s is %s",
            scale,
            path,
            data.vae["scaling_factor"],
        )
    return data
