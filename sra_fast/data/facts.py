"""What a model's users have to know of the data it was trained on: nothing of it is asked twice."""

from dataclasses import asdict, dataclass

from sra_fast.data.normalization import (
    Normalization,
    Numbers,
    check_scale,
    check_shift,
    one_if_equal,
    told_apart,
)
from sra_fast.utils.checks import require_that


@dataclass(frozen=True)
class DataFacts:
    """Facts about a training set. A run folder keeps them in ``data.json``, an export in its metadata."""

    name: str
    """name in ``DATASETS``"""
    shape: tuple[int, int, int]
    """(C, H, W) of a latent or an image"""
    num_classes: int
    """labels lie in [0, num_classes)"""
    path: str | None = None
    """where the data were"""
    class_names: list[str] | None = None
    """name of every class, if the data have names"""
    pixels: bool = False
    """the model sees images themselves, scaled to [-1, 1], and no latents"""
    scale: Numbers = 1.0
    """a latent is (z - shift) * scale, z being the VAE's; one number, or one for each channel"""
    shift: Numbers = 0.0
    """see ``scale``"""
    vae: dict | None = None
    """``vae_identity`` of the VAE that made the latents, if it is known"""
    vae_path: str | None = None
    """where that VAE was"""
    fingerprint: str | None = None
    """SHA-256 that tells the images apart from others, wherever they lie"""
    features: dict | None = None
    """``StoredFeatures.facts`` of the features that came with every batch"""
    text: dict | None = None
    """``StoredText.facts`` of the captions that came with every batch"""

    def as_json(self) -> dict:
        return asdict(self)

    @classmethod
    def from_json(cls, held: dict) -> "DataFacts":
        """The inverse of ``as_json``; facts that this version does not know are ignored.

        Raises:
            ValueError: scale or shift are not those of its channels.
        """
        known = {name: held[name] for name in cls.__dataclass_fields__ if name in held}
        facts = cls(**{**known, "shape": tuple(held["shape"])})
        require_that(
            len(facts.shape) == 3,
            f"the shape of the data of a model must be three sizes, got {held['shape']}",
        )
        check_scale("the scale of the data of a model", facts.scale, facts.shape[0])
        check_shift("the shift of the data of a model", facts.shift, facts.shape[0])
        return facts

    @property
    def normalization(self) -> Normalization:
        """What ``scale`` and ``shift`` do."""
        return Normalization(self.scale, self.shift)

    def name_of(self, label: int) -> str:
        """The name of a class; its number if it has none."""
        named = self.class_names is not None and label < len(self.class_names)
        return self.class_names[label] if named else str(label)


def differences(found: DataFacts, expected: DataFacts) -> list[str]:
    """How data differ from those that are expected, as far as both are known; places do not count.

    Other images have another fingerprint; the rest makes a model of the one wrong for the other.
    """
    different = _other_values(found, expected, ("num_classes", "class_names"))
    different += other_inputs(found, expected)
    features = [facts.features or {} for facts in (found, expected)]
    prints = [held.get("fingerprint") for held in features]
    if None not in prints and prints[0] != prints[1]:
        different.append(f"other features ({features[0]['name']}, it had {features[1]['name']})")
    texts = [facts.text or {} for facts in (found, expected)]
    if not _other_encoders(*texts):
        prints = [held.get("fingerprint") for held in texts]
        if None not in prints and prints[0] != prints[1]:
            different.append(f"other captions ({texts[0]['name']}, it had {texts[1]['name']})")
    prints = (found.fingerprint, expected.fingerprint)
    if not different and None not in prints and prints[0] != prints[1]:
        different.append("other images")
    return different


def other_inputs(found: DataFacts, expected: DataFacts) -> list[str]:
    """Those of the ``differences`` that make the same picture, with the same caption, another input:
    nothing that a model of the other data has learned to read.
    """
    different = _other_values(found, expected, ("pixels",))
    for name in ("scale", "shift"):
        ours, theirs = getattr(found, name), getattr(expected, name)
        if ours != theirs:
            now, then = told_apart(ours, theirs)
            different.append(f"{name} {now}, it was {then}")
    vaes = [(facts.vae or {}).get("sha256") for facts in (found, expected)]
    if None not in vaes and vaes[0] != vaes[1]:
        different.append("latents of another VAE")
    texts = [facts.text or {} for facts in (found, expected)]
    if _other_encoders(*texts):
        different.append(
            f"features of another text encoder ({texts[0]['name']}, it had {texts[1]['name']})"
        )
    return different


def _other_values(found: DataFacts, expected: DataFacts, names: tuple[str, ...]) -> list[str]:
    pairs = [(name, getattr(found, name), getattr(expected, name)) for name in names]
    return [
        f"{name} {_short(ours)}, it was {_short(theirs)}"
        for name, ours, theirs in pairs
        if None not in (ours, theirs) and ours != theirs
    ]


def _other_encoders(found: dict, expected: dict) -> bool:
    """Whether captions have features of other encoders, as far as both are known."""
    encoders = [
        [encoder["sha256"] for encoder in held["encoders"]] if held.get("encoders") else None
        for held in (found, expected)
    ]
    return None not in encoders and encoders[0] != encoders[1]


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "..."


def refuse_other_latents(
    trained: DataFacts, scale: Numbers | None, shift: Numbers | None, section: str
) -> None:
    """ValueError for a scale or a shift that is not that of a model's training.

    Args:
        trained: facts about its data.
        scale, shift: as given by the user; None: not given.
        section: of the options ``latent_scale`` and ``latent_shift``, for messages.
    """
    given = {
        "latent_scale": (scale, trained.scale, check_scale),
        "latent_shift": (shift, trained.shift, check_shift),
    }
    for name, (value, expected, check) in given.items():
        if value is None:
            continue
        check(f"{section}{name}", value, trained.shape[0])
        if one_if_equal(value) != expected:
            then, now = told_apart(expected, one_if_equal(value))
            raise ValueError(
                f"the model was trained with {section}{name} {then}, got {now}: leave it out"
            )
