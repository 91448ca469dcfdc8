"""Captions of images: in a text file beside each, in JSON files, or in a column of a data set."""

import json
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from sra_fast.data.reasons import why

# what `captions` says if each image has a text file of its name
BESIDE = "txt"
SUFFIX = ".txt"
# small files: a network drive answers many at once
READERS = 16


def lines_of(content: bytes, name: str) -> list[str]:
    """The captions of a text file, one a line; empty lines are none.

    Raises:
        ValueError: the file is no UTF-8 text.
    """
    try:
        # some editors mark the encoding with a first character
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} must be UTF-8 text: {error}") from None
    # not splitlines: a caption may hold the line ends of other alphabets
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return [line for line in lines if line.strip()]


def is_text(text: str) -> bool:
    """Whether a string can be one that somebody has written."""
    try:
        text.encode()
    except UnicodeEncodeError:
        # JSON can hold halves of characters, which no tokenizer takes
        return False
    # a file of UTF-16 that is read as UTF-8 has them
    return "\0" not in text


def read_all(read: Callable[[str], list[str] | None], names: Iterable[str]) -> list:
    """``read(name)`` of every name, in order, by several threads."""
    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(read, names))


def as_captions(value: object) -> object:
    """A string as a list of one; anything else as it is."""
    return [value] if isinstance(value, str) else value


def checked(found: list, names: list[str], place: str) -> list[list[str]]:
    """Captions without white space around them.

    Args:
        found: of every image; None or an empty list: it has none.
        names: of the images.
        place: where the images are, for errors.

    Raises:
        ValueError: an image has no caption, or one that is empty or no text.
    """
    without = [name for name, held in zip(names, found, strict=True) if held in (None, [])]
    if without:
        raise ValueError(
            f"{place} has no caption for {len(without)} images, the first is {without[0]}"
        )
    empty = []
    for name, captions in zip(names, found, strict=True):
        are_texts = isinstance(captions, list) and all(isinstance(text, str) for text in captions)
        if not are_texts:
            raise ValueError(
                f"{place}: expected a caption or a list of them for {name}, got "
                f"{str(captions)[:60]!r}"
            )
        # they would be the prompt that stands for no caption
        empty += [name for text in captions if not text.strip()]
        if not all(map(is_text, captions)):
            raise ValueError(f"{place}: a caption of {name} is no valid Unicode text")
    if empty:
        raise ValueError(f"{place} has {len(empty)} empty captions, the first is of {empty[0]}")
    return [[text.strip() for text in captions] for captions in found]


def read_lists(files: list[str]) -> dict[str, list]:
    """File name of an image -> its captions, from JSON files.

    A file has COCO's form, ``{"images": [{"id", "file_name"}], "annotations": [{"image_id",
    "caption"}]}``, or is an object ``{file name: caption or list of captions}``.

    Raises:
        ValueError: a file is none of both, or lists an image that another one has.
    """
    listed: dict[str, list] = {}
    for file in files:
        found = _read_list(Path(file))
        twice = next((name for name in found if name in listed), None)
        if twice is not None:
            raise ValueError(f"{file} lists {twice}, which another file of captions has as well")
        listed |= found
    return listed


def _read_list(file: Path) -> dict[str, list]:
    if not file.is_file():
        raise ValueError(
            f"captions must be {BESIDE}, JSON files or a column of a Hugging Face data set, there "
            f"is no file {file}"
        )
    try:
        content = json.loads(file.read_bytes(), object_pairs_hook=_once)
        if not isinstance(content, dict):
            raise ValueError(f"an object was expected, got {type(content).__name__}")
        if "annotations" in content:
            return _of_coco(content)
        return {name: as_captions(value) for name, value in content.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f'{file} must hold COCO\'s captions ("images" with id and file_name, "annotations" with '
            f"image_id and caption) or {{file: caption}}: {why(error)}"
        ) from None


def _once(pairs: list[tuple], twice: str = "{} is there twice") -> dict:
    """Pairs as a dictionary; ValueError, ``twice``, if one would replace another."""
    held = dict(pairs)
    if len(held) < len(pairs):
        (name, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(twice.format(name))
    return held


def _of_coco(content: dict) -> dict[str, list]:
    images = [(image["id"], image["file_name"]) for image in content["images"]]
    odd = [name for _, name in images if not isinstance(name, str)]
    if odd:
        raise ValueError(f"a file_name must be a text, got {odd[0]!r}")
    names = _once(images, "two images have the id {}")
    listed: dict[str, list] = _once([(name, []) for _, name in images], "two images are named {}")
    for annotation in content["annotations"]:
        image = annotation["image_id"]
        if image not in names:
            raise ValueError(f'an annotation is of the image {image}, which "images" lacks')
        listed[names[image]].append(annotation["caption"])
    return listed


def from_lists(
    files: list[str], names: list[str], root: str, place: str
) -> tuple[list, set[str], str | None]:
    """The captions of images in JSON files, by the names of the images' files.

    Args:
        files: see ``read_lists``.
        names: of the images.
        root: the folder that the names are below, with a slash, or nothing.
        place: where the images are.

    Returns:
        The captions of every image, None if it has none; the names in the lists that these are of;
        and a note or None.
    """
    listed = read_lists(files)
    keys = _names_in(listed, names, root)
    found = [None if key is None else listed[key] for key in keys]
    used = {key for key in keys if key is not None}
    others = [name for name in listed if name not in used]
    note = None
    if others:
        note = (
            f"captions of {len(others)} images that are not in {place} are left out, the first is "
            f"{others[0]}"
        )
    return found, used, note


def _names_in(listed: dict[str, list], names: list[str], root: str) -> list[str | None]:
    """What lists call each image, or None.

    That is its name below the folder of the images, with ``root`` or without. If the lists have no
    such name, their folders are others: then the last part decides, where only one image and one
    entry has it.
    """
    for folder in (root, ""):
        keys = [folder + name if folder + name in listed else None for name in names]
        if any(keys):
            return keys
    by_base = _by_base(listed)
    bases = [PurePosixPath(name).name for name in names]
    counts = Counter(bases)
    return [by_base.get(base) if counts[base] == 1 else None for base in bases]


def _by_base(listed: dict[str, list]) -> dict[str, str]:
    """Last part of a name -> the name, where only one name has it."""
    bases = Counter(PurePosixPath(name).name for name in listed)
    every = {PurePosixPath(name).name: name for name in listed}
    return {base: name for base, name in every.items() if bases[base] == 1}
