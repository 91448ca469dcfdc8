"""Weights of anybody, checked and made fp32: what is no number, or no fixed table, is refused by
name.
"""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from sra_fast.checkpoint.names import CLASS_TABLE, FOREIGN_HEADS, KNOWN_PARAMETER, in_short
from sra_fast.models import has_joint_blocks
from sra_fast.models.layers import sincos_pos_embed
from sra_fast.models.positions import grid_positions
from sra_fast.utils.messages import warn
from sra_fast.utils.registry import MODEL_FAMILIES

# in the last block of an MMDiT nothing reads the result of these queries
LAST_QUERIES = re.compile(r"joint_blocks\.(\d+)\.context_block\.attn\.ln_q\.weight")
# which way time runs, unless it is known
DIRECTION = "noise at time 1, as in REPA and SRA (import-weights reads an official SiT)"
# of the class embedding of the releases: 1000 classes and the null class
IMAGENET_ROWS = 1001
# whose values fp32 represents, or rounds
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def warn_of_foreign_heads(states: Iterable[Mapping[str, Tensor]], source: str) -> list[str]:
    """One line about the heads that ``checked`` leaves out of the state dicts of a file. Returns
    their names.
    """
    names = dict.fromkeys(name for state in states for name in state)
    dropped = [name for name in names if name.startswith(FOREIGN_HEADS)]
    if dropped:
        warn("not read from %s, nothing here uses it: %s", source, in_short(dropped))
    return dropped


def checked(state: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """The same weights in fp32, without the heads of other training methods and the norm of queries
    that nothing reads.

    Args:
        state: under the published names (``checkpoint/names.py``); it is not changed.
        source: where they were read from, for messages.

    Raises:
        ValueError: weights that are integers, complex, in 8 bits, not finite, sparse or without
            values, patches that are no image's, or a position table that is no fixed function: of
            its size, or for an MMDiT of any places along an axis. The first such name is given.
    """
    kept = {name: value for name, value in state.items() if not name.startswith(FOREIGN_HEADS)}
    kept = _without_last_queries(kept)
    for name, value in kept.items():
        if not is_dense(value):
            kind = "on the meta device" if value.is_meta else str(value.layout).rpartition(".")[2]
            raise ValueError(f"expected dense weights with values in {source}, {name} is {kind}")
    if "pos_embed" in kept:
        kept["pos_embed"] = _exact(kept["pos_embed"], source, has_joint_blocks(kept))
    weights = {}
    for name, value in kept.items():
        if value.dtype not in FLOATS:
            kind = str(value.dtype).removeprefix("torch.")
            raise ValueError(f"expected floating-point weights in {source}, {name} is {kind}")
        weights[name] = value.float()
        # after the cast: fp64 reaches further than fp32
        if not weights[name].isfinite().all():
            raise ValueError(f"expected finite weights in {source}, {name} has NaN or infinity")
    if KNOWN_PARAMETER in weights and weights[KNOWN_PARAMETER].dim() != 4:
        found = [*weights[KNOWN_PARAMETER].shape]
        raise ValueError(f"{KNOWN_PARAMETER} of {source} should be [D, C, p, p], it is {found}")
    return weights


def is_dense(value: Tensor) -> bool:
    """Whether a tensor holds all of its values."""
    return value.layout == torch.strided and not value.is_meta


def _without_last_queries(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights without the norm of the captions' queries in the last block, which SD3.5
    has and no model here.
    """
    blocks = [int(name.split(".")[1]) for name in state if name.startswith("joint_blocks.")]
    last = str(max(blocks, default=0))
    unread = {name for name in state if (m := LAST_QUERIES.fullmatch(name)) and m[1] == last}
    return {name: value for name, value in state.items() if name not in unread}


def _exact(table: Tensor, source: str, anywhere: bool) -> Tensor:
    """A position table as it was before it was rounded to half precision, if it was.

    Raises:
        ValueError: it is not the fixed function of its own size, or with ``anywhere`` of other
            places than 0, 1, 2, ... A model computes its table itself, so another one would be lost
            silently.
    """
    found = grid_positions(table) if table.dtype in FLOATS else None
    if found is not None and (anywhere or found[1:] == (0.0, 1.0)):
        side, start, step = found
        is_rounded = table.dtype in (torch.float16, torch.bfloat16)
        return sincos_pos_embed(side, table.shape[2], start, step) if is_rounded else table
    raise ValueError(
        f"the position embedding of {source} is not the fixed 2-d sine-cosine one: "
        f"pos_embed is {[*table.shape]}"
    )


def family_in(args) -> str | None:
    """The family that the arguments of a checkpoint name, ``"SiT"`` or ``"DiT"``; None: none.

    Args:
        args: ``argparse.Namespace``, or None.
    """
    family = str(getattr(args, "model", "")).partition("-")[0]
    return family if family in MODEL_FAMILIES else None


def official_family(state: dict[str, Tensor], args) -> str | None:
    """``"SiT"`` or ``"DiT"`` for weights of these official releases; None: not known.

    They have the same names and shapes and differ in what they compute. A SiT leaves half of its
    outputs unused: their weights are the zeros of its initialisation, where a DiT has learned its
    variance.

    Args:
        state: under the published names.
        args: of the checkpoint, or None.
    """
    # only what was trained here has the head, with our direction of time
    if any(name.startswith("ap_head.") for name in state) or has_joint_blocks(state):
        return None
    # the official SiT spells its interpolants with capitals
    if str(getattr(args, "path_type", "")) in ("Linear", "GVP", "VP"):
        return "SiT"
    patches = state[KNOWN_PARAMETER]
    last = state.get("final_layer.linear.weight", patches.new_zeros(0))
    channels = patches.shape[1]
    if len(last) != 2 * channels * patches[0, 0].numel():
        return None
    if family_in(args) is not None:
        return family_in(args)
    learned = last.unflatten(0, (-1, 2 * channels))[:, channels:].any()
    return "DiT" if learned else "SiT"


def refuse_reversed_time(state: dict[str, Tensor], args, source: str) -> None:
    """ValueError for weights of an official SiT, whose time runs backwards: taken for a DiT they
    would make noise.

    Args:
        state: under the published names.
        args: of the checkpoint, or None.
        source: where the weights were read from, for messages.
    """
    if official_family(state, args) == "SiT":
        raise ValueError(
            f"{source} looks like an official SiT, whose time runs backwards: "
            f"import-weights --from {source} --model SiT-XL/2 --out FILE.safetensors converts it"
        )


def warn_of_assumptions(state: dict[str, Tensor], args, source: str) -> None:
    """A line about what is assumed of weights where neither they nor arguments beside them say
    along which interpolant they were trained, which way time runs, or whether there is a null
    class.

    Args:
        state: under the published names; of no official SiT that is known as one.
        args: of the checkpoint, or None.
        source: where the weights were read from, for messages.
    """
    if has_joint_blocks(state):
        return
    assumed = []
    if _is_untold_flow(state, args):
        assumed.append("the linear interpolant")
        if _shows_no_direction(state):
            assumed.append(DIRECTION)
    rows = len(state.get(CLASS_TABLE, ()))
    if rows not in (0, IMAGENET_ROWS) and not hasattr(args, "num_classes"):
        assumed.append(f"{rows - 1} classes and a null class")
    if assumed:
        warn("%s does not say how it was trained, assumed are %s", source, "; ".join(assumed))


def warn_of_direction(state: dict[str, Tensor], args, source: str) -> None:
    """The same line for a run that starts from the weights: interpolant and classes are its own."""
    if _is_untold_flow(state, args) and _shows_no_direction(state):
        warn("%s does not say how it was trained, assumed is %s", source, DIRECTION)


def _is_untold_flow(state: dict[str, Tensor], args) -> bool:
    """Whether weights are those of a network of labels that predicts a velocity, as far as shapes
    show it, and nothing says how its times are meant.
    """
    if has_joint_blocks(state) or hasattr(args, "path_type"):
        return False
    patches = state[KNOWN_PARAMETER]
    last = state.get("final_layer.linear.weight", patches.new_zeros(0))
    # a DiT has a variance as well, and one chain of noise levels
    return len(last) == patches[0].numel() and family_in(args) != "DiT"


def _shows_no_direction(state: dict[str, Tensor]) -> bool:
    # only what was trained here has the head, with our direction of time
    return not any(name.startswith("ap_head.") for name in state)


def refuse_unknown_times(state: dict[str, Tensor], args, source: str) -> None:
    """ValueError for weights of an MMDiT with a pooled feature that do not say what its times are
    multiplied by: it may be SD3, and the predictions would be those of wrong times.

    Args:
        state: under the published names.
        args: of the checkpoint, or None.
        source: where the weights were read from, for messages.
    """
    is_pooled = has_joint_blocks(state) and "y_embedder.mlp.0.weight" in state
    if is_pooled and getattr(args, "time_scale", None) is None:
        raise ValueError(
            f"{source} looks like SD3 and does not say what its times are multiplied by: "
            f"import-weights --from {source} --out FILE.safetensors converts it"
        )


def refuse_other_prediction(args, process: str, source: str) -> None:
    """ValueError for weights that predict noise, score or image where the process takes a velocity.
    Shapes do not show it.

    Args:
        args: of the checkpoint, or None.
        process: name of the diffusion process of the model.
        source: where the weights were read from, for messages.
    """
    told = getattr(args, "prediction", "velocity")
    # REPA's code says v
    if process == "flow_matching" and told not in ("velocity", "v"):
        raise ValueError(
            f"expected weights that predict the velocity, those of {source} predict {told!r}"
        )
