"""Labelled images in a folder or a .zip, cropped to a square."""

import hashlib
import json
import os
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path, PurePosixPath
from zipfile import BadZipFile, ZipFile

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The square crop of the ADM evaluation, ``size x size``.

    Halve the image with a box filter while the shorter side is at least ``2 * size``. Resize the
    shorter side to ``size`` (bicubic). Cut out the middle; if a margin is odd, its extra pixel is
    on the right or below.
    """
    while min(image.size) >= 2 * size:
        half = (image.width // 2, image.height // 2)
        image = image.resize(half, Image.Resampling.BOX)
    # the shorter side becomes exactly size
    scale = size / min(image.size)
    resized = (round(image.width * scale), round(image.height * scale))
    image = image.resize(resized, Image.Resampling.BICUBIC)
    left = (image.width - size) // 2
    top = (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _hidden(name: str) -> bool:
    """What file managers and notebooks leave: .DS_Store, ._0.jpg, .ipynb_checkpoints/0-checkpoint.jpg, __MACOSX/."""
    parts = [part for part in name.split("/") if part not in (".", "..")]
    return any(part.startswith(".") or part == "__MACOSX" for part in parts)


def _unreadable(error: OSError) -> None:
    raise ValueError(f"{error.filename} cannot be read: {error.strerror}")


class ImageFolder(Dataset):
    """Images in class folders, or with their labels in a ``dataset.json``.

    A ``dataset.json`` is ``{"labels": [["a/b.png", 3], ...]}``, at the top of the folder or the .zip.
    Class folders are numbered in the order of their names. Files and folders whose name begins with
    a dot are ignored, as is __MACOSX in a .zip. Reading is thread-safe.

    Args:
        path: folder or .zip.
        size: side of the square crop.
        num_classes: how many classes there must be; None: as many as there are.
        mirror: every image is followed by its mirror image.

    Raises:
        ValueError: there are no images, a class is empty, the number of classes is another, a label
            is missing or outside [0, num_classes), or a folder cannot be read or links to one above
            it. ``__getitems__`` raises it for a file that is no readable image of 8 bits per
            channel.
    """

    def __init__(self, path: str, size: int, num_classes: int | None = None, mirror: bool = False):
        self.path = Path(path)
        self.size = size
        self.copies = 2 if mirror else 1
        self.zip = self._open_zip() if self.path.is_file() else None

        # a set: a .zip may hold a file twice, and its last version counts
        names = sorted({name for name in self._list() if not _hidden(name)})
        files = [name for name in names if not name.endswith("/")]
        self.names = [name for name in files if PurePosixPath(name).suffix.lower() in SUFFIXES]
        if not self.names:
            raise ValueError(f"{path} holds no images ({', '.join(sorted(SUFFIXES))})")

        listed = "dataset.json" in names
        labels = self._listed_labels() if listed else self._folder_labels(names, num_classes)
        # labels of a dataset.json may have gaps: the highest one decides
        self.num_classes = max(labels) + 1 if num_classes is None else num_classes
        for name, label in zip(self.names, labels, strict=True):
            if not 0 <= label < self.num_classes:
                raise ValueError(f"labels must lie in [0, {self.num_classes}), {name} has {label}")
        self.labels = torch.tensor(labels, dtype=torch.int64).repeat_interleave(self.copies)
        self.fingerprint = hashlib.sha256(json.dumps([self.names, labels]).encode()).hexdigest()

    def _open_zip(self) -> ZipFile:
        try:
            return ZipFile(self.path)
        except (OSError, BadZipFile) as error:
            raise ValueError(
                f"{self.path} is neither a folder nor a readable .zip: {error}"
            ) from None

    def _list(self) -> Iterator[str]:
        """Names of all files and folders, relative to the root. A folder's name ends with a slash."""
        if self.zip:
            yield from self.zip.namelist()
            return
        if not self.path.is_dir():
            raise ValueError(f"no folder or .zip of images at {self.path}")
        for folder, subfolders, files in os.walk(self.path, onerror=_unreadable, followlinks=True):
            # links are followed, so a link to a folder above would never end
            here = Path(folder)
            parents = [p.resolve() for p in here.parents if p.is_relative_to(self.path)]
            if here.resolve() in parents:
                raise ValueError(f"{folder} is a link to a folder above it, {here.resolve()}")
            # os.walk descends into what is left in this list
            subfolders[:] = [name for name in subfolders if not _hidden(name)]
            relative = os.path.relpath(folder, self.path).replace(os.sep, "/")
            prefix = "" if relative == "." else relative + "/"
            yield from (prefix + name + "/" for name in subfolders)
            yield from (prefix + name for name in files)

    def _listed_labels(self) -> list[int]:
        """The labels of ``names`` in ``dataset.json``."""
        index = f"{self.path}/dataset.json"
        try:
            listed = json.loads(self._read("dataset.json"))["labels"]
            labels = dict(listed)
            if len(labels) < len(listed):
                raise ValueError("a file is listed twice")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f'{index} must hold {{"labels": [[file, label], ...]}}: {error!r}'
            ) from None
        for name in self.names:
            label = labels.get(name)
            # bool is a subclass of int, but true is no label
            if type(label) is not int:
                raise ValueError(
                    f"{index} must hold a whole number as the label of {name}, got {label!r}"
                )
        # a list with more files than the folder is a sign of an incomplete copy
        absent = labels.keys() - set(self.names)
        if absent:
            raise ValueError(
                f"{index} lists {len(absent)} files that are not there: {min(absent, key=str)}"
            )
        return [labels[name] for name in self.names]

    def _folder_labels(self, names: list[str], num_classes: int | None) -> list[int]:
        """The labels of ``self.names`` by class folder; ``names``: all files and folders."""
        # an image at the top has no class
        loose = next((name for name in self.names if "/" not in name), None)
        if loose:
            raise ValueError(
                f"{self.path} needs a dataset.json, or every image in a class folder: {loose} is in none"
            )
        classes = sorted({name.partition("/")[0] for name in names if "/" in name})
        number = {name: i for i, name in enumerate(classes)}
        labels = [number[name.partition("/")[0]] for name in self.names]

        # imagenet/train/n01440764/...: the user gave the folder above the right one
        nested = any(name.count("/") > 1 for name in self.names)
        if len(classes) == 1 and num_classes is None and nested:
            raise ValueError(
                f"{self.path} holds one folder, {classes[0]}, with folders in it: the classes must be one level higher "
                "(or num_classes 1)"
            )
        occupied = set(labels)
        empty = [name for name in classes if number[name] not in occupied]
        if empty:
            raise ValueError(
                f"{self.path} has {len(empty)} class folders without images, the first is {empty[0]}"
            )
        if num_classes not in (None, len(classes)):
            raise ValueError(
                f"num_classes {num_classes} was asked for, {self.path} has {len(classes)} class folders"
            )
        return labels

    def _read(self, name: str) -> bytes:
        return self.zip.read(name) if self.zip else (self.path / name).read_bytes()

    def _pixels(self, name: str) -> np.ndarray:
        """The crop of one image, uint8 ``[size, size, 3]``."""
        try:
            with Image.open(BytesIO(self._read(name))) as image:
                # 16- and 32-bit modes: Pillow would clip them to 255, which is white
                if image.mode[0] in "IF":
                    raise ValueError(f"8 bits per channel were expected, its mode is {image.mode}")
                return np.asarray(center_crop(image.convert("RGB"), self.size))
        except UnidentifiedImageError:
            raise ValueError(
                f"{self.path}/{name} is no readable image: empty, or of an unknown format"
            ) from None
        except Exception as error:
            # Pillow's decoders and zip files raise many types
            raise ValueError(f"{self.path}/{name} is no readable image: {error!r}") from None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """uint8 ``[B, 3, size, size]`` (channels last in memory) and labels ``[B]``."""
        # an image and its mirror image are decoded once
        numbers = {index // self.copies for index in indices}
        pixels = {number: self._pixels(self.names[number]) for number in numbers}
        batch = []
        for index in indices:
            number, mirrored = divmod(index, self.copies)
            image = pixels[number]
            batch.append(image[:, ::-1] if mirrored else image)
        return torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2), self.labels[indices]
