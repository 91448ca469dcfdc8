"""What a model's users have to know of the data it was trained on: nothing of it is asked twice."""

from dataclasses import asdict, dataclass


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
    scale: float = 1.0
    """a latent is (z - shift) * scale, z being the VAE's"""
    shift: float = 0.0
    """see ``scale``"""
    vae: dict | None = None
    """``vae_identity`` of the VAE that made the latents, if it is known"""
    vae_path: str | None = None
    """where that VAE was"""
    fingerprint: str | None = None
    """SHA-256 of the data set's index"""

    def as_json(self) -> dict:
        return asdict(self)

    @classmethod
    def from_json(cls, held: dict) -> "DataFacts":
        """The inverse of ``as_json``; facts that this version does not know are ignored."""
        known = {name: held[name] for name in cls.__dataclass_fields__ if name in held}
        return cls(**{**known, "shape": tuple(held["shape"])})

    def name_of(self, label: int) -> str:
        """The name of a class, or its number."""
        return self.class_names[label] if self.class_names else str(label)
