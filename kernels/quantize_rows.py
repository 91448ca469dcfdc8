"""Rows in e4m3 with one scale each, optionally with the GELU before them in the same pass.

    v = x  or  gelu_tanh(x);   scale = max |v| / 448;   q = round(v / scale)

One program with few warps per row, the row in registers: many rows are in progress on an SM, each
in another phase.
Reference: sra_fast/ops/quantize_rows.py::quantize_rows_ref.

Bytes moved, s per element of x (2 in bf16): (s + 1) M K (x; q) + 4 M (scales). Instructions count
as well: at 35 per element an H100 issues for longer than it moves bytes; here they are 13.4.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._rows import E4M3, e4m3_scale

# a row is held in this many blocks at most, with 8 columns per thread: 128 bits in bf16. SiT-XL's
# 4608 columns are 9 blocks of 2 warps
MAX_BLOCKS = 9
# upper limit of 32-bit registers per thread: ten rows of SiT-XL share an SM of Hopper, 90 KB
REGISTERS = {"_quantize_rows_kernel": 96}


@triton.jit
def _gelu(x):
    """tanh-GELU as x / (1 + 2^u), u = -2 log2(e) sqrt(2/pi) (x + 0.044715 x^3)."""
    t = 1.0 + tl.exp2(x * (-2.302208198 - 0.1029432397 * x * x))
    # 1 / t in two instructions, where a division takes five; above t = 2^64 the square is infinite
    # and the result 0
    return x * tl.rsqrt(t * t)


@triton.jit
def _quantize_rows_kernel(
    x_ptr,  # [M, K]
    q_ptr,  # [M, K] e4m3
    scale_ptr,  # [M] fp32
    K: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    GELU: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * K
    q_ptr += row * K
    # issue the loads of the whole row before any of it is used
    blocks = ()
    for i in tl.static_range(NUM_BLOCKS):
        cols = i * BLOCK + tl.arange(0, BLOCK)
        blocks += (tl.load(x_ptr + cols, mask=cols < K, other=0.0),)

    # each thread takes the maximum of its own columns first: one reduction across threads
    values = ()
    amax = tl.zeros((BLOCK,), dtype=tl.float32)
    for i in tl.static_range(NUM_BLOCKS):
        v = blocks[i].to(tl.float32)
        if GELU:
            v = _gelu(v)
        amax = tl.maximum(amax, tl.abs(v))
        values += (v,)
    scale = e4m3_scale(tl.max(amax, axis=0))
    tl.store(scale_ptr + row, scale)

    # scale and round; one division per row, not one per element
    inverse = 1.0 / scale
    for i in tl.static_range(NUM_BLOCKS):
        cols = i * BLOCK + tl.arange(0, BLOCK)
        tl.store(q_ptr + cols, (values[i] * inverse).to(q_ptr.dtype.element_ty), mask=cols < K)


def quantize_rows(x: Tensor, gelu: bool) -> tuple[Tensor, Tensor]:
    """q ``[M, K]`` e4m3 and scale ``[M, 1]`` fp32 of a contiguous ``x [M, K]``."""
    assert x.is_contiguous()
    M, K = x.shape
    q = x.new_empty(M, K, dtype=E4M3)
    scale = x.new_empty(M, 1, dtype=torch.float32)
    # as few warps as hold the row
    num_warps = min(triton.next_power_of_2(triton.cdiv(K, 256 * MAX_BLOCKS)), 16)
    block = 256 * num_warps
    _quantize_rows_kernel[(M,)](
        x,
        q,
        scale,
        K,
        NUM_BLOCKS=triton.cdiv(K, block),
        BLOCK=block,
        GELU=gelu,
        num_warps=num_warps,
        enable_fp_fusion=True,
    )
    return q, scale
