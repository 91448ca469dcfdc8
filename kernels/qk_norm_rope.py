"""Norm of every head of queries and keys, then rotary position embedding, in one pass over both.

    n = norm(x) w;   y1 = n1 cos1 - n2 sin1;   y2 = n2 cos2 + n1 sin2

for every pair (1, 2) of a head's d elements; the norm is RMS, LayerNorm or none. Pairs are
neighbours (interleaved), or element i of either half of the head. A program owns some tokens of one
image and walks their heads in q or in k, so that it reads cosines and sines once and keeps them in
registers. It loads several heads before it uses any. The backward recomputes the statistics. A
program leaves one fp32 partial sum; they are added in a fixed order, without atomics, so the result
is bitwise repeatable.
Reference: sra_fast/ops/qk_norm_rope.py::qk_norm_rope_ref.

Bytes, everything moved once, s per element, N elements of q and k together (2 in bf16), R rows of a
table with c columns (d or d/2) of 4 bytes:
    forward   2 s N (x; y) + 8 R c (cos, sin) + 2 s d (weights)
    backward  3 s N (x, dy; dx) + 8 R c + 4 s d (weights; their gradients)
The tables are read once per image, for q, for k and for every share of the heads; from the second
time on the second-level cache has them. The backward moves 16 P d bytes more, an fp32 sum per
weight and program written and read, with P programs for q and as many for k.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._rows import num_sms, num_splits, sum_partials

# the widest head
MAX_WIDTH = 256
# of a program, fewer for narrow heads, see MAX_ROWS
THREADS = 128
# tokens of a tile at most: more would leave a short sequence to few programs
MAX_ROWS = 64
# bytes of all arrays that a thread loads before it uses any
LOADED_BYTES = 64
# programs of 128 threads that share an SM of Hopper, with 80 and 128 registers: 48 and 32 KiB of
# loads in flight, less where a head fills its tile in part
FWD_PROGRAMS_PER_SM = 6
BWD_PROGRAMS_PER_SM = 4
# upper limits of 32-bit registers per thread, checked by tests/ops/test_codegen_heads.py
REGISTERS = {"_qk_norm_rope_fwd_kernel": 128, "_qk_norm_rope_bwd_kernel": 128}


@triton.jit
def _pair_masks(D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Which pairs have a first, and which a second element: a head may have an odd width."""
    pair = tl.arange(0, HALF)
    in_half = pair < D // 2
    return (2 * pair < D, 2 * pair + 1 < D) if INTERLEAVED else (in_half, in_half)


@triton.jit
def _load_pairs(
    ptr, rows, live, other, D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr
):
    """First and second elements ``[ROWS, HALF]`` of the pairs of D columns from ``rows [ROWS, 1]``,
    as stored; ``other`` where there is nothing.
    """
    if INTERLEAVED:
        # neighbours in one wide load, separated in registers
        cols = tl.arange(0, 2 * HALF)[None, :]
        x = tl.load(ptr + rows + cols, mask=live & (cols < D), other=other)
        first, second = tl.split(tl.reshape(x, (x.shape[0], HALF, 2)))
    else:
        cols = tl.arange(0, HALF)[None, :]
        mask = live & (cols < D // 2)
        first = tl.load(ptr + rows + cols, mask=mask, other=other)
        second = tl.load(ptr + rows + (D // 2 + cols), mask=mask, other=other)
    return first, second


@triton.jit
def _store_pairs(
    ptr, rows, live, first, second, D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr
):
    """Store first and second elements ``[ROWS, HALF]``, rounded once."""
    first = first.to(ptr.dtype.element_ty)
    second = second.to(ptr.dtype.element_ty)
    if INTERLEAVED:
        cols = tl.arange(0, 2 * HALF)[None, :]
        x = tl.reshape(tl.join(first, second), (first.shape[0], 2 * HALF))
        tl.store(ptr + rows + cols, x, mask=live & (cols < D))
    else:
        cols = tl.arange(0, HALF)[None, :]
        mask = live & (cols < D // 2)
        tl.store(ptr + rows + cols, first, mask=mask)
        tl.store(ptr + rows + (D // 2 + cols), second, mask=mask)


@triton.jit
def _load_weight(ptr, live, D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """A weight as pairs ``[1, HALF]`` in fp32; ones without one, or unless ``live``."""
    first = 1.0
    second = 1.0
    if ptr is not None:
        row = tl.zeros((1, 1), dtype=tl.int32)
        first, second = _load_pairs(ptr, row, live, 1.0, D, HALF, INTERLEAVED)
        first = first.to(tl.float32)
        second = second.to(tl.float32)
    return first, second


@triton.jit
def _load_weights(
    q_ptr, k_ptr, is_query, D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr
):
    """This program's weight; the two may differ in dtype, so that no pointer stands for both."""
    q1, q2 = _load_weight(q_ptr, is_query, D, HALF, INTERLEAVED)
    k1, k2 = _load_weight(k_ptr, is_query == 0, D, HALF, INTERLEAVED)
    return q1 * k1, q2 * k2


@triton.jit
def _load_table(
    ptr,
    rows,
    live,
    neutral,
    D: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    FULL: tl.constexpr,
):
    """Cosines or sines of a tile's tokens for both elements of a pair, in fp32.

    A table has D columns (FULL), or a column per pair. ``neutral`` is for tokens without rotation.
    """
    if FULL:
        first, second = _load_pairs(ptr, rows, live, neutral, D, HALF, INTERLEAVED)
    else:
        cols = tl.arange(0, HALF)[None, :]
        first = tl.load(ptr + rows + cols, mask=live & (cols < D // 2), other=neutral)
        second = first
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def _load_tables(
    cos_ptr,
    sin_ptr,
    b,
    t,
    table,
    TABLE_UNIT: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    FULL: tl.constexpr,
):
    """Cosines and sines of tokens ``t [ROWS, 1]``, each a pair; unused without tables."""
    cos = (1.0, 1.0)
    sin = (0.0, 0.0)
    if cos_ptr is not None:
        offset, table_rows, cos_b, cos_t, sin_b, sin_t = table
        row = t - offset
        live = (row >= 0) & (row < table_rows)
        cos_rows = (b * cos_b + row * cos_t) * TABLE_UNIT
        sin_rows = (b * sin_b + row * sin_t) * TABLE_UNIT
        cos = _load_table(cos_ptr, cos_rows, live, 1.0, D, HALF, INTERLEAVED, FULL)
        sin = _load_table(sin_ptr, sin_rows, live, 0.0, D, HALF, INTERLEAVED, FULL)
    return cos, sin


@triton.jit
def _normalize(
    first,
    second,
    live,
    eps,
    D: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    NORM: tl.constexpr,
    CENTER: tl.constexpr,
):
    """xhat of both elements in fp32 and 1 / deviation ``[ROWS, 1]``."""
    first = first.to(tl.float32)
    second = second.to(tl.float32)
    if CENTER:
        mean = tl.sum(first + second, axis=1, keep_dims=True) / D
        # the padding now holds 0 - mean, which must not enter the variance
        first_exists, second_exists = _pair_masks(D, HALF, INTERLEAVED)
        first = tl.where(first_exists[None, :], first - mean, 0.0)
        second = tl.where(second_exists[None, :], second - mean, 0.0)
    rstd = 1.0
    if NORM:
        squares = tl.sum(first * first + second * second, axis=1, keep_dims=True)
        # rows past the end are zeros: with eps = 0 they would be NaN and enter the sums
        rstd = 1.0 / tl.sqrt(tl.where(live, squares / D + eps, 1.0))
    return first * rstd, second * rstd, rstd


@triton.jit
def _select(is_query, q, k):
    """The three strides of queries, or those of keys, which may be wider integers."""
    first = tl.where(is_query, q[0], k[0])
    second = tl.where(is_query, q[1], k[1])
    third = tl.where(is_query, q[2], k[2])
    return first, second, third


@triton.jit
def _locate(T, H, P, C, num_tokens, num_heads):
    """Image, tokens [first, last) and heads [first, last) of this program."""
    pid = tl.program_id(0).to(tl.int64)
    first_token = pid // C % P * num_tokens
    first_head = pid % C * num_heads
    tokens = (first_token, tl.minimum(first_token + num_tokens, T))
    return pid // C // P, tokens, (first_head, tl.minimum(first_head + num_heads, H))


def _unspecialized(*arrays: str) -> list[str]:
    """Arguments of which Triton need not know whether they are 1 or a multiple of 16."""
    strides = [f"{array}_{axis}" for array in arrays for axis in "bth"]
    tables = ["cos_b", "cos_t", "sin_b", "sin_t", "offset", "table_rows"]
    return [*strides, *tables, *SHAPE_ARGUMENTS]


SHAPE_ARGUMENTS = ("T", "S", "H", "H_kv", "P", "C", "num_tokens", "num_heads")


@triton.jit(do_not_specialize=_unspecialized("q", "k", "q_out", "k_out"))
def _qk_norm_rope_fwd_kernel(
    q_ptr,  # [B, T, H, D], strides in units of UNIT elements; the last is 1, as for all arrays
    k_ptr,  # [B, S, H_kv, D]
    cos_ptr,  # [B or 1, table_rows, D or D / 2], strides in units of TABLE_UNIT, or None, as sin
    sin_ptr,
    q_weight_ptr,  # [D] or None
    k_weight_ptr,
    q_out_ptr,  # [B, T, H, D]
    k_out_ptr,  # [B, S, H_kv, D]
    T,
    S,
    H,
    H_kv,
    P,
    C,
    num_tokens,
    num_heads,
    q_b,
    q_t,
    q_h,
    k_b,
    k_t,
    k_h,
    q_out_b,
    q_out_t,
    q_out_h,
    k_out_b,
    k_out_t,
    k_out_h,
    cos_b,
    cos_t,
    sin_b,
    sin_t,
    offset,
    table_rows,
    eps,
    UNIT: tl.constexpr,
    TABLE_UNIT: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    FULL: tl.constexpr,
    NORM: tl.constexpr,
    CENTER: tl.constexpr,
):
    # the second half of the programs has the keys
    is_query = tl.program_id(1) == 0
    x_ptr = tl.where(is_query, q_ptr, k_ptr)
    y_ptr = tl.where(is_query, q_out_ptr, k_out_ptr)
    x_strides = _select(is_query, (q_b, q_t, q_h), (k_b, k_t, k_h))
    y_strides = _select(is_query, (q_out_b, q_out_t, q_out_h), (k_out_b, k_out_t, k_out_h))
    table = (offset, table_rows, cos_b, cos_t, sin_b, sin_t)
    b, tokens, heads = _locate(
        tl.where(is_query, T, S), tl.where(is_query, H, H_kv), P, C, num_tokens, num_heads
    )
    x_ptr += b * x_strides[0] * UNIT
    y_ptr += b * y_strides[0] * UNIT
    w1, w2 = _load_weights(q_weight_ptr, k_weight_ptr, is_query, D, HALF, INTERLEAVED)
    for start in range(tokens[0], tokens[1], ROWS):
        t = (start + tl.arange(0, ROWS))[:, None]
        exists = t < tokens[1]
        x_rows = t * x_strides[1] * UNIT
        y_rows = t * y_strides[1] * UNIT
        # once for all heads
        cos, sin = _load_tables(
            cos_ptr, sin_ptr, b, t, table, TABLE_UNIT, D, HALF, INTERLEAVED, FULL
        )
        for h in range(heads[0], heads[1], HEADS):
            # load several heads before any is used
            loaded = ()
            for i in tl.static_range(HEADS):
                live = exists & (h + i < heads[1])
                head_ptr = x_ptr + (h + i) * x_strides[2] * UNIT
                x = _load_pairs(head_ptr, x_rows, live, 0.0, D, HALF, INTERLEAVED)
                loaded = loaded + (x,)
            for i in tl.static_range(HEADS):
                live = exists & (h + i < heads[1])
                x1, x2 = loaded[i]
                y1, y2, _ = _normalize(x1, x2, live, eps, D, HALF, INTERLEAVED, NORM, CENTER)
                y1 *= w1
                y2 *= w2
                # rotate and round once
                if cos_ptr is not None:
                    y1, y2 = y1 * cos[0] - y2 * sin[0], y2 * cos[1] + y1 * sin[1]
                out_ptr = y_ptr + (h + i) * y_strides[2] * UNIT
                _store_pairs(out_ptr, y_rows, live, y1, y2, D, HALF, INTERLEAVED)


@triton.jit(do_not_specialize=_unspecialized("q", "k", "q_out", "k_out", "dq", "dk"))
def _qk_norm_rope_bwd_kernel(
    q_ptr,  # [B, T, H, D], strides in units of UNIT elements; the last is 1, as for all arrays
    k_ptr,  # [B, S, H_kv, D]
    q_out_ptr,  # the gradients of the outputs, shaped as q and k
    k_out_ptr,
    cos_ptr,  # [B or 1, table_rows, D or D / 2], strides in units of TABLE_UNIT, or None, as sin
    sin_ptr,
    q_weight_ptr,  # [D] or None
    k_weight_ptr,
    dq_ptr,  # [B, T, H, D]
    dk_ptr,  # [B, S, H_kv, D]
    part_ptr,  # [programs, K, D] fp32, queries' weight before keys', or None without any
    K,
    T,
    S,
    H,
    H_kv,
    P,
    C,
    num_tokens,
    num_heads,
    q_b,
    q_t,
    q_h,
    k_b,
    k_t,
    k_h,
    q_out_b,
    q_out_t,
    q_out_h,
    k_out_b,
    k_out_t,
    k_out_h,
    dq_b,
    dq_t,
    dq_h,
    dk_b,
    dk_t,
    dk_h,
    cos_b,
    cos_t,
    sin_b,
    sin_t,
    offset,
    table_rows,
    eps,
    UNIT: tl.constexpr,
    TABLE_UNIT: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    FULL: tl.constexpr,
    NORM: tl.constexpr,
    CENTER: tl.constexpr,
):
    # the second half of the programs has the keys
    is_query = tl.program_id(1) == 0
    x_ptr = tl.where(is_query, q_ptr, k_ptr)
    dy_ptr = tl.where(is_query, q_out_ptr, k_out_ptr)
    dx_ptr = tl.where(is_query, dq_ptr, dk_ptr)
    x_strides = _select(is_query, (q_b, q_t, q_h), (k_b, k_t, k_h))
    dy_strides = _select(is_query, (q_out_b, q_out_t, q_out_h), (k_out_b, k_out_t, k_out_h))
    dx_strides = _select(is_query, (dq_b, dq_t, dq_h), (dk_b, dk_t, dk_h))
    table = (offset, table_rows, cos_b, cos_t, sin_b, sin_t)
    b, tokens, heads = _locate(
        tl.where(is_query, T, S), tl.where(is_query, H, H_kv), P, C, num_tokens, num_heads
    )
    x_ptr += b * x_strides[0] * UNIT
    dy_ptr += b * dy_strides[0] * UNIT
    dx_ptr += b * dx_strides[0] * UNIT
    w1, w2 = _load_weights(q_weight_ptr, k_weight_ptr, is_query, D, HALF, INTERLEAVED)
    sum1 = tl.zeros((ROWS, HALF), tl.float32)
    sum2 = tl.zeros((ROWS, HALF), tl.float32)
    for start in range(tokens[0], tokens[1], ROWS):
        t = (start + tl.arange(0, ROWS))[:, None]
        exists = t < tokens[1]
        x_rows = t * x_strides[1] * UNIT
        dy_rows = t * dy_strides[1] * UNIT
        dx_rows = t * dx_strides[1] * UNIT
        # once for all heads
        cos, sin = _load_tables(
            cos_ptr, sin_ptr, b, t, table, TABLE_UNIT, D, HALF, INTERLEAVED, FULL
        )
        for h in range(heads[0], heads[1], HEADS):
            # load several heads before any is used
            loaded = ()
            for i in tl.static_range(HEADS):
                live = exists & (h + i < heads[1])
                x_head_ptr = x_ptr + (h + i) * x_strides[2] * UNIT
                dy_head_ptr = dy_ptr + (h + i) * dy_strides[2] * UNIT
                x = _load_pairs(x_head_ptr, x_rows, live, 0.0, D, HALF, INTERLEAVED)
                dy = _load_pairs(dy_head_ptr, dy_rows, live, 0.0, D, HALF, INTERLEAVED)
                loaded = loaded + ((x, dy),)
            for i in tl.static_range(HEADS):
                live = exists & (h + i < heads[1])
                x, dy = loaded[i]
                xhat1, xhat2, rstd = _normalize(
                    x[0], x[1], live, eps, D, HALF, INTERLEAVED, NORM, CENTER
                )
                # rotate back: the transposed rotation gives the gradient of the weighted norm
                dn1 = dy[0].to(tl.float32)
                dn2 = dy[1].to(tl.float32)
                if cos_ptr is not None:
                    dn1, dn2 = dn1 * cos[0] + dn2 * sin[1], dn2 * cos[1] - dn1 * sin[0]
                if part_ptr is not None:
                    sum1 += dn1 * xhat1
                    sum2 += dn2 * xhat2
                dx1 = dn1 * w1
                dx2 = dn2 * w2
                if NORM:
                    # dx = (dxhat - xhat mean(xhat dxhat) - mean(dxhat)) rstd
                    c1 = tl.sum(xhat1 * dx1 + xhat2 * dx2, axis=1, keep_dims=True) / D
                    c2 = tl.sum(dx1 + dx2, axis=1, keep_dims=True) / D if CENTER else 0.0
                    dx1 = (dx1 - xhat1 * c1 - c2) * rstd
                    dx2 = (dx2 - xhat2 * c1 - c2) * rstd
                out_ptr = dx_ptr + (h + i) * dx_strides[2] * UNIT
                _store_pairs(out_ptr, dx_rows, live, dx1, dx2, D, HALF, INTERLEAVED)

    # one partial sum per program and weight
    if part_ptr is not None:
        has_weight = tl.where(is_query, q_weight_ptr is not None, k_weight_ptr is not None)
        pid = tl.program_id(0).to(tl.int64)
        part_ptr += (pid * K + tl.where(is_query, 0, K - 1)) * D
        row = tl.zeros((1, 1), dtype=tl.int32)
        sum1 = tl.sum(sum1, axis=0)[None, :]
        sum2 = tl.sum(sum2, axis=0)[None, :]
        _store_pairs(part_ptr, row, has_weight, sum1, sum2, D, HALF, INTERLEAVED)


def _unit(*tensors: Tensor) -> int:
    """The largest power of two up to 8 that divides all strides but the last.

    Triton knows that a stride is a multiple of 16, or nothing: heads of 72 are multiples of 8. With
    strides in units of 8 elements it sees that rows begin at multiples of 16 bytes.
    """
    strides = [stride for x in tensors for stride in _used_strides(x)]
    return next(unit for unit in (8, 4, 2, 1) if all(stride % unit == 0 for stride in strides))


def _used_strides(x: Tensor) -> list[int]:
    """All strides but the last; 0 over a single element, where it is never used."""
    return [
        stride if size > 1 else 0
        for stride, size in zip(x.stride()[:-1], x.shape[:-1], strict=True)
    ]


def _in_units(unit: int, *tensors: Tensor) -> list[int]:
    """The strides of all tensors but the last of each."""
    return [stride // unit for x in tensors for stride in _used_strides(x)]


def _pairs_per_thread(x: Tensor, interleaved: bool) -> int:
    """Pairs of a head in a thread: its loads have 128 bits, of neighbours, or of each half if the
    second begins at a multiple of them.
    """
    return 4 if interleaved or x.element_size() > 2 or x.shape[3] % 16 else 8


def _heads_per_iteration(x: Tensor, interleaved: bool, num_loads: int) -> int:
    """Heads that a thread loads before it uses any, of ``num_loads`` arrays."""
    bytes_per_head = 2 * _pairs_per_thread(x, interleaved) * x.element_size() * num_loads
    return max(LOADED_BYTES // bytes_per_head, 1)


def _shape_arguments(
    q: Tensor, k: Tensor, interleaved: bool, programs_per_sm: int
) -> tuple[int, list[int], dict[str, int]]:
    """Programs for queries, as many as for keys; ``SHAPE_ARGUMENTS``; the tile and its warps.

    As few shares as fill the device: of the tokens, and where these are few also of the heads.
    """
    B, T, H, D = q.shape
    S, H_kv = k.shape[1:3]
    step = _heads_per_iteration(q, interleaved, 1)
    half = max(triton.next_power_of_2(triton.cdiv(D, 2)), 8)
    pairs = _pairs_per_thread(q, interleaved)
    rows = min(max(THREADS * pairs // half, 1), MAX_ROWS)
    blocks = triton.cdiv(max(T, S), rows)
    slots = num_sms(q.device) * programs_per_sm
    images = 2 * B
    P = num_splits(images, blocks, slots) if images * blocks >= slots else blocks
    most = max(H, H_kv)
    shares = min(triton.cdiv(slots, images * blocks), triton.cdiv(most, step))
    # whole iterations of the forward, which has most heads in one
    num_heads = triton.cdiv(triton.cdiv(most, shares), step) * step
    C = triton.cdiv(most, num_heads)
    arguments = [T, S, H, H_kv, P, C, triton.cdiv(blocks, P) * rows, num_heads]
    tile = {"D": D, "HALF": half, "ROWS": rows}
    return B * P * C, arguments, tile | {"num_warps": max(rows * half // (32 * pairs), 1)}


def _table_arguments(
    cos: Tensor | None, sin: Tensor | None, offset: int, D: int, interleaved: bool
) -> tuple[list[int], dict[str, Any]]:
    """Strides of image and token of both tables, the offset and the number of rows; the style."""
    if cos is None or sin is None:
        # without pairs to rotate, neighbours make the widest loads
        return [0] * 6, {"INTERLEAVED": True, "FULL": False, "TABLE_UNIT": 1}
    unit = _unit(cos, sin)
    style = {"INTERLEAVED": interleaved, "FULL": cos.shape[2] == D, "TABLE_UNIT": unit}
    return [*_in_units(unit, cos, sin), offset, cos.shape[1]], style


def dense_like(x: Tensor, heads_first: bool) -> Tensor:
    """An uninitialized tensor shaped as ``x [B, T, H, D]``, dense, heads before tokens in memory or
    after them.
    """
    B, T, H, D = x.shape
    strides = (H * T * D, D, T * D, 1) if heads_first else (T * H * D, H * D, D, 1)
    # no transposed view: autograd would forbid in-place changes of a Function's views
    return x.new_empty_strided((B, T, H, D), strides)


def qk_norm_rope_fwd(
    q: Tensor,
    k: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    norm: bool,
    center: bool,
    interleaved: bool,
    offset: int,
    heads_first: bool,
) -> tuple[Tensor, Tensor]:
    """Queries and keys, normed and rotated.

    Args:
        q: ``[B, T, H, d]`` with any strides but the last, which is 1, as in all arguments.
        k: ``[B, S, H_kv, d]``.
        cos: ``[B or 1, R, d or d / 2]`` for tokens offset to offset + R, or None.
        sin: shaped as ``cos``.
        q_weight: ``[d]`` or None.
        k_weight: ``[d]`` or None.
        eps: added to the variance.
        norm: whether there is one.
        center: LayerNorm instead of RMS norm.
        interleaved: pairs are neighbours.
        offset: tokens before the first that is rotated.
        heads_first: heads before tokens in the memory of the results.
    """
    q_out = dense_like(q, heads_first)
    k_out = dense_like(k, heads_first)
    table_arguments, style = _table_arguments(cos, sin, offset, q.shape[3], interleaved)
    programs, shape_arguments, tile = _shape_arguments(
        q, k, style["INTERLEAVED"], FWD_PROGRAMS_PER_SM
    )
    unit = _unit(q, k, q_out, k_out)
    # without a limit ptxas 13 spills two registers to fit 96 (sm_80, halves of 36 columns)
    max_registers = None if style["INTERLEAVED"] or q.shape[3] % 16 == 0 else 128
    _qk_norm_rope_fwd_kernel[(programs, 2)](
        q,
        k,
        cos,
        sin,
        q_weight,
        k_weight,
        q_out,
        k_out,
        *shape_arguments,
        *_in_units(unit, q, k, q_out, k_out),
        *table_arguments,
        eps,
        UNIT=unit,
        NORM=norm,
        CENTER=center,
        HEADS=_heads_per_iteration(q, style["INTERLEAVED"], 1),
        **style,
        **tile,
        maxnreg=max_registers,
        enable_fp_fusion=True,
    )
    return q_out, k_out


def qk_norm_rope_bwd(
    dq_out: Tensor,
    dk_out: Tensor,
    q: Tensor,
    k: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    norm: bool,
    center: bool,
    interleaved: bool,
    offset: int,
    heads_first: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk and the gradients of the weights, each empty without its weight.

    ``dq_out`` and ``dk_out`` are shaped as q and k; the last stride is 1. The other arguments are
    those of the forward.
    """
    D = q.shape[3]
    dq = dense_like(q, heads_first)
    dk = dense_like(k, heads_first)
    weights = [w for w in (q_weight, k_weight) if w is not None]
    table_arguments, style = _table_arguments(cos, sin, offset, D, interleaved)
    programs, shape_arguments, tile = _shape_arguments(
        q, k, style["INTERLEAVED"], BWD_PROGRAMS_PER_SM
    )
    unit = _unit(q, k, dq_out, dk_out, dq, dk)
    part = q.new_empty(1, programs, len(weights), D, dtype=torch.float32)
    _qk_norm_rope_bwd_kernel[(programs, 2)](
        q,
        k,
        dq_out,
        dk_out,
        cos,
        sin,
        q_weight,
        k_weight,
        dq,
        dk,
        part if weights else None,
        len(weights),
        *shape_arguments,
        *_in_units(unit, q, k, dq_out, dk_out, dq, dk),
        *table_arguments,
        eps,
        UNIT=unit,
        NORM=norm,
        CENTER=center,
        HEADS=_heads_per_iteration(q, style["INTERLEAVED"], 2),
        **style,
        **tile,
        # what BWD_PROGRAMS_PER_SM programs have: by itself ptxas 13 takes up to 168, or spills to
        # fit 80 (sm_100, interleaved)
        maxnreg=128,
        enable_fp_fusion=True,
    )
    sums = [w.new_empty(D) for w in weights]
    if sums:
        sum_partials(part, *sums)
    dq_weight = q.new_empty(0) if q_weight is None else sums[0]
    dk_weight = k.new_empty(0) if k_weight is None else sums[-1]
    return dq, dk, dq_weight, dk_weight
