"""Rows in e4m3 with one scale each, optionally with the GELU before them."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sra_fast.kernels import quantize_rows as kernels
from sra_fast.ops._backend import check_tensors, takes_kernel
from sra_fast.ops._register import register

E4M3 = kernels.E4M3
# the largest number of e4m3
E4M3_MAX = 448.0


class Rows(NamedTuple):
    """``values * scale``: ``values [..., K]`` e4m3, ``scale [..., 1]`` fp32."""

    values: Tensor
    scale: Tensor

    def dequantize(self) -> Tensor:
        """``[..., K]`` fp32."""
        return self.values.float() * self.scale


def quantize_rows_ref(x: Tensor, *, gelu: bool = False) -> Rows:
    """The definition, in fp32."""
    v = F.gelu(x.float(), approximate="tanh") if gelu else x.float()
    scale = v.abs().amax(-1, keepdim=True).clamp(min=1e-12) / E4M3_MAX
    return Rows((v / scale).to(E4M3), scale)


def empty_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Uninitialized values and scale of the rows of ``x [..., K]``."""
    values = x.new_empty(x.shape, dtype=E4M3)
    scale = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    return values, scale


_op = register(
    "quantize_rows(Tensor x, bool gelu) -> (Tensor, Tensor)",
    kernels.quantize_rows,
    lambda x, gelu: empty_rows(x),
)


@torch.no_grad()
def quantize_rows(x: Tensor, *, gelu: bool = False, backend: str | None = None) -> Rows:
    """Each row of ``x`` in e4m3, with the scale that puts its largest magnitude at 448; no
    gradient.

    Args:
        x: ``[..., K]`` bf16/fp16/fp32; copied first unless contiguous.
        gelu: take tanh-GELU of x first.
        backend: ``"triton"``, ``"torch"`` or ``"auto"``; default: ``$SRA_FAST_BACKEND``, else auto.

    Returns:
        ``Rows`` of the shape of ``x``.

    Raises:
        ValueError: ``x`` is not a floating-point tensor with rows, or ``backend`` is unknown.
    """
    check_tensors("quantize_rows", {"x": x})
    if x.dim() < 2 or not x.is_floating_point():
        raise ValueError(
            f"quantize_rows: expected x [..., K] of a floating-point dtype, got {[*x.shape]} {x.dtype}"
        )
    if not takes_kernel("quantize_rows", backend, x):
        return quantize_rows_ref(x, gelu=gelu)
    # the kernel sees a matrix; leading dimensions come back as views
    values, scale = _op(x.reshape(-1, x.shape[-1]).contiguous(), gelu)
    return Rows(values.view(x.shape), scale.view(*x.shape[:-1], 1))
