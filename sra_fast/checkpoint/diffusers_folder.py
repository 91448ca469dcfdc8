"""A DiT as a folder that ``DiTPipeline.from_pretrained`` of diffusers loads, and such folders, and
those of SD3 (``checkpoint/sd3_folder.py``), as exports.

``checkpoint/diffusers_weights.py`` says what differs between the two.
"""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from sra_fast import models
from sra_fast.checkpoint.diffusers_weights import (
    EMBEDDERS,
    NULL_ROW,
    STEPS_HERE,
    STEPS_THERE,
    fold_time,
    from_diffusers,
    to_diffusers,
    with_null_row,
    without_null_rows,
)
from sra_fast.checkpoint.export import state_of, write_export
from sra_fast.checkpoint.load_model import LoadedModel, fill
from sra_fast.checkpoint.names import CLASS_TABLE
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
from sra_fast.checkpoint.schedulers import DIT_CHAIN, check_dit_scheduler
from sra_fast.checkpoint.sd3_folder import SD3, import_transformer, write_sd3
from sra_fast.checkpoint.sources import read_tensors, transformer_folder
from sra_fast.checkpoint.values import checked, warn_of_foreign_heads
from sra_fast.config.schema import ModelConfig
from sra_fast.data.facts import DataFacts
from sra_fast.data.normalization import in_words
from sra_fast.models import DiT
from sra_fast.models.registry import PATCHES
from sra_fast.utils.checks import require_that
from sra_fast.utils.files import require
from sra_fast.utils.messages import warn
from sra_fast.utils.outputs import refuse_input

# what a DiT of diffusers computes exactly as ours; other values are refused
SETTINGS = {
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
}
# of the norms here; diffusers' default for one of a block's two is 1e-5
NORM_EPS = 1e-6
# what its configuration has to say
SIZES = (
    "num_layers",
    "num_attention_heads",
    "attention_head_dim",
    "in_channels",
    "sample_size",
    "patch_size",
)
# it stretches the places of its patches, for large images by default
OLD_CLASS = "Transformer2DModel"
CLASSES = ("DiTTransformer2DModel", OLD_CLASS)


def refuse_unless_diffusers(model: models.DiffusionTransformer) -> None:
    """ValueError for a model that ``DiTTransformer2DModel`` cannot be."""
    found = models.arguments_of(model)
    require_that(
        isinstance(model, DiT) and model.family == "DiT",
        f"diffusers has classes for DiT and MMDiT, the weights are of a {model.family}",
    )
    require_that(not found["qk_norm"], "the DiT of diffusers has no qk_norm, the model has")
    require_that(
        found["mlp_ratio"] == 4,
        f"the DiT of diffusers has an mlp_ratio of 4, the model has {found['mlp_ratio']:g}",
    )
    require_that(
        model.has_null,
        "the DiT of diffusers has a null class, the model has none (class_dropout_prob 0)",
    )
    require_that(
        model.num_classes <= NULL_ROW,
        f"DiTPipeline takes label {NULL_ROW} for the null class: expected at most {NULL_ROW} "
        f"classes, got {model.num_classes}",
    )


def write_pipeline(
    loaded: LoadedModel, out: Path, vae: str | None = None, fold: bool = False
) -> None:
    """Write a folder for ``DiTPipeline.from_pretrained``, or of an MMDiT one for
    ``StableDiffusion3Pipeline``.

    Args:
        loaded: a DiT or an MMDiT.
        out: the folder; made if it is not there.
        vae: folder of the AutoencoderKL that decodes the latents; default: the one that made the
            training data. Weights of which no data are known may do without: the pipeline then has
            to be given one, ``from_pretrained(folder, vae=...)``.
        fold: ``fold_time`` for diffusers' features. The weights are then not the same numbers.

    Raises:
        ValueError: the model is none of diffusers', it makes pixels, shifted latents or such of
            a scale per channel, the VAE is not known or does not fit, or diffusers is missing.
        OSError: a file cannot be written.
    """
    model = loaded.model
    if model.conditioning == "text":
        require_that(not fold, "fold_time is for a DiT: SD3's features of the time are ours")
        write_sd3(loaded, out, vae)
        return
    refuse_unless_diffusers(model)
    require("diffusers", "diffusers", "vae")
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    facts = loaded.facts
    if facts is not None:
        _refuse_unless_decoded(facts)
    decoder = open_vae(loaded, vae, out, ", which DiTPipeline divides by")
    if decoder is not None and facts is not None:
        decoder.register_to_config(scaling_factor=facts.scale)
    elif decoder is not None:
        refuse_unlike(decoder, DiTPipeline.__name__, shifts=False)
    found = models.arguments_of(model)
    config = dict(
        num_attention_heads=found["num_heads"],
        attention_head_dim=found["hidden_size"] // found["num_heads"],
        in_channels=found["in_channels"],
        out_channels=model.out_channels,
        num_layers=found["depth"],
        sample_size=found["input_size"],
        patch_size=found["patch_size"],
        num_embeds_ada_norm=NULL_ROW,
        norm_eps=NORM_EPS,
        **SETTINGS,
    )
    state = state_of(loaded)
    if fold:
        state = fold_time(state, STEPS_HERE, STEPS_THERE)
    weights = to_diffusers(state, model.depth)
    table = EMBEDDERS[CLASS_TABLE]
    for name, value in weights.items():
        if name.endswith(table):
            weights[name] = with_null_row(value)
    # of diffusers' spacings that whose samples are the nearest to those of our ddim
    scheduler = DDIMScheduler(**DIT_CHAIN, clip_sample=False, timestep_spacing="trailing")
    parts = {
        "scheduler": scheduler,
        "transformer": make_transformer(DiTTransformer2DModel, config, weights),
        "vae": decoder,
    }
    more = {}
    if facts is not None and facts.class_names:
        more["id2label"] = {str(i): name for i, name in enumerate(facts.class_names)}
    write_parts(out, DiTPipeline.__name__, parts, **more)


def _refuse_unless_decoded(facts: DataFacts) -> None:
    """ValueError if the model's data are nothing that a pipeline decodes."""
    require_that(
        not facts.pixels,
        "the model makes images, DiTPipeline decodes latents: expected another --format",
    )
    check_one_number(facts, "DiTPipeline")
    require_that(
        facts.shift == 0,
        f"DiTPipeline does not shift latents, the model's have a shift of {in_words(facts.shift)}",
    )


def import_pipeline(
    source: str, out: str, seed: int = 0, fold: bool = False, input_size: int | None = None
) -> None:
    """Convert a DiT or SD3 of diffusers to an export.

    Args:
        source: folder of a pipeline, or of its transformer.
        out: the ``.safetensors`` file to write.
        seed: of the projection head, which diffusers' DiT does not have.
        fold: ``fold_time``, for a DiT that was trained with diffusers' features. The releases were
            not.
        input_size: of an SD3: side of the latents, if it is not the folder's ``sample_size``.

    Raises:
        ValueError: it is no DiT or SD3 that can be one here.
    """
    folder = transformer_folder(Path(source))
    require_that(folder is not None, f"expected a folder of diffusers with a DiT, got {source}")
    assert folder is not None
    refuse_input("--out", Path(out), {"--from": folder})
    config = json.loads((folder / "config.json").read_text())
    if config["_class_name"] == SD3:
        require_that(not fold, "--fold-time is for a DiT: SD3's features of the time are ours")
        state = _read_transformer(folder)
        import_transformer(folder, config, checked(state, str(folder)), out, seed, input_size)
        return
    require_that(
        input_size is None,
        f"a DiT of diffusers says its size itself: expected no --input_size {input_size}",
    )
    _check_config(config, folder)
    pipeline = pipeline_of(folder)
    check_dit_scheduler(pipeline)
    state = _read_transformer(folder)
    warn_of_foreign_heads([state], str(folder))
    state = checked(state, str(folder))
    state = from_diffusers(state, config["num_layers"])
    state[CLASS_TABLE] = without_null_rows(state[CLASS_TABLE])
    if fold:
        state = fold_time(state, STEPS_THERE, STEPS_HERE)
    cfg = _model_config(config, state)
    torch.manual_seed(seed)
    model = cfg.build()
    fill(model, state)
    export_config = {"model": asdict(cfg), "diffusion": {"path": "linear"}}
    facts = None if pipeline is None else _facts(pipeline, cfg)
    write_export(Path(out), model.state_dict(), export_config, None, facts)


def _check_config(config: dict, folder: Path) -> None:
    require_that(
        config.get("_class_name") in CLASSES and config.get("norm_type") == "ada_norm_zero",
        f"expected a DiT (DiTTransformer2DModel) or an SD3 ({SD3}) in {folder}, got "
        f"{config.get('_class_name')}",
    )
    check_numbers(config, SIZES, folder)
    for name, value in SETTINGS.items():
        found = config.get(name, value)
        require_that(found == value, f"expected {name} {value} in {folder}, got {found}")
    stretched = config.get("interpolation_scale")
    if stretched is None and config["_class_name"] == OLD_CLASS:
        stretched = max(config["sample_size"] // 64, 1)
    require_that(
        stretched in (None, 1),
        f"expected the places of a DiT (interpolation_scale 1) in {folder}, got {stretched}",
    )
    eps = config.get("norm_eps", 1e-5)
    require_that(0 < eps <= 1e-5, f"expected norm_eps of at most 1e-5 in {folder}, got {eps}")
    if eps != NORM_EPS:
        warn("%s has norm_eps %g, a DiT here has %g", folder, eps, NORM_EPS)


def _read_transformer(folder: Path) -> dict[str, Tensor]:
    """The tensors of ``diffusion_pytorch_model``, in one file or in shards, of any precision."""
    name = "diffusion_pytorch_model"
    places = [f"{name}.safetensors", f"{name}.safetensors.index.json", f"{name}.bin"]
    found = [folder / place for place in places if (folder / place).exists()]
    require_that(bool(found), f"expected one of {', '.join(places)} in {folder}, found none")
    return read_tensors(found[0])


def _model_config(config: dict, state: dict[str, Tensor]) -> ModelConfig:
    patch = config["patch_size"]
    heads = config["num_attention_heads"]
    channels = config["in_channels"]
    require_that(
        config.get("out_channels") == 2 * channels,
        f"expected {2 * channels} output channels, noise and variance, "
        f"got {config.get('out_channels')}",
    )
    return ModelConfig(
        f"DiT-{_size(config, heads)}/{patch if patch in PATCHES else 2}",
        input_size=config["sample_size"],
        in_channels=channels,
        num_classes=len(state[CLASS_TABLE]) - 1,
        patch_size=patch,
        hidden_size=heads * config["attention_head_dim"],
        depth=config["num_layers"],
        num_heads=heads,
    )


def _size(config: dict, heads: int) -> str:
    """The paper's size, or S, whose numbers the configuration replaces."""
    sizes = (config["num_layers"], heads * config["attention_head_dim"], heads)
    return next((name for name, size in models.SIZES.items() if size == sizes), "S")


def _facts(pipeline: Path, cfg: ModelConfig) -> DataFacts | None:
    """What a pipeline's folder says about the data: the scale of its VAE, the names of classes."""
    assert (
        cfg.input_size is not None and cfg.in_channels is not None and cfg.num_classes is not None
    )
    shape = (cfg.in_channels, cfg.input_size, cfg.input_size)
    latents = vae_facts(pipeline, shape, shifts=False)
    if latents is None:
        return None
    try:
        labels = dict(json.loads((pipeline / "model_index.json").read_text())["id2label"])
    except (OSError, ValueError, LookupError, TypeError):
        labels = {}
    names = [labels.get(str(i)) for i in range(cfg.num_classes)]
    return DataFacts(
        name="latents",
        shape=shape,
        num_classes=cfg.num_classes,
        class_names=names if all(names) else None,
        **latents,
    )
