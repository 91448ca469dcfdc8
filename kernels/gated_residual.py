"""The residual update of adaLN-Zero:  x' = x + gate (y + bias).

A program walks rows of one image, so that the gate is read once and the sum over tokens stays in registers; each
leaves one fp32 partial sum of dgate, added in a fixed order (no atomics: bitwise repeatable).  dx is dx' itself.
Reference: sra_fast/ops/gated_residual.py::gated_residual_ref.

Bytes, everything moved once, s per element of the [B, T, D] arrays (2 in bf16):
    forward   3 s B T D (x, y; x') + s B D (gate)
    backward  3 s B T D (dx', y; dy) + 2 s B D (gate; dgate)
P programs share an image (kernels/_rows.py) and the minimum has P = 1 and no partial sums: the forward moves
s (P - 1) B D more, the backward (s (P - 1) + 8 P) B D (an fp32 sum written and read), with a bias 8 P B D more.
In the names below a 2 marks the tail of a row that is cut in two.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._rows import (
    load_bias,
    load_fp32,
    load_two,
    locate,
    mod_strides,
    residual,
    split_rows,
    sum_partials,
    width_config,
)

# the widest rows that fit the registers of every architecture in every dtype; fp32 spills 48 bytes at D=8192
MAX_WIDTH = 6144
# 32-bit registers per thread, at most: every launch up to D=1536, and SiT-XL's (D=1152, half precision)
REGISTERS = {
    "_gated_residual_fwd_kernel": 72,
    "_gated_residual_bwd_kernel": 105,
}  # fp32 and Triton 3.6; 96 with 3.7
REGISTERS_XL = {"_gated_residual_fwd_kernel": 72, "_gated_residual_bwd_kernel": 72}


@triton.jit
def _gated_residual_fwd_kernel(
    x_ptr,  # [B, T, D]
    y_ptr,  # [B, T, D]
    bias_ptr,  # [D] or None
    gate_ptr,  # [B, G, D], the last stride is 1
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
):
    pid, b, g, p, mine = locate(G, P)
    gate_ptr += b * gate_b + g * gate_g
    cols, cols2 = tl.arange(0, HEAD), HEAD + tl.arange(0, TAIL if TAIL else 1)
    gate, bias = load_fp32(gate_ptr, cols, cols < D), load_bias(bias_ptr, cols, cols < D)
    gate2, bias2 = load_fp32(gate_ptr, cols2, cols2 < D), load_bias(bias_ptr, cols2, cols2 < D)
    for t in range(p * num_rows, (p + 1) * num_rows, 2):
        even = load_two(x_ptr, y_ptr, group_ptr, b, mine, t, T, cols, cols2, D, TAIL)
        odd = load_two(x_ptr, y_ptr, group_ptr, b, mine, t + 1, T, cols, cols2, D, TAIL)
        for k in tl.static_range(2):
            row, live, head, tail = odd if k else even
            residual(head[0], head[1], gate, bias, x_new_ptr, row * D + cols, live & (cols < D))
            if TAIL:
                residual(
                    tail[0], tail[1], gate2, bias2, x_new_ptr, row * D + cols2, live & (cols2 < D)
                )


@triton.jit
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
):
    pid, b, g, p, mine = locate(G, P)
    gate_ptr += b * gate_b + g * gate_g
    cols, cols2 = tl.arange(0, HEAD), HEAD + tl.arange(0, TAIL if TAIL else 1)
    gate, gate2 = load_fp32(gate_ptr, cols, cols < D), load_fp32(gate_ptr, cols2, cols2 < D)
    zero, zero2 = tl.zeros((HEAD,), tl.float32), tl.zeros((TAIL if TAIL else 1,), tl.float32)
    dgate, sum_dx, dgate2, sum_dx2 = zero, zero, zero2, zero2
    for t in range(p * num_rows, (p + 1) * num_rows, 2):
        even = load_two(dx_new_ptr, y_ptr, group_ptr, b, mine, t, T, cols, cols2, D, TAIL)
        odd = load_two(dx_new_ptr, y_ptr, group_ptr, b, mine, t + 1, T, cols, cols2, D, TAIL)
        for k in tl.static_range(2):
            row, live, head, tail = odd if k else even
            dx = head[0].to(tl.float32)
            tl.store(dy_ptr + row * D + cols, dx * gate, mask=live & (cols < D))
            dgate, sum_dx = dgate + dx * head[1].to(tl.float32), sum_dx + dx
            if TAIL:
                dx2 = tail[0].to(tl.float32)
                tl.store(dy_ptr + row * D + cols2, dx2 * gate2, mask=live & (cols2 < D))
                dgate2, sum_dx2 = dgate2 + dx2 * tail[1].to(tl.float32), sum_dx2 + dx2

    # y + bias enters dgate: the bias times the sum of dx is added once, here
    part_ptr += pid * K * D
    tl.store(part_ptr + cols, dgate + sum_dx * load_bias(bias_ptr, cols, cols < D), mask=cols < D)
    if TAIL:
        tl.store(
            part_ptr + cols2,
            dgate2 + sum_dx2 * load_bias(bias_ptr, cols2, cols2 < D),
            mask=cols2 < D,
        )
    if K == 2:
        tl.store(part_ptr + D + cols, sum_dx * gate, mask=cols < D)
        if TAIL:
            tl.store(part_ptr + D + cols2, sum_dx2 * gate2, mask=cols2 < D)


def gated_residual_fwd(
    x: Tensor, y: Tensor, bias: Tensor | None, gate: Tensor, group: Tensor | None
) -> Tensor:
    """x' of contiguous x, y ``[B, T, D]``, gate ``[B, D]`` or ``[B, G, D]``, bias ``[D]``, group ``[B, T]``."""
    B, T, D = x.shape
    assert x.is_contiguous() and y.is_contiguous() and (group is None or group.is_contiguous())
    G = gate.shape[1] if gate.dim() == 3 else 1
    P, rows = split_rows(x, G, 2)
    x_new = x.new_empty(x.shape)
    _gated_residual_fwd_kernel[(B * G * P,)](
        *(x, y, bias, gate, group, x_new, T, G, P, rows, *mod_strides(gate)),
        **width_config(D),
        # left alone, ptxas 13 spills four registers for sm_100 to fit 64 (D=3072)
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
    G, K = gate.shape[1] if gate.dim() == 3 else 1, 1 if bias is None else 2
    P, rows = split_rows(y, G, 2)
    dy, dgate = y.new_empty(y.shape), gate.new_empty(gate.shape)
    part = y.new_empty(B * G, P, K, D, dtype=torch.float32)
    _gated_residual_bwd_kernel[(B * G * P,)](
        *(dx_new, y, bias, gate, group, dy, part, T, G, P, rows, *mod_strides(gate)),
        K=K,
        **width_config(D),
        enable_fp_fusion=True,
    )
    dbias = y.new_empty(0) if bias is None else bias.new_empty(D)
    sum_partials(part, dgate, total=None if bias is None else dbias)
    return dy, dgate, dbias
