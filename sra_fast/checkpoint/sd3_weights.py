"""Weights of an MMDiT under the names of diffusers' ``SD3Transformer2DModel``, and back.

SD3's own names are those of this engine. Under diffusers' the weights are the same numbers; queries,
keys and values are three layers. Two things differ:

- A norm whose output is only shifted and scaled has the scale first there. It has the shift first in
  SD3 and here.
- The captions of the last block have queries, of which nothing reads the result. Their layer is
  kept; their norm, if there is one, is left out here and has the weight 1 on the way back.
"""

import torch
from torch import Tensor

from sra_fast.utils.checks import require_that

KINDS = ("weight", "bias")
# name here -> name there, outside of the blocks
OUTSIDE = {
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "context_embedder": "context_embedder",
    "final_layer.linear": "proj_out",
}
# the last modulation, with scale and shift the other way round
FINAL_MODULATION = ("final_layer.adaLN_modulation.1", "norm_out.linear")
TABLE = ("pos_embed", "pos_embed.pos_embed")
# in each block, by stream: what always is there, and what only a stream with an output has
MODULATION = {"x_block": "norm1.linear", "context_block": "norm1_context.linear"}
QKV = {
    "x_block": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "context_block": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
OUTPUTS = {
    "x_block": {"attn.proj": "attn.to_out.0", "mlp.fc1": "ff.net.0.proj", "mlp.fc2": "ff.net.2"},
    "context_block": {
        "attn.proj": "attn.to_add_out",
        "mlp.fc1": "ff_context.net.0.proj",
        "mlp.fc2": "ff_context.net.2",
    },
}
# norms of queries and of keys
NORMS = {
    "x_block": ("attn.norm_q", "attn.norm_k"),
    "context_block": ("attn.norm_added_q", "attn.norm_added_k"),
}
# a second attention of the image's tokens to themselves, which SD3.5-medium has
DUAL = "attn2."


def swapped(modulation: Tensor) -> Tensor:
    """``[2 D, ...]``, shift and scale -> scale and shift, and the inverse."""
    return torch.cat(modulation.chunk(2)[::-1])


class _Taken:
    """Weights by name, of which every one has to be taken.

    Args:
        state: what is to be taken.
        prefix: of all names.
    """

    def __init__(self, state: dict[str, Tensor], prefix: str = ""):
        self.prefix = prefix
        self.rest = {
            name.removeprefix(prefix): value
            for name, value in state.items()
            if name.startswith(prefix)
        }

    def __contains__(self, name: str) -> bool:
        return name in self.rest

    def __call__(self, name: str) -> Tensor:
        require_that(
            name in self.rest,
            f"the weights are no SD3Transformer2DModel: they have no {self.prefix}{name}",
        )
        return self.rest.pop(name)

    def finish(self) -> None:
        """ValueError for a weight that was not taken."""
        dual = next((name for name in self.rest if name.startswith(DUAL)), None)
        require_that(
            dual is None,
            f"blocks with a second attention, as SD3.5-medium has, are not known here: expected no "
            f"{self.prefix}{dual}",
        )
        left = next(iter(self.rest), None)
        require_that(
            left is None,
            f"the weights are no SD3Transformer2DModel: expected no {self.prefix}{left}",
        )


def block_from_diffusers(state: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """Weights of a ``JointTransformerBlock`` -> those of a ``JointBlock``.

    Args:
        state: of the block, or of a model.
        prefix: of the block's names in it.

    Raises:
        ValueError: a weight is missing or unknown. Blocks with a second attention are refused.
    """
    take = _Taken(state, prefix)
    found = {}
    for stream in QKV:
        outputs = OUTPUTS[stream]
        has_output = stream == "x_block" or f"{outputs['attn.proj']}.weight" in take
        for kind in KINDS:
            parts = [take(f"{name}.{kind}") for name in QKV[stream]]
            found[f"{stream}.attn.qkv.{kind}"] = torch.cat(parts)
            modulation = take(f"{MODULATION[stream]}.{kind}")
            # without an output there is no gate, and the norm is of the other kind
            modulation = modulation if has_output else swapped(modulation)
            found[f"{stream}.adaLN_modulation.1.{kind}"] = modulation
            for here, there in outputs.items() if has_output else ():
                found[f"{stream}.{here}.{kind}"] = take(f"{there}.{kind}")
        of_queries, of_keys = (f"{name}.weight" for name in NORMS[stream])
        if of_keys in take:
            queries = take(of_queries)
            found[f"{stream}.attn.ln_k.weight"] = take(of_keys)
            if has_output:
                found[f"{stream}.attn.ln_q.weight"] = queries
    take.finish()
    return found


def block_to_diffusers(state: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """The inverse of ``block_from_diffusers``; ``prefix``: of the block's names in ``state``."""
    own = _Taken(state, prefix).rest
    found = {}
    for stream in QKV:
        has_output = f"{stream}.attn.proj.weight" in own
        for kind in KINDS:
            parts = own[f"{stream}.attn.qkv.{kind}"].chunk(3)
            for name, part in zip(QKV[stream], parts, strict=True):
                found[f"{name}.{kind}"] = part
            modulation = own[f"{stream}.adaLN_modulation.1.{kind}"]
            modulation = modulation if has_output else swapped(modulation)
            found[f"{MODULATION[stream]}.{kind}"] = modulation
            for here, there in OUTPUTS[stream].items() if has_output else ():
                found[f"{there}.{kind}"] = own[f"{stream}.{here}.{kind}"]
        of_queries, of_keys = (f"{name}.weight" for name in NORMS[stream])
        keys = own.get(f"{stream}.attn.ln_k.weight")
        if keys is not None:
            found[of_keys] = keys
            found[of_queries] = own.get(f"{stream}.attn.ln_q.weight", torch.ones_like(keys))
    return found


def from_diffusers(state: dict[str, Tensor], depth: int) -> dict[str, Tensor]:
    """Weights of an ``SD3Transformer2DModel`` of ``depth`` blocks under our names; ValueError for
    any that is missing or unknown.
    """
    blocks = "transformer_blocks."
    take = _Taken({name: value for name, value in state.items() if not name.startswith(blocks)})
    found = {}
    for here, there in OUTSIDE.items():
        for kind in KINDS:
            found[f"{here}.{kind}"] = take(f"{there}.{kind}")
    here, there = FINAL_MODULATION
    for kind in KINDS:
        found[f"{here}.{kind}"] = swapped(take(f"{there}.{kind}"))
    if TABLE[1] in take:
        found[TABLE[0]] = take(TABLE[1])
    take.finish()
    known = tuple(f"{blocks}{i}." for i in range(depth))
    other = [name for name in state if name.startswith(blocks) and not name.startswith(known)]
    require_that(not other, f"expected {depth} blocks, the weights have {''.join(other[:1])}")
    for i, prefix in enumerate(known):
        block = block_from_diffusers(state, prefix)
        found |= {f"joint_blocks.{i}.{name}": value for name, value in block.items()}
    return found


def to_diffusers(state: dict[str, Tensor], depth: int) -> dict[str, Tensor]:
    """The inverse of ``from_diffusers``, without the position embedding, whose size is another."""
    found = {}
    for here, there in OUTSIDE.items():
        for kind in KINDS:
            found[f"{there}.{kind}"] = state[f"{here}.{kind}"]
    here, there = FINAL_MODULATION
    for kind in KINDS:
        found[f"{there}.{kind}"] = swapped(state[f"{here}.{kind}"])
    for i in range(depth):
        block = block_to_diffusers(state, f"joint_blocks.{i}.")
        found |= {f"transformer_blocks.{i}.{name}": value for name, value in block.items()}
    return found
