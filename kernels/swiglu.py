"""SwiGLU (arXiv 2002.05202, Eq. 6) of two halves side by side, and its backward with the gradient
of the bias before it; the backward can recompute the output.

    y = silu(x1) x2, x = [x1 | x2];   dx1 = dy x2 silu'(x1);   dx2 = dy silu(x1);
    dbias = sum over rows of [dx1 | dx2]

A program owns some columns of both halves and walks some rows. It leaves one fp32 partial sum per
half. The partial sums are added in a fixed order, without atomics, so the result is bitwise
repeatable.
Reference: sra_fast/ops/swiglu.py::swiglu_ref and swiglu_bwd_ref.

Bytes, everything moved once, s per element, x [M, 2 N] and y [M, N] (2 in bf16):
    forward   3 s M N (x; y)
    backward  5 s M N (dy, x; dx), s M N more if y is recomputed, and 2 s N (dbias)
PyTorch's two operators move 5 s M N forward, and 9 s M N backward without the sum.
P programs share the rows of a column: 16 P N bytes more (an fp32 sum per half written and read).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._rows import SHARES, num_sms, num_splits, sum_partials

# a thread has 8 columns, 128 bits in bf16, of each half of each of ROWS rows
BLOCK = 512
ROWS = 2
# this many programs of 64 threads share an SM of Hopper: 40 and 48 KiB of loads in flight
FWD_PROGRAMS_PER_SM = 10
BWD_PROGRAMS_PER_SM = 8
# upper limits of 32-bit registers per thread
REGISTERS = {"_swiglu_fwd_kernel": 40, "_swiglu_bwd_kernel": 128}


@triton.jit(do_not_specialize=SHARES)
def _swiglu_fwd_kernel(
    x_ptr,  # [M, 2 N]
    y_ptr,  # [M, N]
    M,
    N,
    num_rows,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    split = tl.program_id(1).to(tl.int64)
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    for m in range(split * num_rows, (split + 1) * num_rows, ROWS):
        row = (m + tl.arange(0, ROWS))[:, None]
        mask = (row < M) & (cols < N)
        x1 = tl.load(x_ptr + row * 2 * N + cols, mask=mask, other=0.0).to(tl.float32)
        x2 = tl.load(x_ptr + (row * 2 + 1) * N + cols, mask=mask, other=0.0).to(tl.float32)
        # silu and the product in fp32, rounded once
        tl.store(y_ptr + row * N + cols, x1 * tl.sigmoid(x1) * x2, mask=mask)


@triton.jit(do_not_specialize=SHARES)
def _swiglu_bwd_kernel(
    dy_ptr,  # [M, N]
    x_ptr,  # [M, 2 N]
    dx_ptr,  # [M, 2 N]
    y_ptr,  # [M, N], the recomputed output of the forward, or None
    part_ptr,  # [P, 2 N] fp32, or None without the gradient of a bias
    M,
    N,
    num_rows,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    split = tl.program_id(1).to(tl.int64)
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sums1 = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    sums2 = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for m in range(split * num_rows, (split + 1) * num_rows, ROWS):
        row = (m + tl.arange(0, ROWS))[:, None]
        mask = (row < M) & (cols < N)
        first = row * 2 * N + cols
        second = (row * 2 + 1) * N + cols
        dy = tl.load(dy_ptr + row * N + cols, mask=mask, other=0.0).to(tl.float32)
        x1 = tl.load(x_ptr + first, mask=mask, other=0.0).to(tl.float32)
        x2 = tl.load(x_ptr + second, mask=mask, other=0.0).to(tl.float32)

        # silu' = sigmoid (1 + x (1 - sigmoid))
        sigmoid = tl.sigmoid(x1)
        silu = x1 * sigmoid
        dx1 = dy * x2 * (sigmoid + silu * (1.0 - sigmoid))
        dx2 = dy * silu
        tl.store(dx_ptr + first, dx1, mask=mask)
        tl.store(dx_ptr + second, dx2, mask=mask)
        if y_ptr is not None:
            tl.store(y_ptr + row * N + cols, silu * x2, mask=mask)
        if part_ptr is not None:
            sums1 += dx1
            sums2 += dx2

    # one partial sum of dbias per half and program
    if part_ptr is not None:
        part_ptr += split * 2 * N
        tl.store(part_ptr + cols, tl.sum(sums1, axis=0), mask=cols < N)
        tl.store(part_ptr + N + cols, tl.sum(sums2, axis=0), mask=cols < N)


def _launch(M: int, N: int, device: torch.device, programs_per_sm: int):
    """The grid, rows per program and the options of a launch."""
    block = min(BLOCK, triton.next_power_of_2(N))
    blocks = triton.cdiv(N, block)
    steps = triton.cdiv(M, ROWS)
    P = num_splits(blocks, steps, num_sms(device) * programs_per_sm)
    options = {"ROWS": ROWS, "BLOCK": block, "num_warps": max(block // 256, 1)}
    return (blocks, P), triton.cdiv(steps, P) * ROWS, options


def swiglu_fwd(x: Tensor) -> Tensor:
    """``silu(x1) x2 [M, N]`` of contiguous ``x = [x1 | x2] [M, 2 N]``."""
    M, N = x.shape[0], x.shape[1] // 2
    assert x.is_contiguous() and x.shape[1] % 2 == 0
    y = x.new_empty(M, N)
    grid, rows, options = _launch(M, N, x.device, FWD_PROGRAMS_PER_SM)
    _swiglu_fwd_kernel[grid](x, y, M, N, rows, **options, enable_fp_fusion=True)
    return y


def swiglu_bwd(
    dy: Tensor, x: Tensor, recompute_y: bool, needs_dbias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dx ``[M, 2 N]``, dbias ``[2 N]`` and y ``[M, N]``, the last two empty unless they are wanted,
    of contiguous ``dy [M, N]`` and ``x [M, 2 N]``.
    """
    M, N = dy.shape
    assert dy.is_contiguous() and x.is_contiguous() and x.shape == (M, 2 * N)
    dx = x.new_empty(M, 2 * N)
    y = x.new_empty((M, N) if recompute_y else 0)
    dbias = x.new_empty(2 * N if needs_dbias else 0)
    grid, rows, options = _launch(M, N, x.device, BWD_PROGRAMS_PER_SM)
    part = x.new_empty(1, grid[1], 1, 2 * N if needs_dbias else 0, dtype=torch.float32)
    # without a limit ptxas 13 spills two registers to fit 96 (sm_100, bf16, N=1024)
    max_registers = 128 if needs_dbias else None
    _swiglu_bwd_kernel[grid](
        dy,
        x,
        dx,
        y if recompute_y else None,
        part if needs_dbias else None,
        M,
        N,
        rows,
        **options,
        maxnreg=max_registers,
        enable_fp_fusion=True,
    )
    if needs_dbias:
        sum_partials(part, total=dbias)
    return dx, dbias, y
