"""Rows in e4m3 with one scale each, the GELU before them in the same pass.

    v = x  or  gelu_tanh(x);   scale = max |v| / 448;   q = round(v / scale)

One program per row, the row in registers.  Reference: sra_fast/ops/fp8.py::quantize_rows_ref.

Bytes moved, s per element of x (2 in bf16): (s + 1) M K (x; q) + 4 M (scales).
"""
import torch
import triton
import triton.language as tl
from torch import Tensor

from ._rows import E4M3, load_fp32, store_row, width_config


@triton.jit
def _gelu(x):
    """tanh-GELU as x sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3)."""
    return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def _quantize_rows_kernel(
    x_ptr,  # [M, K]
    q_ptr,  # [M, K] e4m3
    scale_ptr,  # [M] fp32
    D: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    GELU: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols, cols2 = tl.arange(0, HEAD), HEAD + tl.arange(0, TAIL if TAIL else 1)
    at, at2 = row * D + cols, row * D + cols2
    x, x2 = load_fp32(x_ptr, at, cols < D), load_fp32(x_ptr, at2, cols2 < D)
    if GELU:
        x, x2 = _gelu(x), _gelu(x2)
    store_row(q_ptr, scale_ptr, row, True, x, x2, at, cols < D, at2, cols2 < D, TAIL)


def quantize_rows(x: Tensor, gelu: bool) -> tuple[Tensor, Tensor]:
    """q ``[M, K]`` e4m3 and scale ``[M, 1]`` fp32 of a contiguous ``x [M, K]``."""
    assert x.is_contiguous()
    M, K = x.shape
    q, scale = x.new_empty(M, K, dtype=E4M3), x.new_empty(M, 1, dtype=torch.float32)
    _quantize_rows_kernel[(M,)](x, q, scale, GELU=gelu, **width_config(K), enable_fp_fusion=True)
    return q, scale
