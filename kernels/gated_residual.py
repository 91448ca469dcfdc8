"""The residual update of adaLN-Zero:  x' = x + gate (y + bias).

Without a gate, x' = x + y + bias, there is no backward kernel: dx and dy are dx' itself. One gate
per token is per_token.py's.

A program walks rows of one image, so that the gate is read once and the sum over tokens stays in
registers. It leaves one fp32 partial sum of dgate. The partial sums are added in a fixed order,
without atomics, so the result is bitwise repeatable. dx is dx' itself.
Reference: sra_fast/ops/gated_residual.py::gated_residual_ref.

Bytes, everything moved once, s per element of the [B, T, D] arrays (2 in bf16):
    forward   3 s B T D (x, y; x') + s B D (gate)
    backward  3 s B T D (dx', y; dy) + 2 s B D (gate; dgate)

The minimum has one program per image (P = 1, kernels/_rows.py) and no partial sums. With P
programs the forward moves s (P - 1) B D more, the backward (s (P - 1) + 8 P) B D (an fp32 sum
written and read), and 8 P B D more with a bias.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._rows import (
    SHARES,
    load_bias,
    load_fp32,
    load_gate,
    load_two_arrays,
    locate,
    mod_strides,
    residual,
    row_columns,
    split_rows,
    sum_partials,
    width_config,
)

# the widest rows that fit the registers of every architecture in every dtype
MAX_WIDTH = 8192
# the widest of which two rows at a time fit: fp32 spills 48 bytes at D=8192
TWO_ROWS_WIDTH = 6144
# upper limits of 32-bit registers per thread: every launch up to D=1536, and SiT-XL's (D=1152, half
# precision); the backward's 105 are fp32's with Triton 3.6, with 3.7 it takes 96
REGISTERS = {"_gated_residual_fwd_kernel": 72, "_gated_residual_bwd_kernel": 105}
REGISTERS_XL = {"_gated_residual_fwd_kernel": 72, "_gated_residual_bwd_kernel": 72}


@triton.jit(do_not_specialize=SHARES)
def _gated_residual_fwd_kernel(
    x_ptr,  # [B, T, D]
    y_ptr,  # [B, T, D]
    bias_ptr,  # [D] or None
    gate_ptr,  # [B, G, D] or None; the last stride is 1
    group_ptr,  # [B, T] integers, or None
    x_new_ptr,  # [B, T, D]
    T,
    G,
    P,
    num_rows,
    gate_b,
    gate_g,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    ROWS: tl.constexpr,
):
    pid, b, g, split, owned = locate(G, P)
    # gate of this image and group, and the bias, loaded once for all rows
    if gate_ptr is not None:
        gate_ptr += b * gate_b + g * gate_g
    columns = row_columns(HEAD, TAIL)
    head_cols, tail_cols = columns
    gate_head = load_gate(gate_ptr, head_cols, head_cols < D)
    bias_head = load_bias(bias_ptr, head_cols, head_cols < D)
    gate_tail = load_gate(gate_ptr, tail_cols, tail_cols < D)
    bias_tail = load_bias(bias_ptr, tail_cols, tail_cols < D)

    for t in range(split * num_rows, (split + 1) * num_rows, ROWS):
        # load two rows before either is used
        even = load_two_arrays(x_ptr, y_ptr, group_ptr, b, owned, t, T, columns, D, TAIL)
        odd = even
        if ROWS == 2:
            odd = load_two_arrays(x_ptr, y_ptr, group_ptr, b, owned, t + 1, T, columns, D, TAIL)
        for k in tl.static_range(ROWS):
            row, live, head, tail = odd if k else even
            # x + gate (y + bias), rounded once
            offsets = row * D + head_cols
            mask = live & (head_cols < D)
            residual(head[0], head[1], gate_head, bias_head, x_new_ptr, offsets, mask)
            if TAIL:
                offsets_tail = row * D + tail_cols
                mask_tail = live & (tail_cols < D)
                residual(tail[0], tail[1], gate_tail, bias_tail, x_new_ptr, offsets_tail, mask_tail)


@triton.jit(do_not_specialize=SHARES)
def _gated_residual_bwd_kernel(
    dx_new_ptr,  # [B, T, D], the gradient of x', which is also that of x
    y_ptr,  # [B, T, D]
    bias_ptr,  # [D] or None
    gate_ptr,  # [B, G, D], the last stride is 1
    group_ptr,  # [B, T] integers, or None
    dy_ptr,  # [B, T, D]
    part_ptr,  # [B, G, P, K, D] fp32: dgate, and for K = 2 the sum of dy
    T,
    G,
    P,
    num_rows,
    gate_b,
    gate_g,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
):
    pid, b, g, split, owned = locate(G, P)
    # gate of this image and group, loaded once for all rows
    gate_ptr += b * gate_b + g * gate_g
    columns = row_columns(HEAD, TAIL)
    head_cols, tail_cols = columns
    gate_head = load_fp32(gate_ptr, head_cols, head_cols < D)
    gate_tail = load_fp32(gate_ptr, tail_cols, tail_cols < D)
    # sums of dx y and of dx over this program's tokens
    zero_head = tl.zeros((HEAD,), tl.float32)
    zero_tail = tl.zeros((TAIL if TAIL else 1,), tl.float32)
    dgate_head = zero_head
    sum_dx_head = zero_head
    dgate_tail = zero_tail
    sum_dx_tail = zero_tail

    for t in range(split * num_rows, (split + 1) * num_rows, ROWS):
        # load two rows before either is used
        even = load_two_arrays(dx_new_ptr, y_ptr, group_ptr, b, owned, t, T, columns, D, TAIL)
        odd = even
        if ROWS == 2:
            odd = load_two_arrays(
                dx_new_ptr, y_ptr, group_ptr, b, owned, t + 1, T, columns, D, TAIL
            )
        for k in tl.static_range(ROWS):
            row, live, head, tail = odd if k else even
            # dy = gate dx, and this row's share of the sums
            dx_head = head[0].to(tl.float32)
            tl.store(dy_ptr + row * D + head_cols, dx_head * gate_head, mask=live & (head_cols < D))
            dgate_head += dx_head * head[1].to(tl.float32)
            sum_dx_head += dx_head
            if TAIL:
                dx_tail = tail[0].to(tl.float32)
                mask_tail = live & (tail_cols < D)
                tl.store(dy_ptr + row * D + tail_cols, dx_tail * gate_tail, mask=mask_tail)
                dgate_tail += dx_tail * tail[1].to(tl.float32)
                sum_dx_tail += dx_tail

    # y + bias enters dgate: the bias times the sum of dx is added once, here
    part_ptr += pid * K * D
    dgate_ptr = part_ptr + head_cols
    bias_head = load_bias(bias_ptr, head_cols, head_cols < D)
    tl.store(dgate_ptr, dgate_head + sum_dx_head * bias_head, mask=head_cols < D)
    if TAIL:
        dgate_tail_ptr = part_ptr + tail_cols
        bias_tail = load_bias(bias_ptr, tail_cols, tail_cols < D)
        tl.store(dgate_tail_ptr, dgate_tail + sum_dx_tail * bias_tail, mask=tail_cols < D)
    # the bias gradient is the sum of dy
    if K == 2:
        tl.store(part_ptr + D + head_cols, sum_dx_head * gate_head, mask=head_cols < D)
        if TAIL:
            tl.store(part_ptr + D + tail_cols, sum_dx_tail * gate_tail, mask=tail_cols < D)


def gated_residual_fwd(
    x: Tensor, y: Tensor, bias: Tensor | None, gate: Tensor | None, group: Tensor | None
) -> Tensor:
    """x' of contiguous x, y ``[B, T, D]``, gate ``[B, D]``, ``[B, G, D]`` or None, bias ``[D]``,
    group ``[B, T]``.
    """
    B, T, D = x.shape
    assert x.is_contiguous() and y.is_contiguous() and (group is None or group.is_contiguous())
    G = gate.shape[1] if gate is not None and gate.dim() == 3 else 1
    P, rows = split_rows(x, G, 2)
    x_new = x.new_empty(x.shape)
    _gated_residual_fwd_kernel[(B * G * P,)](
        x,
        y,
        bias,
        gate,
        group,
        x_new,
        T,
        G,
        P,
        rows,
        *mod_strides(gate),
        ROWS=2 if D <= TWO_ROWS_WIDTH else 1,
        **width_config(D),
        # without a limit ptxas 13 spills four registers for sm_100 to fit 64 (D=3072)
        maxnreg=96 if D > 2048 else None,
        enable_fp_fusion=True,
    )
    return x_new


def gated_residual_bwd(
    dx_new: Tensor, y: Tensor, bias: Tensor | None, gate: Tensor, group: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """dy, dgate and dbias (empty without a bias); dx is dx_new."""
    B, T, D = y.shape
    assert dx_new.is_contiguous() and y.is_contiguous() and (group is None or group.is_contiguous())
    G = gate.shape[1] if gate.dim() == 3 else 1
    # a bias adds a second partial sum
    K = 1 if bias is None else 2
    P, rows = split_rows(y, G, 2)
    dy = y.new_empty(y.shape)
    dgate = gate.new_empty(gate.shape)
    part = y.new_empty(B * G, P, K, D, dtype=torch.float32)
    _gated_residual_bwd_kernel[(B * G * P,)](
        dx_new,
        y,
        bias,
        gate,
        group,
        dy,
        part,
        T,
        G,
        P,
        rows,
        *mod_strides(gate),
        K=K,
        ROWS=2 if D <= TWO_ROWS_WIDTH else 1,
        **width_config(D),
        enable_fp_fusion=True,
    )
    dbias = y.new_empty(0) if bias is None else bias.new_empty(D)
    sum_partials(part, dgate, total=None if bias is None else dbias)
    return dy, dgate, dbias
