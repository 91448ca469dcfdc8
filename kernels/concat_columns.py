"""Parts of rows side by side in one matrix, and the sum over its rows in the same pass: the gradient of a product that makes
queries, keys and values, and of its bias.

    out = [a | b | c];   sums = sum over rows of out

A program owns some columns of one part and walks some rows; it leaves one fp32 partial sum, added in a fixed order (no atomics:
bitwise repeatable).  Reference: torch.cat, used by sra_fast/ops/adaln_linear.py.

Bytes, everything moved once, s per element of the parts [M, D] (2 in bf16):
    2 s M K D (K parts; out) + s K D (sums)
P programs share the rows of a column: 8 P K D bytes more (an fp32 sum written and read).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._rows import num_sms, num_splits, sum_partials

# every width of a DiT is a multiple of 128; a thread has 16 elements of a tile, two loads of 128 bits in bf16
BLOCK = 128
ROWS = 16
# so many programs of 128 threads share an SM of Hopper: 40 KiB of loads in flight
PROGRAMS_PER_SM = 10
# 32-bit registers per thread, at most
REGISTERS = {"_concat_columns_kernel": 64}


@triton.jit(
    do_not_specialize=["a_row", "b_row", "c_row"]
)  # of three numbers one is chosen at run time
def _concat_columns_kernel(
    a_ptr,  # [M, D], rows a_row elements apart
    b_ptr,
    c_ptr,
    out_ptr,  # [M, N], N = K D
    part_ptr,  # [P, N] fp32
    M,
    D,
    N,
    num_rows,
    a_row,
    b_row,
    c_row,
    ALIGNED: tl.constexpr,  # all parts and their rows begin at multiples of 16 bytes
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    p = tl.program_id(1).to(tl.int64)
    blocks = tl.cdiv(D, BLOCK)
    k = tl.program_id(0) // blocks
    cols = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    source, stride = a_ptr, a_row.to(tl.int64)
    if k == 1:
        source, stride = b_ptr, b_row.to(tl.int64)
    if k == 2:
        source, stride = c_ptr, c_row.to(tl.int64)
    if ALIGNED:  # a hint on a number that is chosen at run time would be dropped
        stride = stride // VECTOR * VECTOR
    sums = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for m in range(p * num_rows, (p + 1) * num_rows, ROWS):
        row = m + tl.arange(0, ROWS)
        mask = (row < M)[:, None] & (cols < D)
        x = tl.load(source + row[:, None] * stride + cols, mask=mask, other=0.0)
        tl.store(out_ptr + row[:, None] * N + (k * D + cols), x, mask=mask)
        sums += x.to(tl.float32)
    tl.store(part_ptr + p * N + k * D + cols, tl.sum(sums, axis=0), mask=cols < D)


def concat_columns(parts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """out ``[M, K D]`` and sums ``[K D]`` of one to three parts ``[M, D]`` of one dtype whose columns are dense."""
    (M, D), K, like = parts[0].shape, len(parts), parts[0]
    assert 1 <= K <= 3 and all(
        x.shape == like.shape and x.dtype == like.dtype and (x.stride(1) == 1 or D == 1)
        for x in parts
    )
    size = like.element_size()
    aligned = all(x.data_ptr() % 16 == 0 and x.stride(0) * size % 16 == 0 for x in parts)
    blocks, steps = K * triton.cdiv(D, BLOCK), triton.cdiv(M, ROWS)
    P = num_splits(blocks, steps, num_sms(like.device) * PROGRAMS_PER_SM)
    out, part = like.new_empty(M, K * D), like.new_empty(1, P, 1, K * D, dtype=torch.float32)
    sources = [*parts, *[like] * (3 - K)]
    _concat_columns_kernel[(blocks, P)](
        *(
            *sources,
            out,
            part,
            M,
            D,
            K * D,
            triton.cdiv(steps, P) * ROWS,
            *(x.stride(0) for x in sources),
        ),
        ALIGNED=aligned,
        VECTOR=16 // size,
        ROWS=ROWS,
        BLOCK=BLOCK,
        num_warps=4,
        enable_fp_fusion=True,
    )
    sums = like.new_empty(K * D)
    sum_partials(part, total=sums)
    return out, sums
