"""What the folders of diffusers' pipelines have in common, whichever model they hold."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from sra_fast.checkpoint.load_model import LoadedModel
from sra_fast.data.facts import DataFacts
from sra_fast.data.normalization import Normalization, in_words
from sra_fast.data.vae import load_vae, vae_identity
from sra_fast.utils.checks import require_that
from sra_fast.utils.files import write_json
from sra_fast.utils.messages import warn
from sra_fast.utils.outputs import refuse_input, whole_folder


def check_numbers(config: dict, names: Sequence[str], folder: Path) -> None:
    """ValueError unless a transformer's ``config.json`` says these numbers."""
    for name in names:
        require_that(
            isinstance(config.get(name), int),
            f"expected a number {name} in {folder}/config.json, got {config.get(name)}",
        )


def check_one_number(facts: DataFacts, pipeline: str) -> None:
    """ValueError for latents with a scale or a shift of their own in every channel, which a pipeline
    would decode as something else.
    """
    for name, value in (("scale", facts.scale), ("shift", facts.shift)):
        require_that(
            not isinstance(value, list),
            f"{pipeline} knows one {name} of the latents, the model's have {in_words(value)}: expected "
            "another --format",
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
            f"the VAE carries the scale of the latents, {in_words(facts.scale)}{use}: expected --vae, the "
            "VAE that made the data",
        )
    refuse_input("out", out / "vae", {"vae": path})
    require_that(
        path is not None or not (out / "vae").exists(),
        f"{out} has a VAE of before: expected --vae, or another folder",
    )
    return None if path is None else load_vae(path, loaded.model.in_channels)


def vae_facts(pipeline: Path) -> dict:
    """What is kept of the VAE in a pipeline's folder: where it is, and its identity, by which another
    one is noticed. Without diffusers, or if it cannot be read, the identity is not known.
    """
    folder = str((pipeline / "vae").absolute())
    try:
        identity = vae_identity(load_vae(folder))
    except ValueError as error:
        warn("another VAE than that of %s will not be noticed: %s", pipeline, error)
        identity = None
    return {"vae": identity, "vae_path": folder}


def refuse_shift_of_vae(decoder, pipeline: str) -> None:
    """ValueError for a VAE whose latents are shifted, which a pipeline would not undo. The model
    was trained on latents of nobody knows which shift: ``sample.py`` takes the VAE's.
    """
    own = Normalization.of_vae(vae_identity(decoder))
    require_that(
        own.shift == 0 and not isinstance(own.scale, list),
        f"{pipeline} knows one scale of the latents and no shift, those of the VAE have a scale of "
        f"{in_words(own.scale)} and a shift of {in_words(own.shift)}: expected another --format",
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
