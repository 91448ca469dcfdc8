"""Scaled dot-product attention over tokens-first heads."""
import torch.nn.functional as F
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``softmax(q k^T / sqrt(d)) v`` for every head; PyTorch picks the implementation.

    Args:
        q: ``[B, T, H, d]``; views of a fused qkv projection are used in place.
        k: ``[B, T, H, d]``.
        v: ``[B, T, H, d]``.

    Returns:
        ``[B, T, H, d]`` in ``q.dtype``.

    Raises:
        ValueError: the shapes differ or are not four-dimensional.
    """
    if q.dim() != 4 or k.shape != q.shape or v.shape != q.shape:
        raise ValueError(f"expected q, k, v of one shape [B, T, H, d], got {[*q.shape]}, {[*k.shape]}, {[*v.shape]}")
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
