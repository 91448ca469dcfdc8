"""Blocks whose forward runs its three large products in fp8, for a network without gradients: the teacher."""

import torch
from torch import Tensor, nn

from sra_fast.models.layers import Block, Pending
from sra_fast.models.transformer import Backbone
from sra_fast.ops.fp8 import (
    adaln_fp8,
    gated_residual_adaln_fp8,
    linear_fp8,
    power_of_two_multiplier,
)
from sra_fast.ops.quantize_rows import E4M3, Rows, quantize_rows


def _linear(x: Rows, layer: nn.Linear) -> Tensor:
    return linear_fp8(x, Rows(layer.weight, layer.weight_scale), layer.bias)


class Fp8Block(Block):
    """A ``Block`` with qkv, fc1 and fc2 in e4m3, one scale per token and per weight matrix; inference only, in bf16.

    Their inputs are quantised by the pass that makes them: the modulated norm, or the GELU.  The projection after attention
    stays in bf16: quantising its input would take a pass of its own and about what it saves.
    """

    def _forward(self, x: Tensor, c: Tensor, pending: Pending | None) -> tuple[Tensor, Pending]:
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation[1](
            c
        ).chunk(6, dim=1)
        assert pending is None or pending[2] is None  # what the teacher's own blocks leave
        if pending is None:
            h = adaln_fp8(x, shift_msa, scale_msa)
        else:
            x, h = gated_residual_adaln_fp8(x, *pending[:2], shift_msa, scale_msa)
        y = self.attn.proj(self.attn(*_linear(h, self.attn.qkv).chunk(3, dim=2)))
        x, h = gated_residual_adaln_fp8(x, y, gate_msa, shift_mlp, scale_mlp)
        hidden = quantize_rows(_linear(h, self.mlp.fc1), gelu=True)
        return x, (_linear(hidden, self.mlp.fc2), gate_mlp, None)


def fp8_layers(model: Backbone) -> dict[str, nn.Linear]:
    """``{name of the weight: layer}`` of the layers that an ``Fp8Block`` runs in e4m3."""
    layers = {}
    for i, block in enumerate(model.blocks):
        for path, layer in {
            "attn.qkv": block.attn.qkv,
            "mlp.fc1": block.mlp.fc1,
            "mlp.fc2": block.mlp.fc2,
        }.items():
            layers[f"blocks.{i}.{path}.weight"] = layer
    return layers


@torch.no_grad()
def use_fp8(model: Backbone) -> None:
    """Turn the blocks of a frozen network into ``Fp8Block``, in place, and the weights of their large products into e4m3.

    What is left of the network must be bf16 on its device already.  The layers get ``weight_scale [out_features, 1]`` fp32.

    Raises:
        ValueError: a width that fp8 products cannot have.
    """
    if model.hidden_size % 16:
        raise ValueError(
            f"fp8 needs a hidden_size that is a multiple of 16, got {model.hidden_size}"
        )
    for block in model.blocks:
        block.__class__ = Fp8Block
    for layer in fp8_layers(model).values():
        multiplier = power_of_two_multiplier(layer.weight.abs().amax().float())
        layer.weight_scale = multiplier.reciprocal().repeat(layer.out_features, 1)
        layer.weight.data = (layer.weight * multiplier).to(E4M3)
