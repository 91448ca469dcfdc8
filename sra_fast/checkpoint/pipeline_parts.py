"""What the folders of diffusers' pipelines have in common, whichever model they hold."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from sra_fast.checkpoint.load_model import LoadedModel
from sra_fast.data.facts import DataFacts
from sra_fast.data.normalization import (
    DEFAULT_SCALE,
    OF_LATENTS,
    Normalization,
    check_scale,
    check_shift,
    in_words,
)
from sra_fast.data.vae import load_vae, vae_identity
from sra_fast.utils.checks import require_that
from sra_fast.utils.files import read_json, write_json
from sra_fast.utils.messages import warn
from sra_fast.utils.outputs import refuse_input, whole_folder


def check_numbers(config: dict, names: Sequence[str], folder: Path) -> None:
    """ValueError unless a transformer's ``config.json`` says these numbers."""
    for name in names:
        require_that(
            isinstance(config.get(name), int),
            f"expected a number {name} in {folder}/config.json, got {config.get(name)}",
        )


def pipeline_of(transformer: Path) -> Path | None:
    """The pipeline's folder that a transformer's folder lies in; None: it was copied by itself."""
    return transformer.parent if transformer.name == "transformer" else None


def check_one_number(facts: DataFacts, pipeline: str) -> None:
    """ValueError for latents with a scale or a shift of their own in every channel, which a
    pipeline would decode as something else.
    """
    for name, value in (("scale", facts.scale), ("shift", facts.shift)):
        require_that(
            not isinstance(value, list),
            f"{pipeline} knows one {name} of the latents, the model's have {in_words(value)}: "
            "expected another --format",
        )


def open_vae(loaded: LoadedModel, given: str | None, out: Path, use: str = ""):
    """The VAE of a pipeline that is written to ``out``. It carries the scale of the latents, which
    is lost without it.

    Args:
        loaded: the model.
        given: folder of the VAE; default: that of the one that made the training data.
        out: the pipeline's folder.
        use: what the pipeline does with the scale, for the message; it follows the number.

    Returns:
        An AutoencoderKL; None if none is given and no data are known, nor a scale.

    Raises:
        ValueError: the VAE is missing or does not fit, or ``out`` has one of before.
    """
    path = given
    facts = loaded.facts
    if path is None and facts is not None:
        path = facts.vae_path
        require_that(
            path is not None and Path(path).exists(),
            f"the VAE carries the scale of the latents, {in_words(facts.scale)}{use}: expected "
            "--vae, the VAE that made the data",
        )
    refuse_input("out", out / "vae", {"vae": path})
    require_that(
        path is not None or not (out / "vae").exists(),
        f"{out} has a VAE of before: expected --vae, or another folder",
    )
    return None if path is None else load_vae(path, loaded.model.in_channels)


def vae_facts(pipeline: Path, shape: tuple[int, int, int], shifts: bool) -> dict | None:
    """What a pipeline's folder says about latents: their scale and shift, where the VAE is, and its
    identity, by which another one is noticed. None: it has no VAE.

    Args:
        pipeline: folder.
        shape: (C, H, W) of a latent.
        shifts: whether the pipeline undoes the VAE's shift.

    Raises:
        ValueError: the VAE's configuration is damaged, or its scale or shift is no number.
    """
    file = pipeline / "vae/config.json"
    if not file.exists():
        return None
    held = read_json(file)
    told = held if isinstance(held, dict) else {}
    scale = told.get("scaling_factor", DEFAULT_SCALE)
    shift = (told.get("shift_factor") if shifts else None) or 0.0
    for name, value, check in (
        ("scaling_factor", scale, check_scale),
        ("shift_factor", shift, check_shift),
    ):
        # a pipeline knows one
        require_that(
            not isinstance(value, list), f"expected a number {name} in {file}, got {value}"
        )
        check(f"{name} in {file}", value, shape[0])
    folder = str(file.parent.absolute())
    try:
        identity = vae_identity(load_vae(folder, shape[0]))
    except ValueError as error:
        # without diffusers too
        warn("another VAE than that of %s will not be noticed: %s", pipeline, error)
        identity = None
    return {"scale": scale, "shift": shift, "vae": identity, "vae_path": folder}


def refuse_unlike(decoder, pipeline: str, shifts: bool) -> None:
    """ValueError for a VAE that a pipeline decodes otherwise than ``sample.py``, which follows all
    of its configuration where the model was trained on nobody knows which latents.

    Args:
        decoder: the VAE.
        pipeline: name of its class.
        shifts: whether it undoes a shift.
    """
    own = Normalization.of_vae(
        vae_identity(decoder), decoder.config.latent_channels, "the VAE's config.json"
    )
    statistics = all(getattr(decoder.config, name, None) for name in OF_LATENTS)
    knows = "one scale and one shift" if shifts else "one scale of the latents and no shift"
    require_that(
        not statistics and (shifts or own.shift == 0),
        f"{pipeline} knows {knows}, those of the VAE have a scale of {in_words(own.scale)} and a "
        f"shift of {in_words(own.shift)}: expected another --format",
    )


def make_transformer(cls: type, config: dict, weights: dict[str, Tensor]):
    """A transformer of diffusers, of this class and configuration, with these weights."""
    # its own initialisation would only cost time
    with torch.device("meta"):
        transformer = cls(**config)
    # clones: some of the weights are one tensor or parts of one (the embedders of a DiT's blocks,
    # queries, keys and values of SD3), and safetensors refuses shared memory
    clones = {name: value.clone() for name, value in weights.items()}
    transformer.load_state_dict(clones, strict=True, assign=True)
    return transformer


def write_parts(out: Path, pipeline: str, parts: dict, **more) -> None:
    """Write a pipeline's folder: its parts, and ``model_index.json`` with their classes.

    Args:
        out: the folder; made if it is not there.
        pipeline: name of its class.
        parts: name -> object of diffusers; None: the pipeline has to be given this one.
        more: what else the index says.

    Raises:
        OSError: a file cannot be written.
    """
    import diffusers

    classes = {
        name: [None, None] if part is None else ["diffusers", type(part).__name__]
        for name, part in parts.items()
    }
    index = {
        "_class_name": pipeline,
        "_diffusers_version": diffusers.__version__,
        **classes,
        **more,
    }
    with whole_folder(out) as folder:
        for name, part in parts.items():
            if part is not None:
                part.save_pretrained(folder / name)
        write_json(folder / "model_index.json", index)
