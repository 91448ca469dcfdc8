"""An MMDiT as a folder of diffusers' ``StableDiffusion3Pipeline``, and such folders as exports.

``checkpoint/sd3_weights.py`` says what differs between the names. The text encoders are no part of
the folder: the pipeline is given them, or the features of prompts.
"""

from pathlib import Path

from torch import Tensor

from sra_fast import models
from sra_fast.checkpoint.export import state_of
from sra_fast.checkpoint.load_model import LoadedModel
from sra_fast.checkpoint.pipeline_parts import (
    check_numbers,
    check_one_number,
    make_transformer,
    open_vae,
    pipeline_of,
    refuse_unlike,
    vae_facts,
    write_parts,
)
from sra_fast.checkpoint.schedulers import time_shift_of
from sra_fast.checkpoint.sd3_file import TIME_SCALE, export_state
from sra_fast.checkpoint.sd3_weights import TABLE, from_diffusers, to_diffusers
from sra_fast.config.schema import DiffusionConfig
from sra_fast.data.facts import DataFacts
from sra_fast.data.text_encoders import T5_TOKENS
from sra_fast.models import MMDiT
from sra_fast.utils.checks import require_that
from sra_fast.utils.files import require
from sra_fast.utils.messages import warn

SD3 = "SD3Transformer2DModel"
# numbers that its configuration has to say
SIZES = (
    "sample_size",
    "patch_size",
    "in_channels",
    "out_channels",
    "num_layers",
    "attention_head_dim",
    "num_attention_heads",
    "joint_attention_dim",
    "caption_projection_dim",
    "pooled_projection_dim",
)
# text encoders that the pipeline joins
CLIP = "CLIPTextModelWithProjection"
T5 = "T5EncoderModel"
# parts of the pipeline that a folder of ours does not have
ABSENT = (
    *(f"{part}{number}" for part in ("text_encoder", "tokenizer") for number in ("", "_2", "_3")),
    "image_encoder",
    "feature_extractor",
)


def import_transformer(
    folder: Path,
    config: dict,
    state: dict[str, Tensor],
    out: str,
    seed: int = 0,
    input_size: int | None = None,
) -> None:
    """Convert an SD3 of diffusers to an export.

    Args:
        folder: of the transformer.
        config: its ``config.json``.
        state: its weights, checked.
        out: the ``.safetensors`` file to write.
        seed: of the projection head, which SD3 does not have.
        input_size: side of the latents; default: ``sample_size``.

    Raises:
        ValueError: it is no MMDiT that can be one here.
    """
    _check_config(config, folder)
    state = from_diffusers(state, config["num_layers"])
    require_that(
        "pos_embed" in state, f"expected the weights in {folder} with {TABLE[1]}, they have none"
    )
    side = config["sample_size"] if input_size is None else input_size
    heads = config["num_attention_heads"]
    _, arguments = models.arguments_from_state_dict(state, heads, input_size=side)
    told = {
        "patch_size": config["patch_size"],
        "in_channels": config["in_channels"],
        "hidden_size": heads * config["attention_head_dim"],
        "context_size": config["joint_attention_dim"],
        "pooled_size": config["pooled_projection_dim"],
        "qk_norm": config.get("qk_norm") is not None,
    }
    for name, value in told.items():
        require_that(
            arguments[name] == value,
            f"the weights in {folder} are not those of its config.json: {name} should be {value}, "
            f"it is {arguments[name]}",
        )
    pipeline = pipeline_of(folder)
    facts = None if pipeline is None else _facts(pipeline, arguments)
    tokens = (arguments["input_size"] // arguments["patch_size"]) ** 2
    diffusion = DiffusionConfig(time_shift=time_shift_of(pipeline, tokens))
    export_state(state, {**arguments, "time_scale": TIME_SCALE}, out, seed, diffusion, facts)


def _check_config(config: dict, folder: Path) -> None:
    """ValueError unless a configuration is that of an MMDiT here."""
    check_numbers(config, SIZES, folder)
    dual = config.get("dual_attention_layers") or ()
    require_that(
        not dual,
        "blocks with a second attention, as SD3.5-medium has, are not known here: expected no "
        f"dual_attention_layers in {folder}, got {[*dual]}",
    )
    norm = config.get("qk_norm")
    require_that(
        norm in (None, "rms_norm"), f"expected qk_norm rms_norm or none in {folder}, got {norm}"
    )
    width = config["num_attention_heads"] * config["attention_head_dim"]
    same = {"out_channels": config["in_channels"], "caption_projection_dim": width}
    for name, value in same.items():
        require_that(
            config[name] == value, f"expected {name} {value} in {folder}, got {config[name]}"
        )


def _facts(pipeline: Path, arguments: dict) -> DataFacts | None:
    """What a pipeline's folder says about the data: scale and shift of its VAE."""
    side = arguments["input_size"]
    shape = (arguments["in_channels"], side, side)
    latents = vae_facts(pipeline, shape, shifts=True)
    # captions are no classes
    return None if latents is None else DataFacts("latents", shape, num_classes=1, **latents)


def refuse_unless_sd3(loaded: LoadedModel) -> None:
    """ValueError for a model that ``SD3Transformer2DModel`` cannot be."""
    model, facts = loaded.model, loaded.facts
    require_that(type(model) is MMDiT, f"diffusers has no class for an {model.family} of captions")
    assert isinstance(model, MMDiT)
    require_that(
        model.pooled_size > 0,
        f"{SD3} takes a pooled feature of the captions, the model takes none (model.pooled_size)",
    )
    require_that(
        model.time_scale == TIME_SCALE,
        f"{SD3} has times up to {TIME_SCALE:g}, the model multiplies them by "
        f"{model.time_scale:g} (model.time_scale)",
    )
    require_that(
        model.mlp_ratio == 4, f"{SD3} has an mlp_ratio of 4, the model has {model.mlp_ratio:g}"
    )
    require_that(
        loaded.path == "linear",
        f"StableDiffusion3Pipeline has the interpolant linear, the model {loaded.path}",
    )
    if facts is None:
        return
    require_that(
        not facts.pixels,
        "the model makes images, StableDiffusion3Pipeline decodes latents: expected another "
        "--format",
    )
    check_one_number(facts, "StableDiffusion3Pipeline")
    require_that(
        not (facts.text or {}).get("masked"),
        f"{SD3} attends to all tokens of a caption, the model's captions have masks: expected "
        "another --format",
    )


def write_sd3(loaded: LoadedModel, out: Path, vae: str | None = None) -> None:
    """Write a folder for ``StableDiffusion3Pipeline.from_pretrained``.

    Args:
        loaded: an MMDiT with SD3's times and a pooled feature.
        out: the folder; made if it is not there.
        vae: folder of the AutoencoderKL that decodes the latents; default: the one that made the
            training data. Weights of which no data are known may do without.

    Raises:
        ValueError: the model is none of diffusers', the VAE is not known or does not fit, or
            diffusers is missing.
        OSError: a file cannot be written.
    """
    refuse_unless_sd3(loaded)
    require("diffusers", "diffusers", "vae")
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel

    decoder = open_vae(loaded, vae, out)
    if decoder is not None:
        _tell_scale(decoder, loaded.facts)
    found = models.arguments_of(loaded.model)
    width = found["hidden_size"]
    side = found["input_size"] // found["patch_size"]
    config = dict(
        sample_size=found["input_size"],
        patch_size=found["patch_size"],
        in_channels=found["in_channels"],
        out_channels=found["in_channels"],
        num_layers=found["depth"],
        attention_head_dim=width // found["num_heads"],
        num_attention_heads=found["num_heads"],
        joint_attention_dim=found["context_size"],
        caption_projection_dim=width,
        pooled_projection_dim=found["pooled_size"],
        # the table is the model's own, nothing is cut from it
        pos_embed_max_size=side,
        qk_norm="rms_norm" if found["qk_norm"] else None,
    )
    weights = to_diffusers(state_of(loaded), found["depth"])
    weights[TABLE[1]] = loaded.model.pos_embed
    parts = {
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=loaded.diffusion.time_shift),
        "transformer": make_transformer(SD3Transformer2DModel, config, weights),
        "vae": decoder,
        **dict.fromkeys(ABSENT),
    }
    write_parts(out, "StableDiffusion3Pipeline", parts)
    advice = _advice_on_prompts(loaded.facts)
    if advice:
        warn("%s: %s", out, advice)


def _advice_on_prompts(facts: DataFacts | None) -> str | None:
    """How the pipeline makes of prompts what the model was trained on; None: as it does by itself,
    or nobody knows.
    """
    text = (facts.text if facts else None) or {}
    encoders = text.get("encoders")
    if not encoders:
        return None
    kinds = [encoder.get("class") for encoder in encoders]
    if kinds[:2] != [CLIP] * 2 or kinds[2:] not in ([], [T5]):
        return (
            f"the pipeline makes other features of prompts than {' and '.join(map(str, kinds))}: "
            "give it prompt_embeds and pooled_prompt_embeds"
        )
    # without T5 the pipeline adds as many zeros, to which the model would attend
    length = encoders[2].get("tokens") if kinds[2:] else 0
    if length == T5_TOKENS:
        return None
    return f"give the pipeline max_sequence_length={length}, as in the model's training"


def _tell_scale(decoder, facts: DataFacts | None) -> None:
    """Give the VAE the scale and the shift of the model's latents."""
    if facts is not None:
        # the pipeline decodes latent / scale + shift
        decoder.register_to_config(scaling_factor=facts.scale, shift_factor=facts.shift)
        return
    refuse_unlike(decoder, "StableDiffusion3Pipeline", shifts=True)
    if decoder.config.shift_factor is None:
        # the pipeline adds it
        decoder.register_to_config(shift_factor=0.0)
