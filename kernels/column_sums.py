"""The sum over the rows of a matrix, for the gradient of a bias that no other pass can take.

    sums = sum over m of x[m, :]

A program owns some columns and walks some rows. It leaves one fp32 partial sum. The partial sums
are added in a fixed order, without atomics, so the result is bitwise repeatable.
Reference: sra_fast/ops/column_sums.py::column_sums_ref.

Bytes, everything moved once, s per element of x [M, N] (2 in bf16): s M N + s N.
P programs share the rows of a column: 8 P N bytes more (an fp32 sum written and read).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._rows import num_sms, num_splits, sum_partials

# a thread has 32 elements of a tile, four 128-bit loads in bf16
BLOCK = 128
ROWS = 32
# this many programs of 128 threads share an SM of Hopper: 48 KiB of loads in flight
PROGRAMS_PER_SM = 6
# upper limit of 32-bit registers per thread
REGISTERS = {"_column_sums_kernel": 80}


@triton.jit
def _column_sums_kernel(
    x_ptr,  # [M, N]
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
        mask = (row < M)[:, None] & (cols < N)
        sums += tl.load(x_ptr + row[:, None] * N + cols, mask=mask, other=0.0).to(tl.float32)
    # one partial sum per program
    tl.store(part_ptr + split * N + cols, tl.sum(sums, axis=0), mask=cols < N)


def column_sums(x: Tensor) -> Tensor:
    """Sums ``[N]`` in x's dtype of a contiguous ``x [M, N]``."""
    assert x.is_contiguous()
    M, N = x.shape
    blocks = triton.cdiv(N, BLOCK)
    steps = triton.cdiv(M, ROWS)
    P = num_splits(blocks, steps, num_sms(x.device) * PROGRAMS_PER_SM)
    part = x.new_empty(1, P, 1, N, dtype=torch.float32)
    _column_sums_kernel[(blocks, P)](
        x,
        part,
        M,
        N,
        triton.cdiv(steps, P) * ROWS,
        ROWS=ROWS,
        BLOCK=BLOCK,
        num_warps=4,
        enable_fp_fusion=True,
    )
    sums = x.new_empty(N)
    sum_partials(part, total=sums)
    return sums
