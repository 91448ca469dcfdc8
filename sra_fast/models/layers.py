"""Layers under the published parameter names (DiT, arXiv 2212.09748; SiT, arXiv 2401.08740; SD3,
arXiv 2403.03206).
"""

import math
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sra_fast import ops
from sra_fast.models.conditioning import ClassLabels
from sra_fast.models.token_groups import Segments
from sra_fast.ops._backend import autocast


def patches_of(images: Tensor, patch_size: int) -> Tensor:
    """``[B, C, H, W]`` -> ``[B, T, C, p, p]``, along the rows of an image."""
    B, C, H, W = images.shape
    p = patch_size
    # [B, C, rows, p, columns, p] -> [B, rows, columns, C, p, p]
    patches = images.view(B, C, H // p, p, W // p, p).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(B, (H // p) * (W // p), C, p, p)


def images_of(patches: Tensor) -> Tensor:
    """The inverse of ``patches_of`` for square images: ``[B, T, C, p, p]`` -> ``[B, C, H, W]``."""
    B, T, C, p, _ = patches.shape
    grid = round(T**0.5)
    # [B, rows, columns, C, p, p] -> [B, C, rows, p, columns, p]
    images = patches.view(B, grid, grid, C, p, p).permute(0, 3, 1, 4, 2, 5)
    return images.reshape(B, C, grid * p, grid * p)


class PatchProjection(nn.Conv2d):
    """A convolution of patches that do not overlap, as one product: ``[B, C, H, W]`` -> ``[B, T,
    D]``, contiguous.

    Parameters and their initial values are the convolution's.  On CUDA its forward pass and its
    weight's gradient would be cuDNN's, channels first: passes over [B, D, T] that only change the
    order.
    """

    bias: nn.Parameter

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int):
        super().__init__(in_channels, hidden_size, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        # a patch in the order of the weight's last three dimensions
        patches = patches_of(x, self.kernel_size[0]).flatten(2)
        return F.linear(patches, self.weight.flatten(1), self.bias)


class PatchEmbed(nn.Module):
    """``[B, C, H, W]`` -> ``[B, T, D]``, T = (H / patch_size)(W / patch_size)."""

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int):
        super().__init__()
        # a module of its own, so that what gathers its weights (ZeRO 3, FSDP) sees the call
        self.proj = PatchProjection(patch_size, in_channels, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


def timestep_frequencies(count: int, device=None) -> Tensor:
    """Angular frequencies ``[count]`` fp32 of the sinusoid of a time, from 1 towards 1e-4."""
    return torch.exp(
        torch.arange(count, device=device, dtype=torch.float32) * (-math.log(10000) / count)
    )


def timestep_features(t: Tensor, size: int = 256) -> Tensor:
    """Cosines and sines of raw times, ``[B]`` -> ``[B, size]`` fp32 (``[B, G]`` -> ``[B, G,
    size]``): what the MLP of a ``TimestepEmbedder`` sees.
    """
    phase = t.float()[..., None] * timestep_frequencies(size // 2, t.device)
    return torch.cat([phase.cos(), phase.sin()], dim=-1)


class TimestepEmbedder(nn.Module):
    """An MLP of two layers on the sinusoid of the time: ``[B]`` -> ``[B, D]``.

    Its input may also be the sinusoid itself, ``timestep_features`` ``[B, frequency_size]``:
    student and teacher share one computation of it. Of images with G times only the sinusoid is
    taken, ``[B, G, frequency_size]`` -> ``[B, G, D]``.
    """

    def __init__(self, hidden_size: int, frequency_size: int = 256):
        super().__init__()
        self.frequency_size = frequency_size
        self.mlp = nn.Sequential(
            nn.Linear(frequency_size, hidden_size),
            nn.SiLU(),
            nn.Linear(hidden_size, hidden_size),
        )

    def forward(self, t: Tensor) -> Tensor:
        features = timestep_features(t, self.frequency_size) if t.dim() == 1 else t
        dtype = next(self.mlp.parameters()).dtype
        return self.mlp(features.to(dtype))


class LabelEmbedder(nn.Module):
    """The embedding of ``ClassLabels``: ``[B]`` -> ``[B, D]``.

    Row ``num_classes`` is the null class of classifier-free guidance. It exists only if
    ``dropout_prob`` is positive.
    """

    def __init__(self, num_classes: int, hidden_size: int, dropout_prob: float):
        super().__init__()
        self.num_classes = num_classes
        self.dropout_prob = dropout_prob
        self.embedding_table = nn.Embedding(num_classes + (dropout_prob > 0), hidden_size)

    def forward(self, condition: ClassLabels) -> Tensor:
        labels = condition.labels
        drop = condition.drop
        if self.dropout_prob > 0:
            if drop is None and self.training:
                drop = torch.rand(labels.shape, device=labels.device) < self.dropout_prob
            if drop is not None:
                # no index of the dropped labels: its length would depend on the data, which a graph
                # cannot have
                labels = torch.where(drop, self.num_classes, labels)
        return self.embedding_table(labels)


class Projections(nn.Module):
    """The products before and after multi-head attention.

    They are only held here: ``StreamBlock`` fuses them with the norm before and the gate after.

    Args:
        hidden_size: width D.
        num_heads: attention heads.

    Attributes:
        proj: made by whoever has norms, in the order of the published state dict.
    """

    proj: nn.Linear

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)

    def by_head(self, x: Tensor) -> Tensor:
        """``[B, T, D]`` -> ``[B, T, H, d]``, a view."""
        B, T, D = x.shape
        return x.view(B, T, self.num_heads, D // self.num_heads)


class Attention(Projections):
    """Multi-head self-attention between its two projections."""

    def __init__(self, hidden_size: int, num_heads: int, qk_norm: bool):
        super().__init__(hidden_size, num_heads)
        self.q_norm = nn.LayerNorm(hidden_size // num_heads) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(hidden_size // num_heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments | None = None) -> Tensor:
        """Queries, keys and values ``[B, T, D]`` -> ``[B, T, D]``.

        ``segments``: lengths of the runs of tokens inside which attention stays.
        """
        q = self.q_norm(self.by_head(q))
        k = self.k_norm(self.by_head(k))
        return ops.attention(q, k, self.by_head(v), segments=segments).flatten(2)


class Mlp(nn.Module):
    """The weights of a block's MLP, which runs as ``ops.adaln_mlp``."""

    def __init__(self, hidden_size: int, mlp_size: int):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, mlp_size)
        self.fc2 = nn.Linear(mlp_size, hidden_size)


# what a half-block has yet to add to the residual stream: its output [B, T, D], its gate [B, D]
# (with groups [B, G, D]), and the bias [D] of its last product, or None if the output already
# contains it
Pending = tuple[Tensor, Tensor, Tensor | None]


class StreamBlock(nn.Module):
    """One stream of tokens in an adaLN-Zero transformer block: everything but attention itself,
    which comes between ``heads`` and ``outputs``.

    A block does not add its last half-block to the residual stream. It returns that output as
    pending, and the next block adds it. The gate of one half-block, the addition and the norm of
    the next one are therefore a single pass over memory, across blocks too.

    Args:
        attn: has ``qkv`` and, if there is an output, ``proj``.
        hidden_size: width D.
        mlp_ratio: MLP width over D.
        recompute: what the backward pass recomputes: ``"none"``; ``"norm"``, the outputs of the
            norms and of GELU, which the kernels write again in passes that run anyway; ``"full"``,
            everything inside the block.
        defer_bias: leave the MLP's last bias to the pass that adds the pending output, where its
            gradient costs nothing. The parameter must be whole at that point: true under ZeRO 0 to
            2, false where blocks are gathered one by one (ZeRO 3, FSDP).
        has_output: whether the tokens go on after attention; if not, there is no MLP.
        modulations: vectors [D] that the conditioning gives: shift, scale and gate of both
            half-blocks, or the first two of them alone.
    """

    def __init__(
        self,
        attn: Projections,
        hidden_size: int,
        mlp_ratio: float,
        recompute: str = "none",
        defer_bias: bool = False,
        has_output: bool = True,
        modulations: int = 6,
    ):
        super().__init__()
        self.recompute = recompute
        self.defer_bias = defer_bias
        self.modulations = modulations
        self.attn = attn
        if has_output:
            # rounded: a ratio that is read back from the weights may lie just below its width
            mlp_width = round(hidden_size * mlp_ratio)
            if mlp_width < 1:
                raise ValueError(f"mlp_ratio must give an MLP of at least 1 unit, got {mlp_ratio}")
            self.mlp = Mlp(hidden_size, mlp_width)
        projection = nn.Linear(hidden_size, modulations * hidden_size)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), projection)

    def modulation(self, c: Tensor) -> tuple[Tensor, ...]:
        """Shift, scale and gate of attention, then of the MLP, each ``[B, D]`` (groups: ``[B, G,
        D]``), from the conditioning after the SiLU that all blocks share.
        """
        _, projection = self.adaLN_modulation
        return projection(c).chunk(self.modulations, dim=-1)

    def heads(
        self,
        x: Tensor,
        shift: Tensor,
        scale: Tensor,
        pending: Pending | None,
        group: Tensor | None = None,
        queries: bool = True,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Add what is pending, norm, modulate, project: the stream ``[B, T, D]``, and queries, keys
        and values ``[B, T, D]``, without ``queries`` only the last two.
        """
        qkv = self.attn.qkv
        weight, bias = qkv.weight, qkv.bias
        if not queries:
            # the rows of keys and values
            width = x.shape[-1]
            weight, bias = (rows.narrow(0, width, 2 * width) for rows in (weight, bias))
        x, found = ops.adaln_linear(
            x,
            shift,
            scale,
            weight,
            bias,
            residual=pending,
            group=group,
            recompute=self.recompute == "norm",
            parts=3 if queries else 2,
        )
        return x, cast(tuple[Tensor, ...], found)

    def outputs(
        self,
        x: Tensor,
        attended: Tensor,
        modulation: tuple[Tensor, ...],
        group: Tensor | None = None,
    ) -> tuple[Tensor, Pending]:
        """The output of attention ``[B, T, D]`` and the MLP: the stream and what is pending."""
        _, _, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation
        proj = self.attn.proj
        fc1, fc2 = self.mlp.fc1, self.mlp.fc2
        # the projection's bias is added together with its gate, by the next pass over the stream
        attended = F.linear(attended, proj.weight)
        # add the gated attention, norm, modulate, two products with GELU between them
        x, y = ops.adaln_mlp(
            x,
            shift_mlp,
            scale_mlp,
            fc1.weight,
            fc1.bias,
            fc2.weight,
            None if self.defer_bias else fc2.bias,
            residual=(attended, gate_msa, proj.bias),
            group=group,
            recompute=self.recompute == "norm",
        )
        return x, (y, gate_mlp, fc2.bias if self.defer_bias else None)


def recomputed(recompute: str, forward: Callable, *inputs):
    """``forward(*inputs)``, whose backward pass runs it again if ``recompute`` is ``"full"``."""
    if recompute != "full" or not torch.is_grad_enabled():
        return forward(*inputs)
    # nothing in a block draws random numbers, so there is no generator state to restore
    return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False)


class Block(StreamBlock):
    """adaLN-Zero transformer block of one stream, whose tokens attend to each other.

    Args:
        hidden_size: width D.
        num_heads: attention heads.
        mlp_ratio: MLP width over D.
        qk_norm: LayerNorm on the queries and keys of each head.
        recompute, defer_bias: see ``StreamBlock``.
    """

    attn: Attention

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        mlp_ratio: float,
        qk_norm: bool,
        recompute: str = "none",
        defer_bias: bool = False,
    ):
        attn = Attention(hidden_size, num_heads, qk_norm)
        super().__init__(attn, hidden_size, mlp_ratio, recompute, defer_bias)

    def forward(
        self,
        x: Tensor,
        c: Tensor,
        pending: Pending | None = None,
        group: Tensor | None = None,
        segments: Segments | None = None,
    ) -> tuple[Tensor, Pending]:
        """Run the block.

        Args:
            x: ``[B, T, D]`` residual stream, in the weights' dtype or in fp32.
            c: ``[B, D]`` conditioning, after the SiLU that all blocks share; with groups ``[B, G,
                D]``.
            pending: what the block before has yet to add to ``x``.
            group: ``[B, T]`` integers in [0, G): whose conditioning each token has; None: that of
                its image.
            segments: lengths of the runs of tokens inside which attention stays; see
                ``TokenGroups``.

        Returns:
            The residual stream ``[B, T, D]`` and what is pending now.
        """
        return recomputed(self.recompute, self._forward, x, c, pending, group, segments)

    def _forward(
        self,
        x: Tensor,
        c: Tensor,
        pending: Pending | None,
        group: Tensor | None,
        segments: Segments | None,
    ) -> tuple[Tensor, Pending]:
        modulation = self.modulation(c)
        x, heads = self.heads(x, modulation[0], modulation[1], pending, group)
        return self.outputs(x, self.attn(*heads, segments), modulation, group)


def add_pending(x: Tensor, pending: Pending, group: Tensor | None = None) -> Tensor:
    """The residual stream ``[B, T, D]`` with the pending output of the last half-block added."""
    y, gate, bias = pending
    return ops.gated_residual(x, y, gate, bias=bias, group=group)


class FinalLayer(nn.Module):
    """Modulated norm and a linear layer: the prediction of every patch. Inputs as ``Block``'s."""

    def __init__(self, hidden_size: int, out_size: int):
        super().__init__()
        self.linear = nn.Linear(hidden_size, out_size)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(
        self,
        x: Tensor,
        c: Tensor,
        pending: Pending | None = None,
        group: Tensor | None = None,
    ) -> Tensor:
        shift, scale = self.adaLN_modulation[1](c).chunk(2, dim=-1)
        weight, bias = self.linear.weight, self.linear.bias
        _, prediction = ops.adaln_linear(
            x, shift, scale, weight, bias, residual=pending, group=group
        )
        return cast(Tensor, prediction)


def as_weights(x: Tensor, weight: Tensor) -> Tensor:
    """Features in the dtype of a layer; autocast rounds an fp32 residual stream itself."""
    return x if autocast(x) else x.to(weight.dtype)


class ProjectionHead(nn.Module):
    """Linear(D, 2D) - SiLU - Linear(2D, D): maps student features before alignment (SRA, Sec.
    3.3).
    """

    def __init__(self, hidden_size: int):
        super().__init__()
        self.linear1 = nn.Linear(hidden_size, 2 * hidden_size)
        self.act = nn.SiLU()
        self.linear2 = nn.Linear(2 * hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        x = as_weights(x, self.linear1.weight)
        return self.linear2(self.act(self.linear1(x)))


def sincos_line(grid_size: int, hidden_size: int, start: float = 0.0, step: float = 1.0) -> Tensor:
    """Sines, then cosines of the places ``start + i step`` along one axis, ``[grid_size, D/2]``
    float64.
    """
    quarter = hidden_size // 4
    omega = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    positions = start + step * torch.arange(grid_size, dtype=torch.float64)
    phase = positions[:, None] * omega
    return torch.cat([phase.sin(), phase.cos()], dim=1)


def sincos_pos_embed(
    grid_size: int, hidden_size: int, start: float = 0.0, step: float = 1.0
) -> Tensor:
    """Fixed 2-d sine-cosine position embedding ``[1, grid_size^2, D]`` fp32.

    The first half of the channels encodes the column, the second the row; see ``sincos_line``.
    """
    line = sincos_line(grid_size, hidden_size, start, step).float()
    # tokens run along the rows of the image: the column changes fastest
    column = line.repeat(grid_size, 1)
    row = line.repeat_interleave(grid_size, dim=0)
    return torch.cat([column, row], dim=1)[None]
