"""Images of Hugging Face `datasets`: on disk, in the cache, or on the hub."""

from pathlib import Path

from sra_fast.data.captions import as_captions
from sra_fast.data.images import Crop
from sra_fast.data.sources import VALIDATION, ImageSource
from sra_fast.utils.files import require

# what a source begins with that names a data set of the hub: hf:uoft-cs/cifar10
PREFIX = "hf:"
# files that `save_to_disk` writes
SAVED = ("dataset_dict.json", "state.json")


def is_saved(path: Path) -> bool:
    """Whether `datasets` has written this folder."""
    return any((path / name).is_file() for name in SAVED)


def load(source: str):
    """A ``Dataset`` or a ``DatasetDict``.

    Args:
        source: a folder that `save_to_disk` made, or ``hf:NAME`` of a data set of the hub, with
            ``hf:NAME:CONFIGURATION`` if it has several. Downloaded data sets stay in the cache.

    Raises:
        ValueError: `datasets` is not installed, or there is no such data set.
    """
    require("datasets", "Hugging Face's datasets", "hub")
    # only this source needs it
    import datasets

    name, _, configuration = source.removeprefix(PREFIX).partition(":")
    try:
        if source.startswith(PREFIX):
            return datasets.load_dataset(name, configuration or None)
        return datasets.load_from_disk(source)
    except Exception as error:
        # datasets, huggingface_hub and pyarrow each raise their own types
        reason = (str(error).strip().splitlines() or [repr(error)])[0]
        raise ValueError(f"{source} is no data set that `datasets` can load: {reason}") from None


class HuggingFaceSource(ImageSource):
    """One split of a data set: its first column of images, and its labels if it has any.

    Labels are the first ``ClassLabel`` column, with the names of the classes, or a whole-number
    column ``label``. Without either all images are of one class.

    Args:
        place: what was asked for, for errors.
        dataset: of `datasets`.
        crop: how images are decoded.
        num_classes: how many classes there must be; None: as many as there are.
        mirror, bad: see ``ImageSource``.

    Raises:
        ValueError: no column of images, no images, or labels that are no whole numbers.
    """

    def __init__(
        self,
        place: str,
        dataset,
        crop: Crop,
        num_classes: int | None = None,
        mirror: bool = False,
        bad: str = "stop",
    ):
        super().__init__(crop, mirror, bad)
        import datasets

        self.place = place
        # plain Python values, whatever the data set was saved for
        dataset = dataset.with_format(None)
        features = dataset.features
        images = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
        if not images or not len(dataset):
            raise ValueError(f"{place} has no images, only the columns {', '.join(features)}")
        self.column = images[0]
        # the file's bytes: decoding and counting are ours, as for every source
        self.dataset = dataset.cast_column(self.column, datasets.Image(decode=False))
        self.content_digest = dataset._fingerprint
        self.names = [f"{number:08d}" for number in range(len(dataset))]
        self._places = list(range(len(dataset)))

        classes = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
        self.class_names = features[classes[0]].names if classes else None
        labelled = classes or [name for name in ("label",) if name in features]
        self._taken = [self.column, *labelled[:1]]
        self._note_columns()
        if not labelled:
            self.notes.append("no labels: all images are of one class")
            labels = [0] * len(dataset)
        else:
            labels = list(dataset[labelled[0]])
        for name, label in zip(self.names, labels, strict=True):
            if type(label) is not int or label < 0:
                raise ValueError(
                    f"{place}: the label of image {name} must be a whole number, got {label!r}"
                )
        known = len(self.class_names) if self.class_names else None
        if None not in (known, num_classes) and known != num_classes:
            raise ValueError(
                f"num_classes {num_classes} was asked for, {place} has {known} classes"
            )
        self._set_labels(labels, num_classes or known, counted=bool(labelled))

    def _note_columns(self) -> None:
        """Note which columns are not read; it replaces an earlier note of that."""
        others = [name for name in self.dataset.features if name not in self._taken]
        begin = "columns "
        self.notes = [note for note in self.notes if not note.startswith(begin)]
        if others:
            self.notes.append(f"{begin}{', '.join(self._taken)} are read, not {', '.join(others)}")

    def _captions(self, where: list[str]) -> list:
        """Captions in a column, texts or lists of texts."""
        columns = [name for name in self.dataset.features if name not in self._taken]
        if len(where) != 1 or where[0] not in columns:
            raise ValueError(
                f"captions must name a column of {self.place}, one of {', '.join(columns)}; got "
                f"{' '.join(where)}"
            )
        texts = list(self.dataset[where[0]])
        self._taken.append(where[0])
        self._note_columns()
        return [as_captions(texts[number]) for number in self._places]

    def _content(self, number: int) -> bytes:
        held = self.dataset[self._places[number]][self.column]
        # small data sets hold the bytes, large ones the name of a file
        return held["bytes"] if held["bytes"] is not None else Path(held["path"]).read_bytes()


def open_huggingface(
    source: str, crop: Crop, num_classes: int | None, mirror: bool, bad: str
) -> tuple[HuggingFaceSource, HuggingFaceSource | None]:
    """The training split, and the held-out one if there is one.

    Raises:
        ValueError: see ``load`` and ``HuggingFaceSource``.
    """
    found = load(source)
    if not isinstance(found, dict):
        return HuggingFaceSource(source, found, crop, num_classes, mirror, bad), None
    if "train" not in found:
        raise ValueError(f"{source} has no split `train`, only {', '.join(found)}")
    train = HuggingFaceSource(source, found["train"], crop, num_classes, mirror, bad)
    names = [name for name in VALIDATION if name in found]
    if not names:
        return train, None
    train.notes.append(f"split {names[0]} is held out")
    held_out = HuggingFaceSource(
        f"{source} ({names[0]})", found[names[0]], crop, train.num_classes, False, bad
    )
    return train, held_out
