"""Images in WebDataset tars: files of one sample share a name up to the first dot (``0001.jpg``, ``0001.cls``)."""

import json
import os
import re
import tarfile
from pathlib import Path

from sra_fast.data.captions import SUFFIX, as_captions, lines_of, read_all
from sra_fast.data.images import Crop, holds_images, image_suffixes
from sra_fast.data.sources import ImageSource, suffix_note

# suffixes of the files that hold a sample's label, the first that is there counts
LABELS = (".cls", ".json")
# entries of a sample's .json that may hold its captions
CAPTIONS = ("caption", "captions", "text")


def expand(pattern: str) -> list[Path]:
    """The files that a name with one range means: ``a-{000..010}.tar`` is a-000.tar, .. a-010.tar.

    Args:
        pattern: such a name, one .tar, or a folder of them.

    Raises:
        ValueError: one of the files is not there.
    """
    match = re.fullmatch(r"(.*)\{(\d+)\.\.(\d+)\}(.*)", pattern)
    if match:
        before, first, last, after = match.groups()
        numbers = range(int(first), int(last) + 1)
        files = [Path(f"{before}{number:0{len(first)}d}{after}") for number in numbers]
    elif Path(pattern).is_dir():
        files = sorted(Path(pattern).glob("*.tar"))
    else:
        files = [Path(pattern)]
    missing = [file for file in files if not file.is_file()]
    if missing or not files:
        first = missing[0] if missing else pattern
        raise ValueError(f"no .tar of images at {first}")
    return files


def holds_tars(path: Path) -> bool:
    """Whether a source is one of tars: a name with .tar, or a folder of them.

    Raises:
        ValueError: a folder that holds both tars and images: which of them are meant?
    """
    if not path.is_dir():
        return ".tar" in path.suffixes
    tars = sorted(path.glob("*.tar"))
    if tars and holds_images(path):
        raise ValueError(
            f"{path} holds images and {len(tars)} tars, the first is {tars[0].name}: move one kind away"
        )
    return bool(tars)


class TarSource(ImageSource):
    """Images and labels of WebDataset tars. Opening reads the headers only.

    The label of a sample is its ``.cls`` (a number as text), or ``label`` or ``cls`` in its
    ``.json``. Without any label all images are of one class. Its captions are the lines of its
    ``.txt``, or ``caption``, ``captions`` or ``text`` in its ``.json``, a text or a list of them.

    Args:
        pattern: see ``expand``.
        crop: how images are decoded.
        num_classes: how many classes there must be; None: as many as there are.
        mirror, bad: see ``ImageSource``.

    Raises:
        ValueError: no tars, compressed ones, no images in them, or a label is missing or is no
            number.
    """

    def __init__(
        self,
        pattern: str,
        crop: Crop,
        num_classes: int | None = None,
        mirror: bool = False,
        bad: str = "stop",
    ):
        super().__init__(crop, mirror, bad)
        self.place = pattern
        self.class_names = None
        self.suffixes = image_suffixes()
        self.tars = expand(pattern)
        # name of an image -> suffix -> place of a file that may hold its captions
        self._texts: dict[str, dict[str, tuple[int, int, int]]] = {}
        # opened once: os.pread needs no position, so threads can share a file
        self.descriptors = [os.open(tar, os.O_RDONLY) for tar in self.tars]
        samples = [sample for tar in range(len(self.tars)) for sample in self._samples(tar)]
        if not samples:
            raise ValueError(f"{pattern} holds no images that Pillow opens")
        self.names = [name for name, _, _ in samples]
        self._places = [place for _, place, _ in samples]
        labels = [label for _, _, label in samples]
        unlabelled = [name for name, _, label in samples if label is None]
        if len(unlabelled) == len(samples):
            if len(self.tars) > 1 and num_classes != 1:
                raise ValueError(
                    f"{pattern} has no labels (.cls or .json): if a tar is a class, unpack each into "
                    "a folder; if all images are of one class, give num_classes 1"
                )
            self.notes.append("no labels (.cls or .json): all images are of one class")
            labels = [0] * len(samples)
        elif unlabelled:
            raise ValueError(
                f"{pattern} has no label (.cls or .json) for {len(unlabelled)} images, the first is "
                f"{unlabelled[0]}"
            )
        self._set_labels(labels, num_classes, counted=not unlabelled)

    def _samples(self, tar: int) -> list[tuple[str, tuple[int, int, int], int | None]]:
        """Name, place (tar, first byte, bytes) and label of every image of a tar."""
        path = self.tars[tar]
        # key of a sample -> suffix -> (first byte, bytes)
        members: dict[str, dict[str, tuple[int, int]]] = {}
        try:
            # r: and not r|*: a compressed tar has no bytes to point at
            with tarfile.open(path, "r:") as archive:
                for member in archive:
                    if not member.isfile():
                        continue
                    folder, slash, base = member.name.rpartition("/")
                    stem, _, suffix = base.partition(".")
                    files = members.setdefault(folder + slash + stem, {})
                    files["." + suffix.lower()] = (member.offset_data, member.size)
        except (OSError, tarfile.TarError) as error:
            raise ValueError(f"{path} is no readable, uncompressed .tar: {error}") from None
        self._count_others(path, members)
        samples = []
        for key, files in members.items():
            images = [suffix for suffix in files if suffix in self.suffixes]
            if len(images) > 1:
                raise ValueError(
                    f"{path}: expected one image of {key}, found {' and '.join(images)}"
                )
            if images:
                label = self._label(tar, key, files)
                place = (tar, *files[images[0]])
                name = f"{path.name}/{key}{images[0]}"
                samples.append((name, place, label))
                self._texts[name] = {
                    suffix: (tar, *files[suffix]) for suffix in (SUFFIX, ".json") if suffix in files
                }
        return samples

    def _count_others(self, path: Path, members: dict[str, dict[str, tuple[int, int]]]) -> None:
        """Notes about the files of a tar that are neither images nor their labels or captions."""
        others = []
        for key, files in members.items():
            has_image = any(suffix in self.suffixes for suffix in files)
            known = {*self.suffixes, *LABELS, *((SUFFIX,) if has_image else ())}
            others += [key + suffix for suffix in files if suffix not in known]
        dotted = {name for name in others if Path(name).suffix in self.suffixes}
        if dotted:
            self.notes.append(
                f"{path.name}: {len(dotted)} images are left out, WebDataset's names have one dot: "
                f"{min(dotted)}"
            )
        if note := suffix_note(others, dotted):
            self.notes.append(f"{path.name}: {note}")

    def _label(self, tar: int, key: str, files: dict[str, tuple[int, int]]) -> int | None:
        for suffix in LABELS:
            if suffix not in files:
                continue
            text = self._read((tar, *files[suffix]))
            try:
                if suffix == ".cls":
                    return int(text)
                content = json.loads(text)
                label = content.get("label", content.get("cls"))
            except (ValueError, AttributeError):
                label = text.decode(errors="replace").strip()
            # a .json may hold something else
            if label is None:
                continue
            if type(label) is not int:
                raise ValueError(
                    f"{self.tars[tar]}: the label of {key} must be a whole number, got {label!r}"
                )
            return label
        return None

    def _read(self, place: tuple[int, int, int]) -> bytes:
        tar, first, size = place
        content = os.pread(self.descriptors[tar], size, first)
        if len(content) < size:
            raise ValueError(f"{self.tars[tar]} ends before its last file does")
        return content

    def _content(self, number: int) -> bytes:
        return self._read(self._places[number])

    def _captions_beside(self) -> list:
        return read_all(self._text, self.names)

    def _text(self, name: str) -> object:
        """What a sample has as captions, or None."""
        files = self._texts[name]
        where = f"{self.place}: the captions of {name}"
        if SUFFIX in files:
            return lines_of(self._read(files[SUFFIX]), where)
        if ".json" not in files:
            return None
        try:
            content = json.loads(self._read(files[".json"]))
        except ValueError as error:
            raise ValueError(f"{where} must be in a readable .json: {error}") from None
        held = content if isinstance(content, dict) else {}
        return as_captions(next((held[key] for key in CAPTIONS if held.get(key) is not None), None))
