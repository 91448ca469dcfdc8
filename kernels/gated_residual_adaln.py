"""The residual update of adaLN-Zero and the modulated norm that follows it, in one pass.

    x' = x + gate (y + bias)
    h  = norm(x') (1 + scale) + shift

A program walks rows of one image, so that the modulation is read once and the sums over tokens stay in registers; each
leaves one fp32 partial sum per gradient, added in a fixed order (no atomics: bitwise repeatable).  x', y, mean and rstd
are all the backward needs: h is recomputed, and y cannot be, since the gate starts at zero.
Reference: sra_fast/ops/gated_residual.py::gated_residual_adaln_ref.

Bytes, everything moved once, s per element of the [B, T, D] arrays (2 in bf16):
    forward   4 s B T D (x, y; x', h) + 3 s B D (modulation) + 8 B T (statistics)
    backward  6 s B T D (x', y, dx', dh; dx, dy) + 5 s B D (gate, scale; dgate, dshift, dscale) + 8 B T (statistics)
With x, x' and their gradients in fp32, the others in bf16, B T D elements take 12 bytes forward and 18 backward.
P programs share an image (kernels/_rows.py) and the minimum has P = 1 and no partial sums: the forward moves
3 s (P - 1) B D more, the backward (2 s (P - 1) + 24 P) B D (three fp32 sums written and read; a bias: 8 P B D).
The backward can write h once more, s B T D, for a weight gradient that needs it: nothing is gained by keeping it.
In the names below a 2 marks the tail of a row that is cut in two.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._rows import (
    E4M3,
    is_mine,
    load,
    load_bias,
    load_fp32,
    load_two,
    locate,
    mod_strides,
    norm_bwd,
    norm_fwd,
    residual,
    split_rows,
    store_row,
    sum_partials,
    width_config,
)  # fmt: skip

# the widest rows that fit the registers of every architecture in every dtype: the backward spills 112-168 bytes in fp32
# at D=3584, 72-136 in bf16 at D=4608
MAX_WIDTH = 3072
# 32-bit registers per thread, at most: every launch up to D=1536, and SiT-XL's (D=1152, half precision), whose programs
# of 128 threads then share an SM of Hopper by threes
REGISTERS = {"_gated_residual_adaln_fwd_kernel": 144, "_gated_residual_adaln_bwd_kernel": 250}
REGISTERS_XL = {"_gated_residual_adaln_fwd_kernel": 96, "_gated_residual_adaln_bwd_kernel": 168}


@triton.jit
def _load_mod(gate_ptr, shift_ptr, scale_ptr, bias_ptr, cols, D: tl.constexpr):
    mask = cols < D
    w = 1.0 + load_fp32(scale_ptr, cols, mask)
    return (
        load_fp32(gate_ptr, cols, mask),
        load_fp32(shift_ptr, cols, mask),
        w,
        load_bias(bias_ptr, cols, mask),
    )


@triton.jit
def _gated_residual_adaln_fwd_kernel(
    x_ptr,  # [B, T, D]
    y_ptr,  # [B, T, D]
    bias_ptr,  # [D] or None
    gate_ptr,  # [B, G, D], as are shift and scale; the last stride is 1
    shift_ptr,
    scale_ptr,
    group_ptr,  # [B, T] integers, or None
    x_new_ptr,  # [B, T, D]
    h_ptr,  # [B, T, D]
    h_scale_ptr,  # [B, T] fp32, None unless h is e4m3
    mean_ptr,  # [B, T] fp32, None for RMS
    rstd_ptr,  # [B, T] fp32
    T,
    G,
    P,
    num_rows,
    gate_b,
    gate_g,
    shift_b,
    shift_g,
    scale_b,
    scale_g,
    eps,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
):
    pid, b, g, p, mine = locate(G, P)
    gate_ptr += b * gate_b + g * gate_g
    shift_ptr += b * shift_b + g * shift_g
    scale_ptr += b * scale_b + g * scale_g
    cols, cols2 = tl.arange(0, HEAD), HEAD + tl.arange(0, TAIL if TAIL else 1)
    gate, shift, w, bias = _load_mod(gate_ptr, shift_ptr, scale_ptr, bias_ptr, cols, D)
    gate2, shift2, w2, bias2 = _load_mod(gate_ptr, shift_ptr, scale_ptr, bias_ptr, cols2, D)
    for t in range(p * num_rows, (p + 1) * num_rows, 2):
        even = load_two(x_ptr, y_ptr, group_ptr, b, mine, t, T, cols, cols2, D, TAIL)
        odd = load_two(x_ptr, y_ptr, group_ptr, b, mine, t + 1, T, cols, cols2, D, TAIL)
        for k in tl.static_range(2):
            row, live, head, tail = odd if k else even
            at, mask = row * D + cols, live & (cols < D)
            at2, mask2 = row * D + cols2, live & (cols2 < D)
            x = residual(head[0], head[1], gate, bias, x_new_ptr, at, mask)
            x2 = residual(tail[0], tail[1], gate2, bias2, x_new_ptr, at2, mask2) if TAIL else x
            x, x2 = norm_fwd(x, x2, row, live, mean_ptr, rstd_ptr, eps, cols, cols2, D, HEAD, TAIL)
            h, h2 = x * w + shift, x2 * w2 + shift2 if TAIL else x
            store_row(h_ptr, h_scale_ptr, row, live, h, h2, at, mask, at2, mask2, TAIL)


@triton.jit
def _load_four(x_ptr, y_ptr, dx_new_ptr, dh_ptr, at, mask):
    dh = load(dh_ptr, at, mask)
    dx = load(dx_new_ptr, at, mask) if dx_new_ptr is not None else dh
    return load(x_ptr, at, mask), load(y_ptr, at, mask), dx, dh


@triton.jit
def _load_row(
    x_ptr,
    y_ptr,
    dx_new_ptr,
    dh_ptr,
    mean_ptr,
    rstd_ptr,
    group_ptr,
    b,
    mine,
    t,
    T,
    cols,
    cols2,
    D: tl.constexpr,
    TAIL: tl.constexpr,
):
    """Row t of image b, its statistics, and whether it is this program's."""
    row = b * T + t
    live = is_mine(group_ptr, row, t, mine, T)
    head = _load_four(x_ptr, y_ptr, dx_new_ptr, dh_ptr, row * D + cols, live & (cols < D))
    tail = head
    if TAIL:
        tail = _load_four(x_ptr, y_ptr, dx_new_ptr, dh_ptr, row * D + cols2, live & (cols2 < D))
    mean = load(mean_ptr, row, live) if mean_ptr is not None else 0.0
    return row, live, mean, load(rstd_ptr, row, live), head, tail


@triton.jit
def _unpack(piece, w, mean, rstd):
    """fp32 xhat, dh and its product with w = 1 + scale."""
    dh = piece[3].to(tl.float32)
    return (piece[0].to(tl.float32) - mean) * rstd, dh, dh * w


@triton.jit
def _finish(
    piece,
    xhat,
    dh,
    dxhat,
    gate,
    w,
    shift_ptr,
    sums,
    c1,
    c2,
    rstd,
    dx_new_ptr,
    dx_ptr,
    dy_ptr,
    h_ptr,
    at,
    cols,
    mask,
):
    """Store dx and dy of a piece of a row, h again where it is wanted, and add the row to the sums over tokens."""
    if h_ptr is not None:
        tl.store(h_ptr + at, xhat * w + load_fp32(shift_ptr, cols, mask), mask=mask)
    dx = (dxhat - xhat * c1 - c2) * rstd
    if dx_new_ptr is not None:
        dx += piece[2].to(tl.float32)
    tl.store(dx_ptr + at, dx, mask=mask)
    tl.store(dy_ptr + at, dx * gate, mask=mask)
    return sums[0] + dx * piece[1].to(tl.float32), sums[1] + dh, sums[2] + dh * xhat, sums[3] + dx


@triton.jit
def _store_sums(part_ptr, sums, gate, bias_ptr, cols, D: tl.constexpr, K: tl.constexpr):
    # y + bias enters dgate: the bias times the sum of dx is added once, here
    tl.store(
        part_ptr + cols, sums[0] + sums[3] * load_bias(bias_ptr, cols, cols < D), mask=cols < D
    )
    tl.store(part_ptr + D + cols, sums[1], mask=cols < D)
    tl.store(part_ptr + 2 * D + cols, sums[2], mask=cols < D)
    if K == 4:
        tl.store(part_ptr + 3 * D + cols, sums[3] * gate, mask=cols < D)


@triton.jit
def _gated_residual_adaln_bwd_kernel(
    x_new_ptr,  # [B, T, D]
    y_ptr,  # [B, T, D]
    bias_ptr,  # [D] or None
    gate_ptr,  # [B, G, D], as is scale; the last stride is 1
    scale_ptr,
    shift_ptr,  # as scale, or None where h is not wanted
    group_ptr,  # [B, T] integers, or None
    mean_ptr,  # [B, T] fp32, None for RMS
    rstd_ptr,  # [B, T] fp32
    dx_new_ptr,  # [B, T, D], or None if x' has no other use
    dh_ptr,  # [B, T, D]
    dx_ptr,  # [B, T, D]
    dy_ptr,  # [B, T, D]
    h_ptr,  # [B, T, D], or None: what the forward pass gave
    part_ptr,  # [B, G, P, K, D] fp32: dgate, dshift, dscale, and for K = 4 the sum of dy
    T,
    G,
    P,
    num_rows,
    gate_b,
    gate_g,
    scale_b,
    scale_g,
    shift_b,
    shift_g,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    K: tl.constexpr,
):
    pid, b, g, p, mine = locate(G, P)
    gate_ptr += b * gate_b + g * gate_g
    scale_ptr += b * scale_b + g * scale_g
    if h_ptr is not None:
        shift_ptr += b * shift_b + g * shift_g
    cols, cols2 = tl.arange(0, HEAD), HEAD + tl.arange(0, TAIL if TAIL else 1)
    gate, w = load_fp32(gate_ptr, cols, cols < D), 1.0 + load_fp32(scale_ptr, cols, cols < D)
    gate2, w2 = load_fp32(gate_ptr, cols2, cols2 < D), 1.0 + load_fp32(scale_ptr, cols2, cols2 < D)
    zero, zero2 = tl.zeros((HEAD,), tl.float32), tl.zeros((TAIL if TAIL else 1,), tl.float32)
    sums, sums2 = (zero, zero, zero, zero), (zero2, zero2, zero2, zero2)
    for t in range(p * num_rows, (p + 1) * num_rows, 2):
        even = _load_row(
            x_new_ptr,
            y_ptr,
            dx_new_ptr,
            dh_ptr,
            mean_ptr,
            rstd_ptr,
            group_ptr,
            b,
            mine,
            t,
            T,
            cols,
            cols2,
            D,
            TAIL,
        )
        odd = _load_row(
            x_new_ptr,
            y_ptr,
            dx_new_ptr,
            dh_ptr,
            mean_ptr,
            rstd_ptr,
            group_ptr,
            b,
            mine,
            t + 1,
            T,
            cols,
            cols2,
            D,
            TAIL,
        )
        for k in tl.static_range(2):
            row, live, mean, rstd, head, tail = odd if k else even
            xhat, dh, dxhat = _unpack(head, w, mean, rstd)
            xhat2, dh2, dxhat2 = _unpack(tail, w2, mean, rstd) if TAIL else (xhat, dh, dxhat)
            c1, c2 = norm_bwd(xhat, xhat2, dxhat, dxhat2, mean_ptr, D, HEAD, TAIL)
            at, mask = row * D + cols, live & (cols < D)
            sums = _finish(
                *(head, xhat, dh, dxhat, gate, w, shift_ptr, sums, c1, c2, rstd),
                *(dx_new_ptr, dx_ptr, dy_ptr, h_ptr, at, cols, mask),
            )
            if TAIL:
                at, mask = row * D + cols2, live & (cols2 < D)
                sums2 = _finish(
                    *(tail, xhat2, dh2, dxhat2, gate2, w2, shift_ptr, sums2, c1, c2, rstd),
                    *(dx_new_ptr, dx_ptr, dy_ptr, h_ptr, at, cols2, mask),
                )
    _store_sums(part_ptr + pid * K * D, sums, gate, bias_ptr, cols, D, K)
    if TAIL:
        _store_sums(part_ptr + pid * K * D, sums2, gate2, bias_ptr, cols2, D, K)


def gated_residual_adaln_fwd(
    x: Tensor,
    y: Tensor,
    bias: Tensor | None,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    group: Tensor | None,
    eps: float,
    rms: bool,
    dtype: torch.dtype | None = None,
    h_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x', h, mean (empty for RMS) and rstd; x, y, group contiguous, modulations ``[B, D]`` or ``[B, G, D]``.

    h is of ``dtype``, by default x's.  With ``h_scale [B, T]`` h is e4m3, to be multiplied by the scales that are written there.
    """
    B, T, D = x.shape
    assert x.is_contiguous() and y.is_contiguous() and (group is None or group.is_contiguous())
    G = gate.shape[1] if gate.dim() == 3 else 1
    P, rows = split_rows(x, G, 2)
    x_new, h = (
        x.new_empty(x.shape),
        x.new_empty(x.shape, dtype=(dtype or x.dtype) if h_scale is None else E4M3),
    )
    mean = x.new_empty(0 if rms else (B, T), dtype=torch.float32)
    rstd = x.new_empty((B, T), dtype=torch.float32)
    config = width_config(D)
    columns = (config["HEAD"] + config["TAIL"]) // (32 * config["num_warps"])
    _gated_residual_adaln_fwd_kernel[(B * G * P,)](
        *(
            x,
            y,
            bias,
            gate,
            shift,
            scale,
            group,
            x_new,
            h,
            h_scale,
            None if rms else mean,
            rstd,
            T,
            G,
            P,
            rows,
        ),
        *(*mod_strides(gate), *mod_strides(shift), *mod_strides(scale), eps),
        **config,
        # left alone, ptxas 13 spills two registers for sm_100 at D=768 and 1536 (12 columns per thread) to fit 128, at
        # D=640 and 1280 (10) to fit 96; rows of 8 or 9 columns per thread it fits in fewer by itself
        maxnreg=144 if columns >= 10 else None,
        enable_fp_fusion=True,
    )
    return x_new, h, mean, rstd


def gated_residual_adaln_bwd(
    dx_new: Tensor | None,
    dh: Tensor,
    x_new: Tensor,
    y: Tensor,
    bias: Tensor | None,
    gate: Tensor,
    scale: Tensor,
    group: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    shift: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx, dy, dgate, dshift, dscale, dbias (empty without a bias), and with ``shift`` h, else empty.

    The [B, T, D] arrays and group are contiguous.
    """
    B, T, D = y.shape
    assert all(t is None or t.is_contiguous() for t in (dx_new, dh, x_new, y, group))
    G, K = gate.shape[1] if gate.dim() == 3 else 1, 3 if bias is None else 4
    P, rows = split_rows(y, G, 4)
    dx, dy = x_new.new_empty(y.shape), y.new_empty(y.shape)
    dgate, dshift, dscale = (t.new_empty(t.shape) for t in (gate, scale, scale))
    part, h = (
        y.new_empty(B * G, P, K, D, dtype=torch.float32),
        dh.new_empty(0 if shift is None else y.shape),
    )
    _gated_residual_adaln_bwd_kernel[(B * G * P,)](
        *(
            x_new,
            y,
            bias,
            gate,
            scale,
            shift,
            group,
            mean if mean.numel() else None,
            rstd,
            dx_new,
            dh,
            dx,
            dy,
        ),
        *(
            None if shift is None else h,
            part,
            T,
            G,
            P,
            rows,
            *mod_strides(gate),
            *mod_strides(scale),
        ),
        *mod_strides(scale if shift is None else shift),
        K=K,
        **width_config(D),
        enable_fp_fusion=True,
    )
    dbias = y.new_empty(0) if bias is None else bias.new_empty(D)
    sum_partials(part, dgate, dshift, dscale, total=None if bias is None else dbias)
    return dx, dy, dgate, dshift, dscale, dbias, h
