"""The backward of tanh-GELU with the gradient of the bias before it; it can recompute GELU's output.

    y = gelu_tanh(x);   dx = dy y'(x);   dbias = sum over rows of dx

A program owns some columns and walks some rows. It leaves one fp32 partial sum. The partial sums
are added in a fixed order, without atomics, so the result is bitwise repeatable.
Reference: sra_fast/ops/gelu.py::gelu_bwd_ref.

Bytes, everything moved once, s per element of x [M, N] (2 in bf16):
    3 s M N (dy, x; dx), s M N more if y is recomputed, and s N (dbias)
P programs share the rows of a column: 8 P N bytes more (an fp32 sum written and read).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._rows import SHARES, num_sms, num_splits, sum_partials

# a thread has 8 columns, 128 bits in bf16, of each of ROWS rows
BLOCK = 512
ROWS = 2
# this many programs of 64 threads and 96 registers share an SM of Hopper: 40 KiB of loads in flight
PROGRAMS_PER_SM = 10
# upper limit of 32-bit registers per thread; 4 rows would take 182 in half precision, and spill
# below that
REGISTERS = {"_gelu_bwd_kernel": 113}


@triton.jit(do_not_specialize=SHARES)
def _gelu_bwd_kernel(
    dy_ptr,  # [M, N]
    x_ptr,  # [M, N]
    dx_ptr,  # [M, N]
    y_ptr,  # [M, N], the recomputed output of the forward, or None
    part_ptr,  # [P, N] fp32
    M,
    N,
    num_rows,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    split = tl.program_id(1).to(tl.int64)
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for m in range(split * num_rows, (split + 1) * num_rows, ROWS):
        row = m + tl.arange(0, ROWS)
        offsets = row[:, None] * N + cols
        mask = (row < M)[:, None] & (cols < N)
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)

        # y = x sigmoid(2u) with u = sqrt(2/pi) (x + 0.044715 x^3): the tanh form without the
        # cancellation of 1 + tanh(u) for negative x
        sigmoid = tl.sigmoid(x * (1.5957691216057308 + 0.07135481282562635 * x * x))
        # y' = sigmoid (1 + x (1 - sigmoid) d(2u)/dx)
        slope = x * (1.0 - sigmoid) * (1.5957691216057308 + 0.21406443847687905 * x * x)
        dx = dy * sigmoid * (1.0 + slope)
        tl.store(dx_ptr + offsets, dx, mask=mask)
        if y_ptr is not None:
            tl.store(y_ptr + offsets, x * sigmoid, mask=mask)
        sums += dx

    # one partial sum of dbias per program
    tl.store(part_ptr + split * N + cols, tl.sum(sums, axis=0), mask=cols < N)


def gelu_bwd(dy: Tensor, x: Tensor, recompute_y: bool) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dbias ``[N]`` and y (empty unless ``recompute_y``) of contiguous dy, x ``[M, N]``."""
    M, N = x.shape
    assert dy.is_contiguous() and x.is_contiguous()
    block = min(BLOCK, triton.next_power_of_2(N))
    blocks = triton.cdiv(N, block)
    steps = triton.cdiv(M, ROWS)
    P = num_splits(blocks, steps, num_sms(x.device) * PROGRAMS_PER_SM)
    dx = x.new_empty(M, N)
    y = x.new_empty(x.shape if recompute_y else 0)
    part = x.new_empty(1, P, 1, N, dtype=torch.float32)
    _gelu_bwd_kernel[(blocks, P)](
        dy,
        x,
        dx,
        y if recompute_y else None,
        part,
        M,
        N,
        triton.cdiv(steps, P) * ROWS,
        ROWS=ROWS,
        BLOCK=block,
        num_warps=max(block // 256, 1),
        enable_fp_fusion=True,
    )
    dbias = x.new_empty(N)
    sum_partials(part, total=dbias)
    return dx, dbias, y
