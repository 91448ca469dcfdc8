"""The residual update of an adaLN-Zero block, alone and with the next half-block's modulated LayerNorm."""
from torch import Tensor

from sra_fast.ops._backend import upcast
from sra_fast.ops.adaln import adaln


def gated_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """``x + gate * y`` computed in fp32 and rounded once.

    Args:
        x: ``[B, T, D]`` residual stream.
        y: ``[B, T, D]`` output of the attention or the MLP.
        gate: ``[B, D]``; may be a column slice of the 6*D adaLN projection.

    Returns:
        ``[B, T, D]`` in ``x.dtype``.

    Raises:
        ValueError: the shapes do not fit.
    """
    if x.dim() != 3 or y.shape != x.shape or gate.shape != (x.shape[0], x.shape[2]):
        raise ValueError(f"expected x, y [B, T, D] and gate [B, D], got {[*x.shape]}, {[*y.shape]}, {[*gate.shape]}")
    return (upcast(x) + upcast(gate)[:, None] * upcast(y)).to(x.dtype)


def gated_residual_adaln(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """``x' = x + gate * y`` and ``h = layer_norm(x') * (1 + scale) + shift``.

    Args:
        x: ``[B, T, D]`` residual stream.
        y: ``[B, T, D]`` output of the half-block that ends.
        gate: ``[B, D]`` of the half-block that ends.
        shift: ``[B, D]`` of the half-block that begins.
        scale: ``[B, D]`` of the half-block that begins.
        eps: added to the variance.

    Returns:
        ``(x', h)``, each ``[B, T, D]`` in ``x.dtype``.

    Raises:
        ValueError: the shapes do not fit.
    """
    x = gated_residual(x, y, gate)
    return x, adaln(x, shift, scale, eps)
