"""A stack of blocks of adaLN-Zero."""

import torch.nn.functional as F
from programs import D
from torch import nn


class Block(nn.Module):
    """A block of adaLN-Zero (DiT), its attention replaced by a layer."""

    def __init__(self):
        super().__init__()
        self.norm1 = nn.LayerNorm(D, elementwise_affine=False, eps=1e-6)
        self.norm2 = nn.LayerNorm(D, elementwise_affine=False, eps=1e-6)
        self.attend = nn.Linear(D, D)
        self.mlp = nn.Linear(D, D)
        self.modulation = nn.Linear(D, 6 * D)

    def forward(self, x, c):
        parts = self.modulation(F.silu(c)).chunk(6, dim=1)
        shift, scale, gate, shift2, scale2, gate2 = (part[:, None] for part in parts)
        x = x + gate * self.attend(self.norm1(x) * (1 + scale) + shift)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class Stack(nn.Module):
    """Blocks one after the other; ``around`` runs each."""

    def __init__(self, depth=3, around=lambda block, x, c: block(x, c)):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.around = around

    def forward(self, x, c):
        for block in self.blocks:
            x = self.around(block, x, c)
        return x
