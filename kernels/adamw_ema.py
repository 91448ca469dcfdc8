"""The whole optimizer step in one pass over flat buffers: clipping, AdamW, weights, EMA, teacher.

    g <- clip g
    p <- (1 - lr wd) p;   m <- m + (1 - b1)(g - m);   v <- b2 v + (1 - b2) g^2
    p <- p - lr / (1 - b1^k) m / (sqrt(v / (1 - b2^k)) + eps);   weights <- p
    ema <- ema + (1 - decay)(p - ema);   ema_copy <- ema

The gradient may lie in pieces, as autograd leaves it: a table says which elements each piece
holds, and where. A copy of the EMA in e4m3 is cut into segments with one multiplier each.

What depends on the number of the update k may lie on the device, with whether the update is taken
at all. If it is not, nothing is read but that, and nothing is written.

Bytes moved per element: 24 for p, m and v, 4 (2) for an fp32 (bf16) gradient, 2 for the weights, 8
for the EMA and 2 for its copy: 40 in all; 1 for a copy in e4m3: 39.
Reference: sra_fast/ops/adamw_ema.py::adamw_ema_ref_.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._plans import Plans, check_not_capturing, mark_in_use

# 8 elements per thread at 4 warps: two 128-bit accesses of each fp32 buffer, one of each
# half-precision one
BLOCK = 1024
# upper limit of 32-bit registers per thread, for launches with wide accesses
REGISTERS = {"_adamw_ema_kernel": 56}
# a program loads the ends of at least this many segments, one per thread: models with fewer
# segments share one compiled kernel
MIN_SEGMENTS = 128
# bytes; addresses of gradient pieces are multiples of this, so that every access can be wide
ALIGNMENT = 16
# after the last piece: a begin that no block reaches
NO_MORE_PIECES = 2**62

_layouts = Plans()
_addresses = Plans()


@triton.jit
def _scale_to_e4m3(
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
    """Scale elements [start, stop) by their segments' multipliers, and raise the segments' amax.

    Nearly always they lie in one segment.
    """
    lanes = tl.arange(0, SEGMENTS)
    ends = tl.load(ends_ptr + lanes, mask=lanes < S, other=stop)
    # the segments of the first and of the last element: two counts in one reduction, 16 bits each
    both = tl.sum((ends <= start).to(tl.int32) + (ends < stop).to(tl.int32) * 65536)
    first_segment = both % 65536
    last_segment = tl.minimum(both // 65536, S - 1)

    scaled = x
    # positions count from the block's first element, in 32 bits: 64 bits took up to 16 registers
    # more, and launches spilled
    begin = start
    position = tl.arange(0, BLOCK)
    for segment in range(first_segment, last_segment + 1):
        end = tl.load(ends_ptr + segment)
        after_start = position >= (start - begin).to(tl.int32)
        before_end = position < tl.minimum(end - begin, BLOCK).to(tl.int32)
        inside = after_start & before_end
        scaled = tl.where(inside, x * tl.load(multiplier_ptr + segment), scaled)
        # lanes beyond the end hold 0, or a NaN if eps is 0, which no maximum takes
        peak = tl.max(tl.where(inside, tl.abs(x), 0.0))
        # rarely true after the first programs: few atomics
        if peak > tl.load(amax_ptr + segment):
            tl.atomic_max(amax_ptr + segment, peak, sem="relaxed")
        start = tl.maximum(start, end)
    # clamp by comparisons, which keep a NaN
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
    """Elements [start, stop) of a vector in pieces, in fp32; zero where no piece holds them.

    Nearly always they lie in one piece.
    """
    out = tl.zeros((BLOCK,), tl.float32)
    piece = tl.load(first_ptr + start // BLOCK)
    begin = tl.load(begin_ptr + piece)
    # ends at the latest after the last piece, where the table has a very large begin
    while begin < stop:
        # the compiler cannot see into the tables; without these hints every access is one element
        # wide
        source = tl.multiple_of(tl.load(address_ptr + piece).to(like_ptr.dtype), 16)
        count = tl.multiple_of(tl.load(count_ptr + piece), VECTOR)
        offsets = tl.multiple_of(start - begin, VECTOR) + tl.arange(0, BLOCK)
        mask = (offsets >= 0) & (offsets < count)
        out += tl.load(source + offsets, mask=mask, other=0.0).to(tl.float32)
        piece += 1
        begin = tl.load(begin_ptr + piece)
    return out


@triton.jit
def _adamw_ema_kernel(
    param_ptr,  # [N] fp32
    grad_ptr,  # [N]; for a gradient in pieces only a pointer of their dtype
    begin_ptr,  # [pieces + 1] int64: first element of each piece, these N being FIRST and up; or None
    count_ptr,  # [pieces] int64
    address_ptr,  # [pieces] int64
    first_ptr,  # [blocks] int32: the first piece that ends after the block begins
    exp_avg_ptr,  # [N] fp32
    exp_avg_sq_ptr,  # [N] fp32
    weights_ptr,  # [N] half precision, or unused
    ema_ptr,  # [N] fp32, or unused
    ema_copy_ptr,  # [N] half precision or e4m3, or unused
    multiplier_ptr,  # [S] fp32: of the segments of an e4m3 copy, or unused
    amax_ptr,  # [S] fp32, or unused
    ends_ptr,  # [S] int64, counted as begin_ptr is, or unused
    clip_scale_ptr,  # one fp32 number, or unused
    numbers_ptr,  # [4] fp64: 1 / (1 - beta1^k), 1 / sqrt(1 - beta2^k), factor of lr, taken; or None
    N,
    S,
    FIRST,
    shrink,  # 1 - lr * weight_decay
    weight1,  # 1 - beta1
    beta2,
    weight2,  # 1 - beta2
    step_size,  # lr / (1 - beta1^step)
    inv_sqrt_bias2,  # 1 / sqrt(1 - beta2^step)
    lr,  # these two are read if the count is on the device
    lr_decay,  # lr * weight_decay
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
    # the same elements counted in the whole buffer, for the tables
    start = FIRST + tl.program_id(0).to(tl.int64) * BLOCK
    stop = tl.minimum(start + BLOCK, FIRST + N)
    count = N
    if numbers_ptr is not None:
        # no lane is left if the update is not taken; both lengths are multiples of 16, as wide
        # accesses need it
        count = tl.where(tl.load(numbers_ptr + 3) != 0.0, N, 0)
        factor = tl.load(numbers_ptr + 2).to(tl.float32)
        shrink = 1.0 - lr_decay * factor
        step_size = lr * factor * tl.load(numbers_ptr).to(tl.float32)
        inv_sqrt_bias2 = tl.load(numbers_ptr + 1).to(tl.float32)
    mask = cols < count
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

    # AdamW (arXiv 1711.05101, Alg. 2)
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
        # as torch.lerp: from the nearer end, so that decay 0 returns the parameter exactly
        ema_is_nearer = ema_weight < 0.5
        from_ema = ema + ema_weight * (param - ema)
        from_param = param - decay * (param - ema)
        ema = tl.where(ema_is_nearer, from_ema, from_param)
        tl.store(ema_ptr + cols, ema, mask=mask)
        if SEGMENTS:
            ema = _scale_to_e4m3(
                ema, start, stop, multiplier_ptr, amax_ptr, ends_ptr, S, SEGMENTS, BLOCK
            )
        if EMA_COPY:
            tl.store(ema_copy_ptr + cols, ema, mask=mask)


def _layout(
    begins: list[int], counts: list[int], N: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """The tables begin, count and first of ``_adamw_ema_kernel``."""
    check_not_capturing("adamw_ema_")
    begin = torch.tensor([*begins, NO_MORE_PIECES])
    count = torch.tensor(counts)
    ends = begin[:-1] + count
    first = torch.searchsorted(ends, torch.arange(0, N, BLOCK), right=True)
    return begin.to(device), count.to(device), first.to(device, torch.int32)


def _on_device(addresses: list[int], device: torch.device) -> Tensor:
    """The table of addresses; on a GPU copied without a wait."""
    check_not_capturing("adamw_ema_")
    table = torch.tensor(addresses)
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


def _tables(
    pieces: list[Tensor], begins: list[int], N: int, device: torch.device
) -> tuple[Tensor, ...]:
    """The tables begin, count, address and first.

    All are cached. An allocator hands out the same addresses step after step, so the table of
    addresses is rarely rebuilt either.

    Raises:
        RuntimeError: a table is new and a CUDA graph is being captured.
    """
    counts = [piece.numel() for piece in pieces]
    addresses = [piece.data_ptr() for piece in pieces]
    layout_key = (N, device, *begins, *counts)
    begin, count, first = _layouts.get(layout_key, lambda: _layout(begins, counts, N, device))
    address = _addresses.get((device, *addresses), lambda: _on_device(addresses, device))
    mark_in_use(begin, count, address, first)
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
    numbers: Tensor | None = None,
) -> None:
    """One step on one-dimensional contiguous buffers of one length; optional buffers are None.

    With ``begins`` the gradient is a list of pieces that begin at these elements, in ascending
    order. Their addresses, begins and lengths are multiples of ``ALIGNMENT`` bytes. Where two
    pieces overlap, one is zero.

    ``numbers [4]`` fp64 of a ``DeviceStep`` take the place of ``step``, which is not read then.
    """
    # scalars that do not depend on the element
    on_host = numbers is None
    scalars = (
        1 - lr * weight_decay,
        1 - beta1,
        beta2,
        1 - beta2,
        lr / (1 - beta1**step) if on_host else 0.0,
        (1 - beta2**step) ** -0.5 if on_host else 0.0,
        lr,
        lr * weight_decay,
        eps,
        1 - decay,
        decay,
    )
    # tables of a gradient in pieces
    N = param.numel()
    tables: tuple[Tensor | None, ...] = (None, None, None, None)
    if begins is not None:
        tables = _tables(grad, begins, N, param.device)
        # only its dtype is read
        grad = grad[0].new_empty(0)

    S = 0 if ends is None else ends.numel()
    options = {
        "CLIP": clip_scale is not None,
        "WEIGHTS": weights is not None,
        "EMA": ema is not None,
        "EMA_COPY": ema_copy is not None,
        "SEGMENTS": max(triton.next_power_of_2(S), MIN_SEGMENTS) if S else 0,
        "VECTOR": ALIGNMENT // grad.element_size(),
        "BLOCK": BLOCK,
    }
    # the kernel needs a pointer for every operand; it does not read the unused ones
    unused = lambda x: param if x is None else x
    state = [param, grad]
    outputs = [exp_avg, exp_avg_sq, unused(weights), unused(ema), unused(ema_copy)]
    scaling = [unused(multiplier), unused(amax), unused(ends), unused(clip_scale)]
    # a length that is no multiple of 16 would narrow every access of the launch: the remainder
    # gets a launch of its own
    even = N // 16 * 16
    for start, stop in ((0, even), (even, N)):
        if start < stop:
            # without a limit ptxas may aim at 48 registers for a copy in segments and spill two;
            # accesses of one element need more
            limit = REGISTERS["_adamw_ema_kernel"] if S and stop == even else None
            _adamw_ema_kernel[(triton.cdiv(stop - start, BLOCK),)](
                *[x[start:stop] for x in state],
                *tables,
                *[x[start:stop] for x in outputs],
                *scaling,
                numbers,
                stop - start,
                S,
                start,
                *scalars,
                **options,
                num_warps=4,
                maxnreg=limit,
                enable_fp_fusion=True,
            )
