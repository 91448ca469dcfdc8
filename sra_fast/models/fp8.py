"""A frozen network whose blocks run their three large products in fp8: SRA's teacher."""

import torch
from torch import Tensor, nn

from sra_fast.models.layers import Block, Pending
from sra_fast.models.token_groups import Segments
from sra_fast.models.transformer import Backbone
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


class Fp8Block(Block):
    """A ``Block`` with qkv, fc1 and fc2 in e4m3, for inference in bf16.

    There is one scale per token and one per weight matrix. The inputs are quantised by the pass
    that produces them: the modulated norm, or GELU. The projection after attention stays in bf16,
    because quantising its input would take a separate pass that costs about what it saves.
    """

    @classmethod
    def from_block(cls, block: Block) -> "Fp8Block":
        """The same block in fp8. It takes over the block's layers, which must be bf16 already."""
        # without __init__, which would allocate and draw the weights of a whole block
        new = cls.__new__(cls)
        nn.Module.__init__(new)
        new.recompute = "none"
        new.defer_bias = False
        new.attn = block.attn
        new.mlp = block.mlp
        new.adaLN_modulation = block.adaLN_modulation
        for path in LAYERS:
            layer = new.get_submodule(path)
            assert isinstance(layer, nn.Linear), "the block is in fp8 already"
            new.set_submodule(path, Fp8Linear(layer))
        return new.train(block.training)

    def _forward(
        self,
        x: Tensor,
        c: Tensor,
        pending: Pending | None,
        group: Tensor | None,
        segments: Segments | None,
    ) -> tuple[Tensor, Pending]:
        modulation = self.adaLN_modulation[1](c).chunk(6, dim=-1)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation

        # attention: norm and modulation round their result to e4m3 themselves
        if pending is None:
            h = adaln_fp8(x, shift_msa, scale_msa, group=group)
        else:
            y, gate, bias = pending
            assert bias is None, "the block before is an Fp8Block, which adds its bias"
            x, h = gated_residual_adaln_fp8(x, y, gate, shift_msa, scale_msa, group=group)
        q, k, v = self.attn.qkv(h).chunk(3, dim=2)
        y = self.attn.proj(self.attn(q, k, v, segments))

        # MLP: so does GELU
        x, h = gated_residual_adaln_fp8(x, y, gate_msa, shift_mlp, scale_mlp, group=group)
        hidden = quantize_rows(self.mlp.fc1(h), gelu=True)
        return x, (self.mlp.fc2(hidden), gate_mlp, None)


def fp8_layers(model: Backbone) -> dict[str, nn.Module]:
    """``{name of the weight: layer}`` of the layers that an ``Fp8Block`` runs in e4m3."""
    return {
        f"blocks.{i}.{path}.weight": block.get_submodule(path)
        for i, block in enumerate(model.blocks)
        for path in LAYERS
    }


@torch.no_grad()
def use_fp8(model: Backbone) -> None:
    """Replace the blocks of a frozen network by ``Fp8Block``, in place.

    The network must be bf16 and on its device already.

    Raises:
        ValueError: a width that fp8 products cannot have.
    """
    if model.hidden_size % 16:
        raise ValueError(
            f"fp8 needs a hidden_size that is a multiple of 16, got {model.hidden_size}"
        )
    for i, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        model.blocks[i] = Fp8Block.from_block(block)
