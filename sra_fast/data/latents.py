"""VAE moments on disk, in the reference's layout (one file per image) or packed in shards.

Packed: ``<path>/index.json``, ``labels.npy`` (int64 ``[N]``) and ``shards/00000.npy``, ... (``[shard_size, 2C, H, W]``
each, the last one shorter; mean, then standard deviation).  The index is written last and holds what the latents were
made with, and the size and SHA-256 of every other file.  bf16 is stored as its bits in uint16, which .npy has a name for.
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
INDEX, LABELS, JOB, VERSION = "index.json", "labels.npy", "preprocess.json", 1
STORAGE = {"float16": np.float16, "bfloat16": np.uint16, "float32": np.float32}
_parsing = threading.Lock()


def load_npy(file: Path | io.BytesIO, **options) -> np.ndarray:
    """``numpy.load``, by one thread at a time.

    It parses a header as Python, which two threads at once may turn into a SystemError (CPython 3.11.7, gh-106905).
    """
    with _parsing:
        return np.load(file, **options)


def shard_name(number: int) -> str:
    return f"shards/{number:05d}.npy"


def sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def file_entry(root: Path, name: str) -> dict:
    """What the index says of a file."""
    return {"file": name, "bytes": (root / name).stat().st_size, "sha256": sha256(root / name)}


class Moments(TrainingData):
    """Means and standard deviations of latents.

    Attributes:
        moments_shape: [2C, H, W].
        fingerprint: SHA-256 of names and labels, or of the index.
        vae: ``vae_identity`` of what made them, if known.
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
        return (self.moments_shape[0] // 2, *self.moments_shape[1:])

    def __len__(self) -> int:
        return len(self.labels)

    def to_latent(self, moments: Tensor, noise: Tensor) -> Tensor:
        """``[B, 2C, H, W]`` moments and ``[B, C, H, W]`` normals -> latents ``(mean + std * noise) * scale``, fp32."""
        mean, std = moments.float().chunk(2, dim=1)
        return (mean + std * noise) * self.scale


class Latents(Moments):
    """The reference's layout: ``<path>/vae-sd/**/*.npy`` (``[2C, H, W]``) and ``vae-sd/dataset.json``.

    Args:
        path: folder that holds ``vae-sd``.
        scale: multiplies the sampled latents.

    Raises:
        ValueError: the folder, its ``dataset.json``, images or labels are missing, or the moments have no [2C, H, W].
    """

    def __init__(self, path: str, scale: float = 0.18215):
        self.root, self.scale = Path(path) / "vae-sd", scale
        if not self.root.is_dir():
            raise ValueError(
                f"data.path must hold a folder vae-sd with VAE moments, or {INDEX} of packed ones; found none at {path}"
            )
        self.files = sorted(f.relative_to(self.root).as_posix() for f in self.root.rglob("*.npy"))
        if not self.files:
            raise ValueError(f"no .npy file under {self.root}")
        found = self._read_labels()
        self.labels = torch.tensor(found, dtype=torch.int64)
        self.num_classes = int(self.labels.max()) + 1
        self.moments_shape = self._read(self.files[0], first=True).shape
        self.fingerprint = hashlib.sha256(json.dumps([self.files, found]).encode()).hexdigest()

    def _read_labels(self) -> list[int]:
        index = self.root / "dataset.json"
        try:
            content = json.loads(index.read_text())
            labels, self.vae = dict(content["labels"]), content.get("vae")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f'{index} must hold {{"labels": [[file, label], ...]}}: {error!r}'
            ) from None
        missing = [f for f in self.files if f not in labels]
        if missing:
            raise ValueError(
                f"{index} has no label for {len(missing)} files, the first is {missing[0]}"
            )
        absent = labels.keys() - set(self.files)
        if absent:
            raise ValueError(
                f"{index} lists {len(absent)} files that are not there, the first is {min(absent, key=str)}"
            )
        found = [labels[f] for f in self.files]
        wrong = next((i for i, label in enumerate(found) if type(label) is not int), None)
        if wrong is not None:
            raise ValueError(
                f"{index}: the label of {self.files[wrong]} must be an integer, got {found[wrong]!r}"
            )
        return found

    def _read(self, name: str, first: bool = False) -> np.ndarray:
        try:
            moments = load_npy(io.BytesIO((self.root / name).read_bytes()), allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"{self.root / name} is no readable .npy file: {error}") from None
        if (
            moments.ndim == 4 and moments.shape[0] == 1
        ):  # the reference's encoder leaves a batch dimension
            moments = moments[0]
        expected = moments.shape if first else self.moments_shape
        if moments.ndim != 3 or moments.shape[0] % 2 or moments.shape != expected:
            raise ValueError(
                f"{self.root / name} must hold moments [2C, H, W] like the others, got {moments.shape}"
            )
        return moments

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        moments = np.stack([self._read(self.files[i]) for i in indices])
        return torch.from_numpy(moments), self.labels[indices]


class PackedLatents(Moments):
    """Moments in shards, memory-mapped as they are touched; nothing but the index is read before.

    Args:
        path: folder that holds ``index.json``.
        scale: multiplies the sampled latents.
        verify: compare a shard's SHA-256 with the index when a batch first touches it (once per process and its loaders).

    Raises:
        ValueError: the index is unreadable, or the labels or any shard are missing, cut short or (labels) altered;
            ``__getitems__``: a shard that was altered since.
    """

    def __init__(self, path: str, scale: float = 0.18215, verify: bool = False):
        self.root, self.scale = Path(path), scale
        self._read_index()
        self._check_files()
        # mode c: PyTorch has no read-only tensors
        self.labels = torch.from_numpy(np.load(self.root / LABELS, mmap_mode="c"))
        if (
            self.labels.shape != (self.length,)
            or not 0 <= self.labels.min() <= self.labels.max() < self.num_classes
        ):
            raise ValueError(
                f"{self.root / LABELS} must hold {self.length} labels in [0, {self.num_classes})"
            )
        self.unchecked = torch.full((len(self.entries),), verify).share_memory_()
        self._maps: dict[int, np.ndarray] = {}

    def _read_index(self) -> None:
        file = self.root / INDEX
        try:
            text = file.read_bytes()
            self.index = index = json.loads(text)
            if index["version"] != VERSION:
                raise ValueError(f"version {VERSION} was expected, got {index['version']}")
            self.moments_shape, self.dtype = tuple(index["shape"]), getattr(torch, index["dtype"])
            self.storage, self.shard_size = STORAGE[index["dtype"]], int(index["shard_size"])
            self.length, self.num_classes, self.vae = (
                index["num_images"],
                index["num_classes"],
                index["vae"],
            )
            self.entries, self.label_entry = index["shards"], index["labels"]
            if len(self.entries) != -(-self.length // self.shard_size):
                raise ValueError(
                    f"{len(self.entries)} shards of {self.shard_size} cannot hold {self.length} images"
                )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file} is no index of packed latents: {error!r}") from None
        self.fingerprint = hashlib.sha256(text).hexdigest()

    def _check_files(self) -> None:
        wrong = []
        for entry in (self.label_entry, *self.entries):
            path = self.root / entry["file"]
            size = path.stat().st_size if path.exists() else None
            if size != entry["bytes"]:
                found = (
                    "is missing"
                    if size is None
                    else f"has {size} bytes instead of {entry['bytes']}"
                )
                wrong.append(f"{entry['file']} {found}")
        if not wrong and sha256(self.root / LABELS) != self.label_entry["sha256"]:
            wrong.append(f"{LABELS} was altered")
        if wrong:
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise ValueError(
                f"{self.root}: {'; '.join(wrong[:3])}{more}. The command that made the folder mends it"
            )

    def _shard(self, number: int) -> np.ndarray:
        if number not in self._maps:
            self._maps[number] = self._open(number)
        return self._maps[number]

    def _open(self, number: int) -> np.ndarray:
        path, entry = self.root / self.entries[number]["file"], self.entries[number]
        try:
            if self.unchecked[number] and sha256(path) != entry["sha256"]:
                raise ValueError(f"its SHA-256 is not the index's {entry['sha256']}")
            shard = load_npy(path, mmap_mode="r").view(
                np.ndarray
            )  # a memmap's own indexing costs more than the read
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} was altered or cannot be read: {error}") from None
        expected = (
            min(self.shard_size, self.length - number * self.shard_size),
            *self.moments_shape,
        )
        if (shard.shape, shard.dtype) != (expected, self.storage):
            raise ValueError(
                f"{path} must hold {expected} of {self.storage}, got {shard.shape} of {shard.dtype}"
            )
        self.unchecked[number] = False
        return shard

    def __getstate__(self) -> dict:
        return {
            **self.__dict__,
            "_maps": {},
        }  # a loader process opens its own; a pickled map would be the shard itself

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """``[B, 2C, H, W]`` moments in the stored dtype and ``[B]`` labels, as asked for; read in the order of the disk."""
        moments = np.empty((len(indices), *self.moments_shape), self.storage)
        for position in np.argsort(indices):
            shard, row = divmod(indices[position], self.shard_size)
            moments[position] = self._shard(shard)[row]
        return torch.from_numpy(moments).view(self.dtype), self.labels[indices]


def open_latents(
    path: str, scale: float = 0.18215, verify: bool = False
) -> Latents | PackedLatents:
    """Moments in either layout; ValueError if there are none, or not all yet."""
    root = Path(path)
    if (
        (root / JOB).exists()
        and not (root / INDEX).exists()
        and not (root / "vae-sd/dataset.json").exists()
    ):
        raise ValueError(
            f"the preprocessing of {root} is not finished: the same command goes on with it"
        )
    data = PackedLatents(path, scale, verify) if (root / INDEX).exists() else Latents(path, scale)
    factor = data.vae["scaling_factor"] if data.vae else scale
    if factor != scale:
        log.warning(
            "data.latent_scale is %s, the scaling_factor of the VAE that made %s is %s",
            scale,
            path,
            factor,
        )
    return data
