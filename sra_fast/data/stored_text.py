"""Features of captions, stored beside a packed data set: one row for each caption.

They are shards like the data set's own (see ``packed.py``), in ``<path>/text/NAME``. A row is flat,
so that one read fetches all of a caption: the L tokens ``[L, E]``, the pooled vector ``[P]`` and
the mask ``[L]`` as zeros and ones. The captions of an image follow each other, in the order of the
images, and ``labels.npy`` has the number of each caption's image. An image and its mirror image
(``copies`` 2 in the index) share their captions. ``null.npy`` holds one row, the empty prompt;
``captions.jsonl`` the captions themselves, a JSON string in a line, unless only their features are
known. The index says which data set they belong to.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sra_fast.data.features import check_name
from sra_fast.data.order import ImageNumbers
from sra_fast.data.packed import INDEX, RECIPE, REPAIR, Shards, load_npy
from sra_fast.data.reasons import why
from sra_fast.diffusion.draws import block_seed
from sra_fast.models import TextFeatures
from sra_fast.utils.checks import require_that
from sra_fast.utils.files import sha256, why_unreadable

# folder of all text features of a data set
TEXT_FOLDER = "text"
# the features of the empty prompt, and the captions
NULL = "null.npy"
CAPTIONS = "captions.jsonl"
# tells the choice of a caption from other draws of a step
CHOICE = -5


def as_rows(features: TextFeatures) -> Tensor:
    """Features as they are stored: ``[B, L * E + P + L]``, in the tokens' dtype."""
    tokens, pooled, mask = features.tokens, features.pooled, features.mask
    mask = tokens.new_ones(tokens.shape[:2]) if mask is None else mask.to(tokens.dtype)
    parts = [tokens.flatten(1), mask]
    if pooled is not None:
        parts.insert(1, pooled.to(tokens.dtype))
    return torch.cat(parts, 1)


def row_length(tokens: int, width: int, pooled: int) -> int:
    """How many numbers a row has."""
    return tokens * width + pooled + tokens


class StoredText:
    """The features of the captions of every image of a packed data set. Pickles like ``Shards``.

    Args:
        path: folder of the data set.
        name: of the features: they are in ``<path>/text/<name>``. None: the only ones there are.
        data: fingerprint of the data set.
        verify: see ``Shards``.

    Attributes:
        name: of the features.
        tokens, width, pooled: L, E and P; P is 0 if there is no pooled vector.
        masked: whether there is a mask.
        dtype: of what is stored.
        empty: the empty prompt, one entry.
        fingerprint: SHA-256 of the hashes of labels, shards and the empty prompt.
        facts: what a resumed run must have the same of and a sampler has to know: ``name``,
            ``fingerprint``, ``tokens``, ``width``, ``pooled``, ``masked``, ``encoders`` (see
            ``TextEncoders``; None: not known) and ``paths`` (of the encoders; None: not known).

    Raises:
        ValueError: there are none, or several and no name; they are not finished, cut short, or of
            another data set; the empty prompt was altered. ``read`` raises it for a shard that was
            altered, ``caption`` for altered captions.
    """

    def __init__(self, path: str | Path, name: str | None, data: str, verify: bool = False):
        self.name = _choose(Path(path), name)
        self.root = Path(path) / TEXT_FOLDER / self.name
        self.shards = Shards(self.root, "text", verify)
        index = self.shards.index
        require_that(
            index.get("data_sha256") == data,
            f"{self.root} holds captions of other images than {path}: make them again",
        )
        self._read_layout(index)
        self.dtype: torch.dtype = self.shards.dtype
        self.empty = self._features(self._read_null(index))
        contents = [self.shards.fingerprint, index["null"]["sha256"]]
        self.fingerprint = hashlib.sha256(json.dumps(contents).encode()).hexdigest()
        self.facts = {
            "name": self.name,
            "fingerprint": self.fingerprint,
            "tokens": self.tokens,
            "width": self.width,
            "pooled": self.pooled,
            "masked": self.masked,
            "encoders": index["encoders"],
            "paths": index.get("text_paths"),
        }
        self._captions: list[str] | None = None
        # the empty prompt on each device that has asked for it
        self._empty_on: dict[torch.device, TextFeatures] = {}

    def _read_layout(self, index: dict) -> None:
        file = self.root / INDEX
        try:
            self.tokens: int = index["tokens"]
            self.width: int = index["width"]
            self.pooled: int = index["pooled"]
            self.masked: bool = index["masked"]
            self.copies: int = index["copies"]
            self._captions_entry = index["captions"]
            _ = index["null"]["sha256"], index["encoders"]
            length = row_length(self.tokens, self.width, self.pooled)
            if self.shards.row_shape != (length,):
                raise ValueError(f"rows must be {length} long, got {[*self.shards.row_shape]}")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is no index of text features: {why(error)}") from None
        # of every image: how many captions, and the row of the first
        labels = self.shards.labels
        self.counts = torch.bincount(labels, minlength=self.shards.num_classes)
        in_order = bool((labels.diff() >= 0).all())
        require_that(
            in_order and bool(self.counts.min() > 0),
            f"{self.root / 'labels.npy'} must have the images of the captions in their order, at "
            "least one caption of each",
        )
        self.first_rows = self.counts.cumsum(0) - self.counts

    def _read_null(self, index: dict) -> Tensor:
        """The row of the empty prompt, ``[1, R]``."""
        path = self.root / index["null"]["file"]
        try:
            if sha256(path) != index["null"]["sha256"]:
                raise ValueError("its SHA-256 is not the index's")
            row = load_npy(path)
        except (OSError, ValueError) as error:
            reason = why_unreadable(error)
            raise ValueError(f"{path} was altered or cannot be read: {reason}. {REPAIR}") from None
        expected = (1, *self.shards.row_shape)
        require_that(
            (row.shape, row.dtype) == (expected, np.dtype(self.shards.storage)),
            f"{path} must hold {expected} of {np.dtype(self.shards.storage)}, got {row.shape} of "
            f"{row.dtype}",
        )
        return torch.from_numpy(row).view(self.dtype)

    def __len__(self) -> int:
        """How many images have captions, mirror images included."""
        return len(self.counts) * self.copies

    def __getstate__(self) -> dict:
        # a loader process reads no captions and has no device
        return {**self.__dict__, "_captions": None, "_empty_on": {}}

    def count(self, image: int) -> int:
        """How many captions an image has."""
        return int(self.counts[image // self.copies])

    def choose(self, numbers: Sequence[int]) -> list[int]:
        """Which caption each image of a batch gets.

        Of ``ImageNumbers`` it is drawn, as a function of seed, step and image; else the first one.
        """
        if not isinstance(numbers, ImageNumbers):
            return [0] * len(numbers)
        seed, step = numbers.seed, numbers.step
        return [block_seed(seed, step, n, CHOICE) % self.count(n) for n in numbers]

    def read(self, numbers: Sequence[int]) -> TextFeatures:
        """A caption of each image, in their order and in the stored dtype; see ``choose``."""
        chosen = self.choose(numbers)
        return self.read_captions([*zip(numbers, chosen, strict=True)])

    def read_captions(self, wanted: Sequence[tuple[int, int]]) -> TextFeatures:
        """The captions ``k`` of images, given as pairs (image, k)."""
        rows = [int(self.first_rows[image // self.copies]) + k for image, k in wanted]
        return self._features(self.shards.read(rows))

    def _features(self, rows: Tensor) -> TextFeatures:
        """Rows ``[B, R]`` as features, without ``empty`` and ``drop``."""
        sizes = [self.tokens * self.width, self.pooled, self.tokens]
        tokens, pooled, mask = rows.split(sizes, 1)
        # a copy: they would keep the rows, and a device takes what lies in one piece
        tokens = tokens.unflatten(1, (self.tokens, self.width)).contiguous()
        pooled = pooled.contiguous() if self.pooled else None
        return TextFeatures(tokens, pooled, mask > 0 if self.masked else None, None, None)

    def tensors(self, numbers: Sequence[int]) -> tuple[Tensor, ...]:
        """``read``'s tokens, pooled vectors and mask, as far as there are any."""
        found = self.read(numbers)
        return tuple(t for t in (found.tokens, found.pooled, found.mask) if t is not None)

    def condition(self, tensors: Sequence[Tensor]) -> TextFeatures:
        """The features that ``tensors`` were made of, with the empty prompt on their device."""
        tokens, *rest = tensors
        if tokens.device not in self._empty_on:
            # once: a copy in every step would wait for it
            self._empty_on[tokens.device] = self.empty.to(tokens.device)
        pooled = rest.pop(0) if self.pooled else None
        mask = rest.pop(0) if self.masked else None
        return TextFeatures(tokens, pooled, mask, self._empty_on[tokens.device], None)

    @property
    def texts(self) -> bool:
        """Whether the captions themselves are known, and not only their features."""
        return self._captions_entry is not None

    def caption(self, image: int, k: int) -> str | None:
        """Caption ``k`` of an image; None if only features are known."""
        if not self.texts:
            return None
        if self._captions is None:
            self._captions = self._read_captions()
        return self._captions[int(self.first_rows[image // self.copies]) + k]

    def _read_captions(self) -> list[str]:
        path = self.root / self._captions_entry["file"]
        try:
            if sha256(path) != self._captions_entry["sha256"]:
                raise ValueError("its SHA-256 is not the index's")
            # not splitlines: a caption may hold other line ends, which JSON leaves as they are
            lines = path.read_text(encoding="utf-8").split("\n")
            captions = [json.loads(line) for line in lines if line]
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} was altered or cannot be read: {error}. {REPAIR}") from None
        require_that(
            len(captions) == self.shards.length,
            f"{path} must hold {self.shards.length} captions, it has {len(captions)}",
        )
        return captions


def text_names(path: Path) -> list[str]:
    """The names of the text features that a data set has."""
    folder = Path(path) / TEXT_FOLDER
    return sorted(index.parent.name for index in folder.glob(f"*/{INDEX}"))


def _choose(path: Path, name: str | None) -> str:
    """The name of the features to read."""
    names = text_names(path)
    if name is None:
        begun = sorted(recipe.parent.name for recipe in (path / TEXT_FOLDER).glob(f"*/{RECIPE}"))
        # one that is not finished says so when it is read
        names = sorted({*names, *begun})
        require_that(
            bool(names),
            f"{path} has no text features: preprocess.py --captions makes them",
        )
        require_that(
            len(names) == 1,
            f"{path} has the text features {', '.join(names)}: data.text must name one of them",
        )
        return names[0]
    check_name(name, "data.text")
    root = path / TEXT_FOLDER / name
    require_that(
        (root / INDEX).exists() or (root / RECIPE).exists(),
        f"data.text {name}: {path} has none of this name, but "
        f"{', '.join(names) or 'no text features at all'} (preprocess.py --captions makes them)",
    )
    return name
