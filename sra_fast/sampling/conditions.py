"""What images are sampled for: one conditioning for each image, whatever the kind of the model.

Who samples asks ``SampleConditions`` for those of some image numbers, and for what to write below
the images. Models of labels get ``SampledLabels``, models of text ``StoredCaptions`` or the
``EncodedPrompts`` of ``prompts.py``.
"""

import hashlib
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from sra_fast.config.schema import DiffusionConfig, SampleConfig
from sra_fast.data.facts import DataFacts
from sra_fast.data.prompts import digest_of
from sra_fast.data.stored_text import StoredText
from sra_fast.data.training_data import TrainingData
from sra_fast.diffusion.draws import block_seed
from sra_fast.models import ClassLabels, Conditioning, DiffusionTransformer
from sra_fast.sampling.generate import choose_labels, generate, labels_like
from sra_fast.utils.checks import require_that

# tells the choice of images from other draws; see choose_labels
IMAGES = -8


class SampleConditions(Protocol):
    """The conditioning of N images.

    Attributes:
        numbers: ``[N]`` int64, what each image is of: its label; or the number of its prompt, or of
            the data set's image whose caption it has.
        prompts: of every image, as far as they are known; None: they are not, or these are labels.
        facts: what the images depend on, for ``samples.json``; a run that resumes must have the
            same.
    """

    numbers: Tensor

    def __len__(self) -> int:
        """N."""
        ...

    def read(self, first: int, end: int) -> Conditioning:
        """Those of the images ``first`` to ``end - 1``."""
        ...

    def captions(self, count: int) -> list[str] | None:
        """A text for each of the first images, for a picture; None: there are none."""
        ...

    @property
    def prompts(self) -> list[str] | None: ...

    @property
    def facts(self) -> dict: ...


class SampledLabels:
    """Class labels; see ``SampleConditions``.

    Args:
        labels: ``[N]`` int64.
        data: facts about the data, which may have names for the classes.
    """

    prompts = None

    def __init__(self, labels: Tensor, data: DataFacts | None = None):
        self.numbers = labels
        self.data = data

    def __len__(self) -> int:
        return len(self.numbers)

    def read(self, first: int, end: int) -> ClassLabels:
        return ClassLabels(self.numbers[first:end])

    def captions(self, count: int) -> list[str] | None:
        if self.data is None or self.data.class_names is None:
            return None
        return [self.data.name_of(label) for label in self.numbers[:count].tolist()]

    @property
    def facts(self) -> dict:
        # the options say which classes
        return {}


class StoredCaptions:
    """Stored features of the first captions of a data set's images; see ``SampleConditions``.

    Args:
        text: of the data set.
        images: ``[N]`` int64, numbers of the images.
    """

    def __init__(self, text: StoredText, images: Tensor):
        self.text = text
        self.numbers = images

    def __len__(self) -> int:
        return len(self.numbers)

    def read(self, first: int, end: int) -> Conditioning:
        return self.text.condition(self.text.tensors(self.numbers[first:end].tolist()))

    def captions(self, count: int) -> list[str] | None:
        if not self.text.texts:
            return None
        found = [self.text.caption(image, 0) for image in self.numbers[:count].tolist()]
        return [caption for caption in found if caption is not None]

    @property
    def prompts(self) -> list[str] | None:
        return self.captions(len(self))

    @property
    def facts(self) -> dict:
        # the captions are part of the fingerprint only through their features
        return {
            "text": self.text.fingerprint,
            "text_images": hashlib.sha256(self.numbers.numpy().tobytes()).hexdigest(),
            "prompts_sha256": None if self.prompts is None else digest_of(self.prompts),
            "text_encoders": self.text.facts["encoders"],
        }


def conditions_of(
    data: TrainingData, count: int, mode: str, seed: int, num_classes: int | None = None
) -> SampleConditions:
    """What a run on these data samples for.

    Args:
        data: training set. Captions are those of its held-out images, if it has any, else of its
            own.
        count: how many images.
        mode: ``balanced``: the classes take turns, or captions of images evenly spread over the
            data; ``random``: they are drawn.
        seed: of the draws.
        num_classes: of the model, where it may have more than the data.
    """
    if data.text is None:
        labels = choose_labels(count, num_classes or data.num_classes, mode, seed)
        return SampledLabels(labels, data.facts())
    held_out, rows = data.held_out_split()[1]
    if mode == "random":
        generator = np.random.default_rng(block_seed(seed, 0, IMAGES))
        chosen = generator.choice(rows, count, replace=count > len(rows))
        return _captions_of(held_out, chosen)
    return _captions_of(held_out, spread(rows, count))


def conditions_like(
    data: TrainingData, rows: np.ndarray, count: int
) -> tuple[SampleConditions, Tensor]:
    """What ``count`` samples are made for that are compared with images of a data set.

    Args:
        data: whose images.
        rows: which of them.

    Returns:
        Labels with the frequencies of those images, or captions of images that are spread evenly
        over them; and the label of every sample, ``[count]``.
    """
    if data.text is None:
        labels = labels_like(count, data.labels[rows])
        return SampledLabels(labels, data.facts()), labels
    found = _captions_of(data, spread(rows, count))
    return found, data.labels[found.numbers]


def generate_for(
    model: DiffusionTransformer,
    conditions: SampleConditions,
    images: range,
    cfg: SampleConfig,
    diffusion: DiffusionConfig,
    seed: int,
    batch: int,
    device: torch.device | str,
) -> Tensor:
    """Latents of some images ``[n, C, H, W]``. The conditioning of a batch is read when it is needed:
    features of all captions may be gigabytes.

    Args:
        conditions: of all images.
        images: which of them.
        model, cfg, diffusion, seed, batch, device: see ``generate``.
    """
    latents = []
    for first in images[::batch]:
        condition = conditions.read(first, min(first + batch, images.stop))
        settings = (cfg, diffusion, seed, batch, device)
        latents.append(generate(model, condition, *settings, first=first))
    return torch.cat(latents)


def spread(rows: np.ndarray, count: int) -> np.ndarray:
    """``count`` of the rows, spread evenly over them; where there are fewer, all in turn."""
    if count > len(rows):
        return rows[np.arange(count) % len(rows)]
    return rows[np.arange(count) * len(rows) // count]


def _captions_of(data: TrainingData, rows: np.ndarray) -> StoredCaptions:
    assert data.text is not None, "asked for captions of data that have none"
    require_that(len(rows) > 0, "captions are sampled of at least one image, got none")
    return StoredCaptions(data.text, torch.from_numpy(np.asarray(rows, np.int64)))
