"""How preprocess.py makes text features: of which captions, with which encoders, for which data set."""

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from sra_fast.data.batch import Batch, Report
from sra_fast.data.feature_jobs import belongs_to
from sra_fast.data.features import check_name
from sra_fast.data.options import CAPTION_OPTIONS, ENCODER_OPTIONS, TEXT_OPTIONS, Options, refuse
from sra_fast.data.packed import INDEX, STORAGE, file_entry, read_index
from sra_fast.data.sources import ImageSource
from sra_fast.data.stored_text import CAPTIONS, NULL, TEXT_FOLDER, as_rows, row_length
from sra_fast.data.text_encoders import TextEncoders, load_text_encoders
from sra_fast.utils.checks import require_that
from sra_fast.utils.files import sha256, write_atomic
from sra_fast.utils.outputs import save_npy

# a shard of text is the most that a restart makes again: a row of three encoders has 2.7 MB
SHARD_BYTES = 2**30


class TextSource(Protocol):
    """The captions of a data set's images: number i is caption i.

    Attributes:
        labels: int64 ``[N]``, number of each caption's image, in order; mirror images not counted.
        num_classes: how many images there are.
        copies: 2 if every image of the data set is followed by its mirror image.
        image_labels: int64, the class of every image; mirror images not counted.
        texts: the captions, or None if only their features are known.
        fingerprint: SHA-256 that tells them apart from others.
    """

    labels: Tensor
    num_classes: int
    copies: int
    image_labels: Tensor
    texts: list[str] | None

    @property
    def fingerprint(self) -> str: ...

    def __len__(self) -> int: ...

    def read(self, numbers: list[int]) -> Batch:
        """Captions as their encoder takes them. Thread-safe."""
        ...


class Captions:
    """The captions of a source of images, as token ids; see ``TextSource``.

    Args:
        images: with captions.
        encoders: whose ids they are.
        notes: what a user should know, one line each.
    """

    def __init__(self, images: ImageSource, encoders: TextEncoders, notes: list[str]):
        self.images = images
        self.encoders = encoders
        self.notes = notes
        self.texts: list[str] = [text for captions in images.captions for text in captions]
        counts = torch.tensor([len(captions) for captions in images.captions])
        self.num_classes = len(counts)
        self.labels = torch.arange(len(counts)).repeat_interleave(counts)
        self.copies = images.copies
        self.image_labels = images.labels[:: images.copies]
        # number of an image -> whether it can be read
        self._readable: dict[int, bool] = {}

    @property
    def fingerprint(self) -> str:
        identity = [self.images.fingerprint, self.images.captions]
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.texts)

    def _is_kept(self, number: int) -> bool:
        """Whether the data set has the image of a caption: if it was skipped, so is the caption."""
        image = int(self.labels[number])
        if image not in self._readable:
            self._readable[image] = self.images.is_readable(image)
        return self._readable[image]

    def read(self, numbers: list[int]) -> Batch:
        """Token ids ``[B, S]`` of captions."""
        kept = [number for number in numbers if self._is_kept(number)]
        ids, too_long = self.encoders.tokenize([self.texts[number] for number in kept])
        report = Report()
        if too_long:
            report.counts["too_long"] = len(too_long)
            report.too_long = self.texts[kept[too_long[0]]]
        return Batch(ids, kept, len(numbers), report)


def check_text_options(options: Options) -> None:
    """ValueError for options that cannot be, or that have no effect."""
    if options.captions is None and options.text_encoders is None:
        names = (*TEXT_OPTIONS, *ENCODER_OPTIONS)
        refuse(options, names, "is for captions", "was given without --captions")
        return
    require_that(
        bool(options.captions),
        "text_encoders see captions: give captions (txt, JSON files, or a column), got nothing",
    )
    require_that(
        bool(options.text_encoders),
        "captions need text_encoders, folders of CLIP or T5, got nothing",
    )
    _check_storage(options)
    require_that(options.bad != "list", "bad list makes nothing, got captions as well")


def check_source_options(options: Options) -> None:
    """``check_text_options`` of a source that has features of its captions already."""
    names = (*CAPTION_OPTIONS, *ENCODER_OPTIONS)
    refuse(options, names, "is for images", "holds the features of its captions")
    _check_storage(options)


def _check_storage(options: Options) -> None:
    require_that(
        options.layout == "packed",
        "text features are packed beside packed data, got layout published",
    )
    if options.text_name is not None or options.text_encoders:
        check_name(text_name(options), "text_name")


def text_name(options: Options, default: str = "") -> str:
    """The name that text features get; ``default``: without encoders."""
    if options.text_name is not None:
        return options.text_name
    if not options.text_encoders:
        return default
    return "+".join(Path(path).resolve().name for path in options.text_encoders)


def text_folder(folder: Path, name: str) -> Path:
    """Where the text features of the data set in ``folder`` go."""
    return folder / TEXT_FOLDER / name


def load_encoders(options: Options, device: torch.device) -> TextEncoders:
    """The encoders that the options name.

    Raises:
        ValueError: see ``load_text_encoders``.
    """
    encoders = load_text_encoders(options.text_encoders, options.text_tokens)
    return encoders.to(device, options.precision)


def text_recipe(options: Options, tokens: int, width: int, pooled: int, masked: bool) -> dict:
    """What a restart must have in common: how rows are stored."""
    return {
        "kind": "text",
        "shape": [row_length(tokens, width, pooled)],
        "tokens": tokens,
        "width": width,
        "pooled": pooled,
        "masked": masked,
        "dtype": options.text_dtype,
    }


def encoded_text(
    options: Options, encoders: TextEncoders
) -> tuple[Callable[[Tensor], Tensor], dict, dict]:
    """Token ids to rows: the function, what a restart must have in common, and what the index says
    besides.
    """

    def encode(ids: Tensor) -> Tensor:
        return as_rows(encoders.encode(ids)).cpu()

    recipe = {
        **text_recipe(options, encoders.tokens, encoders.width, encoders.pooled, encoders.masked),
        "encoders": encoders.identity,
        "precision": options.precision,
    }
    return encode, recipe, {"text_paths": encoders.paths}


def rows_per_shard(recipe: dict, asked: int) -> int:
    """How many captions a shard holds: as many as were asked for, as far as they fit."""
    row = math.prod(recipe["shape"]) * np.dtype(STORAGE[recipe["dtype"]]).itemsize
    return max(1, min(asked, SHARD_BYTES // row))


def end_of_text(
    source: TextSource, null: Callable[[], Tensor], recipe: dict, data: Path, out: Path
) -> Callable[[list[int]], dict]:
    """What is done when all captions are stored: the ``at_end`` of a job.

    The empty prompt and the captions are written, and the index learns of both and of the data set.

    Args:
        source: of the captions.
        null: makes the row of the empty prompt, ``[1, R]``.
        recipe: of the job.
        data: folder of the data set.
        out: folder of the text features.
    """

    def at_end(numbers: list[int]) -> dict:
        images = source.labels[numbers].unique()
        labels = source.image_labels[images].repeat_interleave(source.copies)
        skipped = sorted({*range(source.num_classes)} - {*images.tolist()})
        # those of the data set count mirror images
        missing = [image * source.copies + k for image in skipped for k in range(source.copies)]
        said = belongs_to(data, labels, missing, "captions")
        if not _is_complete(out):
            # on another device it would differ a little from the one that runs have seen
            write_atomic(out / NULL, lambda p: save_npy(p, _stored(null(), recipe["dtype"])))
        captions = None
        if source.texts is not None:
            texts = [source.texts[number] for number in numbers]
            content = "".join(json.dumps(text, ensure_ascii=False) + "\n" for text in texts)
            write_atomic(out / CAPTIONS, lambda p: p.write_text(content, encoding="utf-8"))
            captions = file_entry(out, CAPTIONS)
        return {
            **said,
            # of images that can be read
            "num_classes": len(images),
            "copies": source.copies,
            "null": file_entry(out, NULL),
            "captions": captions,
        }

    return at_end


def _is_complete(out: Path) -> bool:
    """Whether an earlier run has written the row of the empty prompt, and nobody has altered it."""
    if not (out / INDEX).exists():
        return False
    entry = read_index(out)["null"]
    return (out / NULL).exists() and sha256(out / NULL) == entry["sha256"]


def _stored(row: Tensor, dtype: str) -> np.ndarray:
    """A row as the .npy format has it."""
    stored = row.to(getattr(torch, dtype)).contiguous()
    require_that(
        bool(stored.isfinite().all()), f"the features of the empty prompt are not finite in {dtype}"
    )
    return stored.view(torch.uint8).numpy().view(STORAGE[dtype])
