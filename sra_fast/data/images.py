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
    """The square crop of the ADM evaluation: halve (box filter) while the shorter side is at least ``2 * size``, resize
    it to ``size`` (bicubic), cut ``size x size`` out of the middle; an odd margin's extra pixel is right or below."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize(
        (round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC
    )
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _hidden(name: str) -> bool:
    """What file managers and notebooks leave: .DS_Store, ._0.jpg, .ipynb_checkpoints/0-checkpoint.jpg, __MACOSX/."""
    return any(
        part.startswith(".") and part not in (".", "..") or part == "__MACOSX"
        for part in name.split("/")
    )


def _unreadable(error: OSError) -> None:
    raise ValueError(f"{error.filename} cannot be read: {error.strerror}")


class ImageFolder(Dataset):
    """Images of class folders, or of a ``dataset.json`` (``{"labels": [["a/b.png", 3], ...]}``) beside them.

    Class folders are numbered in the order of their names.  Files and folders whose name begins with a dot are not there,
    nor is a .zip's __MACOSX.  Reading is thread-safe.

    Args:
        path: folder or .zip.
        size: side of the square crop.
        num_classes: how many classes there must be; None: as many as there are.
        mirror: every image is followed by its mirror image.

    Raises:
        ValueError: no images, an empty class, another number of classes, a label missing or outside [0, num_classes), a
            folder that cannot be read or links to one above it; ``__getitems__``: a file that is no readable image of 8 bits.
    """

    def __init__(self, path: str, size: int, num_classes: int | None = None, mirror: bool = False):
        self.path, self.size, self.copies = Path(path), size, 2 if mirror else 1
        self.zip = self._open_zip() if self.path.is_file() else None
        names = sorted(
            {name for name in self._list() if not _hidden(name)}
        )  # a .zip may hold a file twice: the last counts
        self.names = [
            name
            for name in names
            if PurePosixPath(name).suffix.lower() in SUFFIXES and name[-1] != "/"
        ]
        if not self.names:
            raise ValueError(f"{path} holds no images ({', '.join(sorted(SUFFIXES))})")
        labels = (
            self._listed_labels()
            if "dataset.json" in names
            else self._folder_labels(names, num_classes)
        )
        self.num_classes = max(labels) + 1 if num_classes is None else num_classes
        wrong = next((i for i, y in enumerate(labels) if not 0 <= y < self.num_classes), None)
        if wrong is not None:
            raise ValueError(
                f"labels must lie in [0, {self.num_classes}), {self.names[wrong]} has {labels[wrong]}"
            )
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
        """Names of all files, and of folders with a slash at the end."""
        if self.zip:
            yield from self.zip.namelist()
            return
        if not self.path.is_dir():
            raise ValueError(f"no folder or .zip of images at {self.path}")
        for folder, subfolders, files in os.walk(self.path, onerror=_unreadable, followlinks=True):
            above = [
                parent.resolve()
                for parent in Path(folder).parents
                if parent.is_relative_to(self.path)
            ]
            if Path(folder).resolve() in above:
                raise ValueError(
                    f"{folder} is a link to a folder above it, {Path(folder).resolve()}"
                )
            subfolders[:] = [name for name in subfolders if not _hidden(name)]
            above = os.path.relpath(folder, self.path).replace(os.sep, "/") + "/"
            above = "" if above == "./" else above
            yield from (above + name + "/" for name in subfolders)
            yield from (above + name for name in files)

    def _listed_labels(self) -> list[int]:
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
            if type(label := labels.get(name)) is not int:
                raise ValueError(
                    f"{index} must hold a whole number as the label of {name}, got {label!r}"
                )
        absent = labels.keys() - set(self.names)
        if absent:
            raise ValueError(
                f"{index} lists {len(absent)} files that are not there: {min(absent, key=str)}"
            )
        return [labels[name] for name in self.names]

    def _folder_labels(self, names: list[str], num_classes: int | None) -> list[int]:
        loose = next((name for name in self.names if "/" not in name), None)
        if loose:
            raise ValueError(
                f"{self.path} needs a dataset.json, or every image in a class folder: {loose} is in none"
            )
        classes = sorted({name.partition("/")[0] for name in names if "/" in name})
        number = {name: i for i, name in enumerate(classes)}
        labels = [number[name.partition("/")[0]] for name in self.names]
        empty = [classes[i] for i in sorted(set(range(len(classes))) - set(labels))]
        if (
            len(classes) == 1
            and num_classes is None
            and any(name.count("/") > 1 for name in self.names)
        ):
            raise ValueError(
                f"{self.path} holds one folder, {classes[0]}, with folders in it: the classes must be one level higher "
                "(or num_classes 1)"
            )
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
        """uint8 ``[size, size, 3]``."""
        try:
            with Image.open(BytesIO(self._read(name))) as image:
                if image.mode[0] in "IF":  # Pillow clips them to 255: white
                    raise ValueError(f"8 bits per channel were expected, its mode is {image.mode}")
                return np.asarray(center_crop(image.convert("RGB"), self.size))
        except UnidentifiedImageError:
            raise ValueError(
                f"{self.path}/{name} is no readable image: empty, or of an unknown format"
            ) from None
        except Exception as error:  # whatever Pillow's decoders and zip files raise
            raise ValueError(f"{self.path}/{name} is no readable image: {error!r}") from None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """uint8 ``[B, 3, size, size]`` (channels last in memory) and labels ``[B]``."""
        pixels = {
            i: self._pixels(self.names[i]) for i in {index // self.copies for index in indices}
        }
        batch = [pixels[i // self.copies][:, :: -1 if i % self.copies else 1] for i in indices]
        return torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2), self.labels[indices]
