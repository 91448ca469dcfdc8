"""What turns a model's latents into images: what it was trained with, and nothing else."""

import json
import logging
from dataclasses import dataclass

from sra_fast.data.facts import DataFacts, refuse_other_latents
from sra_fast.data.normalization import Normalization, Numbers
from sra_fast.data.vae import load_vae, vae_identity, vae_is_there, weights_digest

log = logging.getLogger("sra_fast")


@dataclass
class Decoder:
    """A VAE, on the CPU, and how latents were scaled.

    Attributes:
        vae: None: the latents are the images.
        normalization: of the latents.
    """

    vae: object | None
    normalization: Normalization = Normalization()

    def identity(self) -> dict:
        """What the images depend on; JSON."""
        return {
            "vae": None if self.vae is None else _digest_of(self.vae),
            "latent_scale": self.normalization.scale,
            "latent_shift": self.normalization.shift,
        }


def _digest_of(vae) -> str:
    """Of the whole VAE: two decoders may belong to one encoder."""
    digest = weights_digest(vae.state_dict())
    # the number of groups of a norm, for example, is in no weight
    settings = {key: value for key, value in vae.config.items() if not key.startswith("_")}
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]


def choose_decoder(
    vae: str | None,
    scale: Numbers | None,
    shift: Numbers | None,
    channels: int,
    facts: DataFacts | None,
) -> Decoder:
    """The decoder that belongs to a model.

    Args:
        vae, scale, shift: as given by the user; None: not given.
        channels: of the model's input.
        facts: about the data it was trained on, if they are known.

    Raises:
        ValueError: something that is needed was not given and is not known, or contradicts what the
            model was trained with.
    """
    given = {"vae": vae, "latent_scale": scale, "latent_shift": shift}
    pixels = facts.pixels if facts else channels in (1, 3) and vae is None
    if pixels:
        for name, value in given.items():
            if value is not None:
                raise ValueError(f"{name} is for latents, the model makes pixels; got {value}")
        return Decoder(None)
    if facts is None:
        return _of_foreign_weights(vae, scale, shift, channels)

    refuse_other_latents(facts, scale, shift, "")
    if vae is None:
        if facts.vae_path is None or not vae_is_there(facts.vae_path):
            was = f" (it was {facts.vae_path})" if facts.vae_path else ""
            raise ValueError(
                f"the model makes latents of {channels} channels: give --vae, the folder of the "
                f"AutoencoderKL that decodes them{was}"
            )
        vae = facts.vae_path
    loaded = load_vae(vae, channels)
    if facts.vae is not None:
        _compare(vae_identity(loaded), facts.vae, vae)
    return Decoder(loaded, facts.normalization)


def _of_foreign_weights(
    vae: str | None, scale: Numbers | None, shift: Numbers | None, channels: int
) -> Decoder:
    """Weights of other projects say nothing: what is not given is the VAE's own."""
    if vae is None:
        raise ValueError(
            f"the model makes latents of {channels} channels: give --vae to decode them"
        )
    loaded = load_vae(vae, channels)
    own = Normalization.of_vae(vae_identity(loaded), channels, vae)
    normalization = Normalization.checked(
        own.scale if scale is None else scale, own.shift if shift is None else shift, channels
    )
    return Decoder(loaded, normalization)


def _compare(found: dict, expected: dict, path: str) -> None:
    """Whether a VAE is the one that made the training data."""
    for name in ("scaling_factor", "shift_factor", "latents_mean", "latents_std"):
        if expected.get(name) not in (None, found.get(name)):
            raise ValueError(
                f"vae {path} has {name} {found.get(name)}, that of the training data has "
                f"{expected[name]}: it is another VAE"
            )
    if found["sha256"] != expected["sha256"]:
        # the same encoder in half precision has another hash, so this is no error
        log.warning(
            "the encoder of %s is not the one that made the training data: its decoder may not "
            "fit the latents",
            path,
        )
