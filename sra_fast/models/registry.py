"""Names and sizes of the papers, and the model that a state dict belongs to."""

import re
from collections.abc import Mapping

from torch import Tensor

from sra_fast.models.backbone import DiffusionTransformer
from sra_fast.models.mmdit import MMDiT
from sra_fast.models.positions import grid_positions
from sra_fast.models.transformer import DiT
from sra_fast.utils.registry import MODEL_FAMILIES

# depth, width, heads (DiT, Table 1)
SIZES = {
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
}
PATCHES = (2, 4, 8)
# REPA's text-to-image model (arXiv 2410.06940): as many heads as blocks, the time without the pooled
# text feature
REPA_TEXT = dict(depth=24, hidden_size=768, num_heads=24, pooled_size=0)
# parameters whose shapes tell the constructor's arguments
SHAPES_FROM = (
    "x_embedder.proj.weight",
    "y_embedder.embedding_table.weight",
    "final_layer.linear.weight",
    "blocks.0.mlp.fc1.weight",
)
JOINT = "joint_blocks."
TEXT_SHAPES_FROM = (
    "x_embedder.proj.weight",
    "context_embedder.weight",
    "final_layer.linear.weight",
    f"{JOINT}0.x_block.mlp.fc1.weight",
)
# what a pooled text feature is multiplied with first, where there is one
POOLED = "y_embedder.mlp.0.weight"


def _named_sizes(family: type[DiffusionTransformer]) -> dict[str, dict]:
    """``{size: constructor's arguments}`` of the names that a family has."""
    sizes = {
        name: dict(depth=depth, hidden_size=hidden_size, num_heads=num_heads)
        for name, (depth, hidden_size, num_heads) in SIZES.items()
    }
    # a class of its own, not one that somebody has derived: it would have other weights
    return {**sizes, "REPA": REPA_TEXT} if family is MMDiT else sizes


def preset(name: str) -> tuple[type[DiffusionTransformer], dict]:
    """The class and size arguments of a name such as ``"SiT-XL/2"``; ValueError lists what
    exists.
    """
    match = re.fullmatch(r"(\w+)-(\w+)/(\d+)", name)
    family, size, patch = match.groups() if match else ("", "", "0")
    sizes = _named_sizes(MODEL_FAMILIES[family]) if family in MODEL_FAMILIES else {}
    if size not in sizes or int(patch) not in PATCHES:
        families, sizes = ",".join(MODEL_FAMILIES), ",".join(sizes or SIZES)
        patches = ",".join(map(str, PATCHES))
        raise ValueError(
            f"expected a model name {{{families}}}-{{{sizes}}}/{{{patches}}}, got {name!r}"
        )
    return MODEL_FAMILIES[family], {**sizes[size], "patch_size": int(patch)}


def create_model(name: str, **overrides) -> DiffusionTransformer:
    """``create_model("SiT-XL/2", num_classes=10)``: a preset, any constructor argument
    overridden.
    """
    family, arguments = preset(name)
    return family(**{**arguments, **overrides})


def has_joint_blocks(state: Mapping[str, Tensor]) -> bool:
    """Whether a state dict is that of an MMDiT."""
    return any(name.startswith(JOINT) for name in state)


def arguments_from_state_dict(
    state: Mapping[str, Tensor],
    num_heads: int | None = None,
    num_classes: int | None = None,
    family: str | None = None,
    input_size: int | None = None,
) -> tuple[type[DiffusionTransformer], dict]:
    """The class and constructor arguments of the model that a state dict belongs to.

    Args:
        state: weights under the published names.
        num_heads: not visible in the shapes, except with ``qk_norm``; default: that of the paper's
            size of the same width (MMDiT: and the same depth, or SD3's rule of as many heads as
            blocks, of 64 each).
        num_classes: default: all rows of the embedding but one, the null class.
        family: ``"SiT"``, ``"DiT"`` or ``"MMDiT"``; default: joint blocks make an MMDiT, 2C output
            channels a DiT.
        input_size: default: that of the position table ``pos_embed``. An MMDiT of a smaller input
            has the middle of the table, as in SD3.

    Raises:
        ValueError: a parameter is missing, or the width is no paper size and ``num_heads`` is not
            given, or there is neither ``pos_embed`` nor ``input_size``, or they contradict each
            other; or the table of an MMDiT is too small or no fixed function.
    """
    if family == "MMDiT" or family is None and has_joint_blocks(state):
        return MMDiT, _text_arguments(state, num_heads, input_size)
    hidden_size, in_channels, patch_size = _image_sizes(state, SHAPES_FROM, "SiT or DiT")
    qk_norm = "blocks.0.attn.q_norm.weight" in state
    if num_heads is None and qk_norm:
        num_heads = hidden_size // len(state["blocks.0.attn.q_norm.weight"])
    if num_heads is None:
        heads = {width: heads for _, width, heads in SIZES.values()}
        num_heads = _known_heads(heads.get(hidden_size), hidden_size)
    rows = state["y_embedder.embedding_table.weight"].shape[0]
    if num_classes is None:
        num_classes = rows - 1
    out_channels = state["final_layer.linear.weight"].shape[0] // patch_size**2
    if family is None:
        family = "SiT" if out_channels == in_channels else "DiT"
    model = MODEL_FAMILIES[family]
    side = _side(state, patch_size, None if "pos_embed" in state else input_size)
    if input_size not in (None, side):
        raise ValueError(
            f"the weights have the position table of an input of {side} x {side}, got input_size "
            f"{input_size}"
        )
    arguments = dict(
        input_size=side,
        patch_size=patch_size,
        in_channels=in_channels,
        hidden_size=hidden_size,
        depth=_depth(state, "blocks"),
        num_heads=num_heads,
        mlp_ratio=state["blocks.0.mlp.fc1.weight"].shape[0] / hidden_size,
        num_classes=num_classes,
        class_dropout_prob=0.1 if rows > num_classes else 0.0,
        qk_norm=qk_norm,
    )
    if issubclass(model, DiT):
        arguments["learn_sigma"] = out_channels != in_channels
    return model, arguments


def _text_arguments(
    state: Mapping[str, Tensor], num_heads: int | None, input_size: int | None
) -> dict:
    """Constructor arguments of the MMDiT that a state dict belongs to."""
    hidden_size, in_channels, patch_size = _image_sizes(state, TEXT_SHAPES_FROM, "MMDiT")
    depth = _depth(state, "joint_blocks")
    norm = f"{JOINT}0.x_block.attn.ln_q.weight"
    if num_heads is None and norm in state:
        num_heads = hidden_size // len(state[norm])
    if num_heads is None:
        sizes = [*SIZES.values(), tuple(REPA_TEXT.values())[:3]]
        heads = {(depth, width): heads for depth, width, heads in sizes}
        if hidden_size == 64 * depth:
            # SD3's own rule
            heads[depth, hidden_size] = depth
        num_heads = _known_heads(heads.get((depth, hidden_size)), hidden_size)
    second = next((name for name in state if ".attn2." in name), None)
    if second is not None:
        raise ValueError(
            "blocks with a second attention, as SD3.5-medium has, are not known here: expected no "
            f"{second}"
        )
    pooled = state.get(POOLED)
    for name in ("context_embedder.weight", POOLED):
        if name in state and state[name].dim() != 2:
            raise ValueError(
                f"the weights are none of an MMDiT: {name} should be a matrix, it is "
                f"{[*state[name].shape]}"
            )
    input_size = _side(state, patch_size, input_size)
    start, step = _middle(state.get("pos_embed"), input_size // patch_size)
    return dict(
        input_size=input_size,
        patch_size=patch_size,
        in_channels=in_channels,
        hidden_size=hidden_size,
        depth=depth,
        num_heads=num_heads,
        mlp_ratio=state[f"{JOINT}0.x_block.mlp.fc1.weight"].shape[0] / hidden_size,
        context_size=state["context_embedder.weight"].shape[1],
        pooled_size=0 if pooled is None else pooled.shape[1],
        qk_norm=norm in state,
        position_start=start,
        position_step=step,
    )


def _middle(table: Tensor | None, side: int) -> tuple[float, float]:
    """Start and step of the positions in the middle of a table, ``side`` patches along an axis."""
    # without values its shape has been read already
    if table is None or table.is_meta:
        return 0.0, 1.0
    found = grid_positions(table)
    if found is None:
        raise ValueError("expected a position table pos_embed that is the fixed function of a grid")
    grid, start, step = found
    if side > grid:
        raise ValueError(
            f"expected an input of at most {grid} x {grid} patches, of which the position table "
            f"is, got {side} x {side}"
        )
    return start + (grid - side) // 2 * step, step


def _image_sizes(
    state: Mapping[str, Tensor], names: tuple[str, ...], family: str
) -> tuple[int, int, int]:
    """Width, channels and patch size; ValueError if a parameter of ``names`` is missing."""
    missing = [name for name in names if name not in state]
    if missing:
        raise ValueError(f"the weights are none of a {family}: they have no {missing[0]}")
    patches = state["x_embedder.proj.weight"].shape
    if len(patches) != 4 or 0 in patches:
        raise ValueError(
            f"the weights are none of a {family}: x_embedder.proj.weight should be [D, C, p, p], "
            f"it is {[*patches]}"
        )
    hidden_size, in_channels, patch_size = patches[:3]
    return hidden_size, in_channels, patch_size


def _known_heads(found: int | None, width: int) -> int:
    """The number of heads that a width has; ValueError if none is known."""
    if found is None:
        raise ValueError(f"num_heads cannot be read from weights of width {width}: give it")
    return found


def _side(state: Mapping[str, Tensor], patch_size: int, input_size: int | None) -> int:
    """Side of the input, as given or as the position table has it."""
    if input_size is not None:
        return input_size
    if "pos_embed" not in state:
        raise ValueError(
            "input_size cannot be read from weights without a position embedding: give it"
        )
    return patch_size * round(state["pos_embed"].shape[1] ** 0.5)


def _depth(state: Mapping[str, Tensor], blocks: str) -> int:
    """How many blocks there are under this name."""
    found = [re.match(rf"{blocks}\.(\d+)\.", name) for name in state]
    return 1 + max(int(match[1]) for match in found if match)


def arguments_of(model: DiffusionTransformer) -> dict:
    """The constructor's arguments that decide what a model computes; ``MODEL_FAMILIES`` has its
    class under ``model.family``.
    """
    arguments = dict(
        input_size=model.input_size,
        patch_size=model.patch_size,
        in_channels=model.in_channels,
        hidden_size=model.hidden_size,
        depth=model.depth,
        num_heads=model.num_heads,
    )
    return {**arguments, **model.own_arguments()}
