"""Matrices side by side in one matrix, and the sum over its rows in the same pass.

    out = [a | b | c];   sums = sum over rows of out

It assembles the gradient of a product that makes queries, keys and values; ``sums`` is the
gradient of its bias. A program owns some columns of one part and walks some rows. It leaves one
fp32 partial sum. The partial sums are added in a fixed order, without atomics, so the result is
bitwise repeatable.
Reference: sra_fast/ops/concat_columns.py::concat_columns_ref.

Bytes, everything moved once, s per element of the parts [M, D] (2 in bf16):
    2 s M K D (K parts; out) + s K D (sums)
P programs share the rows of a column: 8 P K D bytes more (an fp32 sum written and read).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._rows import num_sms, num_splits, sum_partials

# every width of a DiT is a multiple of 128; a thread has 16 elements of a tile, two 128-bit loads
# in bf16
BLOCK = 128
ROWS = 16
# this many programs of 128 threads share an SM of Hopper: 40 KiB of loads in flight
PROGRAMS_PER_SM = 10
# upper limit of 32-bit registers per thread
REGISTERS = {"_concat_columns_kernel": 64}


# strides are not specialized: which of the three applies is decided at run time
@triton.jit(do_not_specialize=["a_row", "b_row", "c_row"])
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
    VECTOR: tl.constexpr,  # elements in 16 bytes
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    split = tl.program_id(1).to(tl.int64)
    blocks = tl.cdiv(D, BLOCK)
    k = tl.program_id(0) // blocks
    cols = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    # the part that this program copies
    source = a_ptr
    stride = a_row.to(tl.int64)
    if k == 1:
        source = b_ptr
        stride = b_row.to(tl.int64)
    if k == 2:
        source = c_ptr
        stride = c_row.to(tl.int64)
    # the arithmetic tells the compiler that rows are aligned; it drops a multiple_of hint on a
    # number that is chosen at run time
    if ALIGNED:
        stride = stride // VECTOR * VECTOR

    sums = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for m in range(split * num_rows, (split + 1) * num_rows, ROWS):
        # copy ROWS rows, and add them to the sums
        row = m + tl.arange(0, ROWS)
        mask = (row < M)[:, None] & (cols < D)
        x = tl.load(source + row[:, None] * stride + cols, mask=mask, other=0.0)
        tl.store(out_ptr + row[:, None] * N + (k * D + cols), x, mask=mask)
        sums += x.to(tl.float32)

    # one partial sum per program
    tl.store(part_ptr + split * N + k * D + cols, tl.sum(sums, axis=0), mask=cols < D)


def concat_columns(parts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """out ``[M, K D]`` and sums ``[K D]`` of K = 1 to 3 parts ``[M, D]`` of one dtype with dense
    columns.
    """
    first = parts[0]
    M, D = first.shape
    K = len(parts)
    assert 1 <= K <= 3 and all(
        x.shape == first.shape and x.dtype == first.dtype and (x.stride(1) == 1 or D == 1)
        for x in parts
    )
    size = first.element_size()
    aligned = all(x.data_ptr() % 16 == 0 and x.stride(0) * size % 16 == 0 for x in parts)
    blocks = K * triton.cdiv(D, BLOCK)
    steps = triton.cdiv(M, ROWS)
    P = num_splits(blocks, steps, num_sms(first.device) * PROGRAMS_PER_SM)
    out = first.new_empty(M, K * D)
    part = first.new_empty(1, P, 1, K * D, dtype=torch.float32)
    # the kernel takes three pointers; it never reads the ones beyond K
    a, b, c = [*parts, first, first][:3]
    _concat_columns_kernel[(blocks, P)](
        a,
        b,
        c,
        out,
        part,
        M,
        D,
        K * D,
        triton.cdiv(steps, P) * ROWS,
        a.stride(0),
        b.stride(0),
        c.stride(0),
        ALIGNED=aligned,
        VECTOR=16 // size,
        ROWS=ROWS,
        BLOCK=BLOCK,
        num_warps=4,
        enable_fp_fusion=True,
    )
    sums = first.new_empty(K * D)
    sum_partials(part, total=sums)
    return out, sums
