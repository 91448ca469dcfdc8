"""Layers of SiT and DiT under the reference's parameter names (DiT, arXiv 2212.09748; SiT, arXiv 2401.08740)."""
import math

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from sra_fast import ops


class PatchEmbed(nn.Module):
    """``[B, C, H, W]`` -> ``[B, T, D]``, T = (H / patch_size)(W / patch_size)."""

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


def timestep_frequencies(count: int, device=None) -> Tensor:
    """Angular frequencies ``[count]`` fp32 of the sinusoid of a time, from 1 towards 1e-4."""
    return torch.exp(torch.arange(count, device=device, dtype=torch.float32) * (-math.log(10000) / count))


def timestep_features(t: Tensor, size: int = 256) -> Tensor:
    """Cosines and sines of raw times, ``[B]`` -> ``[B, size]`` fp32: what the MLP of a ``TimestepEmbedder`` sees."""
    phase = t.float()[:, None] * timestep_frequencies(size // 2, t.device)
    return torch.cat([phase.cos(), phase.sin()], dim=1)


class TimestepEmbedder(nn.Module):
    """``timestep_features`` of the raw time, unless it is they that are given, then a two-layer MLP: ``[B]`` -> ``[B, D]``."""

    def __init__(self, hidden_size: int, frequency_size: int = 256):
        super().__init__()
        self.frequency_size = frequency_size
        self.mlp = nn.Sequential(
            nn.Linear(frequency_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, t: Tensor) -> Tensor:
        features = timestep_features(t, self.frequency_size) if t.dim() == 1 else t
        return self.mlp(features.to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """Class embedding; row ``num_classes`` is the null class of classifier-free guidance (only if labels drop)."""

    def __init__(self, num_classes: int, hidden_size: int, dropout_prob: float):
        super().__init__()
        self.num_classes = num_classes
        self.dropout_prob = dropout_prob
        self.embedding_table = nn.Embedding(num_classes + (dropout_prob > 0), hidden_size)

    def forward(self, y: Tensor, drop: Tensor | None = None) -> Tensor:
        if drop is None and self.training and self.dropout_prob > 0:
            drop = torch.rand(y.shape, device=y.device) < self.dropout_prob
        if drop is not None and self.dropout_prob > 0:
            y = torch.where(drop, self.num_classes, y)
        return self.embedding_table(y)


class Attention(nn.Module):
    def __init__(self, hidden_size: int, num_heads: int, qk_norm: bool):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.q_norm = nn.LayerNorm(hidden_size // num_heads) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(hidden_size // num_heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(self.qkv(x))

    def attend(self, qkv: Tensor) -> Tensor:
        """``[B, T, 3D]`` -> ``[B, T, D]``: everything after the first projection."""
        B, T, D = *qkv.shape[:2], qkv.shape[2] // 3
        q, k, v = qkv.view(B, T, 3, self.num_heads, D // self.num_heads).unbind(2)
        return self.proj(ops.attention(self.q_norm(q), self.k_norm(k), v).reshape(B, T, D))


class LinearGelu(nn.Linear):
    """A linear layer and tanh-GELU: a module, so that ZeRO-3 has its weight there when it runs."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear_gelu(x, self.weight, self.bias)


class Mlp(nn.Module):
    def __init__(self, hidden_size: int, mlp_size: int):
        super().__init__()
        self.fc1 = LinearGelu(hidden_size, mlp_size)
        self.fc2 = nn.Linear(mlp_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x))


# what a half-block adds to the residual stream, not added yet: its output [B, T, D] and its gate [B, D]
Pending = tuple[Tensor, Tensor]


def add_and_norm(x: Tensor, pending: Pending | None, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Residual stream with ``pending`` added, and its modulated LayerNorm: one pass over both."""
    if pending is None:
        return x, ops.adaln(x, shift, scale)
    return ops.gated_residual_adaln(x, *pending, shift, scale)


def _policy(ctx, op, *args, **kwargs) -> CheckpointPolicy:
    name = op.name().partition(".")[0]
    product = name in ("aten::mm", "aten::addmm", "aten::bmm") or "attention" in name or "flash_attn" in name
    return CheckpointPolicy.MUST_SAVE if product else CheckpointPolicy.PREFER_RECOMPUTE


def _keep_products():
    """Selective activation checkpointing: keeps the outputs of matrix products and attention, recomputes the rest."""
    return create_selective_checkpoint_contexts(_policy)


class Block(nn.Module):
    """adaLN-Zero transformer block.

    Takes the residual stream ``x [B, T, D]``, the conditioning ``c [B, D]`` and what the block before left pending, and
    returns the stream and what it leaves pending itself: so that the gate of one half-block, the addition and the norm of
    the next are one pass, across blocks too.

    Attributes:
        recompute: what the backward pass computes again instead of keeping it: ``"none"``, ``"norm"`` (all but matrix products
            and attention) or ``"full"``.
    """

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float, qk_norm: bool):
        super().__init__()
        self.recompute = "none"
        self.attn = Attention(hidden_size, num_heads, qk_norm)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x: Tensor, c: Tensor, pending: Pending | None = None) -> tuple[Tensor, Pending]:
        if self.recompute == "none" or not torch.is_grad_enabled():
            return self._forward(x, c, pending)
        context = {"context_fn": _keep_products} if self.recompute == "norm" else {}
        return checkpoint(self._forward, x, c, pending, use_reentrant=False, preserve_rng_state=False, **context)

    def _forward(self, x: Tensor, c: Tensor, pending: Pending | None) -> tuple[Tensor, Pending]:
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        x, h = add_and_norm(x, pending, shift_msa, scale_msa)
        x, h = add_and_norm(x, (self.attn(h), gate_msa), shift_mlp, scale_mlp)
        return x, (self.mlp(h), gate_mlp)


class FinalLayer(nn.Module):
    def __init__(self, hidden_size: int, out_size: int):
        super().__init__()
        self.linear = nn.Linear(hidden_size, out_size)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, c: Tensor, pending: Pending | None = None) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(add_and_norm(x, pending, shift, scale)[1])


class ProjectionHead(nn.Module):
    """Linear(D, 2D) - SiLU - Linear(2D, D): maps student features before alignment (SRA, Sec. 3.3)."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.linear1 = nn.Linear(hidden_size, 2 * hidden_size)
        self.act = nn.SiLU()
        self.linear2 = nn.Linear(2 * hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear2(self.act(self.linear1(x)))


def sincos_pos_embed(grid_size: int, hidden_size: int) -> Tensor:
    """Fixed 2-d sine-cosine position embedding ``[1, grid_size^2, D]`` fp32.

    The first half of the channels encodes the column, the second the row; in each, sines then cosines.
    """
    quarter = hidden_size // 4
    omega = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    phase = torch.arange(grid_size, dtype=torch.float64)[:, None] * omega
    line = torch.cat([phase.sin(), phase.cos()], dim=1)  # [grid, D/2]
    column, row = line.repeat(grid_size, 1), line.repeat_interleave(grid_size, dim=0)
    return torch.cat([column, row], dim=1).float()[None]
