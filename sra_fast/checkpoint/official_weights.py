"""Weights of the official DiT and SiT releases (facebookresearch/DiT, willisma/SiT) as weights of our models.

Parameter names, patches, position embedding and DiT's process are the same. Three things differ:

- Neither release has SRA's projection head. It is initialised anew.
- SiT's time runs backwards, u = 1 - t (u = 0 is noise), and its velocity is dx/du = -dx/dt.
- SiT carries 2C output channels and uses the first C.
"""

from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from sra_fast import models
from sra_fast.checkpoint.export import write_export
from sra_fast.checkpoint.load_model import fill
from sra_fast.checkpoint.names import CLASS_TABLE, in_short
from sra_fast.checkpoint.sd3_file import import_state
from sra_fast.checkpoint.sources import files_of, find_weights, read_weights
from sra_fast.checkpoint.values import IMAGENET_ROWS, checked, family_in, official_family
from sra_fast.config.schema import ModelConfig
from sra_fast.models import DiffusionTransformer, has_joint_blocks
from sra_fast.models.layers import timestep_frequencies
from sra_fast.utils.checks import require_that
from sra_fast.utils.messages import warn
from sra_fast.utils.outputs import refuse_input

# --path-type of the official SiT -> our name
PATHS = {"Linear": "linear", "GVP": "cosine"}


def reverse_time(weight: Tensor) -> Tensor:
    """The first weight of the time's MLP for u -> the weight that gives the same for t = 1 - u.

    For a frequency w,

        cos((1-t)w) = cos(w) cos(tw) + sin(w) sin(tw)
        sin((1-t)w) = sin(w) cos(tw) - cos(w) sin(tw).

    That is a reflection of each pair of features, so the weight absorbs it exactly.

    Args:
        weight: ``[D, 2F]``, the columns of the cosines first.
    """
    # in float64, rounded once at the end
    of_cos, of_sin = weight.double().chunk(2, dim=1)
    w = timestep_frequencies(of_cos.shape[1]).double()
    reflected_cos = of_cos * w.cos() + of_sin * w.sin()
    reflected_sin = of_cos * w.sin() - of_sin * w.cos()
    return torch.cat([reflected_cos, reflected_sin], dim=1).to(weight.dtype)


def first_channels(parameter: Tensor, patch_size: int, channels: int) -> Tensor:
    """Rows of the last layer ``[p p C_out, ...]``, channels fastest, that make the first ``channels`` channels."""
    rows = parameter.unflatten(0, (patch_size**2, -1))
    return rows[:, :channels].flatten(0, 1)


def model_config(
    state: dict[str, Tensor],
    name: str,
    num_heads: int | None = None,
    input_size: int | None = None,
    num_classes: int | None = None,
) -> ModelConfig:
    """The configuration of the model ``name``, with everything that the shapes of ``state`` show.

    Args:
        state: official state dict.
        name: {SiT,DiT}-{S,B,L,XL}/{2,4,8}.
        num_heads: for weights whose size is not one of the paper's; ``name`` then only gives the
            family.
        input_size: for weights without a position embedding.
        num_classes: default: all rows of the class embedding but that of the null class.

    Raises:
        ValueError: the weights are not those of such a model.
    """
    family, preset = models.preset(name)
    # shapes show everything but the number of heads
    _, found = models.arguments_from_state_dict(
        state, num_heads or preset["num_heads"], num_classes, family.family, input_size
    )
    if num_heads is None:
        for key, value in preset.items():
            if found[key] != value:
                raise ValueError(
                    f"the weights are no {name}: {key} should be {value}, it is {found[key]}"
                )
    kept = ("input_size", "in_channels", "num_classes", "class_dropout_prob", "qk_norm", *preset)
    return ModelConfig(name, **{key: found[key] for key in kept})


def convert(state: dict[str, Tensor], cfg: ModelConfig, seed: int = 0) -> DiffusionTransformer:
    """A model of ``cfg`` with the official weights, in eval mode, fp32, on the CPU.

    Args:
        state: official state dict; it is not changed.
        cfg: see ``model_config``.
        seed: of the projection head.

    Raises:
        ValueError: the weights have another layout.
    """
    if any(name.startswith("ap_head.") for name in state):
        raise ValueError(
            "the weights have a projection head (ap_head), no release has: train.init_from takes them as they are"
        )
    # a run computes its position embedding itself: another one is refused
    state = checked(state, "the weights")
    if cfg.family == "SiT":
        _convert_sit(state, cfg.arguments()["patch_size"], cfg.in_channels)
    torch.manual_seed(seed)
    model = cfg.build().eval()
    # the head keeps its fresh weights
    fill(model, state)
    return model


def _convert_sit(state: dict[str, Tensor], patch_size: int, channels: int) -> None:
    """Reverse the time and the velocity, and drop the unused channels, in place."""
    for name in ("t_embedder.mlp.0.weight", "final_layer.linear.bias"):
        if name not in state:
            raise ValueError(f"the weights do not fit the model: they have no {name}")
    state["t_embedder.mlp.0.weight"] = reverse_time(state["t_embedder.mlp.0.weight"])
    # a SiT that was trained without the unused half has half the rows
    rows = patch_size**2 * channels
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        if len(state[name]) not in (rows, 2 * rows):
            raise ValueError(
                f"{name} should have {rows} or {2 * rows} rows, it has {len(state[name])}"
            )
        # negative: the velocity is dx/du = -dx/dt
        state[name] = -first_channels(state[name], patch_size, channels)


def interpolant_name(args) -> str:
    """Our name of the interpolant that an official SiT checkpoint was trained with.

    Args:
        args: the checkpoint's ``args``; None for a release, which has none.

    Raises:
        ValueError: an interpolant or a prediction that our models do not have.
    """
    path = getattr(args, "path_type", "Linear")
    prediction = getattr(args, "prediction", "velocity")
    if path not in PATHS or prediction != "velocity":
        raise ValueError(
            f"expected --path-type {' or '.join(PATHS)} and --prediction velocity, "
            f"the weights have {path} and {prediction}"
        )
    return PATHS[path]


def _check_family(state: dict[str, Tensor], args, name: str, source: str) -> None:
    """ValueError unless weights and arguments are those of the family of the model ``name``.

    Shapes do not tell the two families apart, and one converted as the other makes noise.
    """
    family = models.preset(name)[0].family
    told = family_in(args)
    require_that(
        told in (None, family),
        f"expected --model {told}-..., of which {source} was made, got --model {name}",
    )
    seen = official_family(state, args)
    require_that(
        seen in (None, family),
        f"expected --model {seen}-..., {source} looks like an official {seen}, got --model {name}",
    )


def _classes_in(state: dict[str, Tensor], args, source: str) -> int | None:
    """The number of classes that the arguments of a checkpoint tell: whether the last row of its
    class embedding is the null class. None: they tell none that the embedding can have.
    """
    told = getattr(args, "num_classes", None)
    rows = len(state.get(CLASS_TABLE, ()))
    if told in (rows, rows - 1):
        return told
    if told is not None:
        warn(
            "%s was made with num_classes %s, and its class embedding has %d rows: it is taken for "
            "%d classes and the null class",
            *(source, told, rows, rows - 1),
        )
    elif rows not in (0, IMAGENET_ROWS):
        warn(
            "%s does not say how many classes it has: it is taken for %d and the null class",
            *(source, rows - 1),
        )
    return None


def import_file(
    source: str,
    name: str | None,
    out: str,
    num_heads: int | None = None,
    seed: int = 0,
    input_size: int | None = None,
    time_scale: float | None = None,
) -> None:
    """Convert an official file to an export.

    Args:
        source: a release's state dict, or a training checkpoint, of which the EMA is taken.
        name, num_heads, input_size: see ``model_config``; an MMDiT needs no name.
        out: the ``.safetensors`` file to write.
        seed: of the projection head.
        time_scale: of an MMDiT, see ``import_state``.

    Raises:
        ValueError: the file cannot be read, or holds other weights, of the other family for
            example.
    """
    for file in files_of(find_weights(source)):
        refuse_input("--out", Path(out), {"--from": file})
    held = read_weights(source)
    is_text = has_joint_blocks(held.get("ema", held.get("model")))
    require_that(
        name is not None or is_text,
        "--model must say what the weights are, {SiT,DiT}-{S,B,L,XL}/{2,4,8}, got none",
    )
    # its time already runs as ours: converted again it would run backwards
    require_that("config" not in held, f"{source} is an export of sra-fast: it needs no conversion")
    # a training checkpoint holds the student and its EMA; samples come from the EMA
    state = held.get("ema", held.get("model"))
    if is_text:
        sizes = (num_heads, seed, input_size, time_scale)
        import_state(state, held.get("args"), source, name, out, *sizes)
        return
    assert name is not None, "checked"
    require_that(
        time_scale is None,
        f"--time-scale is for an MMDiT, {source} holds a network of labels; got {time_scale}",
    )
    _check_family(state, held.get("args"), name, source)
    heads = held.get("foreign_heads")
    require_that(
        not heads,
        f"{source} has heads of REPA ({in_short(heads or [])}), whose time runs as it does here: "
        "it needs no conversion",
    )
    num_classes = _classes_in(state, held.get("args"), source)
    cfg = model_config(state, name, num_heads, input_size, num_classes)
    if cfg.family == "SiT" and official_family(state, held.get("args")) is None:
        warn(
            "%s is taken for weights of the official SiT, whose time runs backwards, and is turned "
            "round; those of REPA and SRA are read as they are",
            source,
        )
    config = {"model": asdict(cfg), "diffusion": {"path": interpolant_name(held.get("args"))}}
    write_export(Path(out), convert(state, cfg, seed).state_dict(), config, step=None)
