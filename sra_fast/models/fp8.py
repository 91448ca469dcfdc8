"""A frozen network whose blocks run their three large products in fp8: SRA's teacher."""

from typing import Self

import torch
from torch import Tensor, nn

from sra_fast.models.backbone import Backbone, layers_of
from sra_fast.models.layers import Block, Pending, StreamBlock
from sra_fast.ops.fp8 import (
    adaln_fp8,
    gated_residual_adaln_fp8,
    linear_fp8,
    power_of_two_multiplier,
)
from sra_fast.ops.quantize_rows import E4M3, Rows, quantize_rows

# the layers of a block that run in e4m3
LAYERS = ("attn.qkv", "mlp.fc1", "mlp.fc2")


class Fp8Linear(nn.Module):
    """A linear layer with its weight in e4m3, for inference.

    Attributes:
        weight: ``[out_features, in_features]`` e4m3, the parameter of the layer it was made from.
        weight_scale: ``[out_features, 1]`` fp32: the weight's value is ``weight * weight_scale``.
        bias: ``[out_features]`` bf16.
    """

    weight_scale: Tensor

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.out_features = layer.out_features
        # the parameters themselves: their names, and with them the EMA's layout, stay the same
        self.weight = layer.weight
        self.bias = layer.bias
        multiplier = power_of_two_multiplier(layer.weight.abs().amax().float())
        scale = multiplier.reciprocal().repeat(layer.out_features, 1)
        # not part of the state dict: the teacher is rebuilt from the EMA
        self.register_buffer("weight_scale", scale, persistent=False)
        self.weight.data = (layer.weight * multiplier).to(E4M3)

    def forward(self, x: Rows) -> Tensor:
        """Rows in e4m3 with their scales -> ``[B, T, out_features]`` bf16."""
        return linear_fp8(x, Rows(self.weight, self.weight_scale), self.bias)


class Fp8Stream(StreamBlock):
    """A ``StreamBlock`` with qkv, fc1 and fc2 in e4m3, for inference in bf16.

    There is one scale per token and one per weight matrix. The inputs are quantised by the pass
    that produces them: the modulated norm, or GELU. The projection after attention stays in bf16,
    because quantising its input would take a separate pass that costs about what it saves.
    """

    @classmethod
    def from_block(cls, block: StreamBlock) -> Self:
        """The same block in fp8. It takes over the block's layers, which must be bf16 already."""
        # without __init__, which would allocate and draw the weights of a whole block
        new = cls.__new__(cls)
        nn.Module.__init__(new)
        new.recompute = "none"
        new.defer_bias = False
        new.modulations = block.modulations
        for name, module in block.named_children():
            new.add_module(name, module)
        for path, layer in layers_of(new, LAYERS).items():
            assert isinstance(layer, nn.Linear), "the block is in fp8 already"
            new.set_submodule(path, Fp8Linear(layer))
        return new.train(block.training)

    def heads(
        self,
        x: Tensor,
        shift: Tensor,
        scale: Tensor,
        pending: Pending | None,
        group: Tensor | None = None,
        queries: bool = True,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        # norm and modulation round their result to e4m3 themselves
        if pending is None:
            h = adaln_fp8(x, shift, scale, group=group)
        else:
            y, gate, bias = pending
            assert bias is None, "the block before is an Fp8Stream, which adds its bias"
            x, h = gated_residual_adaln_fp8(x, y, gate, shift, scale, group=group)
        q, k, v = self.attn.qkv(h).chunk(3, dim=2)
        return x, (q, k, v) if queries else (k, v)

    def outputs(
        self,
        x: Tensor,
        attended: Tensor,
        modulation: tuple[Tensor, ...],
        group: Tensor | None = None,
    ) -> tuple[Tensor, Pending]:
        _, _, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation
        y = self.attn.proj(attended)
        # so does GELU
        x, h = gated_residual_adaln_fp8(x, y, gate_msa, shift_mlp, scale_mlp, group=group)
        hidden = quantize_rows(self.mlp.fc1(h), gelu=True)
        return x, (self.mlp.fc2(hidden), gate_mlp, None)


class Fp8Block(Fp8Stream, Block):
    """A ``Block`` in fp8."""


def _streams(block: nn.Module) -> dict[str, StreamBlock]:
    """The streams of a block, by the prefix of their names: itself, or those that it holds."""
    if isinstance(block, StreamBlock):
        return {"": block}
    children = block.named_children()
    return {f"{name}.": child for name, child in children if isinstance(child, StreamBlock)}


def fp8_layers(model: Backbone) -> dict[str, nn.Module]:
    """``{name of the weight: layer}`` of the layers that an ``Fp8Stream`` runs in e4m3."""
    return {
        f"{model.block_list}.{i}.{prefix}{path}.weight": layer
        for i, block in enumerate(model.blocks)
        for prefix, stream in _streams(block).items()
        for path, layer in layers_of(stream, LAYERS).items()
    }


@torch.no_grad()
def use_fp8(model: Backbone) -> None:
    """Replace the streams of a frozen network's blocks by ``Fp8Stream``, in place.

    The network must be bf16 and on its device already.

    Raises:
        ValueError: a width that fp8 products cannot have.
    """
    if model.hidden_size % 16:
        raise ValueError(
            f"fp8 needs a hidden_size that is a multiple of 16, got {model.hidden_size}"
        )
    for i, block in enumerate(model.blocks):
        if isinstance(block, Block):
            model.blocks[i] = Fp8Block.from_block(block)
            continue
        # the block's own attention stays: only its streams change
        for prefix, stream in _streams(block).items():
            block.set_submodule(prefix.removesuffix("."), Fp8Stream.from_block(stream))
