"""A plain diffusion transformer, and one line for it:  python examples/one_line_dit.py

The model is written as DiT is, and nothing of it changes: not its forward pass, its parameters,
their names or its results. The line puts the operators where norms are modulated and residuals are
gated. On a CUDA tensor they are Triton kernels, on a CPU the same formulas in PyTorch.
"""

import torch
from torch import nn

from sra_fast import integrations


def modulate(x, shift, scale):
    return x * (1 + scale[:, None]) + shift[:, None]


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width)
        )
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c).chunk(6, dim=1)
        h = modulate(self.norm1(x), shift1, scale1)
        x = x + gate1[:, None] * self.attn(h, h, h, need_weights=False)[0]
        x = x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))
        return x


class DiT(nn.Module):
    """Tokens ``[B, T, C]`` and a condition ``[B, D]`` to tokens."""

    def __init__(self, channels: int = 16, width: int = 128, depth: int = 4, heads: int = 4):
        super().__init__()
        self.embed = nn.Linear(channels, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.head = nn.Linear(width, channels)

    def forward(self, x, c):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x, c)
        shift, scale = self.modulation(c).chunk(2, dim=1)
        return self.head(modulate(self.norm(x), shift, scale))


def results(model: nn.Module, x, c) -> list:
    """The output, and a gradient per parameter."""
    out = model(x, c)
    return [out, *torch.autograd.grad(out.square().mean(), list(model.parameters()))]


def compare(device: str = "cpu", then: str = "inductor") -> tuple[float, integrations.Report]:
    """Largest difference that the line makes, relative to the largest value of each result, and
    what it did.
    """
    torch.manual_seed(0)
    model = DiT().to(device)
    x = torch.randn(2, 16, 16, device=device)
    c = torch.randn(2, 128, device=device)
    before = results(model, x, c)
    integrations.compile(model, then=then)  # the one line
    after = results(model, x, c)
    differences = [(a - b).abs().max() / b.abs().max() for a, b in zip(after, before, strict=True)]
    return max(difference.item() for difference in differences), integrations.report(model)


if __name__ == "__main__":
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # compiling C++ for a CPU would take half a minute
    difference, report = compare(device, then="inductor" if device == "cuda" else "aot_eager")
    print(report)
    print(f"the line changes results by {difference:.1e} (relative, with gradients, {device})")
