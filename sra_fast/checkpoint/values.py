"""Weights of anybody, checked and made fp32: what is no number, or no fixed table, is refused by
name.
"""

import logging

import torch
from torch import Tensor

from sra_fast.checkpoint.names import FOREIGN_HEADS, KNOWN_PARAMETER, in_short
from sra_fast.models.layers import sincos_pos_embed

log = logging.getLogger("sra_fast")

# whose values fp32 represents, or rounds
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def checked(state: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """The same weights in fp32, without the heads of other training methods.

    Args:
        state: under the published names (``checkpoint/names.py``); it is not changed.
        source: where they were read from, for messages.

    Raises:
        ValueError: weights that are integers, complex, in 8 bits or not finite, or a position table
            that is not the fixed function of its size. The first such name is given.
    """
    dropped = [name for name in state if name.startswith(FOREIGN_HEADS)]
    if dropped:
        log.warning("not read from %s, nothing here uses it: %s", source, in_short(dropped))
    if "pos_embed" in state:
        _check_table(state["pos_embed"], source)
    weights = {}
    for name, value in state.items():
        if name in dropped:
            continue
        if value.dtype not in FLOATS:
            kind = str(value.dtype).removeprefix("torch.")
            raise ValueError(f"expected floating-point weights in {source}, {name} is {kind}")
        weights[name] = value.float()
        # after the cast: fp64 reaches further than fp32
        if not weights[name].isfinite().all():
            raise ValueError(f"expected finite weights in {source}, {name} has NaN or infinity")
    return weights


def _check_table(table: Tensor, source: str) -> None:
    """ValueError unless a position table is the fixed function of its own size.

    A model computes its table itself, so another one would be lost silently.
    """
    grid = round(table.shape[1] ** 0.5) if table.dim() == 3 else 0
    if table.dim() == 3 and table.dtype in FLOATS and table.shape[2] % 4 == 0:
        fixed = sincos_pos_embed(grid, table.shape[2])
        # a table that was saved in half precision is rounded to it
        rounding = max(1e-5, torch.finfo(table.dtype).eps)
        if table.shape == fixed.shape and torch.allclose(table.float(), fixed, atol=rounding):
            return
    raise ValueError(
        f"the position embedding of {source} is not the fixed 2-d sine-cosine one: "
        f"pos_embed is {[*table.shape]}"
    )


def refuse_reversed_time(state: dict[str, Tensor], args, source: str) -> None:
    """ValueError for weights of an official SiT, whose time runs backwards.

    They have the names and shapes of an official DiT and differ in what they compute, so taking
    them for one would make noise. A SiT leaves half of its outputs unused: their weights are the
    zeros of its initialisation, where a DiT has learned its variance.

    Args:
        state: under the published names.
        args: of the checkpoint, or None.
        source: where the weights were read from, for messages.
    """
    # only what was trained here has the head, with our direction of time
    if any(name.startswith("ap_head.") for name in state):
        return
    patches = state[KNOWN_PARAMETER]
    last = state.get("final_layer.linear.weight", patches.new_zeros(0))
    channels = patches.shape[1]
    pairs = len(last) == 2 * channels * patches[0, 0].numel()
    family = str(getattr(args, "model", "")).partition("-")[0]
    # the official SiT spells its interpolants with capitals
    official = str(getattr(args, "path_type", "")) in ("Linear", "GVP", "VP")
    unused = pairs and not last.unflatten(0, (-1, 2 * channels))[:, channels:].any()
    if official or (pairs and family == "SiT") or (unused and family != "DiT"):
        raise ValueError(
            f"{source} looks like an official SiT, whose time runs backwards: "
            f"import-weights --from {source} --model SiT-XL/2 --out FILE.safetensors converts it"
        )
