"""What a data set has to be for a run to train on it."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from sra_fast.data.batch import Batch
from sra_fast.data.facts import DataFacts
from sra_fast.data.features import StoredFeatures
from sra_fast.data.normalization import LEAST_DEVIATION
from sra_fast.data.packed import Shards
from sra_fast.data.stored_text import StoredText
from sra_fast.models import ClassLabels, Conditioning
from sra_fast.utils.checks import require_that

# one image in five is held out of an analysis
HELD_OUT = 5
# images whose latents are measured for a target that compares with them
LOOKED_AT = 4096
AT_ONCE = 64


def fingerprint_of(images: np.ndarray, labels: np.ndarray) -> str:
    """The ``fingerprint`` of images in memory, ``[N, ...]``, and their labels ``[N]``.

    Raises:
        ValueError: there is not a label for every image.
    """
    require_that(
        len(images) == len(labels),
        f"expected a label for every image, got {len(images)} images and {len(labels)} labels",
    )
    digest = hashlib.sha256(images.tobytes())
    digest.update(labels.tobytes())
    return digest.hexdigest()


class TrainingData(Dataset):
    """Clean latents and their conditioning, in whole batches.

    In ``DATASETS`` stands a function ``DataConfig -> TrainingData`` for each of them.

    Attributes:
        name: that in ``DATASETS``; ``open_data`` sets it where the set has none.
        path: where the images lie; likewise, as it was given.
        shape: (C, H, W) of a latent.
        posterior: whether items are VAE moments, from which the latents are drawn.
        num_classes: labels lie in [0, num_classes).
        counted_classes: ``num_classes`` is only the largest label and one: nothing else tells it.
        labels: ``[N]`` int64.
        flip: half of the images are mirrored, drawn anew in every step, by whoever trains on them.
        in_memory: a batch costs nothing to fetch: no loader processes.
        self_checked: the set compares its files with what was written when it is opened, and a run
            does not look at some of the images first.
        fingerprint: SHA-256 of the images in their order and the labels, the same wherever they lie:
            a run is only resumed on data of the same one. None: it is not known.
        features: stored features that come with every batch, or None.
        text: stored features of captions that come with every batch instead of labels, or None.
        evaluation: name in ``EVALUATIONS`` of how samples are scored at the end of a run, or None.
    """

    name: str = ""
    path: str | Path | None = None
    shape: tuple[int, int, int]
    posterior: bool = False
    num_classes: int
    counted_classes: bool = False
    labels: Tensor
    flip: bool = False
    in_memory: bool = False
    self_checked: bool = False
    fingerprint: str | None = None
    features: StoredFeatures | None = None
    text: StoredText | None = None
    evaluation: str | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, ...]:
        """One batch: the images, the tensors that the conditioning is made from (labels, or those of
        text), and the features ``[B, T, D]`` if there are any; ``split`` takes it apart.

        With text, ``ImageNumbers`` decide which of its captions an image gets; it is the first one
        of other lists.
        """
        raise NotImplementedError

    def open_features(self, name: str, verify: bool = False) -> None:
        """From now on every batch comes with the stored features of this name.

        Raises:
            ValueError: there are none, or none that belong to these images.
        """
        raise ValueError(
            f"data.features is for packed data (index.json), got {name} for data of another layout"
        )

    def open_text(self, name: str | None = None, verify: bool = False) -> None:
        """From now on every batch comes with stored text features instead of labels.

        ``name``: of the features; None: the only ones that there are.

        Raises:
            ValueError: there are none, several and no name, or none that belong to these images.
        """
        raise ValueError(
            "the model takes captions, which packed data (index.json) may have; these data, "
            f"{self.name}, have another layout"
        )

    @property
    def conditioning(self) -> str:
        """Name in ``CONDITIONINGS`` of what ``condition`` makes."""
        return "labels" if self.text is None else "text"

    def condition(self, tensors: Sequence[Tensor]) -> Conditioning:
        """The conditioning that ``split`` has given the tensors of; nothing is decided about
        dropping.
        """
        return ClassLabels(*tensors) if self.text is None else self.text.condition(tensors)

    def complete(self, indices: list[int], images: Tensor) -> tuple[Tensor, ...]:
        """A batch of these images: with labels or text, and with features if there are any."""
        condition = (self.labels[indices],) if self.text is None else self.text.tensors(indices)
        features = () if self.features is None else (self.features.read(indices),)
        return (images, *condition, *features)

    def split(self, batch: Sequence[Tensor]) -> tuple[Tensor, list[Tensor], Tensor | None]:
        """A batch's images, the tensors of its conditioning, and its features or None."""
        images, *condition = batch
        features = None if self.features is None else condition.pop()
        return images, condition, features

    def locate(self, number: int) -> str:
        """Where an image lies, for messages: ``image 123``, and its file if it has one."""
        return f"image {number}"

    def read(self, numbers: list[int]) -> Batch:
        """The images of these numbers as they are stored, to be stored in another layout."""
        images, *_ = self.__getitems__(numbers)
        return Batch(images, numbers, len(numbers))

    def to_latent(self, images: Tensor, noise: Tensor | None) -> Tensor:
        """A batch on the device -> clean latents ``[B, C, H, W]``.

        ``noise``: standard normals like the latents, if the set has a ``posterior``.
        """
        return images

    def blocks(self, rows: list[int]) -> Iterator[tuple[list[int], Tensor, list[Tensor]]]:
        """These images, ``AT_ONCE`` at a time: all of them may be gigabytes.

        Yields:
            Their numbers, their clean latents ``[B, C, H, W]``, and the tensors of their
            conditioning.
        """
        generator = torch.Generator().manual_seed(0)
        for start in range(0, len(rows), AT_ONCE):
            numbers = rows[start : start + AT_ONCE]
            images, told, _ = self.split(self.__getitems__(numbers))
            noise = None
            if self.posterior:
                noise = torch.randn((len(images), *self.shape), generator=generator)
            yield numbers, self.to_latent(images, noise), told

    def channel_statistics(self) -> tuple[list[float], list[float]]:
        """Mean and deviation of the latents in every channel, of at most ``LOOKED_AT`` images."""
        # from the first to the last: they often lie in the order of their classes
        looked_at = np.linspace(0, len(self) - 1, min(len(self), LOOKED_AT)).round().astype(int)
        means = []
        squares = []
        for _, latents, _ in self.blocks(looked_at.tolist()):
            latents = latents.double().flatten(2)
            # a row for each image, all of one size
            means.append(latents.mean(2))
            squares.append(latents.square().mean(2))
        mean = torch.cat(means).mean(0)
        std = (torch.cat(squares).mean(0) - mean.square()).clamp(min=0).sqrt()
        # a channel that is always the same is left as it is
        std = torch.where(std > LEAST_DEVIATION * mean.abs(), std, 1.0)
        return mean.tolist(), std.tolist()

    def facts(self) -> DataFacts:
        """What the model's users have to know of these data.

        Without a posterior, 1 or 3 channels are taken for those of images.
        """
        pixels = not self.posterior and self.shape[0] in (1, 3)
        return DataFacts(
            self.name,
            self.shape,
            self.num_classes,
            path=None if self.path is None else str(Path(self.path).absolute()),
            pixels=pixels,
            fingerprint=self.fingerprint,
            features=self.features and self.features.facts,
            text=self.text and self.text.facts,
        )

    def open_held_out(self) -> "TrainingData | None":
        """The images beside these that no run trains on, without features or text yet; None: there
        are none.
        """
        return None

    def held_out_split(self) -> "list[tuple[TrainingData, np.ndarray]]":
        """Training and held-out images of an analysis, each as a data set and its rows.

        Every fifth row is held out, unless the set has images that no run trains on.
        """
        held_out = self.open_held_out()
        if held_out is not None:
            if self.features is not None:
                held_out.open_features(self.features.name)
            if self.text is not None:
                held_out.open_text(self.text.name)
            # every row of both: no run trains on these images
            return [(part, np.arange(len(part))) for part in (self, held_out)]
        rows = np.arange(len(self))
        held_out = rows % HELD_OUT == 0
        return [(self, rows[~held_out]), (self, rows[held_out])]


class InShards(TrainingData):
    """Images in shards (see ``packed.py``), with features and text beside them. Another base class
    says what the images are.

    Attributes:
        shards: the images as they are stored.
        class_names: of every class, or None.
    """

    shards: Shards
    class_names: list[str] | None

    def _open_shards(self, path: str | Path, kind: str, verify: bool) -> None:
        """Arguments and errors: see ``Shards``."""
        self.shards = Shards(path, kind, verify)
        self.labels = self.shards.labels
        self.num_classes = self.shards.num_classes
        self.class_names = self.shards.index.get("classes")
        self.fingerprint = self.shards.fingerprint

    def locate(self, number: int) -> str:
        return f"image {number} ({self.shards.locate(number)})"

    def open_features(self, name: str, verify: bool = False) -> None:
        self.features = StoredFeatures(self.path, name, self.fingerprint, verify)

    def open_text(self, name: str | None = None, verify: bool = False) -> None:
        self.text = StoredText(self.path, name, self.fingerprint, verify)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, ...]:
        """Images as they are stored, labels ``[B]`` or text, and features, in the order of
        ``indices``.
        """
        return self.complete(indices, self.shards.read(indices))
