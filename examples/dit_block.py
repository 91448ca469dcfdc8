"""A plain DiT block, and the same block with sra_fast.ops:  python examples/dit_block.py

Only the two lines of ``forward`` that norm, modulate, gate and add change. The parameters, their
names and the results stay the same. On a CUDA tensor the operators are Triton kernels, on a CPU
the same formulas in PyTorch.
"""

import torch
from torch import nn

from sra_fast import ops


def modulate(x, shift, scale):
    return x * (1 + scale[:, None]) + shift[:, None]


class PlainBlock(nn.Module):
    """The block as DiT writes it."""

    def __init__(self, width: int = 128, heads: int = 4):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width)
        )
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def attend(self, h):
        return self.attn(h, h, h, need_weights=False)[0]

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c).chunk(6, dim=1)
        x = x + gate1[:, None] * self.attend(modulate(self.norm1(x), shift1, scale1))
        x = x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))
        return x


class FusedBlock(PlainBlock):
    """The same block with the fused operators."""

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c).chunk(6, dim=1)
        y = self.attend(ops.adaln(x, shift1, scale1))
        # one read of x and y, one write of x and h
        x, h = ops.gated_residual_adaln(x, y, gate1, shift2, scale2)
        return ops.gated_residual(x, self.mlp(h), gate2)


def compare(device: str = "cpu") -> float:
    """Largest difference of outputs and gradients between the two blocks, relative to the largest
    value.
    """
    torch.manual_seed(0)
    plain = PlainBlock().to(device)
    fused = FusedBlock().to(device)
    fused.load_state_dict(plain.state_dict())
    x = torch.randn(4, 64, 128, device=device)
    c = torch.randn(4, 128, device=device)
    results = []
    for block in (plain, fused):
        out = block(x, c)
        grads = torch.autograd.grad(out.square().sum(), list(block.parameters()))
        results.append([out, *grads])
    # outputs first, then one gradient per parameter
    differences = [(a - b).abs().max() / a.abs().max() for a, b in zip(*results, strict=True)]
    return max(difference.item() for difference in differences)


if __name__ == "__main__":
    device = "cuda" if torch.cuda.is_available() else "cpu"
    difference = compare(device)
    print(f"the blocks differ by {difference:.1e} (relative, outputs and gradients, {device})")
