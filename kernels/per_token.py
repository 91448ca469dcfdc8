"""Residual update and modulated norm with one vector per token: gate, shift and scale [B, T, D].

    z = x + gate (y + bias)
    h = r + (norm(z) weight + norm_bias) (1 + scale) + shift

Each part may be absent. Without y, z is x: adaln. Without h there is no norm: gated_residual. With
both it is gated_residual_adaln; r, and a scale that is the factor itself, make gated_residual_norm.

A gate, shift or scale may come with a table [D] that is added to it here, in fp32: PixArt-alpha
(arXiv 2310.00426, Sec. 2.3) and Wan learn one per block and add it to the embedding of the time.

A program walks rows of one image. It reads and writes each row once and keeps no vector between
rows. Only weight, norm_bias, bias and the tables, [D], have partial sums, one per program in fp32,
added in a fixed order without atomics, so the result is bitwise repeatable.
Reference: sra_fast/ops/gated_residual_adaln.py::gated_residual_adaln_ref.

Bytes, s per element of the [B, T, D] arrays (2 in bf16), 8 B T of statistics besides:
    adaln                 forward  4 s B T D (x, shift, scale; h)
                          backward 5 s B T D (x, dh, scale; dx, dscale): dshift is dh itself
    gated_residual        forward  4 s B T D (x, y, gate; x')
                          backward 5 s B T D (dx', y, gate; dy, dgate): dx is dx' itself
    gated_residual_adaln  forward  7 s B T D (x, y, gate, shift, scale; x', h)
                          backward 10 s B T D (x', y, dx', dh, gate, scale; dx, dy, dgate, dscale)
    gated_residual_norm   forward  4 s B T D (r, x, scale; h)
                          backward 5 s B T D (x, dh, scale; dx, dscale): the gradient of r is dh
weight, norm_bias, bias and the tables cost D elements each per row, from the cache, and partial
sums.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._rows import (
    SHARES,
    factor_of,
    load,
    load_bias,
    load_fp32,
    load_gate,
    locate,
    mod_strides,
    norm_bwd,
    norm_fwd,
    residual,
    row_columns,
    split_rows,
    sum_partials,
    width_config,
)

# the widest rows that fit the registers of every architecture in every dtype
MAX_WIDTH = 8192
# of a norm with weight or bias, whose sums take registers: at D=8192 fp32 spills 72-192 bytes
AFFINE_WIDTH = 6144
# of the update, or of a norm, with tables: fp32 spills 8-96 bytes at D=8192; of a norm with both,
# 8-48 at D=5120
TABLE_WIDTH = 6144
TABLE_WIDTH_AFFINE = 4096
# of the residual update and the norm in one pass: fp32 spills 112-144 bytes at D=8192; with sums
# for weight, biases or tables 8-88 at D=4096
FUSED_WIDTH = 6144
FUSED_WIDTH_WITH_SUMS = 3072
# upper limits of 32-bit registers per thread: every launch up to D=1536, and SiT-XL's (D=1152, half
# precision)
REGISTERS = {"_per_token_fwd_kernel": 128, "_per_token_bwd_kernel": 255}
REGISTERS_XL = {"_per_token_fwd_kernel": 96, "_per_token_bwd_kernel": 168}


@triton.jit
def _load_or(ptr, offsets, mask, stand_in):
    """Load as stored; without a pointer the stand-in, which nothing reads."""
    return load(ptr, offsets, mask) if ptr is not None else stand_in


@triton.jit
def _with_table(vector, table_ptr, cols, mask):
    """gate, shift or scale of head or tail of a row in fp32, and its table, if there is one."""
    vector = vector.to(tl.float32)
    if table_ptr is not None:
        vector += load_fp32(table_ptr, cols, mask)
    return vector


@triton.jit
def _load_fwd_half(pointers, token, row, live, cols, D: tl.constexpr):
    """Head or tail of a row of x, y, gate, shift, scale and r, as stored, where they exist."""
    x_ptr, y_ptr, gate_ptr, shift_ptr, scale_ptr, residual_ptr = pointers
    offsets = row * D + cols
    mask = live & (cols < D)
    x = load(x_ptr, offsets, mask)
    y = _load_or(y_ptr, offsets, mask, x)
    gate = _load_or(gate_ptr, token[0] + cols, mask, x)
    shift = _load_or(shift_ptr, token[1] + cols, mask, x)
    scale = _load_or(scale_ptr, token[2] + cols, mask, x)
    return x, y, gate, shift, scale, _load_or(residual_ptr, offsets, mask, x)


@triton.jit
def _update_half(half, pointers, row, live, cols, D: tl.constexpr):
    """z of head or tail of a row in fp32, stored if it is not x."""
    y_ptr, gate_ptr, gate_table_ptr, bias_ptr, x_new_ptr = pointers
    if y_ptr is not None:
        mask = live & (cols < D)
        gate = 1.0
        if gate_ptr is not None:
            gate = _with_table(half[2], gate_table_ptr, cols, mask)
        bias = load_bias(bias_ptr, cols, mask)
        z = residual(half[0], half[1], gate, bias, x_new_ptr, row * D + cols, mask)
    else:
        z = half[0].to(tl.float32)
    return z


@triton.jit
def _modulate_half(
    half, xhat, pointers, tables, row, live, cols, D: tl.constexpr, IS_FACTOR: tl.constexpr
):
    """Store h of head or tail of a row."""
    weight_ptr, norm_bias_ptr, shift_ptr, scale_ptr, residual_ptr, h_ptr = pointers
    shift_table_ptr, scale_table_ptr = tables
    mask = live & (cols < D)
    # a weight loads like a gate: 1 without one
    h = xhat * load_gate(weight_ptr, cols, mask) + load_bias(norm_bias_ptr, cols, mask)
    h *= factor_of(_with_table(half[4], scale_table_ptr, cols, mask), scale_ptr, IS_FACTOR)
    if shift_ptr is not None:
        h += _with_table(half[3], shift_table_ptr, cols, mask)
    if residual_ptr is not None:
        h += half[5].to(tl.float32)
    tl.store(h_ptr + row * D + cols, h.to(h_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=SHARES)
def _per_token_fwd_kernel(
    x_ptr,  # [B, T, D]
    y_ptr,  # [B, T, D] or None
    bias_ptr,  # [D] or None, as are weight and norm_bias
    gate_ptr,  # [B, T, D] or None, as are shift and scale; the last stride is 1
    gate_table_ptr,  # [D] or None, as are the other tables
    weight_ptr,
    norm_bias_ptr,
    shift_ptr,
    shift_table_ptr,
    scale_ptr,
    scale_table_ptr,
    residual_ptr,  # [B, T, D], added to h, or None
    x_new_ptr,  # [B, T, D], None without y
    h_ptr,  # [B, T, D], None without a norm
    mean_ptr,  # [B, T] fp32, None for RMS
    rstd_ptr,  # [B, T] fp32
    T,
    P,
    num_rows,
    gate_b,
    gate_t,
    shift_b,
    shift_t,
    scale_b,
    scale_t,
    eps,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    IS_FACTOR: tl.constexpr,
):
    pid, b, g, split, owned = locate(1, P)
    columns = row_columns(HEAD, TAIL)
    head_cols, tail_cols = columns
    loads = (x_ptr, y_ptr, gate_ptr, shift_ptr, scale_ptr, residual_ptr)
    update = (y_ptr, gate_ptr, gate_table_ptr, bias_ptr, x_new_ptr)
    norm = (weight_ptr, norm_bias_ptr, shift_ptr, scale_ptr, residual_ptr, h_ptr)
    tables = (shift_table_ptr, scale_table_ptr)

    for t in range(split * num_rows, (split + 1) * num_rows):
        # every load of the row before the first use
        row = b * T + t
        live = t < T
        token = (b * gate_b + t * gate_t, b * shift_b + t * shift_t, b * scale_b + t * scale_t)
        head = _load_fwd_half(loads, token, row, live, head_cols, D)
        tail = head
        if TAIL:
            tail = _load_fwd_half(loads, token, row, live, tail_cols, D)

        # residual update; the norm reads the rounded x', as the backward will
        z_head = _update_half(head, update, row, live, head_cols, D)
        z_tail = z_head
        if TAIL:
            z_tail = _update_half(tail, update, row, live, tail_cols, D)
        if h_ptr is not None:
            # statistics and xhat in fp32; modulate and round once
            xhat_head, xhat_tail = norm_fwd(
                z_head, z_tail, row, live, mean_ptr, rstd_ptr, eps, columns, D, HEAD, TAIL
            )
            _modulate_half(head, xhat_head, norm, tables, row, live, head_cols, D, IS_FACTOR)
            if TAIL:
                _modulate_half(tail, xhat_tail, norm, tables, row, live, tail_cols, D, IS_FACTOR)


@triton.jit
def _load_bwd_half(pointers, token, row, live, cols, D: tl.constexpr):
    """Head or tail of a row of every array that there is, as stored: z, y, gate, scale, dx', dh."""
    z_ptr, y_ptr, gate_ptr, scale_ptr, dx_new_ptr, dh_ptr = pointers
    offsets = row * D + cols
    mask = live & (cols < D)
    # one of the two gradients is there
    if dh_ptr is not None:
        dh = load(dh_ptr, offsets, mask)
        dx_new = _load_or(dx_new_ptr, offsets, mask, dh)
    else:
        dx_new = load(dx_new_ptr, offsets, mask)
        dh = dx_new
    z = _load_or(z_ptr, offsets, mask, dh)
    y = _load_or(y_ptr, offsets, mask, dh)
    gate = _load_or(gate_ptr, token[0] + cols, mask, dh)
    return z, y, gate, _load_or(scale_ptr, token[1] + cols, mask, dh), dx_new, dh


@triton.jit
def _norm_half(
    half, stats, pointers, tables, sums, row, live, cols, D: tl.constexpr, IS_FACTOR: tl.constexpr
):
    """xhat of head or tail of a row and its gradient, in fp32, and the sums over tokens; stores
    dscale.
    """
    weight_ptr, norm_bias_ptr, scale_ptr, dscale_ptr = pointers
    shift_table_ptr, scale_table_ptr = tables
    mask = live & (cols < D)
    dh = half[5].to(tl.float32)
    xhat = (half[0].to(tl.float32) - stats[0]) * stats[1]
    weight = load_gate(weight_ptr, cols, mask)
    dweight, dnorm_bias, dshift_table, dscale_table = sums
    if dscale_ptr is not None:
        normed = xhat * weight + load_bias(norm_bias_ptr, cols, mask)
        dscale = dh * normed
        tl.store(dscale_ptr + row * D + cols, dscale, mask=mask)
        if scale_table_ptr is not None:
            dscale_table += dscale
    if shift_table_ptr is not None:
        dshift_table += dh
    # the gradient of norm(z) weight + norm_bias
    scale = _with_table(half[3], scale_table_ptr, cols, mask)
    dnormed = dh * factor_of(scale, scale_ptr, IS_FACTOR)
    if weight_ptr is not None:
        dweight += dnormed * xhat
    if norm_bias_ptr is not None:
        dnorm_bias += dnormed
    return xhat, dnormed * weight, (dweight, dnorm_bias, dshift_table, dscale_table)


@triton.jit
def _store_half(half, grads, stats, update, stores, sums, row, live, cols, D: tl.constexpr):
    """Store dx, dy and dgate of head or tail of a row; return the sums over tokens."""
    y_ptr, gate_ptr, gate_table_ptr, bias_ptr = update
    dx_new_ptr, dh_ptr, dx_ptr, dy_ptr, dgate_ptr = stores
    offsets = row * D + cols
    mask = live & (cols < D)
    # gradient of the norm, plus what reaches x' along the residual stream
    if dh_ptr is not None:
        xhat, dxhat, c1, c2 = grads
        dx = (dxhat - xhat * c1 - c2) * stats[1]
        if dx_new_ptr is not None:
            dx += half[4].to(tl.float32)
        tl.store(dx_ptr + offsets, dx, mask=mask)
    else:
        dx = half[4].to(tl.float32)
    dbias, dgate_table = sums
    if y_ptr is not None:
        dy = dx
        if gate_ptr is not None:
            dy = dx * _with_table(half[2], gate_table_ptr, cols, mask)
            y = half[1].to(tl.float32) + load_bias(bias_ptr, cols, mask)
            dgate = dx * y
            tl.store(dgate_ptr + offsets, dgate, mask=mask)
            if gate_table_ptr is not None:
                dgate_table += dgate
        tl.store(dy_ptr + offsets, dy, mask=mask)
        if bias_ptr is not None:
            dbias += dy
    return dbias, dgate_table


@triton.jit
def _store_sum(part_ptr, total, vector_ptr, cols, D: tl.constexpr):
    """Store this program's partial sum of a vector's gradient, if there is that vector; return
    where the next one goes.
    """
    if vector_ptr is not None:
        tl.store(part_ptr + cols, total, mask=cols < D)
        part_ptr += D
    return part_ptr


@triton.jit
def _store_sums(part_ptr, norm_sums, update_sums, of_norm, of_update, cols, D: tl.constexpr):
    """Store the partial sums of head or tail, those of the vectors that there are."""
    weight_ptr, norm_bias_ptr, shift_table_ptr, scale_table_ptr = of_norm
    bias_ptr, gate_table_ptr = of_update
    dweight, dnorm_bias, dshift_table, dscale_table = norm_sums
    dbias, dgate_table = update_sums
    part_ptr = _store_sum(part_ptr, dweight, weight_ptr, cols, D)
    part_ptr = _store_sum(part_ptr, dnorm_bias, norm_bias_ptr, cols, D)
    part_ptr = _store_sum(part_ptr, dshift_table, shift_table_ptr, cols, D)
    part_ptr = _store_sum(part_ptr, dscale_table, scale_table_ptr, cols, D)
    part_ptr = _store_sum(part_ptr, dbias, bias_ptr, cols, D)
    _store_sum(part_ptr, dgate_table, gate_table_ptr, cols, D)


@triton.jit(do_not_specialize=SHARES)
def _per_token_bwd_kernel(
    dx_new_ptr,  # [B, T, D], or None if x' has no other use
    dh_ptr,  # [B, T, D], None without a norm
    z_ptr,  # [B, T, D], what is normed, None without a norm
    y_ptr,  # [B, T, D] or None
    bias_ptr,  # [D] or None, as are weight and norm_bias
    gate_ptr,  # [B, T, D] or None, as is scale; the last stride is 1
    gate_table_ptr,  # [D] or None, as are the other tables
    weight_ptr,
    norm_bias_ptr,
    shift_table_ptr,  # only whether there is one
    scale_ptr,
    scale_table_ptr,
    mean_ptr,  # [B, T] fp32, None for RMS
    rstd_ptr,  # [B, T] fp32, None without a norm
    dx_ptr,  # [B, T, D], None without a norm
    dy_ptr,  # [B, T, D] or None, as are dgate and dscale
    dgate_ptr,
    dscale_ptr,
    # [B, P, K, D] fp32: K of the gradients of weight, norm_bias, the tables of shift and scale,
    # bias and the gate's table
    part_ptr,
    T,
    P,
    num_rows,
    gate_b,
    gate_t,
    scale_b,
    scale_t,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    K: tl.constexpr,
    IS_FACTOR: tl.constexpr,
):
    pid, b, g, split, owned = locate(1, P)
    head_cols, tail_cols = row_columns(HEAD, TAIL)
    # sums over this program's tokens: of the norm dweight, dnorm_bias and those of both tables; of
    # the update dbias and that of the gate's table
    zero_head = tl.zeros((HEAD,), tl.float32)
    zero_tail = tl.zeros((TAIL if TAIL else 1,), tl.float32)
    norm_head = (zero_head, zero_head, zero_head, zero_head)
    norm_tail = (zero_tail, zero_tail, zero_tail, zero_tail)
    update_head = (zero_head, zero_head)
    update_tail = (zero_tail, zero_tail)
    loads = (z_ptr, y_ptr, gate_ptr, scale_ptr, dx_new_ptr, dh_ptr)
    norm = (weight_ptr, norm_bias_ptr, scale_ptr, dscale_ptr)
    tables = (shift_table_ptr, scale_table_ptr)
    update = (y_ptr, gate_ptr, gate_table_ptr, bias_ptr)
    stores = (dx_new_ptr, dh_ptr, dx_ptr, dy_ptr, dgate_ptr)

    for t in range(split * num_rows, (split + 1) * num_rows):
        # every load of the row before the first use
        row = b * T + t
        live = t < T
        token = (b * gate_b + t * gate_t, b * scale_b + t * scale_t)
        head = _load_bwd_half(loads, token, row, live, head_cols, D)
        tail = head
        if TAIL:
            tail = _load_bwd_half(loads, token, row, live, tail_cols, D)
        mean = load(mean_ptr, row, live) if mean_ptr is not None else 0.0
        rstd = load(rstd_ptr, row, live) if rstd_ptr is not None else 0.0
        stats = (mean, rstd)

        grads_head = (0.0, 0.0, 0.0, 0.0)
        grads_tail = grads_head
        if dh_ptr is not None:
            # recompute xhat, and take the two means over the row
            xhat_head, dxhat_head, norm_head = _norm_half(
                head, stats, norm, tables, norm_head, row, live, head_cols, D, IS_FACTOR
            )
            xhat_tail = xhat_head
            dxhat_tail = dxhat_head
            if TAIL:
                xhat_tail, dxhat_tail, norm_tail = _norm_half(
                    tail, stats, norm, tables, norm_tail, row, live, tail_cols, D, IS_FACTOR
                )
            c1, c2 = norm_bwd(xhat_head, xhat_tail, dxhat_head, dxhat_tail, mean_ptr, D, HEAD, TAIL)
            grads_head = (xhat_head, dxhat_head, c1, c2)
            grads_tail = (xhat_tail, dxhat_tail, c1, c2)
        # dx, dy and dgate of this row
        update_head = _store_half(
            head, grads_head, stats, update, stores, update_head, row, live, head_cols, D
        )
        if TAIL:
            update_tail = _store_half(
                tail, grads_tail, stats, update, stores, update_tail, row, live, tail_cols, D
            )

    # one partial sum of each gradient [D] per program
    if K > 0:
        part_ptr += pid * K * D
        of_norm = (weight_ptr, norm_bias_ptr, shift_table_ptr, scale_table_ptr)
        of_update = (bias_ptr, gate_table_ptr)
        _store_sums(part_ptr, norm_head, update_head, of_norm, of_update, head_cols, D)
        if TAIL:
            _store_sums(part_ptr, norm_tail, update_tail, of_norm, of_update, tail_cols, D)


def _are_dense(*arrays: Tensor | None) -> bool:
    return all(t is None or t.is_contiguous() for t in arrays)


def per_token_fwd(
    x: Tensor,
    y: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    norm_bias: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    residual: Tensor | None,
    eps: float,
    rms: bool,
    has_norm: bool,
    dtype: torch.dtype | None = None,
    is_factor: bool = False,
    gate_table: Tensor | None = None,
    shift_table: Tensor | None = None,
    scale_table: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x' (empty without y), h, mean (empty for RMS) and rstd (all three empty without a norm).

    Args:
        x: ``[B, T, D]``, contiguous.
        y: ``[B, T, D]``, contiguous, or None.
        bias: ``[D]`` or None, added to y.
        gate: ``[B, T, D]``; the last stride is 1. None: 1.
        weight: ``[D]`` or None, of the norm.
        norm_bias: ``[D]`` or None.
        shift: ``[B, T, D]``; the last stride is 1. None: 0.
        scale: ``[B, T, D]``; the last stride is 1. None: 0, and the factor is 1.
        residual: ``[B, T, D]``, contiguous, added to h, or None.
        eps: added to the variance.
        rms: RMS norm instead of LayerNorm.
        has_norm: whether there is a norm.
        dtype: of h; default: x's.
        is_factor: the norm is multiplied with ``scale``, not with 1 + scale.
        gate_table: ``[D]``, added to gate, which is there; None: 0. So are the other two.
        shift_table: see ``gate_table``.
        scale_table: see ``gate_table``.
    """
    B, T, D = x.shape
    assert _are_dense(x, y, residual)
    arrays = [t for t in (x, y, gate, shift, scale, residual) if t is not None]
    P, rows = split_rows(x, 1, len(arrays))
    x_new = x.new_empty(0 if y is None else x.shape)
    h = x.new_empty(x.shape if has_norm else 0, dtype=dtype or x.dtype)
    mean = x.new_empty((B, T) if has_norm and not rms else 0, dtype=torch.float32)
    rstd = x.new_empty((B, T) if has_norm else 0, dtype=torch.float32)
    _per_token_fwd_kernel[(B * P,)](
        x,
        y,
        bias,
        gate,
        gate_table,
        weight,
        norm_bias,
        shift,
        shift_table,
        scale,
        scale_table,
        residual,
        None if y is None else x_new,
        h if has_norm else None,
        mean if mean.numel() else None,
        rstd if has_norm else None,
        T,
        P,
        rows,
        *mod_strides(gate),
        *mod_strides(shift),
        *mod_strides(scale),
        eps,
        IS_FACTOR=is_factor,
        **width_config(D),
        enable_fp_fusion=True,
    )
    return x_new, h, mean, rstd


def per_token_bwd(
    dx_new: Tensor | None,
    dh: Tensor | None,
    z: Tensor | None,
    y: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    norm_bias: Tensor | None,
    scale: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    is_factor: bool = False,
    gate_table: Tensor | None = None,
    shift_table: torch.dtype | None = None,
    scale_table: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """dx, dy, dgate, dscale, dweight, dnorm_bias, dbias and the gradients of the tables of gate,
    shift and scale; empty where there is nothing to differ.

    The [B, T, D] arrays but gate and scale are contiguous. dh and z, what is normed (x' or x), are
    None without a norm; dx is then dx' and empty here. The gradient of the shift is dh. Of its
    table nothing is read: ``shift_table`` is its dtype.
    """
    arrays = [t for t in (dx_new, dh, z, y, gate, scale) if t is not None]
    first = arrays[0]
    B, T, D = first.shape
    assert _are_dense(dx_new, dh, z, y)
    P, rows = split_rows(first, 1, len(arrays))
    like = lambda t: first.new_empty(0) if t is None else t.new_empty(t.shape)
    dx, dy, dgate, dscale = (like(t) for t in (z, y, gate, scale))
    dweight, dnorm_bias, dbias = (like(t) for t in (weight, norm_bias, bias))
    dgate_table, dscale_table = (like(t) for t in (gate_table, scale_table))
    dshift_table = first.new_empty(0 if shift_table is None else D, dtype=shift_table)
    # in the kernel's order
    sums = [dweight, dnorm_bias, dshift_table, dscale_table, dbias, dgate_table]
    sums = [t for t in sums if t.numel()]
    K = len(sums)
    part = first.new_empty(1, B * P, K, D, dtype=torch.float32)
    _per_token_bwd_kernel[(B * P,)](
        dx_new,
        dh,
        z,
        y,
        bias,
        gate,
        gate_table,
        weight,
        norm_bias,
        dshift_table if dshift_table.numel() else None,
        scale,
        scale_table,
        mean if mean.numel() else None,
        rstd if rstd.numel() else None,
        dx if dx.numel() else None,
        dy if dy.numel() else None,
        dgate if dgate.numel() else None,
        dscale if dscale.numel() else None,
        part if K else None,
        T,
        P,
        rows,
        *mod_strides(gate),
        *mod_strides(scale),
        K=K,
        IS_FACTOR=is_factor,
        **width_config(D),
        enable_fp_fusion=True,
    )
    if K:
        sum_partials(part, *sums)
    of_tables = (dgate_table, dshift_table, dscale_table)
    return dx, dy, dgate, dscale, dweight, dnorm_bias, dbias, *of_tables
