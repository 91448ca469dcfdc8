"""What the row kernels share: how a width and a batch are cut, and the sum of partial gradients.

A program owns one image (or one group of its tokens) and walks some of its rows, two at a time, so that the loads of
both are in flight together.  A width that is no power of two is cut into a head and a tail, 1152 = 1024 + 128: padded
to 2048, 44 % of the lanes would hold nothing.  Rows are one-dimensional tensors, so that their statistics are scalars:
with two-dimensional tiles, statistics of head and tail pull both into one of their two layouts, and whole tiles cross
shared memory in every iteration.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

# what a quantised row is stored in
E4M3 = torch.float8_e4m3fn
# rows of one loop iteration of every kernel here
STEP = 2
# what a Hopper SM needs in flight to saturate its share of the memory: 25 bytes/ns times about 0.8 us, twice
BYTES_IN_FLIGHT = 40 * 1024
# 32-bit registers per thread, at most
REGISTERS = {"sum_partials_kernel": 64}
# of a program that adds partial sums: four such programs share an SM of Hopper
SUM_WARPS = 8


@functools.cache
def width_config(D: int) -> dict[str, int]:
    """HEAD and TAIL columns (TAIL 0: none) and the warps that give a thread 8 columns of the head, 128 bits in bf16."""
    padded = triton.next_power_of_2(D)
    head = padded if padded == D else padded // 2
    tail = triton.next_power_of_2(D - head)
    if head == D or tail == head:
        head, tail = padded, 0
    return {"D": D, "HEAD": head, "TAIL": tail, "num_warps": min(max(head // 256, 1), 16)}


@functools.cache
def num_splits(images: int, steps: int, slots: int) -> int:
    """Programs per image: as few as fill the device evenly, since each adds a partial sum to the traffic.

    Args:
        images: images times groups.
        steps: loop iterations that one image takes.
        slots: programs that run at once.
    """
    most = max(min(steps, triton.cdiv(2 * slots, images)), 1)
    # a program's prologue and epilogue take about as long as one iteration
    cost = lambda splits: triton.cdiv(images * splits, slots) * (triton.cdiv(steps, splits) + 1)
    return min(range(1, most + 1), key=cost)


@functools.cache
def num_sms(device: torch.device) -> int:
    # the interpreter runs one program after the other: a few are enough to test them
    return (
        torch.cuda.get_device_properties(device).multi_processor_count
        if device.type == "cuda"
        else 2
    )


def mod_strides(mod: Tensor) -> tuple[int, int]:
    """Strides of image and group of a modulation ``[B, D]`` or ``[B, G, D]``."""
    assert mod.stride(-1) == 1 or mod.shape[-1] == 1
    return (mod.stride(0), mod.stride(1)) if mod.dim() == 3 else (mod.stride(0), 0)


def split_rows(x: Tensor, groups: int, num_loads: int) -> tuple[int, int]:
    """Programs per image and group of ``x [B, T, D]``, and rows of each; ``num_loads`` arrays like x are read."""
    B, T, D = x.shape
    steps = triton.cdiv(T, STEP)
    in_flight = STEP * num_loads * D * x.element_size()
    slots = num_sms(x.device) * min(max(triton.cdiv(BYTES_IN_FLIGHT, in_flight), 2), 16)
    splits = num_splits(B * groups, steps, slots)
    return splits, triton.cdiv(steps, splits) * STEP


@triton.jit
def locate(G, P):
    """Image, group, split and indices of this program; int64, since they are multiplied by strides."""
    pid = tl.program_id(0).to(tl.int64)
    g = pid // P % G
    # at the ends also what lies outside [0, G), so that every row is written; 64 bits cost 22 registers (fused, sm_90)
    mine = (
        tl.where(g == 0, -(2**31), g.to(tl.int32)),
        tl.where(g == G - 1, 2**31 - 1, g.to(tl.int32)),
    )
    return pid, pid // P // G, g, pid % P, mine


@triton.jit
def is_mine(group_ptr, row, t, mine, T):
    """Whether token t (row `row` of all) exists and its index lies in `mine`."""
    live = t < T
    if group_ptr is not None:
        index = tl.load(group_ptr + row, mask=live, other=0).to(tl.int32)
        live &= (index >= mine[0]) & (index <= mine[1])
    return live


@triton.jit
def load(ptr, at, mask):
    return tl.load(ptr + at, mask=mask, other=0.0)


@triton.jit
def load_fp32(ptr, at, mask):
    return tl.load(ptr + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def residual(x, y, gate, bias, out_ptr, at, mask):
    """x + gate (y + bias), stored rounded once, given back as the fp32 value of what was stored."""
    out = x.to(tl.float32) + gate * (y.to(tl.float32) + bias)
    out = out.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + at, out, mask=mask)
    return out.to(tl.float32)


@triton.jit
def load_bias(bias_ptr, cols, mask):
    return load_fp32(bias_ptr, cols, mask) if bias_ptr is not None else 0.0


@triton.jit
def load_two(
    a_ptr, b_ptr, group_ptr, b, mine, t, T, cols, cols2, D: tl.constexpr, TAIL: tl.constexpr
):
    """Row t of image b of two arrays, as it is in memory, and whether it is this program's."""
    row = b * T + t
    live = is_mine(group_ptr, row, t, mine, T)
    head = (
        load(a_ptr, row * D + cols, live & (cols < D)),
        load(b_ptr, row * D + cols, live & (cols < D)),
    )
    tail = head
    if TAIL:
        tail = (
            load(a_ptr, row * D + cols2, live & (cols2 < D)),
            load(b_ptr, row * D + cols2, live & (cols2 < D)),
        )
    return row, live, head, tail


@triton.jit
def fold(head, tail, HEAD: tl.constexpr, TAIL: tl.constexpr):
    """The tail added to the head, whose columns each thread sums on its own: one reduction across threads, not two."""
    if TAIL:
        head = tl.sum(tl.reshape(head, (TAIL, HEAD // TAIL)), axis=1) + tail
    return head


@triton.jit
def norm_fwd(
    x,
    x2,
    row,
    live,
    mean_ptr,
    rstd_ptr,
    eps,
    cols,
    cols2,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
):
    """xhat of a row cut in two; stores its statistics.  Without mean_ptr: RMS."""
    if mean_ptr is not None:
        mean = tl.sum(fold(x, x2, HEAD, TAIL), axis=0) / D
        tl.store(mean_ptr + row, mean, mask=live)
        # the padding holds 0 - mean, which must not enter the variance
        x = tl.where(cols < D, x - mean, 0.0)
        x2 = tl.where(cols2 < D, x2 - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(fold(x * x, x2 * x2, HEAD, TAIL), axis=0) / D + eps)
    tl.store(rstd_ptr + row, rstd, mask=live)
    return x * rstd, x2 * rstd


@triton.jit
def norm_bwd(
    xhat, xhat2, dxhat, dxhat2, mean_ptr, D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr
):
    """c1, c2 of dx = (dxhat - xhat c1 - c2) rstd, both means in one reduction; c2 is 0 where no mean was subtracted."""
    c1 = fold(xhat * dxhat, xhat2 * dxhat2, HEAD, TAIL)
    if mean_ptr is None:
        return tl.sum(c1, axis=0) / D, 0.0
    return tl.split(tl.sum(tl.join(c1, fold(dxhat, dxhat2, HEAD, TAIL)), axis=0) / D)


@triton.jit
def e4m3_scale(amax):
    """The scale that maps [-amax, amax] onto e4m3's range; a row of zeros keeps a scale that can divide."""
    return tl.maximum(amax, 1e-12) / 448.0


@triton.jit
def store_row(ptr, scale_ptr, row, live, v, v2, at, mask, at2, mask2, TAIL: tl.constexpr):
    """Store a row cut in two; with scale_ptr in e4m3, divided by a scale of its own that is stored too."""
    if scale_ptr is not None:
        amax = tl.max(tl.abs(v), axis=0)
        if TAIL:
            amax = tl.maximum(amax, tl.max(tl.abs(v2), axis=0))
        scale = e4m3_scale(amax)
        tl.store(scale_ptr + row, scale, mask=live)
        # one division per row, not per element
        inverse = 1.0 / scale
        v, v2 = v * inverse, v2 * inverse
    tl.store(ptr + at, v.to(ptr.dtype.element_ty), mask=mask)
    if TAIL:
        tl.store(ptr + at2, v2.to(ptr.dtype.element_ty), mask=mask2)


@triton.jit
def _sum_rows(part_ptr, first, count, stride, cols, live, ROWS: tl.constexpr):
    """Sum of every live column over `count` rows, `stride` elements apart; each column has its own first row."""
    total = tl.zeros(cols.shape, dtype=tl.float32)
    # in the order of the splits, whatever order they finished in: the same bits every time
    for p in range(0, count, ROWS):
        row = p + tl.arange(0, ROWS)
        at = (first + row[:, None]) * stride + cols
        total += tl.sum(
            tl.load(part_ptr + at, mask=(row < count)[:, None] & live, other=0.0), axis=0
        )
    return total


@triton.jit
def sum_partials_kernel(
    part_ptr,  # [M, P, K, D] fp32
    a_ptr,  # [M, D], the sum over P of k = 0, and so on; None where there is no such k
    b_ptr,
    c_ptr,
    total_ptr,  # [D], the sum over M and P of the last k, or None
    M,
    P,
    K,
    D,
    ROWS: tl.constexpr,
    IMAGES: tl.constexpr,
    BLOCK: tl.constexpr,
    TOTAL_ROWS: tl.constexpr,
    TOTAL_BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    num_totals = 0
    num_sums = K
    if total_ptr is not None:
        # the first programs, because theirs is the longest way: few columns, and rows of every image at once
        num_totals = tl.cdiv(D, TOTAL_BLOCK)
        num_sums = K - 1
        if pid < num_totals:
            cols = pid * TOTAL_BLOCK + tl.arange(0, TOTAL_BLOCK)
            first = tl.zeros((TOTAL_BLOCK,), dtype=tl.int64)
            total = _sum_rows(
                part_ptr + (K - 1) * D, first, M * P, K * D, cols, cols < D, TOTAL_ROWS
            )
            tl.store(total_ptr + cols, total, mask=cols < D)
    if a_ptr is not None:  # noqa: SIM102, this condition is decided when compiling, the next at run time
        if pid >= num_totals:
            # BLOCK columns of IMAGES images side by side
            blocks = tl.cdiv(D, BLOCK)
            k = (pid - num_totals) // blocks % num_sums
            lane = tl.arange(0, IMAGES * BLOCK)
            m = ((pid - num_totals) // blocks // num_sums).to(tl.int64) * IMAGES + lane // BLOCK
            cols = (pid - num_totals) % blocks * BLOCK + lane % BLOCK
            live = (m < M) & (cols < D)
            total = _sum_rows(part_ptr + k * D, m * P, P, K * D, cols, live, ROWS)
            out = m * D + cols
            tl.store(a_ptr + out, total, mask=live & (k == 0))
            if b_ptr is not None:
                tl.store(b_ptr + out, total, mask=live & (k == 1))
            if c_ptr is not None:
                tl.store(c_ptr + out, total, mask=live & (k == 2))


def sum_partials(part: Tensor, *outputs: Tensor, total: Tensor | None = None) -> None:
    """Sum ``part [M, P, K, D]`` over P into K tensors ``[M, D]``, with ``total [D]`` the last k over M too (contiguous)."""
    M, P, K, D = part.shape
    assert len(outputs) == K - (total is not None) and all(out.is_contiguous() for out in outputs)
    # a warp has 128 columns, so that no lane of SiT's widths is idle; a thread has at most eight loads, of the total too
    block = 128
    rows = min(triton.next_power_of_2(P), 64)
    images = min(SUM_WARPS, 64 // rows)
    # two sectors of 32 bytes from each row, and so many rows that one or two iterations take them all
    total_block = 16
    total_rows = min(max(triton.next_power_of_2(M * P), 64), 512)
    num_totals = 0 if total is None else triton.cdiv(D, total_block)
    num_sums = triton.cdiv(M, images) * triton.cdiv(D, block) * len(outputs)
    sum_partials_kernel[(num_totals + num_sums,)](
        *(part, *outputs, *[None] * (3 - len(outputs)), total, M, P, K, D),
        ROWS=rows,
        IMAGES=images,
        BLOCK=block,
        TOTAL_ROWS=total_rows,
        TOTAL_BLOCK=total_block,
        num_warps=SUM_WARPS,
        # left alone, ptxas 13 aims at 40 and waits after three to five of a thread's eight loads (read for sm_90)
        maxnreg=REGISTERS["sum_partials_kernel"],
        enable_fp_fusion=True,
    )
