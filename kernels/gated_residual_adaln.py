"""The residual update of adaLN-Zero and the modulated norm that follows it, in one pass.

    x' = x + gate (y + bias)
    h  = norm(x') (1 + scale) + shift
    h2 = norm(x') (1 + scale2) + shift2, if asked for

or norm(x') scale + shift, where the scale is the factor itself: weights of the norm are folded into
it. Each vector may be absent: what is absent is compiled out, h2 as well. One vector per token is
per_token.py's.

A program walks rows of one image, so that the modulation is read once and the sums over tokens
stay in registers. It leaves one fp32 partial sum per gradient. The partial sums are added in a
fixed order, without atomics, so the result is bitwise repeatable. The backward needs x', y, mean
and rstd: it recomputes h, but it cannot recompute y from x', because the gate starts at zero.
Reference: sra_fast/ops/gated_residual_adaln.py::gated_residual_adaln_ref.

Bytes, everything moved once, s per element of the [B, T, D] arrays (2 in bf16):
    forward   4 s B T D (x, y; x', h) + 3 s B D (modulation) + 8 B T (statistics)
    backward  6 s B T D (x', y, dx', dh; dx, dy) + 5 s B D (2 vectors, 3 gradients) + 8 B T
With x, x' and their gradients in fp32 and the others in bf16, B T D elements take 12 bytes forward
and 18 backward.

With two modulations, h2 and its gradient are the only arrays that are added:
    forward   5 s B T D (x, y; x', h, h2) + 5 s B D (modulation) + 8 B T (statistics)
    backward  7 s B T D (x', y, dx', dh, dh2; dx, dy) + 8 s B D (3 vectors, 5 gradients) + 8 B T

The minimum has one program per image (P = 1, kernels/_rows.py) and no partial sums. With P
programs the forward moves 3 s (P - 1) B D more, the backward (2 s (P - 1) + 24 P) B D (three fp32
sums written and read), and 8 P B D more with a bias. With two modulations it is 5 s (P - 1) B D
and (3 s (P - 1) + 40 P) B D. With one, the backward can also recompute h, s B T D, for a weight
gradient that needs it: this moves as many bytes as keeping h would.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._rows import (
    E4M3,
    SHARES,
    columns_per_thread,
    factor_of,
    is_owned,
    load,
    load_bias,
    load_gate,
    load_stored,
    load_two_arrays,
    locate,
    mod_strides,
    norm_bwd,
    norm_fwd,
    residual,
    row_columns,
    split_rows,
    store_row,
    sum_partials,
    width_config,
)

# the widest rows that fit the registers of every architecture in every dtype: the backward spills
# 112-168 bytes in fp32 at D=3584, 72-136 in bf16 at D=4608
MAX_WIDTH = 3072
# the widest rows with two modulations, half precision: wider than MAX_WIDTH one spills, too
TWO_WIDTH = MAX_WIDTH
# with y or h in fp32: at D=2432 the backward spills 8-16 bytes with 8 warps for sm_100, and 64-104
# with 16 warps for every architecture
TWO_WIDTH_FP32 = 2304
# upper limits of 32-bit registers per thread with one modulation: every launch up to D=1536, and
# SiT-XL's (D=1152, half precision), where three programs of 128 threads then share an SM of Hopper
REGISTERS = {"_gated_residual_adaln_fwd_kernel": 144, "_gated_residual_adaln_bwd_kernel": 250}
REGISTERS_XL = {"_gated_residual_adaln_fwd_kernel": 96, "_gated_residual_adaln_bwd_kernel": 168}


@triton.jit
def _load_modulation(pointers, cols, D: tl.constexpr, IS_FACTOR: tl.constexpr):
    """gate, shift, factor and bias of some columns, in fp32; constants for what is absent."""
    gate_ptr, shift_ptr, scale_ptr, bias_ptr = pointers
    mask = cols < D
    factor = factor_of(load_stored(scale_ptr, cols, mask), scale_ptr, IS_FACTOR)
    gate = load_gate(gate_ptr, cols, mask)
    # loads like a bias: 0 without one
    shift = load_bias(shift_ptr, cols, mask)
    return gate, shift, factor, load_bias(bias_ptr, cols, mask)


@triton.jit(do_not_specialize=SHARES)
def _gated_residual_adaln_fwd_kernel(
    x_ptr,  # [B, T, D]
    y_ptr,  # [B, T, D]
    bias_ptr,  # [D] or None
    gate_ptr,  # [B, G, D] or None, as are shift and scale; the last stride is 1
    shift_ptr,
    scale_ptr,
    group_ptr,  # [B, T] integers, or None
    x_new_ptr,  # [B, T, D]
    h_ptr,  # [B, T, D]
    h_scale_ptr,  # [B, T] fp32, None unless h is e4m3
    shift2_ptr,  # [B, D], the last stride is 1; all three None without a second modulation
    scale2_ptr,
    h2_ptr,  # [B, T, D]
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
    shift2_b,  # None as the pointers
    scale2_b,
    eps,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    IS_FACTOR: tl.constexpr,
):
    pid, b, g, split, owned = locate(G, P)
    # modulation of this image and group, loaded once for all rows
    if gate_ptr is not None:
        gate_ptr += b * gate_b + g * gate_g
    if shift_ptr is not None:
        shift_ptr += b * shift_b + g * shift_g
    if scale_ptr is not None:
        scale_ptr += b * scale_b + g * scale_g
    if h2_ptr is not None:
        shift2_ptr += b * shift2_b
        scale2_ptr += b * scale2_b
    columns = row_columns(HEAD, TAIL)
    head_cols, tail_cols = columns
    modulation = (gate_ptr, shift_ptr, scale_ptr, bias_ptr)
    gate_head, shift_head, w_head, bias_head = _load_modulation(modulation, head_cols, D, IS_FACTOR)
    gate_tail, shift_tail, w_tail, bias_tail = _load_modulation(modulation, tail_cols, D, IS_FACTOR)
    # constants that nothing reads, if there is none
    second = (None, shift2_ptr, scale2_ptr, None)
    _, shift2_head, w2_head, _ = _load_modulation(second, head_cols, D, IS_FACTOR)
    _, shift2_tail, w2_tail, _ = _load_modulation(second, tail_cols, D, IS_FACTOR)

    for t in range(split * num_rows, (split + 1) * num_rows, 2):
        # load two rows before either is used
        even = load_two_arrays(x_ptr, y_ptr, group_ptr, b, owned, t, T, columns, D, TAIL)
        odd = load_two_arrays(x_ptr, y_ptr, group_ptr, b, owned, t + 1, T, columns, D, TAIL)
        for k in tl.static_range(2):
            row, live, head, tail = odd if k else even
            head_offsets = row * D + head_cols
            head_mask = live & (head_cols < D)
            tail_offsets = row * D + tail_cols
            tail_mask = live & (tail_cols < D)

            # residual update; the norm reads the rounded x', as the backward will
            x_head = residual(
                head[0], head[1], gate_head, bias_head, x_new_ptr, head_offsets, head_mask
            )
            x_tail = x_head
            if TAIL:
                x_tail = residual(
                    tail[0], tail[1], gate_tail, bias_tail, x_new_ptr, tail_offsets, tail_mask
                )

            # statistics and xhat in fp32
            xhat_head, xhat_tail = norm_fwd(
                x_head, x_tail, row, live, mean_ptr, rstd_ptr, eps, columns, D, HEAD, TAIL
            )
            # modulate and round once
            h_head = xhat_head * w_head + shift_head
            h_tail = xhat_tail * w_tail + shift_tail if TAIL else xhat_head
            store_row(
                h_ptr,
                h_scale_ptr,
                row,
                live,
                h_head,
                h_tail,
                head_offsets,
                head_mask,
                tail_offsets,
                tail_mask,
                TAIL,
            )
            if h2_ptr is not None:
                # the same xhat once more
                h2_head = xhat_head * w2_head + shift2_head
                tl.store(h2_ptr + head_offsets, h2_head, mask=head_mask)
                if TAIL:
                    h2_tail = xhat_tail * w2_tail + shift2_tail
                    tl.store(h2_ptr + tail_offsets, h2_tail, mask=tail_mask)


@triton.jit
def _load_bwd_half(pointers, offsets, mask):
    """Head or tail of a row of x', y, dx', dh and dh2, as stored; dh stands in for what is
    absent.
    """
    x_new_ptr, y_ptr, dx_new_ptr, dh_ptr, dh2_ptr = pointers
    dh = load(dh_ptr, offsets, mask)
    dx = load(dx_new_ptr, offsets, mask) if dx_new_ptr is not None else dh
    dh2 = load(dh2_ptr, offsets, mask) if dh2_ptr is not None else dh
    return load(x_new_ptr, offsets, mask), load(y_ptr, offsets, mask), dx, dh, dh2


@triton.jit
def _load_bwd_row(pointers, stat_pointers, image, t, columns, D: tl.constexpr, TAIL: tl.constexpr):
    """Row t: its index, whether this program owns it, its statistics, and the arrays of head and
    tail.
    """
    group_ptr, b, owned, T = image
    mean_ptr, rstd_ptr = stat_pointers
    head_cols, tail_cols = columns
    row = b * T + t
    live = is_owned(group_ptr, row, t, owned, T)
    head = _load_bwd_half(pointers, row * D + head_cols, live & (head_cols < D))
    tail = head
    if TAIL:
        tail = _load_bwd_half(pointers, row * D + tail_cols, live & (tail_cols < D))
    mean = load(mean_ptr, row, live) if mean_ptr is not None else 0.0
    return row, live, mean, load(rstd_ptr, row, live), head, tail


@triton.jit
def _xhat_and_grads(half, modulation, dh2_ptr, mean, rstd):
    """xhat, dh, the gradient of xhat, dh w + dh2 w2 with its factors w and w2, and dh2, in fp32."""
    _, w, w2 = modulation
    dh = half[3].to(tl.float32)
    dh2 = dh
    xhat = (half[0].to(tl.float32) - mean) * rstd
    dxhat = dh * w
    if dh2_ptr is not None:
        dh2 = half[4].to(tl.float32)
        dxhat += dh2 * w2
    return xhat, dh, dxhat, dh2


@triton.jit
def _store_bwd_half(loaded, half, modulation, row_data, sums, pointers, cols, D: tl.constexpr):
    """Store dx and dy of head or tail of a row, and h where it is recomputed; return the sums over
    tokens, also those that nothing stores and a compiler drops.
    """
    xhat, dh, dxhat, dh2 = half
    gate, w, _ = modulation
    row, live, c1, c2, rstd = row_data
    shift_ptr, dx_new_ptr, dx_ptr, dy_ptr, h_ptr, dh2_ptr = pointers
    offsets = row * D + cols
    mask = live & (cols < D)
    if h_ptr is not None:
        # the shift of all rows of a program is the same: from the second row on it comes from L1
        tl.store(h_ptr + offsets, xhat * w + load_bias(shift_ptr, cols, mask), mask=mask)
    # gradient of the norm, plus what reaches x' along the residual stream
    dx = (dxhat - xhat * c1 - c2) * rstd
    if dx_new_ptr is not None:
        dx += loaded[2].to(tl.float32)
    tl.store(dx_ptr + offsets, dx, mask=mask)
    tl.store(dy_ptr + offsets, dx * gate, mask=mask)
    # sums over tokens for dgate, dshift, dscale and the bias
    dgate = sums[0] + dx * loaded[1].to(tl.float32)
    dshift2 = sums[4]
    dscale2 = sums[5]
    if dh2_ptr is not None:
        dshift2 += dh2
        dscale2 += dh2 * xhat
    return dgate, sums[1] + dh, sums[2] + dh * xhat, sums[3] + dx, dshift2, dscale2


@triton.jit
def _store_sums(part_ptr, sums, gate, pointers, cols, D: tl.constexpr, HAS_SHIFT: tl.constexpr):
    """Store this program's partial sums: dgate, dshift, dscale, dshift2, dscale2 and dbias, where
    they exist.
    """
    dgate, dshift, dscale, sum_dx, dshift2, dscale2 = sums
    gate_ptr, scale_ptr, scale2_ptr, bias_ptr = pointers
    next_ptr = part_ptr + cols
    mask = cols < D
    if gate_ptr is not None:
        # y + bias enters dgate: the bias times the sum of dx is added once, here
        dgate += sum_dx * load_bias(bias_ptr, cols, mask)
        tl.store(next_ptr, dgate, mask=mask)
        next_ptr += D
    if HAS_SHIFT:
        tl.store(next_ptr, dshift, mask=mask)
        next_ptr += D
    if scale_ptr is not None:
        tl.store(next_ptr, dscale, mask=mask)
        next_ptr += D
    if scale2_ptr is not None:
        tl.store(next_ptr, dshift2, mask=mask)
        next_ptr += D
        tl.store(next_ptr, dscale2, mask=mask)
        next_ptr += D
    if bias_ptr is not None:
        tl.store(next_ptr, sum_dx * gate, mask=mask)


@triton.jit(do_not_specialize=SHARES)
def _gated_residual_adaln_bwd_kernel(
    x_new_ptr,  # [B, T, D]
    y_ptr,  # [B, T, D]
    bias_ptr,  # [D] or None
    gate_ptr,  # [B, G, D] or None, as is scale; the last stride is 1
    scale_ptr,
    shift_ptr,  # as scale, or None if h is not recomputed
    group_ptr,  # [B, T] integers, or None
    mean_ptr,  # [B, T] fp32, None for RMS
    rstd_ptr,  # [B, T] fp32
    dx_new_ptr,  # [B, T, D], or None if x' has no other use
    dh_ptr,  # [B, T, D]
    scale2_ptr,  # [B, D], the last stride is 1; both None without a second modulation
    dh2_ptr,  # [B, T, D]
    dx_ptr,  # [B, T, D]
    dy_ptr,  # [B, T, D]
    h_ptr,  # [B, T, D], the recomputed output of the norm, or None
    # [B, G, P, K, D] fp32: dgate, dshift, dscale, dshift2, dscale2 and the sum of dy, K of the six
    part_ptr,
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
    scale2_b,  # None as the pointers
    D: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    K: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    IS_FACTOR: tl.constexpr,
):
    pid, b, g, split, owned = locate(G, P)
    # gate and factor of this image and group, loaded once for all rows
    if gate_ptr is not None:
        gate_ptr += b * gate_b + g * gate_g
    if scale_ptr is not None:
        scale_ptr += b * scale_b + g * scale_g
    if shift_ptr is not None:
        shift_ptr += b * shift_b + g * shift_g
    if scale2_ptr is not None:
        scale2_ptr += b * scale2_b
    columns = row_columns(HEAD, TAIL)
    head_cols, tail_cols = columns
    modulation = (gate_ptr, None, scale_ptr, None)
    gate_head, _, w_head, _ = _load_modulation(modulation, head_cols, D, IS_FACTOR)
    gate_tail, _, w_tail, _ = _load_modulation(modulation, tail_cols, D, IS_FACTOR)
    second = (None, None, scale2_ptr, None)
    _, _, w2_head, _ = _load_modulation(second, head_cols, D, IS_FACTOR)
    _, _, w2_tail, _ = _load_modulation(second, tail_cols, D, IS_FACTOR)
    mod_head = (gate_head, w_head, w2_head)
    mod_tail = (gate_tail, w_tail, w2_tail)

    # sums over this program's tokens: dgate, dshift, dscale, dx, dshift2, dscale2
    zero_head = tl.zeros((HEAD,), tl.float32)
    zero_tail = tl.zeros((TAIL if TAIL else 1,), tl.float32)
    sums_head = (zero_head, zero_head, zero_head, zero_head, zero_head, zero_head)
    sums_tail = (zero_tail, zero_tail, zero_tail, zero_tail, zero_tail, zero_tail)
    loads = (x_new_ptr, y_ptr, dx_new_ptr, dh_ptr, dh2_ptr)
    stats = (mean_ptr, rstd_ptr)
    stores = (shift_ptr, dx_new_ptr, dx_ptr, dy_ptr, h_ptr, dh2_ptr)
    image = (group_ptr, b, owned, T)

    for t in range(split * num_rows, (split + 1) * num_rows, 2):
        # load two rows before either is used
        even = _load_bwd_row(loads, stats, image, t, columns, D, TAIL)
        odd = _load_bwd_row(loads, stats, image, t + 1, columns, D, TAIL)
        for k in tl.static_range(2):
            row, live, mean, rstd, head, tail = odd if k else even
            # recompute xhat, and take the two means over the row
            half_head = _xhat_and_grads(head, mod_head, dh2_ptr, mean, rstd)
            half_tail = half_head
            if TAIL:
                half_tail = _xhat_and_grads(tail, mod_tail, dh2_ptr, mean, rstd)
            c1, c2 = norm_bwd(
                half_head[0], half_tail[0], half_head[2], half_tail[2], mean_ptr, D, HEAD, TAIL
            )
            # dx and dy of this row, and its share of the sums
            row_data = (row, live, c1, c2, rstd)
            sums_head = _store_bwd_half(
                head, half_head, mod_head, row_data, sums_head, stores, head_cols, D
            )
            if TAIL:
                sums_tail = _store_bwd_half(
                    tail, half_tail, mod_tail, row_data, sums_tail, stores, tail_cols, D
                )

    # one partial sum of each gradient per program
    if K > 0:
        part_ptr += pid * K * D
        vectors = (gate_ptr, scale_ptr, scale2_ptr, bias_ptr)
        _store_sums(part_ptr, sums_head, gate_head, vectors, head_cols, D, HAS_SHIFT)
        if TAIL:
            _store_sums(part_ptr, sums_tail, gate_tail, vectors, tail_cols, D, HAS_SHIFT)


def widest_with_two(y: torch.dtype, h: torch.dtype) -> int:
    """The widest rows that take two modulations without spills; x may have any dtype."""
    return TWO_WIDTH_FP32 if torch.float32 in (y, h) else TWO_WIDTH


def _config_of_two(D: int, y: torch.dtype, h: torch.dtype) -> dict[str, int]:
    """``width_config`` with twice the warps where the backward with two modulations needs them.

    Half precision has room for 10 or 12 columns per thread, also beside an x in fp32, but for 24
    bytes in a single warp (D=384). With y or h in fp32 they would spill 8-56 bytes.
    """
    config = width_config(D)
    is_wide = columns_per_thread(config) >= 10
    if is_wide and (torch.float32 in (y, h) or config["num_warps"] == 1):
        return config | {"num_warps": 2 * config["num_warps"]}
    return config


def _max_registers(config: dict[str, int], has_all_vectors: bool) -> int | None:
    """The limit of a forward launch with one modulation.

    Without it ptxas 13 spills two registers for sm_100: at D=768 and 1536 (12 columns per thread)
    to fit 128, at D=640 and 1280 (10) to fit 96. 8 or 9 columns it fits in fewer by itself, but
    without a vector spills two for sm_80 to fit 64.
    """
    if columns_per_thread(config) >= 10:
        return 144
    return None if has_all_vectors else 96


def _max_registers_of_two(config: dict[str, int], is_half: bool, has_bias: bool) -> int:
    """The limit of a forward launch with two modulations.

    With 128 four programs of 128 threads share an SM (SiT-XL), or two of 256 (D=2432 without a
    bias). Arrays in half precision fit into it, if a thread has up to 10 columns, or 9 and a bias:
    10 and a bias spill 16-24 bytes for sm_100, 12 columns 16-128.
    """
    return 128 if is_half and columns_per_thread(config) + has_bias <= 10 else 160


def _num_groups(gate: Tensor | None, scale: Tensor | None) -> int:
    vectors = gate if scale is None else scale
    return vectors.shape[1] if vectors is not None and vectors.dim() == 3 else 1


def _launch_fwd(
    x: Tensor,
    y: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    group: Tensor | None,
    eps: float,
    rms: bool,
    dtype: torch.dtype | None,
    is_factor: bool,
    h_scale: Tensor | None = None,
    shift2: Tensor | None = None,
    scale2: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x', h, h2 (empty without a second modulation), mean (empty for RMS) and rstd."""
    B, T, D = x.shape
    assert x.is_contiguous() and y.is_contiguous() and (group is None or group.is_contiguous())
    assert shift is None or scale is not None
    G = _num_groups(gate, scale)
    P, rows = split_rows(x, G, 2)
    x_new = x.new_empty(x.shape)
    h = x.new_empty(x.shape, dtype=(dtype or x.dtype) if h_scale is None else E4M3)
    h2 = h.new_empty(0 if scale2 is None else h.shape)
    mean = x.new_empty(0 if rms else (B, T), dtype=torch.float32)
    rstd = x.new_empty((B, T), dtype=torch.float32)
    if scale2 is None:
        config = width_config(D)
        max_registers = _max_registers(config, gate is not None and scale is not None)
    else:
        config = _config_of_two(D, y.dtype, h.dtype)
        is_half = all(t.element_size() == 2 for t in (x, y, h))
        max_registers = _max_registers_of_two(config, is_half, bias is not None)
    _gated_residual_adaln_fwd_kernel[(B * G * P,)](
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
        shift2,
        scale2,
        None if scale2 is None else h2,
        None if rms else mean,
        rstd,
        T,
        G,
        P,
        rows,
        *mod_strides(gate),
        *mod_strides(shift),
        *mod_strides(scale),
        None if shift2 is None else shift2.stride(0),
        None if scale2 is None else scale2.stride(0),
        eps,
        IS_FACTOR=is_factor,
        **config,
        maxnreg=max_registers,
        enable_fp_fusion=True,
    )
    return x_new, h, h2, mean, rstd


def gated_residual_adaln_fwd(
    x: Tensor,
    y: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    group: Tensor | None,
    eps: float,
    rms: bool,
    dtype: torch.dtype | None = None,
    is_factor: bool = False,
    h_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x', h, mean (empty for RMS) and rstd.

    Args:
        x: ``[B, T, D]``, contiguous, as are y and group.
        y: ``[B, T, D]``.
        bias: ``[D]`` or None.
        gate: ``[B, D]`` or ``[B, G, D]``, as are shift and scale; the last stride is 1. None: 1.
        shift: see ``gate``. None: 0.
        scale: see ``gate``. None: 0, and the factor is 1; then there is no shift either.
        group: ``[B, T]`` integers or None.
        eps: added to the variance.
        rms: RMS norm instead of LayerNorm.
        dtype: of h; default: x's.
        is_factor: the norm is multiplied with ``scale``, not with 1 + scale.
        h_scale: ``[B, T]`` fp32; h is then e4m3 and each row's scale is written here.
    """
    x_new, h, _, mean, rstd = _launch_fwd(
        x, y, bias, gate, shift, scale, group, eps, rms, dtype, is_factor, h_scale
    )
    return x_new, h, mean, rstd


def gated_residual_adaln_two_fwd(
    x: Tensor,
    y: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    shift2: Tensor,
    scale2: Tensor,
    eps: float,
    rms: bool,
    dtype: torch.dtype | None = None,
    is_factor: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x', h, h2, mean (empty for RMS) and rstd; arguments as ``gated_residual_adaln_fwd`` has them.

    All vectors are ``[B, D]``. ``dtype`` and ``is_factor`` are those of both modulations.
    """
    assert all(t is None or t.dim() == 2 for t in (gate, shift, scale, shift2, scale2))
    return _launch_fwd(
        *(x, y, bias, gate, shift, scale, None, eps, rms, dtype, is_factor),
        shift2=shift2,
        scale2=scale2,
    )


def _launch_bwd(
    dx_new: Tensor | None,
    dh: Tensor,
    x_new: Tensor,
    y: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    group: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    shift: Tensor | None,
    has_shift: bool,
    is_factor: bool,
    dh2: Tensor | None = None,
    scale2: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """dx, dy, dgate, dshift, dscale, dshift2, dscale2, dbias and h; what is absent is empty."""
    B, T, D = y.shape
    assert all(t is None or t.is_contiguous() for t in (dx_new, dh, dh2, x_new, y, group))
    G = _num_groups(gate, scale)
    has_shift = has_shift and scale is not None
    P, rows = split_rows(y, G, 4 if dh2 is None else 5)
    dx = x_new.new_empty(y.shape)
    dy = y.new_empty(y.shape)
    dgate = y.new_empty(0) if gate is None else gate.new_empty(gate.shape)
    dscale = y.new_empty(0) if scale is None else scale.new_empty(scale.shape)
    dshift = dscale.new_empty(dscale.shape if has_shift else 0)
    dscale2 = y.new_empty(0) if scale2 is None else scale2.new_empty(scale2.shape)
    dshift2 = torch.empty_like(dscale2)
    sums = [t for t in (dgate, dshift, dscale, dshift2, dscale2) if t.numel()]
    # a bias adds one more partial sum
    K = len(sums) + (bias is not None)
    part = y.new_empty(B * G, P, K, D, dtype=torch.float32)
    h = dh.new_empty(0 if shift is None else y.shape)
    config = width_config(D) if dh2 is None else _config_of_two(D, y.dtype, dh.dtype)
    # without a limit ptxas 13 spills two registers at D=512 and 1024 to fit 168
    max_registers = None if dh2 is None else 255
    is_half = all(t.element_size() == 2 for t in (x_new, y, dh))
    # without a limit Triton 3.8's code takes up to 204 registers where h is recomputed or there are
    # groups: two programs of SiT-XL's rows on a processor instead of three. Without a bias, a
    # recomputed h would spill two registers on sm_100
    fits = shift is None or bias is not None
    if dh2 is None and is_half and fits and columns_per_thread(config) == 9:
        max_registers = 168
    _gated_residual_adaln_bwd_kernel[(B * G * P,)](
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
        scale2,
        dh2,
        dx,
        dy,
        None if shift is None else h,
        part if K else None,
        T,
        G,
        P,
        rows,
        *mod_strides(gate),
        *mod_strides(scale),
        *mod_strides(shift),
        None if scale2 is None else scale2.stride(0),
        K=K,
        HAS_SHIFT=has_shift,
        IS_FACTOR=is_factor,
        **config,
        maxnreg=max_registers,
        enable_fp_fusion=True,
    )
    dbias = y.new_empty(0) if bias is None else bias.new_empty(D)
    if K:
        sum_partials(part, *sums, total=None if bias is None else dbias)
    return dx, dy, dgate, dshift, dscale, dshift2, dscale2, dbias, h


def gated_residual_adaln_bwd(
    dx_new: Tensor | None,
    dh: Tensor,
    x_new: Tensor,
    y: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    group: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    shift: Tensor | None,
    has_shift: bool = True,
    is_factor: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx, dy, dgate, dshift, dscale, dbias and h.

    The [B, T, D] arrays and group are contiguous. h is empty without ``shift``, and the gradient
    of what is absent is empty; dshift is that without ``has_shift`` or without a scale.
    """
    dx, dy, dgate, dshift, dscale, _, _, dbias, h = _launch_bwd(
        *(dx_new, dh, x_new, y, bias, gate, scale, group, mean, rstd),
        *(shift, has_shift, is_factor),
    )
    return dx, dy, dgate, dshift, dscale, dbias, h


def gated_residual_adaln_two_bwd(
    dx_new: Tensor | None,
    dh: Tensor,
    dh2: Tensor,
    x_new: Tensor,
    y: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    scale2: Tensor,
    mean: Tensor,
    rstd: Tensor,
    is_factor: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx, dy, dgate, dshift, dscale, dshift2, dscale2 and dbias; the last and dgate may be empty.

    The [B, T, D] arrays are contiguous, the vectors [B, D].
    """
    dx, dy, dgate, dshift, dscale, dshift2, dscale2, dbias, _ = _launch_bwd(
        *(dx_new, dh, x_new, y, bias, gate, scale, None, mean, rstd, None, True, is_factor),
        dh2=dh2,
        scale2=scale2,
    )
    return dx, dy, dgate, dshift, dscale, dshift2, dscale2, dbias
