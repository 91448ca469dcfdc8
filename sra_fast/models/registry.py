"""Names and sizes of the papers, and the model that a state dict belongs to."""

import re
from collections.abc import Mapping

from torch import Tensor, nn

from sra_fast.models.layers import Block
from sra_fast.models.transformer import Backbone, DiT, SiT
from sra_fast.utils.registry import MODEL_FAMILIES

# depth, width, heads (DiT, Table 1)
SIZES = {
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
}
PATCHES = (2, 4, 8)
# parameters whose shapes tell the constructor's arguments
SHAPES_FROM = (
    "x_embedder.proj.weight",
    "y_embedder.embedding_table.weight",
    "final_layer.linear.weight",
    "blocks.0.mlp.fc1.weight",
)


def preset(name: str) -> tuple[type[Backbone], dict]:
    """The class and size arguments of a name such as ``"SiT-XL/2"``; ValueError lists what
    exists.
    """
    match = re.fullmatch(r"(\w+)-(\w+)/(\d+)", name)
    family, size, patch = match.groups() if match else ("", "", "0")
    if family not in MODEL_FAMILIES or size not in SIZES or int(patch) not in PATCHES:
        families, sizes = ",".join(MODEL_FAMILIES), ",".join(SIZES)
        patches = ",".join(map(str, PATCHES))
        raise ValueError(
            f"expected a model name {{{families}}}-{{{sizes}}}/{{{patches}}}, got {name!r}"
        )
    depth, hidden_size, num_heads = SIZES[size]
    arguments = dict(
        depth=depth, hidden_size=hidden_size, num_heads=num_heads, patch_size=int(patch)
    )
    return MODEL_FAMILIES[family], arguments


def create_model(name: str, **overrides) -> Backbone:
    """``create_model("SiT-XL/2", num_classes=10)``: a preset, any constructor argument
    overridden.
    """
    family, arguments = preset(name)
    return family(**{**arguments, **overrides})


def arguments_from_state_dict(
    state: Mapping[str, Tensor],
    num_heads: int | None = None,
    num_classes: int | None = None,
    family: str | None = None,
    input_size: int | None = None,
) -> tuple[type[SiT], dict]:
    """The class and constructor arguments of the model that a state dict belongs to.

    Args:
        state: weights under the published names.
        num_heads: not visible in the shapes, except with ``qk_norm``; default: that of the paper's
            size of the same width.
        num_classes: default: all rows of the embedding but one, the null class.
        family: ``"SiT"`` or ``"DiT"``; default: 2C output channels make a DiT.
        input_size: default: that of the position table ``pos_embed``.

    Raises:
        ValueError: a parameter is missing, or the width is no paper size and ``num_heads`` is not
            given, or there is neither ``pos_embed`` nor ``input_size``.
    """
    missing = [name for name in SHAPES_FROM if name not in state]
    if missing:
        raise ValueError(f"the weights are none of a SiT or DiT: they have no {missing[0]}")
    patches = state["x_embedder.proj.weight"].shape
    if len(patches) != 4:
        raise ValueError(
            "the weights are none of a SiT or DiT: x_embedder.proj.weight should be [D, C, p, p], "
            f"it is {[*patches]}"
        )
    hidden_size, in_channels, patch_size = patches[:3]
    qk_norm = "blocks.0.attn.q_norm.weight" in state
    if num_heads is None and qk_norm:
        num_heads = hidden_size // len(state["blocks.0.attn.q_norm.weight"])
    if num_heads is None:
        heads = {width: heads for _, width, heads in SIZES.values()}
        if hidden_size not in heads:
            raise ValueError(
                f"num_heads cannot be read from weights of width {hidden_size}: give it"
            )
        num_heads = heads[hidden_size]
    if input_size is None:
        if "pos_embed" not in state:
            raise ValueError(
                "input_size cannot be read from weights without a position embedding: give it"
            )
        input_size = patch_size * round(state["pos_embed"].shape[1] ** 0.5)
    blocks = [re.match(r"blocks\.(\d+)\.", name) for name in state]
    rows = state["y_embedder.embedding_table.weight"].shape[0]
    if num_classes is None:
        num_classes = rows - 1
    out_channels = state["final_layer.linear.weight"].shape[0] // patch_size**2
    if family is None:
        family = "SiT" if out_channels == in_channels else "DiT"
    model = MODEL_FAMILIES[family]
    arguments = dict(
        input_size=input_size,
        patch_size=patch_size,
        in_channels=in_channels,
        hidden_size=hidden_size,
        depth=1 + max(int(match[1]) for match in blocks if match),
        num_heads=num_heads,
        mlp_ratio=state["blocks.0.mlp.fc1.weight"].shape[0] / hidden_size,
        num_classes=num_classes,
        class_dropout_prob=0.1 if rows > num_classes else 0.0,
        qk_norm=qk_norm,
    )
    if issubclass(model, DiT):
        arguments["learn_sigma"] = out_channels != in_channels
    return model, arguments


def arguments_of(model: SiT) -> dict:
    """The constructor's arguments that decide what a model computes; ``MODEL_FAMILIES`` has its
    class under ``model.family``.
    """
    block = model.blocks[0]
    assert isinstance(block, Block)
    arguments = dict(
        input_size=model.input_size,
        patch_size=model.patch_size,
        in_channels=model.in_channels,
        hidden_size=model.hidden_size,
        depth=model.depth,
        num_heads=block.attn.num_heads,
        mlp_ratio=block.mlp.fc1.out_features / model.hidden_size,
        num_classes=model.num_classes,
        class_dropout_prob=model.y_embedder.dropout_prob,
        qk_norm=isinstance(block.attn.q_norm, nn.LayerNorm),
    )
    if isinstance(model, DiT):
        arguments["learn_sigma"] = model.learn_sigma
    return arguments
