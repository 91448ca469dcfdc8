"""VAE moments on disk: one file per image as the published code has them, or packed in shards."""

import hashlib
import io
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sra_fast.data.facts import DataFacts
from sra_fast.data.normalization import (
    OF_LATENTS,
    Normalization,
    Numbers,
    check_shift,
    in_words,
)
from sra_fast.data.packed import HELD_OUT_FOLDER, INDEX, check_finished, load_npy
from sra_fast.data.reasons import why
from sra_fast.data.statistics import Statistics
from sra_fast.data.training_data import AT_ONCE, InShards, TrainingData
from sra_fast.utils.checks import require_that
from sra_fast.utils.files import why_unreadable

log = logging.getLogger("sra_fast")

# a model learns best if its input's deviation is about 1; outside of this range there is a warning
PLAUSIBLE_DEVIATION = (0.5, 2.0)
# how many images are looked at when a data set is opened
LOOKED_AT = 64


class MomentDataset(TrainingData):
    """Base class of data sets of means and standard deviations of latents.

    Attributes:
        labels: int64 ``[N]``.
        moments_shape: (2C, H, W).
        num_classes: labels lie in [0, num_classes).
        class_names: of every class, or None.
        fingerprint: SHA-256 of names, labels and some contents, or of the shards' hashes.
        vae: ``vae_identity`` of the VAE that made the moments, or None if unknown.
        vae_path: where that VAE was, or None.
        normalization: what makes latents of z, which is drawn from the VAE's posterior.
        notes: what who packs them anew should know, one line each.
    """

    name = "latents"
    posterior = True
    self_checked = True
    labels: Tensor
    moments_shape: tuple[int, int, int]
    num_classes: int
    class_names: list[str] | None = None
    fingerprint: str
    vae: dict | None = None
    vae_path: str | None = None
    normalization: Normalization
    root: Path
    notes: Sequence[str] = ()

    def _set_normalization(self, scale: Numbers | None, shift: Numbers | None) -> None:
        """What was asked for, or what belongs to the VAE."""
        own = Normalization.of_vae(self.vae, self.shape[0], str(self.path))
        self.normalization = Normalization.checked(
            own.scale if scale is None else scale,
            own.shift if shift is None else shift,
            self.shape[0],
            "data.",
        )

    def use_statistics(self) -> None:
        """From now on latents have mean 0 and deviation 1 in every channel.

        Raises:
            ValueError: a channel has no deviation.
        """
        self.normalization = Normalization.of_statistics(*self.statistics(), str(self.path))

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a latent."""
        channels, height, width = self.moments_shape
        return (channels // 2, height, width)

    def to_latent(self, moments: Tensor, noise: Tensor) -> Tensor:
        """Sample the posterior: ``(mean + std * noise - shift) * scale``.

        Args:
            moments: ``[B, 2C, H, W]``, any floating dtype.
            noise: ``[B, C, H, W]`` standard normals.

        Returns:
            Latents ``[B, C, H, W]``, fp32.
        """
        # the stored dtype may be fp16; the sum is computed in fp32
        mean, std = moments.float().chunk(2, dim=1)
        z = mean + std * noise
        return self.normalization.normalize(z)

    def facts(self) -> DataFacts:
        return replace(
            super().facts(),
            class_names=self.class_names,
            scale=self.normalization.scale,
            shift=self.normalization.shift,
            vae=self.vae,
            vae_path=self.vae_path,
        )

    @property
    def path(self) -> Path:
        """The folder that was given."""
        return self.root

    def statistics(self) -> tuple[list[float], list[float]]:
        """Mean and deviation of z in every channel, over all images."""
        log.warning(
            "all %d images of %s are read for the statistics of their channels, at every start: "
            "data that preprocess.py packs have them in their index",
            *(len(self), self.path),
        )
        return _statistics_of(self, list(range(len(self))))

    def deviations(self) -> list[float]:
        """Standard deviation of the latents in every channel: 1 is what a model expects."""
        return self.normalization.deviations(self._std())

    def _std(self) -> list[float]:
        """Deviation of z in every channel, of some images."""
        rows = np.unique(np.linspace(0, len(self) - 1, LOOKED_AT).astype(int))
        return _statistics_of(self, rows.tolist())[1]

    def open_held_out(self) -> TrainingData | None:
        folder = self.path / HELD_OUT_FOLDER
        if not folder.is_dir():
            return None
        return _open(str(folder), self.normalization.scale, self.normalization.shift)


def _statistics_of(data: MomentDataset, rows: list[int]) -> tuple[list[float], list[float]]:
    """Mean and deviation of z in every channel; ValueError if these images cannot be moments."""
    statistics = Statistics(data.moments_shape[0], moments=True)
    for start in range(0, len(rows), AT_ONCE):
        moments, *_ = data.__getitems__(rows[start : start + AT_ONCE])
        check_moments(moments, f"{data.path}")
        statistics.update(moments)
    found = Statistics.combine([statistics.as_json()])
    assert found is not None
    return found["mean"], found["std"]


def check_moments(moments: Tensor, source: str) -> None:
    """ValueError unless ``[..., 2C, H, W]`` can be means and standard deviations."""
    if not moments.is_floating_point():
        raise ValueError(f"{source}: moments must be floating-point numbers, got {moments.dtype}")
    if not moments.isfinite().all():
        raise ValueError(f"{source}: moments must be finite, they are not")
    std = moments.chunk(2, dim=-3)[1]
    if (std < 0).any():
        raise ValueError(
            f"{source}: the second half of the channels must be standard deviations, found "
            f"{std.min().item():.4g}: are these logarithms of variances?"
        )


class Latents(MomentDataset):
    """The published code's layout: ``<path>/vae-sd/**/*.npy`` (``[2C, H, W]``) and ``vae-sd/dataset.json``.

    Args:
        path: folder that holds ``vae-sd``.
        scale: see ``MomentDataset``; default: that of the VAE in ``dataset.json``, else SD-VAE's.
        shift: likewise.

    Raises:
        ValueError: the folder, its ``dataset.json``, images or labels are missing, or the moments
            are not [2C, H, W].
    """

    counted_classes = True

    def __init__(self, path: str, scale: Numbers | None = None, shift: Numbers | None = None):
        self.root = Path(path) / "vae-sd"
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
        self._set_normalization(scale, shift)
        self.fingerprint = self._fingerprint(labels)

    def _fingerprint(self, labels: list[int]) -> str:
        """SHA-256 of all names and labels, and of the contents of some files.

        A million small files cannot be read at every start. Other moments of the same images differ
        in every file.
        """
        digest = hashlib.sha256(json.dumps([self.files, labels]).encode())
        self.listing = digest.hexdigest()
        for name in self.files[:: max(1, len(self.files) // LOOKED_AT)][:LOOKED_AT]:
            digest.update(hashlib.sha256((self.root / name).read_bytes()).digest())
        return digest.hexdigest()

    @property
    def path(self) -> Path:
        return self.root.parent

    def _read_labels(self) -> list[int]:
        """The label of every file in ``files``, and what the list says about VAE and classes."""
        index = self.root / "dataset.json"
        try:
            content = json.loads(index.read_text())
            labels = dict(content["labels"])
            self.vae = content.get("vae")
            self.vae_path = content.get("vae_path")
            self.class_names = content.get("classes")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f'{index} must hold {{"labels": [[file, label], ...]}}: {why(error)}'
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
            raise ValueError(f"{path} is no readable .npy file: {why_unreadable(error)}") from None
        # the published encoder leaves a batch dimension of 1
        if moments.ndim == 4 and moments.shape[0] == 1:
            moments = moments[0]
        expected = moments.shape if first else self.moments_shape
        if moments.ndim != 3 or moments.shape[0] % 2 or moments.shape != expected:
            raise ValueError(
                f"{path} must hold moments [2C, H, W] like the others, got {moments.shape}"
            )
        # every file: other programs than ours write this layout
        check_moments(torch.from_numpy(moments), str(path))
        return moments

    def locate(self, number: int) -> str:
        return f"image {number} ({self.files[number]})"

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """Moments ``[B, 2C, H, W]`` in the stored dtype and labels ``[B]``."""
        moments = np.stack([self._read(self.files[i]) for i in indices])
        return torch.from_numpy(moments), self.labels[indices]


class PackedLatents(InShards, MomentDataset):
    """Moments in shards (see ``packed.py``).

    Args:
        path: folder that holds ``index.json``.
        scale: see ``MomentDataset``; default: that of the VAE in the index, else SD-VAE's.
        shift: likewise.
        verify: see ``Shards``.

    Raises:
        ValueError: see ``Shards``.
    """

    def __init__(
        self,
        path: str | Path,
        scale: Numbers | None = None,
        shift: Numbers | None = None,
        verify: bool = False,
    ):
        self.root = Path(path)
        self._open_shards(path, "moments", verify)
        index = self.shards.index
        self.moments_shape = self.shards.row_shape
        self.vae = index["vae"]
        self.vae_path = index.get("vae_path")
        self._set_normalization(scale, shift)

    def statistics(self) -> tuple[list[float], list[float]]:
        # an index of an older version has none
        return self._stored_statistics() or super().statistics()

    def _std(self) -> list[float]:
        stored = self._stored_statistics()
        # opened anew: with `verify` a look at some images would hash all shards
        return stored[1] if stored else MomentDataset._std(PackedLatents(self.root))

    def _stored_statistics(self) -> tuple[list[float], list[float]] | None:
        held = self.shards.index.get("channels")
        if held is None:
            return None
        channels = self.shape[0]
        file = self.path / INDEX
        for name in ("mean", "std"):
            numbers = held.get(name) if isinstance(held, dict) else None
            require_that(
                isinstance(numbers, list) and len(numbers) == channels,
                f"expected {name} of {channels} channels in {file}, got {numbers!r}",
            )
            check_shift(f"{name} of the channels in {file}", numbers, channels)
        return held["mean"], held["std"]


def _open(
    path: str, scale: Numbers | None = None, shift: Numbers | None = None, verify: bool = False
) -> Latents | PackedLatents:
    """See ``open_latents``, without its warning."""
    root = Path(path)
    check_finished(root)
    if (root / INDEX).exists():
        return PackedLatents(path, scale, shift, verify)
    return Latents(path, scale, shift)


def open_latents(
    path: str, scale: Numbers | None = None, shift: Numbers | None = None, verify: bool = False
) -> Latents | PackedLatents:
    """Open moments in either layout.

    Args:
        path: folder that holds ``index.json`` or ``vae-sd``.
        scale: one number, or one for each channel, see ``Normalization``; default: that of the VAE
            that made the moments, else SD-VAE's. A warning says if that VAE has another.
        shift: likewise.
        verify: see ``Shards``.

    Raises:
        ValueError: there are no moments, preprocessing has not finished, or scale or shift do not
            fit the channels.
    """
    data = _open(path, scale, shift, verify)
    told = data.vae or {}
    own = Normalization.of_vae(told, data.shape[0], path)
    sources = {"scale": "scaling_factor", "shift": "shift_factor"}
    if all(told.get(name) for name in OF_LATENTS):
        sources = {"scale": "latents_std", "shift": "latents_mean"}
    for name, source in sources.items():
        used, expected = getattr(data.normalization, name), getattr(own, name)
        # whoever gives a number for each channel knows that the VAE has one for all of them
        is_finer = isinstance(used, list) and not isinstance(expected, list)
        if told.get(source) is not None and used != expected and not is_finer:
            log.warning(
                "data.latent_%s is %s, the %s of the VAE that made %s is %s",
                *(name, in_words(used), source, path, in_words(expected)),
            )
    return data


def warn_of_deviation(data: MomentDataset) -> None:
    """Look at some images: an error if they cannot be moments, a warning if the scale is wrong."""
    deviations = data.deviations()
    # the root of the mean variance
    deviation = math.sqrt(sum(value**2 for value in deviations) / len(deviations))
    if deviation == 0:
        raise ValueError(f"all latents of {data.path} are equal, nothing can be learned from them")
    low, high = PLAUSIBLE_DEVIATION
    scale = data.normalization.scale
    if isinstance(scale, list):
        wrong = [i for i, value in enumerate(deviations) if not low <= value <= high]
        if wrong:
            log.warning(
                "%d of the %d channels of the latents of %s are far from a standard deviation of "
                "1, which a model expects: it is %.3g in channel %d (from 0); "
                "--data.latent_statistics true gives 1 in every channel",
                *(len(wrong), len(scale), data.path, deviations[wrong[0]], wrong[0]),
            )
    elif not low <= deviation <= high:
        log.warning(
            "the latents of %s have a standard deviation of %.3g, a model expects about 1: "
            "data.latent_scale %.4g would give 1, it is %.4g; --data.latent_statistics true gives "
            "1 in every channel",
            *(data.path, deviation, scale / deviation, scale),
        )
