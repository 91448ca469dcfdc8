"""Gradient clipping, AdamW, half-precision weights, EMA and half-precision teacher in one pass over flat buffers.

g <- clip g;  p <- (1 - lr wd) p;  m <- m + (1 - b1)(g - m);  v <- b2 v + (1 - b2) g^2;
p <- p - lr / (1 - b1^k) m / (sqrt(v / (1 - b2^k)) + eps);  weights <- p;
ema <- ema + (1 - decay)(p - ema);  ema_copy <- ema

Bytes moved per element: 24 for p, m and v, 4 (2) for an fp32 (bf16) gradient, 2 for the weights, 8 for the EMA and 2
for its copy: 40 in all; 1 for a copy in e4m3: 39.  Reference: sra_fast/ops/adamw_ema.py::adamw_ema_ref_.

The gradient may lie in pieces, as autograd leaves it: a table says which elements each holds, and where.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._plans import Plans, in_use

# 8 elements per thread at 4 warps: two 128-bit accesses of each fp32 buffer, one of each half-precision buffer
BLOCK = 1024
# 32-bit registers per thread, at most, of wide launches
REGISTERS = {"_adamw_ema_kernel": 56}
# a program loads the ends of at least so many segments, one per thread: models with fewer share one kernel
MIN_SEGMENTS = 128
# a device address that aligns every access: so many bytes
ALIGNMENT = 16

_layouts, _addresses = Plans("adamw_ema_"), Plans("adamw_ema_")


@triton.jit
def _scaled_to_e4m3(
    x,
    start,
    stop,
    multiplier_ptr,
    amax_ptr,
    ends_ptr,
    S,
    SEGMENTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Elements [start, stop) of a buffer cut into segments, each times its multiplier; amax learns what they are at most.

    Nearly always they lie in one segment.
    """
    ends = tl.load(ends_ptr + tl.arange(0, SEGMENTS), mask=tl.arange(0, SEGMENTS) < S, other=stop)
    # the segments of the first and of the last element, in one reduction
    both = tl.sum((ends <= start).to(tl.int32) + (ends < stop).to(tl.int32) * 65536)
    scaled = x
    # counted from the block's first element, in 32 bits: with 64 it took up to 16 registers more, and launches spilled
    begin = start
    at = tl.arange(0, BLOCK)
    for segment in range(both % 65536, tl.minimum(both // 65536, S - 1) + 1):
        end = tl.load(ends_ptr + segment)
        # lanes beyond the end hold 0, or a NaN if eps is 0, which no maximum takes
        inside = (at >= (start - begin).to(tl.int32)) & (
            at < tl.minimum(end - begin, BLOCK).to(tl.int32)
        )
        scaled = tl.where(inside, x * tl.load(multiplier_ptr + segment), scaled)
        peak = tl.max(tl.where(inside, tl.abs(x), 0.0))
        if peak > tl.load(amax_ptr + segment):  # rarely true after the first programs: few atomics
            tl.atomic_max(amax_ptr + segment, peak, sem="relaxed")
        start = tl.maximum(start, end)
    # as comparisons, which leave a NaN what it is
    return tl.where(scaled > 448.0, 448.0, tl.where(scaled < -448.0, -448.0, scaled))


@triton.jit
def _gather(
    like_ptr,
    begin_ptr,
    count_ptr,
    address_ptr,
    first_ptr,
    start,
    stop,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Elements [start, stop) of a vector in pieces, in fp32, zero where there is none.  Nearly always they lie in one."""
    out = tl.zeros((BLOCK,), tl.float32)
    piece = tl.load(first_ptr + start // BLOCK)
    begin = tl.load(begin_ptr + piece)
    while begin < stop:  # behind the last piece stands a very large begin
        # the compiler cannot see into the tables; without these facts every access is one element wide
        source = tl.multiple_of(tl.load(address_ptr + piece).to(like_ptr.dtype), 16)
        count = tl.multiple_of(tl.load(count_ptr + piece), VECTOR)
        at = tl.multiple_of(start - begin, VECTOR) + tl.arange(0, BLOCK)
        out += tl.load(source + at, mask=(at >= 0) & (at < count), other=0.0).to(tl.float32)
        piece += 1
        begin = tl.load(begin_ptr + piece)
    return out


@triton.jit
def _adamw_ema_kernel(
    param_ptr,  # [N] fp32
    grad_ptr,  # [N]; in pieces, a pointer of their dtype
    begin_ptr,  # [pieces + 1] int64: the first element of each, counted from FIRST elements before these N; None: in one piece
    count_ptr,  # [pieces] int64
    address_ptr,  # [pieces] int64
    first_ptr,  # [blocks] int32: the first piece that ends behind the begin of the block
    exp_avg_ptr,  # [N] fp32
    exp_avg_sq_ptr,  # [N] fp32
    weights_ptr,  # [N] half precision, or unused
    ema_ptr,  # [N] fp32, or unused
    ema_copy_ptr,  # [N] half precision or e4m3, or unused
    multiplier_ptr,  # [S] fp32: of the segments of an e4m3 copy, or unused
    amax_ptr,  # [S] fp32, or unused
    ends_ptr,  # [S] int64, counted from FIRST elements before these N, or unused
    clip_scale_ptr,  # one fp32 number, or unused
    N,
    S,
    FIRST,
    shrink,  # 1 - lr * weight_decay
    weight1,  # 1 - beta1
    beta2,
    weight2,  # 1 - beta2
    step_size,  # lr / (1 - beta1^step)
    inv_sqrt_bias2,  # 1 / sqrt(1 - beta2^step)
    eps,
    ema_weight,  # 1 - decay
    decay,
    CLIP: tl.constexpr,
    WEIGHTS: tl.constexpr,
    EMA: tl.constexpr,
    EMA_COPY: tl.constexpr,
    SEGMENTS: tl.constexpr,  # a power of two, at least S; 0 without an e4m3 copy
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    cols = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    start = FIRST + tl.program_id(0).to(tl.int64) * BLOCK
    stop = tl.minimum(start + BLOCK, FIRST + N)
    mask = cols < N
    param = tl.load(param_ptr + cols, mask=mask, other=0.0)
    if begin_ptr is None:
        grad = tl.load(grad_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    else:
        grad = _gather(
            grad_ptr, begin_ptr, count_ptr, address_ptr, first_ptr, start, stop, VECTOR, BLOCK
        )
    exp_avg = tl.load(exp_avg_ptr + cols, mask=mask, other=0.0)
    exp_avg_sq = tl.load(exp_avg_sq_ptr + cols, mask=mask, other=0.0)
    if CLIP:
        grad *= tl.load(clip_scale_ptr).to(tl.float32)

    exp_avg += weight1 * (grad - exp_avg)
    exp_avg_sq = beta2 * exp_avg_sq + weight2 * grad * grad
    denominator = tl.sqrt(exp_avg_sq) * inv_sqrt_bias2 + eps
    param = shrink * param - step_size * (exp_avg / denominator)
    tl.store(param_ptr + cols, param, mask=mask)
    tl.store(exp_avg_ptr + cols, exp_avg, mask=mask)
    tl.store(exp_avg_sq_ptr + cols, exp_avg_sq, mask=mask)
    if WEIGHTS:
        tl.store(weights_ptr + cols, param, mask=mask)
    if EMA:
        ema = tl.load(ema_ptr + cols, mask=mask, other=0.0)
        # torch.lerp: from the nearer end, so that decay 0 returns the parameter exactly
        ema = tl.where(
            ema_weight < 0.5, ema + ema_weight * (param - ema), param - decay * (param - ema)
        )
        tl.store(ema_ptr + cols, ema, mask=mask)
        if SEGMENTS:
            ema = _scaled_to_e4m3(
                ema, start, stop, multiplier_ptr, amax_ptr, ends_ptr, S, SEGMENTS, BLOCK
            )
        if EMA_COPY:
            tl.store(ema_copy_ptr + cols, ema, mask=mask)


def _layout(
    begins: list[int], counts: list[int], N: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """begin, count and first of ``_adamw_ema_kernel``."""
    begin, count = torch.tensor([*begins, 2**62]), torch.tensor(counts)
    first = torch.searchsorted(begin[:-1] + count, torch.arange(0, N, BLOCK), right=True)
    return begin.to(device), count.to(device), first.to(device, torch.int32)


def _on_device(addresses: list[int], device: torch.device) -> Tensor:
    table = torch.tensor(addresses)
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


def _tables(
    pieces: list[Tensor], begins: list[int], N: int, device: torch.device
) -> tuple[Tensor, ...]:
    """begin, count, address and first.  An allocator gives out the same addresses step after step: these too are rarely made."""
    counts, addresses = [piece.numel() for piece in pieces], [piece.data_ptr() for piece in pieces]
    begin, count, first = _layouts.get(
        (N, device, *begins, *counts), lambda: _layout(begins, counts, N, device)
    )
    address = _addresses.get((device, *addresses), lambda: _on_device(addresses, device))
    in_use(begin, count, address, first)
    return begin, count, address, first


def adamw_ema_(
    param: Tensor,
    grad: Tensor | list[Tensor],
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    weights: Tensor | None,
    ema: Tensor | None,
    ema_copy: Tensor | None,
    multiplier: Tensor | None,
    amax: Tensor | None,
    ends: Tensor | None,
    clip_scale: Tensor | None,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decay: float,
    begins: list[int] | None = None,
) -> None:
    """One-dimensional contiguous buffers of one length; optional ones are None.

    With ``begins`` the gradient is a list of pieces that begin there, in ascending order, and hold whole multiples of
    ``ALIGNMENT`` bytes at multiples of it; where two overlap, one is zero.
    """
    step_size, inv_sqrt_bias2 = lr / (1 - beta1**step), (1 - beta2**step) ** -0.5
    scalars = (
        1 - lr * weight_decay,
        1 - beta1,
        beta2,
        1 - beta2,
        step_size,
        inv_sqrt_bias2,
        eps,
        1 - decay,
        decay,
    )
    S = 0 if ends is None else ends.numel()
    options = {
        "WEIGHTS": weights is not None,
        "EMA": ema is not None,
        "EMA_COPY": ema_copy is not None,
    }
    segments = max(triton.next_power_of_2(S), MIN_SEGMENTS) if S else 0
    options |= {"CLIP": clip_scale is not None, "SEGMENTS": segments, "BLOCK": BLOCK}
    pieces = [None] * 4
    if begins is not None:
        pieces = _tables(grad, begins, param.numel(), param.device)
        grad = grad[0].new_empty(0)
    options["VECTOR"] = ALIGNMENT // grad.element_size()
    unused = lambda x: param if x is None else x
    buffers = [param, grad, exp_avg, exp_avg_sq, *map(unused, (weights, ema, ema_copy))]
    small = [*map(unused, (multiplier, amax, ends, clip_scale))]
    # a length that is no multiple of 16 would narrow every access of the launch, so the rest goes alone
    N, even = param.numel(), param.numel() // 16 * 16
    for start, stop in ((0, even), (even, N)):
        if start < stop:
            views, sizes = [x[start:stop] for x in buffers], (stop - start, S, start)
            grid = (triton.cdiv(stop - start, BLOCK),)
            # left alone, ptxas may aim at 48 registers for a copy in segments and spill two; single elements need more
            limit = REGISTERS["_adamw_ema_kernel"] if S and stop == even else None
            _adamw_ema_kernel[grid](
                *(*views[:2], *pieces, *views[2:], *small, *sizes, *scalars),
                **options,
                num_warps=4,
                maxnreg=limit,
                enable_fp_fusion=True,
            )
