"""Weights of a DiT under the names of diffusers' ``DiTTransformer2DModel``, and back.

The weights are the same numbers under other names; queries, keys and values are three layers. Three
things differ:

- Every block of diffusers has an embedder of time and class of its own. Here there is one, so all of
  them must be equal.
- The frequencies of diffusers' time are 10000^(-i/127), those of DiT and of this engine
  10000^(-i/128). The predictions differ by that; ``fold_time`` makes the difference smaller, and no
  linear map removes it (docs/weights.md has the numbers).
- ``DiTPipeline`` takes row 1000 of the class table for the null class. A table of fewer classes is
  filled up to there with copies of its null class.
"""

import math

import torch
from torch import Tensor

from sra_fast.checkpoint.names import CLASS_TABLE
from sra_fast.diffusion.gaussian_diffusion import NUM_TIMES
from sra_fast.models.layers import sincos_pos_embed
from sra_fast.utils.checks import require_that

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
# i-th frequency of a time: 10000^(-i/steps)
STEPS_HERE = 128
STEPS_THERE = 127


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
    table = rest.pop("pos_embed.pos_embed", None)
    require_that(
        table is None or _is_of_a_dit(table),
        "the weights have another position table (pos_embed.pos_embed) than a DiT here, whose "
        "places are 0, 1, 2, ...",
    )
    require_that(
        not rest, f"the weights are no DiT of diffusers: expected no {next(iter(rest), None)}"
    )
    return found


def _is_of_a_dit(table: Tensor) -> bool:
    """Whether a position table, which may have been rounded to half precision, is a DiT's."""
    if table.dim() != 3 or table.shape[2] % 4:
        return False
    ours = sincos_pos_embed(math.isqrt(table.shape[1]), table.shape[2])
    return table.shape == ours.shape and torch.allclose(table.float(), ours, rtol=0, atol=1e-2)


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


def time_features(steps: int) -> Tensor:
    """Cosines and sines of all integer times, ``[1000, 256]`` float64."""
    frequencies = 10000.0 ** (-torch.arange(STEPS_HERE, dtype=torch.float64) / steps)
    phase = torch.arange(NUM_TIMES, dtype=torch.float64)[:, None] * frequencies
    return torch.cat([phase.cos(), phase.sin()], dim=1)


def fold_time(state: dict[str, Tensor], before: int, after: int) -> dict[str, Tensor]:
    """Weights whose first layer of the time gives nearly the same on other features.

    The layer is fitted by least squares over all integer times. Features of low frequencies are
    linear combinations of the others' to rounding. Those of the highest quarter are not: at time
    1000 neighbours of the two sets are whole periods apart.

    Args:
        state: under the published names; it is not changed.
        before, after: ``STEPS_HERE`` or ``STEPS_THERE``: the features that the layer was trained on,
            and those that it is to see.
    """
    names = ("t_embedder.mlp.0.weight", "t_embedder.mlp.0.bias")
    weight, bias = (state[name].double() for name in names)
    wanted = time_features(before) @ weight.mT + bias
    seen = torch.cat([time_features(after), torch.ones(NUM_TIMES, 1, dtype=torch.float64)], dim=1)
    # neighbouring low frequencies are nearly equal: without the cut-off they would get huge weights
    # of opposite signs, which fp32 cannot hold
    solution = torch.linalg.lstsq(seen, wanted, rcond=1e-3, driver="gelsd").solution
    folded = (solution[:-1].mT, solution[-1])
    return {**state, **{name: value.float() for name, value in zip(names, folded, strict=True)}}
