"""Labelled images to make a data set of: folders, .zip, .tar, Hugging Face data sets and arrays."""

import copy
import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sra_fast.data.batch import Batch, Report
from sra_fast.data.captions import BESIDE, checked, from_lists
from sra_fast.data.images import Crop
from sra_fast.data.reasons import why

# names of folders and splits of images that no run should train on; the first that is there counts
VALIDATION = ("val", "valid", "validation", "test")


class ImageSource:
    """Images that are decoded and cropped when they are read. Reading is thread-safe.

    With ``mirror`` every image is followed by its mirror image: image i is number 2 i, its mirror
    image number 2 i + 1.

    Attributes:
        place: where the images are, for errors.
        names: of the images.
        labels: int64 ``[N]``, mirror images included.
        num_classes: labels lie in [0, num_classes).
        class_names: of every class, or None.
        fingerprint: SHA-256 of names, labels and ``content_digest``.
        captions: of every name, at least one; None until ``open_captions``.
        listed: names in the lists that these captions are of, if they are from lists.
        notes: what a user should know, one line each.
    """

    place: str
    names: list[str]
    # the folder that the names are below, with a slash, as far as ``place`` has several
    root: str = ""
    # where each image lies, for ``_content``
    _places: list
    _labels: list[int]
    num_classes: int
    class_names: list[str] | None
    captions: list[list[str]] | None = None
    listed: frozenset[str] | set[str] = frozenset()
    notes: list[str]
    # what else tells these images apart from others of the same names
    content_digest: str = ""

    def __init__(self, crop: Crop, mirror: bool = False, bad: str = "stop"):
        """``bad``: ``stop`` raises a ValueError at an image that cannot be read, ``skip`` leaves it
        out.
        """
        self.crop = crop
        self.copies = 2 if mirror else 1
        self.bad = bad
        self.notes = []

    def _set_labels(self, labels: list[int], num_classes: int | None, counted: bool) -> None:
        """Check labels and numbers of classes.

        Args:
            labels: one per name.
            num_classes: how many there must be; None: as many as there are.
            counted: nothing but the labels tells the number of classes.
        """
        if num_classes is None and counted and min(labels) > 0:
            raise ValueError(
                f"labels must be numbered from 0, {self.place} has {min(labels)} .. {max(labels)}; "
                f"if classes without images are meant, give num_classes {max(labels) + 1}"
            )
        # labels of a list may have gaps: the highest one decides
        self.num_classes = max(labels) + 1 if num_classes is None else num_classes
        for name, label in zip(self.names, labels, strict=True):
            if not 0 <= label < self.num_classes:
                raise ValueError(f"labels must lie in [0, {self.num_classes}), {name} has {label}")
        self._labels = labels

    @property
    def labels(self) -> Tensor:
        return torch.tensor(self._labels, dtype=torch.int64).repeat_interleave(self.copies)

    @property
    def fingerprint(self) -> str:
        identity = [self.names, self._labels, self.content_digest]
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.names) * self.copies

    def open_captions(self, where: list[str]) -> None:
        """Read the captions of all images.

        Args:
            where: ``["txt"]``: beside each image; JSON files (``captions.read_lists``); or a column
                of a Hugging Face data set.

        Raises:
            ValueError: an image has none, or they cannot be read.
        """
        self.captions = checked(self._captions(where), self.names, self.place)

    def _captions(self, where: list[str]) -> list:
        """What ``open_captions`` has to check: captions of every image, None or [] for none."""
        if where == [BESIDE]:
            return self._captions_beside()
        found, self.listed, note = from_lists(where, self.names, self.root, self.place)
        if note:
            self.notes.append(note)
        return found

    def _captions_beside(self) -> list:
        """Captions in text files of the images' names."""
        raise NotImplementedError

    def _content(self, number: int) -> bytes:
        """The file of image ``number``."""
        raise NotImplementedError

    def marks(self, numbers: list[int]) -> list[int] | None:
        """A checksum of the file of each of these images (mirror images counted), -1 for one that
        cannot be read; None: the fingerprint tells other contents apart already.
        """
        if self.content_digest:
            return None
        return [self._mark(number // self.copies) for number in numbers]

    def _mark(self, number: int) -> int:
        try:
            return zlib.crc32(self._content(number))
        except Exception:
            # zip files and network drives raise many types
            return -1

    def _pixels(self, number: int) -> tuple[np.ndarray, Report]:
        """The crop of image ``number``, uint8 ``[size, size, channels]``."""
        name = f"{self.place}/{self.names[number]}"
        try:
            content = self._content(number)
        except Exception as error:
            # zip files and network drives raise many types
            raise ValueError(f"{name} is no readable image: {why(error)}") from None
        return self.crop.decode(content, name)

    def is_readable(self, number: int) -> bool:
        """Whether image ``number`` (mirror images not counted) can be read, or ``bad`` stops if not."""
        if self.bad == "stop":
            return True
        try:
            self._pixels(number)
        except ValueError:
            return False
        return True

    def read(self, numbers: list[int]) -> Batch:
        """uint8 images ``[B, channels, size, size]`` (channels last in memory).

        Raises:
            ValueError: an image cannot be read, and ``bad`` is ``stop``.
        """
        # an image and its mirror image are decoded once
        decoded = {}
        report = Report()
        asked = set(numbers)
        for number in dict.fromkeys(number // self.copies for number in numbers):
            # an image whose mirror image is in another batch is counted once
            counts = number * self.copies in asked
            try:
                decoded[number], done = self._pixels(number)
            except ValueError as error:
                if self.bad == "stop":
                    raise
                done = Report(skipped=[str(error)])
            if counts:
                report.add(done)
        kept = [number for number in numbers if number // self.copies in decoded]
        images = []
        for number in kept:
            original, mirrored = divmod(number, self.copies)
            image = decoded[original]
            images.append(image[:, ::-1] if mirrored else image)
        shape = (0, self.crop.size, self.crop.size, self.crop.channels)
        stacked = np.stack(images) if images else np.empty(shape, np.uint8)
        rows = torch.from_numpy(stacked).permute(0, 3, 1, 2)
        return Batch(rows, kept, len(numbers), report)

    def __getitems__(self, numbers: list[int]) -> tuple[Tensor, Tensor]:
        """``read``'s images and their labels ``[B]``."""
        batch = self.read(numbers)
        return batch.images, self.labels[batch.numbers]

    def subset(self, numbers: list[int]) -> "ImageSource":
        """The images of these numbers (mirror images not counted), in this order."""
        part = copy.copy(self)
        part.names = [self.names[number] for number in numbers]
        part._labels = [self._labels[number] for number in numbers]
        part._places = [self._places[number] for number in numbers]
        if self.captions is not None:
            part.captions = [self.captions[number] for number in numbers]
        return part

    def hold_out(self, share: float) -> "tuple[ImageSource, ImageSource]":
        """Split off a share of every class, at least one image of it.

        Which images are held out depends on their names only: not on the order, and hardly on what
        other images there are.

        Raises:
            ValueError: a class has a single image.
        """
        classes: dict[int, list[int]] = {}
        for number, label in enumerate(self._labels):
            classes.setdefault(label, []).append(number)
        held_out = set()
        for label, numbers in classes.items():
            if len(numbers) < 2:
                raise ValueError(
                    f"holdout needs 2 images of every class, class {label} of {self.place} has one"
                )
            count = min(len(numbers) - 1, max(1, round(share * len(numbers))))
            held_out.update(sorted(numbers, key=self._hash)[:count])
        everything = range(len(self.names))
        train = self.subset([number for number in everything if number not in held_out])
        return train, self.subset(sorted(held_out))

    def _hash(self, number: int) -> bytes:
        # a file system's name may be any bytes, which Python keeps as surrogates
        name = self.names[number].encode(errors="surrogateescape")
        return hashlib.blake2b(name).digest()


def check_apart(parts: Iterable[ImageSource]) -> None:
    """ValueError if images of two parts, such as train/0.png and val/0.png, have their captions from
    one entry of a list.
    """
    places: dict[str, str] = {}
    for part in parts:
        twice = min(part.listed & places.keys(), default=None)
        if twice is not None:
            raise ValueError(
                f"captions list {twice} once, which could be an image of {places[twice]} and of "
                f"{part.place}: expected an entry for each, whose name begins with its folder"
            )
        places |= dict.fromkeys(part.listed, part.place)


def suffix_note(names: list[str], kept: set[str]) -> str | None:
    """One line about the files that are no images, or None.

    Args:
        names: all files.
        kept: those that are images.
    """
    suffixes = Counter(
        Path(name).suffix.lower() or "no suffix" for name in names if name not in kept
    )
    if not suffixes:
        return None
    listed = ", ".join(f"{suffix} ({count})" for suffix, count in suffixes.most_common(5))
    return f"{suffixes.total()} files are no images that Pillow opens: {listed}"
