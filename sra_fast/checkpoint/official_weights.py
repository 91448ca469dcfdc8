"""Weights of the official DiT and SiT releases (facebookresearch/DiT, willisma/SiT) as weights of our models.

Parameter names, patches, position embedding and DiT's process are the same.  What differs:

- neither has SRA's projection head: it is initialised anew;
- SiT's time runs backwards, u = 1 - t (u = 0 is noise), and its velocity is dx/du = -dx/dt;
- SiT carries 2C output channels, of which it uses the first C.
"""

import torch
from torch import Tensor

from sra_fast import models
from sra_fast.config.schema import ModelConfig
from sra_fast.models import SiT
from sra_fast.models.layers import timestep_frequencies

PATHS = {"Linear": "linear", "GVP": "cosine"}  # --path-type of the official SiT


def reverse_time(weight: Tensor) -> Tensor:
    """The first weight of the time's MLP ``[D, 2F]`` for u -> the one that gives the same for t = 1 - u.

    With w a frequency, cos((1-t)w) = cos(w) cos(tw) + sin(w) sin(tw) and sin((1-t)w) = sin(w) cos(tw) - cos(w) sin(tw):
    a reflection of each pair of features, absorbed exactly.
    """
    of_cos, of_sin = weight.double().chunk(2, dim=1)
    w = timestep_frequencies(of_cos.shape[1]).double()
    return torch.cat(
        [of_cos * w.cos() + of_sin * w.sin(), of_cos * w.sin() - of_sin * w.cos()], dim=1
    ).to(weight.dtype)


def first_channels(parameter: Tensor, patch_size: int, channels: int) -> Tensor:
    """Rows of the last layer ``[p p C_out, ...]``, channels fastest, that make the first ``channels`` channels."""
    rows = parameter.unflatten(0, (patch_size**2, -1))
    return rows[:, :channels].flatten(0, 1)


def model_config(state: dict[str, Tensor], name: str, num_heads: int | None = None) -> ModelConfig:
    """The configuration of the model ``name`` with everything that the shapes of ``state`` say.

    Args:
        num_heads: for weights that are no size of the paper's; ``name`` then only says the family.

    Raises:
        ValueError: a model that the weights are not.
    """
    family, preset = models.preset(name)
    _, found = models.arguments_from_state_dict(
        state, num_heads or preset["num_heads"], family=family.family
    )
    for key, value in preset.items():
        if num_heads is None and found[key] != value:
            raise ValueError(
                f"the weights are no {name}: {key} should be {value}, it is {found[key]}"
            )
    kept = ("input_size", "in_channels", "num_classes", "class_dropout_prob", "qk_norm", *preset)
    return ModelConfig(name, **{key: found[key] for key in kept})


def convert(state: dict[str, Tensor], cfg: ModelConfig, seed: int = 0) -> SiT:
    """A model of ``cfg`` with the official weights, in fp32 on the CPU.

    Args:
        state: official state dict.
        cfg: see ``model_config``.
        seed: of the projection head.

    Raises:
        ValueError: weights of another layout.
    """
    if any(name.startswith("ap_head.") for name in state):
        raise ValueError(
            "the weights have a projection head (ap_head), no release has: train.init_from takes them as they are"
        )
    state = {name: value.float() for name, value in state.items()}
    if cfg.family == "SiT":
        _convert_sit(state, cfg.arguments()["patch_size"], cfg.in_channels)
    torch.manual_seed(seed)
    model = cfg.build().eval()
    # a run makes its own, so that another one would be lost without a word
    if not torch.allclose(state["pos_embed"], model.pos_embed, atol=1e-5):
        raise ValueError(
            "the position embedding of the weights is not the fixed 2-d sine-cosine one"
        )
    head = {
        name: value for name, value in model.state_dict().items() if name.startswith("ap_head.")
    }
    try:
        model.load_state_dict({**state, **head}, strict=True)
    except RuntimeError as error:
        raise ValueError(f"the weights do not fit the model: {error}") from None
    return model


def _convert_sit(state: dict[str, Tensor], patch_size: int, channels: int) -> None:
    for name in ("t_embedder.mlp.0.weight", "final_layer.linear.bias"):
        if name not in state:
            raise ValueError(f"the weights do not fit the model: they have no {name}")
    state["t_embedder.mlp.0.weight"] = reverse_time(state["t_embedder.mlp.0.weight"])
    expected = [patch_size**2 * channels, 2 * patch_size**2 * channels]
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        if len(state[name]) not in expected:
            raise ValueError(
                f"{name} should have {expected[0]} or {expected[1]} rows, it has {len(state[name])}"
            )
        state[name] = -first_channels(state[name], patch_size, channels)


def interpolant(args) -> str:
    """Our name of the path that an official SiT checkpoint's ``args`` (None: a release) was trained with.

    Raises:
        ValueError: a path or a prediction that our models do not have.
    """
    path, prediction = getattr(args, "path_type", "Linear"), getattr(args, "prediction", "velocity")
    if path not in PATHS or prediction != "velocity":
        raise ValueError(
            f"expected --path-type {' or '.join(PATHS)} and --prediction velocity, the weights have {path} and {prediction}"
        )
    return PATHS[path]
