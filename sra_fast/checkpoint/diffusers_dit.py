"""DiT to and from diffusers: ``DiTTransformer2DModel`` and a folder for ``DiTPipeline``.

The weights are the same numbers under other names; queries, keys and values are three layers. Three
things differ:

- Every block of diffusers has an embedder of time and class of its own. Here there is one, so all of
  them must be equal.
- The frequencies of diffusers' time are 10000^(-i/127), those of DiT and of this engine
  10000^(-i/128). The predictions differ by that (docs/weights.md has the number), and no linear map
  between the two sets of features repairs it.
- ``DiTPipeline`` takes row 1000 of the class table for the null class. A table of fewer classes is
  filled up to there with copies of its null class.
"""

import json
import logging
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from sra_fast import models
from sra_fast.checkpoint.export import state_of, write_export
from sra_fast.checkpoint.load_model import CLASS_TABLE, LoadedModel, fill
from sra_fast.checkpoint.sources import read_tensors
from sra_fast.checkpoint.values import checked
from sra_fast.config.schema import ModelConfig
from sra_fast.data.facts import DataFacts
from sra_fast.data.vae import load_vae
from sra_fast.diffusion.gaussian_diffusion import NUM_TIMES
from sra_fast.models import DiT
from sra_fast.utils.checks import require_that
from sra_fast.utils.files import make_folder, require, write_json

log = logging.getLogger("sra_fast")

# the row of the class table that DiTPipeline takes for the null class
NULL_ROW = 1000
# name here -> name there, outside of the blocks
OUTSIDE = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
# in each block; the embedders of time and class are one for all blocks here
INSIDE = {
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "adaLN_modulation.1": "norm1.linear",
}
QKV = ("attn1.to_q", "attn1.to_k", "attn1.to_v")
EMBEDDERS = {
    "t_embedder.mlp.0.weight": "timestep_embedder.linear_1.weight",
    "t_embedder.mlp.0.bias": "timestep_embedder.linear_1.bias",
    "t_embedder.mlp.2.weight": "timestep_embedder.linear_2.weight",
    "t_embedder.mlp.2.bias": "timestep_embedder.linear_2.bias",
    CLASS_TABLE: "class_embedder.embedding_table.weight",
}
KINDS = ("weight", "bias")
# what a DiT of diffusers computes exactly as ours; other values are refused
SETTINGS = {
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
}
# of the norms here; diffusers' default for one of a block's two is 1e-5
NORM_EPS = 1e-6
CLASSES = ("DiTTransformer2DModel", "Transformer2DModel")


def to_diffusers(state: dict[str, Tensor], depth: int) -> dict[str, Tensor]:
    """Weights under the published names -> weights of ``DiTTransformer2DModel``, the same numbers.

    The class table keeps its rows; ``with_null_row`` fills it up.
    """
    found = {
        f"{there}.{kind}": state[f"{here}.{kind}"]
        for here, there in OUTSIDE.items()
        for kind in KINDS
    }
    for block in range(depth):
        ours = f"blocks.{block}"
        theirs = f"transformer_blocks.{block}"
        for here, there in INSIDE.items():
            for kind in KINDS:
                found[f"{theirs}.{there}.{kind}"] = state[f"{ours}.{here}.{kind}"]
        for kind in KINDS:
            parts = state[f"{ours}.attn.qkv.{kind}"].chunk(3)
            for name, part in zip(QKV, parts, strict=True):
                found[f"{theirs}.{name}.{kind}"] = part
        for here, there in EMBEDDERS.items():
            found[f"{theirs}.norm1.emb.{there}"] = state[here]
    return found


def from_diffusers(state: dict[str, Tensor], depth: int) -> dict[str, Tensor]:
    """The inverse of ``to_diffusers``.

    Raises:
        ValueError: a weight is missing or unknown, or the blocks have different embedders.
    """
    rest = dict(state)

    def take(name: str) -> Tensor:
        require_that(name in rest, f"the weights are no DiT of diffusers: they have no {name}")
        return rest.pop(name)

    found = {
        f"{here}.{kind}": take(f"{there}.{kind}")
        for here, there in OUTSIDE.items()
        for kind in KINDS
    }
    for block in range(depth):
        ours = f"blocks.{block}"
        theirs = f"transformer_blocks.{block}"
        for here, there in INSIDE.items():
            for kind in KINDS:
                found[f"{ours}.{here}.{kind}"] = take(f"{theirs}.{there}.{kind}")
        for kind in KINDS:
            found[f"{ours}.attn.qkv.{kind}"] = torch.cat(
                [take(f"{theirs}.{name}.{kind}") for name in QKV]
            )
        for here, there in EMBEDDERS.items():
            name = f"{theirs}.norm1.emb.{there}"
            value = take(name)
            first = found.setdefault(here, value)
            require_that(
                torch.equal(first, value),
                f"{name} differs from that of block 0: a DiT here has one embedder for all blocks",
            )
    # a fixed function, which old versions of diffusers stored
    rest.pop("pos_embed.pos_embed", None)
    require_that(
        not rest, f"the weights are no DiT of diffusers: expected no {next(iter(rest), None)}"
    )
    return found


def with_null_row(table: Tensor) -> Tensor:
    """A class table ``[K + 1, D]`` -> ``[1001, D]``, its null class at row 1000 and before it."""
    missing = NULL_ROW + 1 - len(table)
    return torch.cat([table, table[-1:].expand(missing, -1)])


def without_null_rows(table: Tensor) -> Tensor:
    """The inverse of ``with_null_row``: copies of the null class at the end become one."""
    copies = (table == table[-1]).all(dim=1).flip(0)
    # the first row that is no copy, from the end; a table of copies keeps one class
    count = int((~copies).int().argmax()) if not copies.all() else len(table) - 1
    return table[: len(table) - count + 1]


def refuse_unless_diffusers(model: models.SiT) -> None:
    """ValueError for a model that ``DiTTransformer2DModel`` cannot be."""
    found = models.arguments_of(model)
    require_that(
        isinstance(model, DiT) and model.family == "DiT",
        f"diffusers has a class for DiT only, the weights are of a {model.family}",
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


def write_pipeline(loaded: LoadedModel, out: Path, vae: str | None = None) -> None:
    """Write a folder for ``DiTPipeline.from_pretrained``.

    Args:
        loaded: a DiT.
        out: the folder; made if it is not there.
        vae: folder of the AutoencoderKL that decodes the latents. Without it the pipeline has to be
            given one: ``from_pretrained(folder, vae=...)``.

    Raises:
        ValueError: the model is none of diffusers', the VAE does not fit, or diffusers is missing.
        OSError: a file cannot be written.
    """
    model = loaded.model
    refuse_unless_diffusers(model)
    require("diffusers", "diffusers", "vae")
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    decoder = None if vae is None else _fitting_vae(vae, loaded)
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
    weights = to_diffusers(state_of(loaded), model.depth)
    table = EMBEDDERS[CLASS_TABLE]
    for name, value in weights.items():
        if name.endswith(table):
            weights[name] = with_null_row(value)
    # its own initialisation would only cost time
    with torch.device("meta"):
        transformer = DiTTransformer2DModel(**config)
    # clones: the embedders of the blocks are one tensor, and safetensors refuses shared memory
    clones = {name: value.clone() for name, value in weights.items()}
    transformer.load_state_dict(clones, strict=True, assign=True)
    scheduler = DDIMScheduler(
        num_train_timesteps=NUM_TIMES,
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        clip_sample=False,
        prediction_type="epsilon",
    )
    make_folder(out)
    transformer.save_pretrained(out / "transformer")
    scheduler.save_pretrained(out / "scheduler")
    if decoder is not None:
        decoder.save_pretrained(out / "vae")
    _write_index(loaded, out, DiTPipeline.__name__, decoder is not None)


def _write_index(loaded: LoadedModel, out: Path, pipeline: str, has_vae: bool) -> None:
    """``model_index.json``: the classes of the pipeline's parts, and the names of the labels."""
    import diffusers

    index = {
        "_class_name": pipeline,
        "_diffusers_version": diffusers.__version__,
        "scheduler": ["diffusers", "DDIMScheduler"],
        "transformer": ["diffusers", "DiTTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"] if has_vae else [None, None],
    }
    facts = loaded.facts
    if facts is not None and facts.class_names:
        index["id2label"] = {str(i): name for i, name in enumerate(facts.class_names)}
    write_json(out / "model_index.json", index)


def _fitting_vae(path: str, loaded: LoadedModel):
    """The VAE, with the scale that the model's latents have."""
    facts = loaded.facts
    require_that(
        facts is None or not facts.pixels,
        f"the model makes images, and --vae {path} decodes latents",
    )
    decoder = load_vae(path, loaded.model.in_channels)
    if facts is None:
        return decoder
    require_that(
        facts.shift == 0,
        f"DiTPipeline does not shift latents, the model's have a shift of {facts.shift}",
    )
    # the pipeline divides by it
    decoder.register_to_config(scaling_factor=facts.scale)
    return decoder


def is_pipeline(path: str) -> bool:
    """Whether a path is a pipeline's folder of diffusers, or its transformer's."""
    return transformer_folder(Path(path)) is not None


def transformer_folder(folder: Path) -> Path | None:
    """The folder of the transformer in a pipeline's folder, or that folder itself; None: neither."""
    for place in (folder / "transformer", folder):
        try:
            held = json.loads((place / "config.json").read_text())
        except (OSError, ValueError):
            continue
        if "_class_name" in held:
            return place
    return None


def import_pipeline(source: str, out: str, seed: int = 0) -> None:
    """Convert a DiT of diffusers to an export.

    Args:
        source: folder of a pipeline, or of its transformer.
        out: the ``.safetensors`` file to write.
        seed: of the projection head, which diffusers' DiT does not have.

    Raises:
        ValueError: it is no DiT that can be one here.
    """
    folder = transformer_folder(Path(source))
    require_that(folder is not None, f"expected a folder of diffusers with a DiT, got {source}")
    assert folder is not None
    config = json.loads((folder / "config.json").read_text())
    _check_config(config, folder)
    state = checked(_read_transformer(folder), str(folder))
    state = from_diffusers(state, config["num_layers"])
    state[CLASS_TABLE] = without_null_rows(state[CLASS_TABLE])
    cfg = _model_config(config, state)
    torch.manual_seed(seed)
    model = cfg.build()
    fill(model, state)
    export_config = {"model": asdict(cfg), "diffusion": {"path": "linear"}}
    facts = _facts(folder.parent, cfg) if folder.name == "transformer" else None
    write_export(Path(out), model.state_dict(), export_config, None, facts)


def _check_config(config: dict, folder: Path) -> None:
    require_that(
        config.get("_class_name") in CLASSES and config.get("norm_type") == "ada_norm_zero",
        f"expected a DiT (DiTTransformer2DModel) in {folder}, got {config.get('_class_name')}",
    )
    for name, value in SETTINGS.items():
        found = config.get(name, value)
        require_that(found == value, f"expected {name} {value} in {folder}, got {found}")
    eps = config.get("norm_eps", 1e-5)
    require_that(0 < eps <= 1e-5, f"expected norm_eps of at most 1e-5 in {folder}, got {eps}")
    if eps != NORM_EPS:
        log.warning("%s has norm_eps %g, a DiT here has %g", folder, eps, NORM_EPS)


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
        f"DiT-{_size(config, heads)}/{patch if patch in models.registry.PATCHES else 2}",
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
    try:
        scale = json.loads((pipeline / "vae/config.json").read_text())["scaling_factor"]
        labels = json.loads((pipeline / "model_index.json").read_text()).get("id2label", {})
    except (OSError, ValueError, LookupError):
        return None
    assert (
        cfg.input_size is not None and cfg.in_channels is not None and cfg.num_classes is not None
    )
    names = [labels.get(str(i)) for i in range(cfg.num_classes)]
    return DataFacts(
        name="latents",
        shape=(cfg.in_channels, cfg.input_size, cfg.input_size),
        num_classes=cfg.num_classes,
        class_names=names if all(names) else None,
        scale=scale,
        vae_path=str(pipeline / "vae"),
    )
