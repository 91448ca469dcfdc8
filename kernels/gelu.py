"""The backward pass of tanh-GELU, the gradient of the bias before it and its output again, in one pass.

    y = gelu_tanh(x);   dx = dy y'(x);   dbias = sum over rows of dx

A program owns some columns and walks some rows; it leaves one fp32 partial sum, added in a fixed order (no atomics: bitwise
repeatable).  Reference: torch.nn.functional.gelu, used by sra_fast/ops/adaln_mlp.py.

Bytes, everything moved once, s per element of x [M, N] (2 in bf16):
    3 s M N (dy, x; dx), s M N more where y is wanted, and s N (dbias)
P programs share the rows of a column: 8 P N bytes more (an fp32 sum written and read).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._rows import num_sms, num_splits, sum_partials

# a thread has 8 columns, 128 bits in bf16, of each of ROWS rows
BLOCK = 512
ROWS = 2
# so many programs of 64 threads and 96 registers share an SM of Hopper: 40 KiB of loads in flight
PROGRAMS_PER_SM = 10
# 32-bit registers per thread, at most; 4 rows take 182 in half precision, and spill if they may not
REGISTERS = {"_gelu_bwd_kernel": 113}


@triton.jit
def _gelu_bwd_kernel(
    dy_ptr,  # [M, N]
    x_ptr,  # [M, N]
    dx_ptr,  # [M, N]
    y_ptr,  # [M, N], or None: what the forward pass gave
    part_ptr,  # [P, N] fp32
    M,
    N,
    num_rows,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    p = tl.program_id(1).to(tl.int64)
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for m in range(p * num_rows, (p + 1) * num_rows, ROWS):
        row = m + tl.arange(0, ROWS)
        at, mask = row[:, None] * N + cols, (row < M)[:, None] & (cols < N)
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32)
        # x sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3): the tanh form, without cancellation where it is small
        sigmoid = tl.sigmoid(x * (1.5957691216057308 + 0.07135481282562635 * x * x))
        slope = x * (1.0 - sigmoid) * (1.5957691216057308 + 0.21406443847687905 * x * x)
        dx = dy * sigmoid * (1.0 + slope)
        tl.store(dx_ptr + at, dx, mask=mask)
        if y_ptr is not None:
            tl.store(y_ptr + at, x * sigmoid, mask=mask)
        sums += dx
    tl.store(part_ptr + p * N + cols, tl.sum(sums, axis=0), mask=cols < N)


def gelu_bwd(dy: Tensor, x: Tensor, want_y: bool) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dbias ``[N]`` and y (empty unless wanted) of contiguous dy, x ``[M, N]``."""
    M, N = x.shape
    assert dy.is_contiguous() and x.is_contiguous()
    block = min(BLOCK, triton.next_power_of_2(N))
    blocks, steps = triton.cdiv(N, block), triton.cdiv(M, ROWS)
    P = num_splits(blocks, steps, num_sms(x.device) * PROGRAMS_PER_SM)
    dx, y, part = (
        x.new_empty(M, N),
        x.new_empty(x.shape if want_y else 0),
        x.new_empty(1, P, 1, N, dtype=torch.float32),
    )
    _gelu_bwd_kernel[(blocks, P)](
        *(dy, x, dx, y if want_y else None, part, M, N, triton.cdiv(steps, P) * ROWS),
        ROWS=ROWS,
        BLOCK=block,
        num_warps=max(block // 256, 1),
        enable_fp_fusion=True,
    )
    dbias = x.new_empty(N)
    sum_partials(part, total=dbias)
    return dx, dbias, y
