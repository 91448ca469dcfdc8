"""SiT and DiT with SRA's projection head, and the sizes of the papers."""

import re
from collections.abc import Mapping

from torch import Tensor

from sra_fast.models.transformer import Backbone, DiT, SiT

__all__ = ["Backbone", "DiT", "SiT", "SIZES", "arguments_from_state_dict", "create_model", "preset"]

# depth, width, heads (DiT, Table 1)
SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
PATCHES = (2, 4, 8)
FAMILIES = {"SiT": SiT, "DiT": DiT}
SHAPES_FROM = (
    "x_embedder.proj.weight",
    "y_embedder.embedding_table.weight",
    "final_layer.linear.weight",
    "pos_embed",
    "blocks.0.mlp.fc1.weight",
)


def preset(name: str) -> tuple[type[SiT], dict]:
    """The class and size arguments of a name such as ``"SiT-XL/2"``; ValueError lists what exists."""
    match = re.fullmatch(r"(\w+)-(\w+)/(\d+)", name)
    family, size, patch = match.groups() if match else (None, None, "0")
    if family not in FAMILIES or size not in SIZES or int(patch) not in PATCHES:
        raise ValueError(
            f"expected a model name {{{','.join(FAMILIES)}}}-{{{','.join(SIZES)}}}/{{{','.join(map(str, PATCHES))}}}, got {name!r}"
        )
    depth, hidden_size, num_heads = SIZES[size]
    return FAMILIES[family], dict(
        depth=depth, hidden_size=hidden_size, num_heads=num_heads, patch_size=int(patch)
    )


def create_model(name: str, **overrides) -> SiT:
    """``create_model("SiT-XL/2", num_classes=10)``: a preset with any constructor argument overridden."""
    family, arguments = preset(name)
    return family(**{**arguments, **overrides})


def arguments_from_state_dict(
    state: Mapping[str, Tensor],
    num_heads: int | None = None,
    num_classes: int | None = None,
    family: str | None = None,
) -> tuple[type[SiT], dict]:
    """The class and constructor arguments that a state dict (the reference's names) was made with.

    Shapes do not tell three things, which have the usual answer unless given: ``num_heads`` (the paper's size of the same
    width), ``num_classes`` (all embedding rows but one, the null class) and ``family`` (2C output channels are a DiT's).
    Raises ValueError if the width is no paper size and ``num_heads`` is not given, or a parameter is missing.
    """
    missing = [name for name in SHAPES_FROM if name not in state]
    if missing:
        raise ValueError(f"the weights are none of a SiT or DiT: they have no {missing[0]}")
    weight = state["x_embedder.proj.weight"]
    hidden_size, in_channels, patch_size = weight.shape[:3]
    if num_heads is None:
        heads = {width: h for _, width, h in SIZES.values()}
        if hidden_size not in heads:
            raise ValueError(
                f"num_heads cannot be read from weights of width {hidden_size}: give it"
            )
        num_heads = heads[hidden_size]
    depth = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
    rows = state["y_embedder.embedding_table.weight"].shape[0]
    out_channels = state["final_layer.linear.weight"].shape[0] // patch_size**2
    num_classes = rows - 1 if num_classes is None else num_classes
    cls = FAMILIES[family] if family else SiT if out_channels == in_channels else DiT
    arguments = dict(
        input_size=patch_size * round(state["pos_embed"].shape[1] ** 0.5),
        patch_size=patch_size,
        in_channels=in_channels,
        hidden_size=hidden_size,
        depth=depth,
        num_heads=num_heads,
        mlp_ratio=state["blocks.0.mlp.fc1.weight"].shape[0] / hidden_size,
        num_classes=num_classes,
        class_dropout_prob=0.1 if rows > num_classes else 0.0,
        qk_norm="blocks.0.attn.q_norm.weight" in state,
    )
    return cls, arguments | ({"learn_sigma": out_channels != in_channels} if cls is DiT else {})
