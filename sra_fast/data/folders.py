"""Images in a folder or a .zip: class folders, a ``dataset.json``, ``train/`` and ``val/``, or no classes at all."""

import json
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from zipfile import BadZipFile, ZipFile

from sra_fast.data.captions import SUFFIX, lines_of, read_all
from sra_fast.data.images import Crop, image_suffixes
from sra_fast.data.reasons import why
from sra_fast.data.sources import VALIDATION, ImageSource, suffix_note

LIST = "dataset.json"
TRAIN = "train"


def _hidden(name: str) -> bool:
    """What file managers and notebooks leave: .DS_Store, ._0.jpg, .ipynb_checkpoints/0-checkpoint.jpg, __MACOSX/."""
    parts = [part for part in name.split("/") if part not in (".", "..")]
    return any(part.startswith(".") or part == "__MACOSX" for part in parts)


def _unreadable(error: OSError) -> None:
    raise ValueError(f"{error.filename} cannot be read: {error.strerror}")


class Files:
    """The files of a folder or a .zip. Reading is thread-safe.

    Args:
        path: folder or .zip.

    Attributes:
        names: of all files and folders, sorted, relative to the root. A folder's name ends with a
            slash. Files and folders whose name begins with a dot are left out, as is __MACOSX.

    Raises:
        ValueError: it is neither, or a folder cannot be read or links to one above it.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.zip = self._open_zip() if self.path.is_file() else None
        # a set: a .zip may hold a file twice, and its last version counts
        self.names = sorted({name for name in self._list() if not _hidden(name)})

    def _open_zip(self) -> ZipFile:
        try:
            return ZipFile(self.path)
        except (OSError, BadZipFile) as error:
            raise ValueError(
                f"{self.path} is neither a folder nor a readable .zip: {error}"
            ) from None

    def _list(self) -> Iterator[str]:
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

    def read(self, name: str) -> bytes:
        return self.zip.read(name) if self.zip else (self.path / name).read_bytes()


class ImageFolder(ImageSource):
    """Images in class folders, with their labels in a ``dataset.json``, or of one class.

    A ``dataset.json`` is ``{"labels": [["a/b.png", 3], ...]}`` and may have ``"classes"``, a list of
    names. It lies at the top; one folder down is right if everything else is there too. Class
    folders are numbered in the order of their names; folders in them make no difference. Images
    without a folder are of one class.

    Args:
        path: folder or .zip, or an open one.
        crop: how images are decoded.
        num_classes: how many classes there must be; None: as many as there are.
        mirror, bad: see ``ImageSource``.
        within: only what lies below this folder.
        class_names: names of the class folders, in the order of the labels; default: those that are
            there.

    The captions of ``a/0.png`` are in ``a/0.txt``, one a line.

    Raises:
        ValueError: there are no images, a class is empty, the number of classes is another, a label
            is missing or outside [0, num_classes). ``read`` raises it for a file that is no readable
            image of 8 bits per channel.
    """

    def __init__(
        self,
        path: str | Path | Files,
        crop: Crop,
        num_classes: int | None = None,
        mirror: bool = False,
        bad: str = "stop",
        within: str = "",
        class_names: list[str] | None = None,
    ):
        super().__init__(crop, mirror, bad)
        self.files = path if isinstance(path, Files) else Files(path)
        self.place = str(self.files.path / within)
        prefix = f"{within}/" if within else ""
        below = [name[len(prefix) :] for name in self.files.names if name.startswith(prefix)]
        top, names = self._below_the_list([name for name in below if name])
        self.root = prefix + top

        suffixes = image_suffixes()
        files = [name for name in names if not name.endswith("/")]
        self.names = [name for name in files if PurePosixPath(name).suffix.lower() in suffixes]
        if not self.names:
            raise ValueError(f"{self.place} holds no images that Pillow opens")
        self._places = [self.root + name for name in self.names]
        self._others = sorted({*files} - {*self.names, LIST})
        if note := suffix_note(self._others, set()):
            self.notes.append(note)
        listed = LIST in names
        labels = (
            self._listed_labels()
            if listed
            else self._folder_labels(names, num_classes, class_names)
        )
        if listed and self.class_names and num_classes is None:
            # the last classes may have no image
            num_classes = len(self.class_names)
        self._set_labels(labels, num_classes, counted=listed)
        if self.class_names and len(self.class_names) != self.num_classes:
            raise ValueError(
                f"{self.place} names {len(self.class_names)} classes, there are {self.num_classes}"
            )

    def _below_the_list(self, names: list[str]) -> tuple[str, list[str]]:
        """The folder of the ``dataset.json``, with a slash, and the names below it."""
        lists = [name for name in names if PurePosixPath(name).name == LIST]
        if not lists or LIST in lists:
            return "", names
        # a .zip is often made of one folder, which then is one level too much
        top = lists[0][: -len(LIST)]
        outside = [name for name in names if not name.startswith(top) and not top.startswith(name)]
        if len(lists) > 1 or outside:
            raise ValueError(
                f"{self.place}: expected {LIST} at the top, found {lists[0]}"
                + (f" and {outside[0]} outside of its folder" if outside else f" and {lists[-1]}")
            )
        return top, [name[len(top) :] for name in names if name.startswith(top) and name != top]

    def _listed_labels(self) -> list[int]:
        """The labels of ``names`` in ``dataset.json``; sets ``class_names``."""
        index = f"{self.files.path}/{self.root}{LIST}"
        try:
            content = json.loads(self.files.read(self.root + LIST))
            listed = content["labels"]
            labels = dict(listed)
            if len(labels) < len(listed):
                raise ValueError("a file is listed twice")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f'{index} must hold {{"labels": [[file, label], ...]}}: {why(error)}'
            ) from None
        self.class_names = _checked_names(content.get("classes"), index)
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

    def _folder_labels(
        self, names: list[str], num_classes: int | None, class_names: list[str] | None
    ) -> list[int]:
        """The labels of ``self.names`` by class folder; sets ``class_names``. ``names``: all files
        and folders.
        """
        loose = [name for name in self.names if "/" not in name]
        if len(loose) == len(self.names):
            if class_names is not None and len(class_names) > 1:
                raise ValueError(
                    f"{self.place} has no class folders, the training images have {len(class_names)}: "
                    "sort it into the same folders, or take it away and use holdout"
                )
            self.class_names = class_names
            self.notes.append("no class folders: all images are of one class")
            return [0] * len(self.names)
        if loose:
            raise ValueError(
                f"{self.place} needs a {LIST}, or every image in a class folder: {loose[0]} is in none"
            )
        found = {name.partition("/")[0] for name in names if "/" in name}
        # 10 comes after 2 if all names are numbers
        found = sorted(found, key=int if all(name.isdecimal() for name in found) else str)
        self.class_names = class_names or found
        unknown = sorted(set(found) - set(self.class_names))
        if unknown:
            raise ValueError(f"{self.place} has a class that training images lack: {unknown[0]}")
        number = {name: i for i, name in enumerate(self.class_names)}
        labels = [number[name.partition("/")[0]] for name in self.names]

        occupied = set(labels)
        empty = [name for name in found if number[name] not in occupied]
        if empty:
            raise ValueError(
                f"{self.place} has {len(empty)} class folders without images, the first is {empty[0]}"
            )
        if num_classes not in (None, len(self.class_names)):
            raise ValueError(
                f"num_classes {num_classes} was asked for, {self.place} has {len(self.class_names)} class folders"
            )
        return labels

    def _content(self, number: int) -> bytes:
        return self.files.read(self._places[number])

    def _captions_beside(self) -> list[list[str] | None]:
        files = [str(PurePosixPath(name).with_suffix(SUFFIX)) for name in self.names]
        there = [name for name in self._others if name.endswith(SUFFIX)]
        known = set(there)
        found = read_all(lambda name: self._lines(name) if name in known else None, files)
        # they are no longer files that nothing is known of
        if (before := suffix_note(self._others, set())) in self.notes:
            self.notes.remove(before)
        if note := suffix_note(self._others, known):
            self.notes.append(note)
        if strangers := sorted(known.difference(files)):
            self.notes.append(
                f"{len(strangers)} files of captions belong to no image, the first is {strangers[0]}"
            )
        return found

    def _lines(self, name: str) -> list[str]:
        """The captions in a text file."""
        try:
            content = self.files.read(self.root + name)
        except Exception as error:
            # zip files and network drives raise many types
            raise ValueError(f"{self.place}/{name} cannot be read: {why(error)}") from None
        return lines_of(content, f"{self.place}/{name}")


def _checked_names(names: object, index: str) -> list[str] | None:
    """The names of the classes in a ``dataset.json``, or None; ValueError if they are no names."""
    if names is None:
        return None
    are_names = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if not are_names or not names or len(set(names)) < len(names):
        raise ValueError(
            f'{index}: "classes" must be a list of different names, in the order of the labels, '
            f"got {str(names)[:60]}"
        )
    return names


def _images_below(files: Files, folder: str) -> list[str]:
    """Names of the images below a folder, relative to it."""
    suffixes = image_suffixes()
    prefix = f"{folder}/" if folder else ""
    return [
        name[len(prefix) :]
        for name in files.names
        if name.startswith(prefix) and PurePosixPath(name).suffix.lower() in suffixes
    ]


def _tops(images: list[str]) -> set[str]:
    """The first folders of images; an empty name if an image lies in none."""
    return {name.partition("/")[0] if "/" in name else "" for name in images}


def open_folder(
    path: str | Path, crop: Crop, num_classes: int | None, mirror: bool, bad: str
) -> tuple[ImageFolder, ImageFolder | None]:
    """The images of a folder or .zip, and the held-out ones if it is cut into ``train/`` and ``val/``.

    Raises:
        ValueError: see ``ImageFolder``.
    """
    files = Files(path)
    within = ""
    images = _images_below(files, within)
    tops = _tops(images)
    # my_images/my_images/cat/1.jpg, as file managers pack it: a folder that holds nothing but folders
    while num_classes != 1 and len(tops) == 1 and "" not in tops:
        (top,) = tops
        inner = _images_below(files, f"{within}/{top}".strip("/"))
        if top.lower() == TRAIN or "" in _tops(inner):
            break
        within = f"{within}/{top}".strip("/")
        images = inner
        tops = _tops(images)
    listed = f"{within}/{LIST}".strip("/") in files.names
    parts = {} if listed else _split(tops)
    notes = [f"only {within}/ holds images"] if within else []
    if not parts:
        whole = ImageFolder(files, crop, num_classes, mirror, bad, within)
        whole.notes[:0] = notes
        return whole, None
    inside = {kind: f"{within}/{folder}".strip("/") for kind, folder in parts.items()}
    train = ImageFolder(files, crop, num_classes, mirror, bad, inside["train"])
    train.notes[:0] = notes
    if "held out" not in inside:
        return train, None
    unread = sorted(tops - set(parts.values()))
    train.notes.append(
        f"{parts['held out']}/ is held out" + "".join(f", {name}/ is not read" for name in unread)
    )
    held_out = ImageFolder(
        files,
        crop,
        train.num_classes,
        False,
        bad,
        inside["held out"],
        class_names=train.class_names,
    )
    return train, held_out


def _split(tops: set[str]) -> dict[str, str]:
    """``{"train": folder, "held out": folder}`` of a folder that is cut into these, as far as it is."""
    lower = {name.lower(): name for name in tops}
    if TRAIN not in lower:
        return {}
    found = [lower[name] for name in VALIDATION if name in lower]
    if found:
        return {"train": lower[TRAIN], "held out": found[0]}
    # `train` alone; beside other folders it is a class
    return {"train": lower[TRAIN]} if len(tops) == 1 else {}
