"""Prompts of a user as what images are sampled for: checked against the model and encoded."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from sra_fast.config.schema import DataConfig
from sra_fast.data.dataset import open_data
from sra_fast.data.facts import DataFacts
from sra_fast.data.prompts import digest_of, read_prompts
from sra_fast.data.stored_text import StoredText, text_names
from sra_fast.data.text_encoders import TextEncoders, load_text_encoders
from sra_fast.models import DiffusionTransformer, TextFeatures
from sra_fast.sampling.conditions import SampleConditions, StoredCaptions
from sra_fast.utils.checks import require_that
from sra_fast.utils.messages import warn

# prompts that an encoder sees at once. always as many, so that the features of a prompt hardly
# depend on the others
AT_ONCE = 16
# images of stored captions, unless another number is asked for
STORED = 100
# how far the empty prompt of the right encoder may be from that of the training data, which may be
# stored in half precision
NEAR = 0.05


class EncodedPrompts:
    """Prompts that are encoded when they are needed; see ``SampleConditions``.

    Args:
        prompts: at least one; the images take them in turn.
        encoders: are moved to ``device``.
        count: N.
        device: where the encoders run.
        dtype: of the features: that of the model's weights loses nothing.
    """

    def __init__(
        self,
        prompts: list[str],
        encoders: TextEncoders,
        count: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        self.numbers = torch.arange(count) % len(prompts)
        self.encoders = encoders
        self.device = device
        self.dtype = dtype
        self._texts = prompts
        self._ids, too_long = encoders.tokenize(prompts)
        self._empty: TextFeatures | None = None
        if too_long:
            warn(
                "%d of %d prompts are longer than the text encoder's %d tokens, their ends are not "
                "seen; the first is %r",
                *(len(too_long), len(prompts), encoders.tokens, prompts[too_long[0]]),
            )

    def __len__(self) -> int:
        return len(self.numbers)

    def read(self, first: int, end: int) -> TextFeatures:
        # a prompt of several images is encoded once
        wanted, places = self.numbers[first:end].unique(return_inverse=True)
        found, *more = [self._encode(self._ids[numbers]) for numbers in wanted.split(AT_ONCE)]
        for part in more:
            found = found.concatenated(part)
        return replace(found.select(places), empty=self.empty)

    @property
    def empty(self) -> TextFeatures:
        """The empty prompt, one entry."""
        if self._empty is None:
            self._empty = self._encode(self.encoders.tokenize([""])[0])
        return self._empty

    def _encode(self, ids: Tensor) -> TextFeatures:
        """Features of at most ``AT_ONCE`` prompts, on the CPU."""
        count = len(ids)
        filled = torch.cat([ids, ids[:1].expand(AT_ONCE - count, -1)])
        found = self.encoders.to(self.device).encode(filled).select(slice(count))
        # a copy that is waited for, which that of Conditioning.to is not
        host = [
            tensor.to("cpu", self.dtype if tensor.is_floating_point() else tensor.dtype)
            for tensor in found.tensors()
        ]
        return found.with_tensors(*host)

    @property
    def prompts(self) -> list[str]:
        return self._first(len(self))

    def captions(self, count: int) -> list[str]:
        return self._first(count)

    def _first(self, count: int) -> list[str]:
        return [self._texts[number] for number in self.numbers[:count].tolist()]

    @property
    def facts(self) -> dict:
        return {
            "prompts_sha256": digest_of(self.prompts),
            "text_encoders": self.encoders.identity,
        }


def choose_text(
    prompts: list[str] | None,
    encoders: list[str] | None,
    text: str | None,
    count: int | None,
    model: DiffusionTransformer,
    trained: DataFacts | None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> SampleConditions:
    """What a model of text samples for.

    Args:
        prompts, encoders, text: as given by the user, None: not given. ``encoders`` and ``text``
            exclude each other.
        count: images; None: one for each prompt, of stored captions at most 100.
        model: what takes the features.
        trained: facts about the data that the model was trained on, if they are known.
        device, dtype: see ``EncodedPrompts``.

    Raises:
        ValueError: too little or too much was given, a file cannot be read, or the features are
            not those that the model was trained with.
    """
    if text is not None:
        for name, value in {"prompts": prompts, "text_encoders": encoders}.items():
            require_that(
                value is None,
                f"text takes the captions of a data set, expected no {name}, got {value}",
            )
        stored = open_stored(text, trained)
        _check_sizes(model, str(stored.root), stored)
        count = min(STORED, len(stored)) if count is None else count
        if count > len(stored):
            # the score of such samples would be that of fewer captions
            warn(
                "%s has captions of %d images, %d were asked for: the captions take turns",
                *(stored.root, len(stored), count),
            )
        return StoredCaptions(stored, torch.arange(count) % len(stored))
    require_that(
        prompts is not None,
        "the model makes images from text: give --prompts (a file, or prompts), or --text, a data "
        "set with text features",
    )
    # before the encoders are loaded, which takes longer
    read = read_prompts(prompts)
    found = choose_encoders(encoders, trained)
    _check_sizes(model, " and ".join(found.paths), found)
    count = len(read) if count is None else count
    return EncodedPrompts(read, found, count, device, dtype)


def open_stored(where: str, trained: DataFacts | None) -> StoredText:
    """The stored text features that a user names, as ``FOLDER`` or ``FOLDER:NAME``.

    Raises:
        ValueError: there are none, several and no name, or they are of other encoders than those
            of the training data.
    """
    path, name = where, None
    if not Path(where).exists() and ":" in where:
        path, _, name = where.rpartition(":")
    require_that(
        Path(path).is_dir(),
        f"text must be FOLDER or FOLDER:NAME of packed data with text features, there is no {path}",
    )
    if name is None:
        name = _name_in(Path(path), _known(trained).get("name"))
    found = _stored(path, name)
    _check_trained(str(found.root), found.facts["encoders"], lambda: found.empty, trained)
    return found


def _name_in(path: Path, known: str | None) -> str | None:
    """The name of the text features of a data set that a user means who gives none: that of the
    training data's, if the set has it; else None, the only ones there are.
    """
    names = text_names(path)
    if known in names:
        return known
    require_that(
        len(names) < 2,
        f"{path} has the text features {', '.join(names)}: text must name one of them, "
        f"{path}:{''.join(names[:1])} for example",
    )
    return None


def _stored(path: str, name: str | None) -> StoredText:
    data = open_data(DataConfig(path=path))
    data.open_text(name)
    assert data.text is not None, "opened"
    return data.text


def _known(trained: DataFacts | None) -> dict:
    """What is known of the text features that a model was trained with."""
    return (trained.text if trained else None) or {}


def choose_encoders(given: list[str] | None, trained: DataFacts | None) -> TextEncoders:
    """The text encoders of a model, on the CPU: those given, else those of its training data.

    Raises:
        ValueError: none are known or there, they cannot be loaded, or they are others than those
            of the training data.
    """
    known = _known(trained)
    paths = given
    if paths is None:
        paths = known.get("paths")
        if not paths or not all(Path(path).exists() for path in paths):
            was = f" (it was {' '.join(paths)})" if paths else ""
            raise ValueError(
                f"prompts need --text_encoders, the folder of the model's text encoder{was}, or "
                "several"
            )
    kinds = [encoder.get("class") for encoder in known.get("encoders") or []]
    found = load_text_encoders(paths, _tokens_of(known, paths), kinds)
    empty = lambda: found.encode(found.tokenize([""])[0])
    _check_trained(" ".join(found.paths), found.identity, empty, trained)
    return found


def _tokens_of(trained: dict, paths: list[str]) -> int | None:
    """What ``load_text_encoders`` takes as ``tokens``, to have as many as the training data."""
    encoders = trained.get("encoders")
    if not encoders:
        # of several encoders it is not known which has how many
        return trained.get("tokens") if len(paths) == 1 else None
    of_t5 = [encoder["tokens"] for encoder in encoders if encoder["class"].startswith("T5")]
    return (of_t5 or [encoder["tokens"] for encoder in encoders])[0]


def _check_trained(
    place: str,
    found: list[dict] | None,
    empty: Callable[[], TextFeatures],
    trained: DataFacts | None,
) -> None:
    """ValueError for text features of other encoders than those of the training data. Where one of
    the two does not say which encoders it is from, the features of the empty prompt are compared; a
    warning says if they are not there either.

    Args:
        place: of the features, or of what makes them.
        found: their encoders, if they are known.
        empty: gives those of the empty prompt, one entry.
        trained: facts about the data that the model was trained on, if they are known.
    """
    known = _known(trained)
    expected = known.get("encoders")
    if found is None or expected is None:
        _check_empty(place, empty(), trained)
        return
    hashes = [[encoder["sha256"] for encoder in held] for held in (found, expected)]
    if hashes[0] != hashes[1]:
        paths = " ".join(known.get("paths") or [known.get("name", "not known")])
        raise ValueError(
            f"the text features of {place} ({_names(found)}) are of another encoder than those of "
            f"the training data, {paths} ({_names(expected)})"
        )


def _names(encoders: list[dict]) -> str:
    return ", ".join(f"{encoder['class']} {encoder['sha256'][:8]}" for encoder in encoders)


def _check_empty(place: str, empty: TextFeatures, trained: DataFacts | None) -> None:
    """See ``_check_trained``."""
    known = _known(trained)
    path = trained.path if trained else None
    if path is None or known.get("name") not in text_names(Path(path)):
        warn(
            "it is not known whether the text features of %s are of the encoder that the model was "
            "trained with",
            place,
        )
        return
    stored = _stored(path, known["name"])
    expected = stored.empty.tokens.float()
    found = empty.tokens.cpu().float()
    require_that(
        found.shape == expected.shape,
        f"expected text features {[*expected.shape[1:]]} as those of the training data "
        f"{stored.root}, those of {place} are {[*found.shape[1:]]}",
    )
    off = float((found - expected).norm())
    length = float(expected.norm())
    # no quotient: some data have zeros as the empty prompt
    require_that(
        off <= NEAR * length,
        f"the text features of {place} are of another encoder than those of the training data "
        f"{stored.root}: the empty prompt differs by {off:.3g}, its length is {length:.3g}",
    )


def _check_sizes(model: DiffusionTransformer, place: str, found: TextEncoders | StoredText) -> None:
    """ValueError unless text features have the sizes that a model takes."""
    takes = {
        "tokens": model.context_tokens,
        "width": model.context_size,
        # a model may leave the pooled vector aside
        "pooled": model.pooled_size or None,
    }
    for name, expected in takes.items():
        value = getattr(found, name)
        require_that(
            expected in (None, value),
            f"the model takes text features with {name} {expected}, those of {place} have {value}",
        )
