"""Captions of images: in a text file beside each, in JSON files, or in a column of a data set."""

import json
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

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
    return [line for line in text.splitlines() if line.strip()]


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
    without = [name for name, captions in zip(names, found, strict=True) if not captions]
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
        # JSON can hold halves of characters, which no tokenizer takes
        if any("\ud800" <= sign <= "\udfff" for text in captions for sign in text):
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
        content = json.loads(file.read_bytes())
        if not isinstance(content, dict):
            raise ValueError(f"an object was expected, got {type(content).__name__}")
        if "annotations" in content:
            return _of_coco(content)
        return {name: as_captions(value) for name, value in content.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f'{file} must hold COCO\'s captions ("images" with id and file_name, "annotations" with '
            f"image_id and caption) or {{file: caption}}: {error!r}"
        ) from None


def _of_coco(content: dict) -> dict[str, list]:
    names = {image["id"]: image["file_name"] for image in content["images"]}
    listed: dict[str, list] = {name: [] for name in names.values()}
    if len(listed) < len(names):
        (name, _), *_ = Counter(names.values()).most_common(1)
        raise ValueError(f"two images are named {name}")
    for annotation in content["annotations"]:
        listed[names[annotation["image_id"]]].append(annotation["caption"])
    return listed


def from_lists(files: list[str], names: list[str], place: str) -> tuple[list, str | None]:
    """The captions of images in JSON files, by the names of the images' files.

    A name in a list is that below the folder of the images; if the folder differs, the last part
    of the name decides, as far as it is the name of one image.

    Args:
        files: see ``read_lists``.
        names: of the images.
        place: where the images are.

    Returns:
        The captions of every image, None if it has none, and a note or None.
    """
    listed = read_lists(files)
    by_base = _by_base(listed)
    bases = Counter(PurePosixPath(name).name for name in names)
    found = []
    used = set()
    for name in names:
        key: str | None = name
        if name not in listed:
            base = PurePosixPath(name).name
            key = by_base.get(base) if bases[base] == 1 else None
        found.append(None if key is None else listed[key])
        used.add(key)
    others = [name for name in listed if name not in used]
    note = None
    if others:
        note = (
            f"captions of {len(others)} images that are not in {place} are left out, the first is "
            f"{others[0]}"
        )
    return found, note


def _by_base(listed: dict[str, list]) -> dict[str, str]:
    """Last part of a name -> the name, where only one name has it."""
    bases = Counter(PurePosixPath(name).name for name in listed)
    every = {PurePosixPath(name).name: name for name in listed}
    return {base: name for base, name in every.items() if bases[base] == 1}
