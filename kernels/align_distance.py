"""Alignment distances and their gradient from one read of the student's and the teacher's features.

Per token:    dist[b,t] = (1/D) sum_d f(p - q), f = smooth-L1, |.| or (.)^2;  or  1 - cos(p, q) over the channels.
Per channel:  dist[b,d] = 1 - cos(p, q) over the tokens.
The forward also stores  g = n * d dist / d p  (n = D or T) in the dtype of p, and the backward is  dp = ddist * g / n.
Without the factor n the entries of g would be about 1/D, and fp16 would lose them to underflow.

Bytes moved, in elements of [B,T,D]: forward 3 (2 without gradient), backward 2; the fp32 distances add 4/D per element.
Reference: sra_fast/ops/align_distance.py::align_distance_ref.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# cosine_token holds [T, 16] elements of both inputs in registers: at 2048 tokens sm_90 spills (272 bytes of stack)
MAX_TOKENS = 1024
# the other kinds hold a row in so many pieces of at most 16 warps
MAX_PIECES = 5
MAX_WIDTH = 16384
# 32-bit registers per thread, at most; compiled and checked by tests/ops/test_codegen_flat.py
REGISTERS = {"_align_token_kernel": 128, "_align_channel_kernel": 128, "_align_bwd_kernel": 64}

SMOOTH_L1, L1, L2, COSINE = (tl.constexpr(i) for i in range(4))
_CODES = {"smooth_l1": 0, "l1": 1, "l2": 2, "cosine_patch": 3}


@triton.jit
def _cosine(pp, qq, pq, n):
    """1 - cos from the sums of p p, q q and p q, and what p and q are multiplied by in n times its gradient.

    Norms below 1e-8 are clamped in the value alone, as torch clamps them.
    """
    # rounded to nearest: 1 - cos of similar features cancels, and what a GPU approximates by default is off by more than fp32 is
    p_norm = tl.sqrt_rn(pp)
    p_clamped = tl.maximum(p_norm, 1e-8)
    q_clamped = tl.maximum(tl.sqrt_rn(qq), 1e-8)
    cos = tl.div_rn(tl.div_rn(pq, p_clamped), q_clamped)
    # at p = 0 the direction p / |p| is taken as zero
    along = n * cos / p_clamped / tl.where(p_norm > 0.0, p_norm, 1.0)
    across = n / p_clamped / q_clamped
    return 1.0 - cos, along, across


@triton.jit
def _elementwise(diff, beta, KIND: tl.constexpr):
    """f and f' of p - q."""
    if KIND == SMOOTH_L1:
        size = tl.abs(diff)
        quadratic = size < beta
        loss = tl.where(quadratic, 0.5 * diff * (diff / beta), size - 0.5 * beta)
        # the sign of a NaN is a NaN
        sign = tl.where(diff > 0.0, 1.0, tl.where(diff < 0.0, -1.0, diff))
        grad = tl.where(quadratic, diff / beta, sign)
    elif KIND == L1:
        loss = tl.abs(diff)
        grad = tl.where(diff > 0.0, 1.0, tl.where(diff < 0.0, -1.0, 0.0))
    else:
        loss = diff * diff
        grad = 2.0 * diff
    return loss, grad


@triton.jit
def _align_token_kernel(
    pred_ptr,  # [B, T, D]
    target_ptr,  # [B, T, D]
    dist_ptr,  # [B*T] fp32
    grad_ptr,  # [B*T, D], or unused
    T,
    D,
    pred_stride_b,
    pred_stride_t,
    target_stride_b,
    target_stride_t,
    beta,
    KIND: tl.constexpr,
    WRITE_GRAD: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    pred_ptr += row // T * pred_stride_b + row % T * pred_stride_t
    target_ptr += row // T * target_stride_b + row % T * target_stride_t
    grad_ptr += row * D
    # the whole row is asked for before any of it is used
    preds, targets = (), ()
    for i in tl.static_range(PIECES):
        cols = i * BLOCK + tl.arange(0, BLOCK)
        preds += (tl.load(pred_ptr + cols, mask=cols < D, other=0.0),)
        targets += (tl.load(target_ptr + cols, mask=cols < D, other=0.0),)

    # each thread adds up its own columns first: one reduction across threads
    if KIND == COSINE:
        zero = tl.zeros((BLOCK,), dtype=tl.float32)
        pp, qq, pq = zero, zero, zero
        for i in tl.static_range(PIECES):
            p, q = preds[i].to(tl.float32), targets[i].to(tl.float32)
            pp, qq, pq = pp + p * p, qq + q * q, pq + p * q
        dist, along, across = _cosine(
            tl.sum(pp, axis=0), tl.sum(qq, axis=0), tl.sum(pq, axis=0), D * 1.0
        )
        tl.store(dist_ptr + row, dist)
        if WRITE_GRAD:
            for i in tl.static_range(PIECES):
                cols = i * BLOCK + tl.arange(0, BLOCK)
                grad = along * preds[i].to(tl.float32) - across * targets[i].to(tl.float32)
                tl.store(grad_ptr + cols, grad, mask=cols < D)
    else:
        total = tl.zeros((BLOCK,), dtype=tl.float32)
        for i in tl.static_range(PIECES):
            cols = i * BLOCK + tl.arange(0, BLOCK)
            loss, grad = _elementwise(
                preds[i].to(tl.float32) - targets[i].to(tl.float32), beta, KIND
            )
            total += loss
            if WRITE_GRAD:
                tl.store(grad_ptr + cols, grad, mask=cols < D)
        tl.store(dist_ptr + row, tl.sum(total, axis=0) / D)


@triton.jit
def _align_channel_kernel(
    pred_ptr,  # [B, T, D]
    target_ptr,  # [B, T, D]
    dist_ptr,  # [B, D] fp32
    grad_ptr,  # [B, T, D], or unused
    T,
    D,
    pred_stride_b,
    pred_stride_t,
    target_stride_b,
    target_stride_t,
    WRITE_GRAD: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    num_blocks = tl.cdiv(D, BLOCK_D)
    b = tl.program_id(0).to(tl.int64) // num_blocks
    t = tl.arange(0, BLOCK_T).to(tl.int64)[:, None]
    cols = tl.program_id(0) % num_blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = (t < T) & (cols < D)[None, :]

    p_tile = b * pred_stride_b + t * pred_stride_t + cols[None, :]
    q_tile = b * target_stride_b + t * target_stride_t + cols[None, :]
    p = tl.load(pred_ptr + p_tile, mask=mask, other=0.0).to(tl.float32)
    q = tl.load(target_ptr + q_tile, mask=mask, other=0.0).to(tl.float32)

    dist, along, across = _cosine(
        tl.sum(p * p, axis=0), tl.sum(q * q, axis=0), tl.sum(p * q, axis=0), T * 1.0
    )
    tl.store(dist_ptr + b * D + cols, dist, mask=cols < D)
    if WRITE_GRAD:
        grad = along[None, :] * p - across[None, :] * q
        tl.store(grad_ptr + (b * T + t) * D + cols[None, :], grad, mask=mask)


@triton.jit
def _align_bwd_kernel(
    ddist_ptr,  # [B, T], or [B, D] for cosine_token
    grad_ptr,  # [B, T, D]
    dpred_ptr,  # [B, T, D]
    T,
    D,
    ddist_stride_b,
    ddist_stride_n,
    PER_TOKEN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    num_d, num_t = tl.cdiv(D, BLOCK_D), tl.cdiv(T, BLOCK_T)
    pid = tl.program_id(0).to(tl.int64)
    b = pid // num_d // num_t
    t = pid // num_d % num_t * BLOCK_T + tl.arange(0, BLOCK_T)
    cols = pid % num_d * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = (t < T)[:, None] & (cols < D)[None, :]
    # loaded in one dimension: of a [BLOCK_T, 1] tile every thread would load 32 numbers, not the 4 or 8 it needs
    ddist_ptr += b * ddist_stride_b
    if PER_TOKEN:
        ddist = (tl.load(ddist_ptr + t * ddist_stride_n, mask=t < T, other=0.0) / D)[:, None]
    else:
        ddist = (tl.load(ddist_ptr + cols * ddist_stride_n, mask=cols < D, other=0.0) / T)[None, :]
    tile = (b * T + t)[:, None] * D + cols[None, :]
    grad = tl.load(grad_ptr + tile, mask=mask, other=0.0).to(tl.float32)
    tl.store(dpred_ptr + tile, ddist * grad, mask=mask)


def _row_config(D: int) -> dict:
    """Pieces of a row, 8 columns of each per thread (128 bits in bf16), and the warps of the program that has it.

    Few warps, so that many rows are under way on an SM, each in another phase: SiT-XL's 1152 columns are 5 pieces of one warp.
    """
    warps = 1
    while triton.cdiv(D, 256 * warps) > MAX_PIECES:
        warps *= 2
    return {
        "PIECES": triton.cdiv(D, 256 * warps),
        "BLOCK": 256 * warps,
        "num_warps": warps,
        "enable_fp_fusion": True,
    }


def _tile_config(T: int, D: int) -> dict:
    """[BLOCK_T, BLOCK_D] of at most 16384 elements, 32 per thread and input."""
    block_t = triton.next_power_of_2(T)
    block_d = min(max(16384 // block_t, 16), 64, max(triton.next_power_of_2(D), 16))
    return {
        "BLOCK_T": block_t,
        "BLOCK_D": block_d,
        "num_warps": min(max(block_t * block_d // 1024, 4), 16),
        "enable_fp_fusion": True,
    }


def grad_dtype(pred: Tensor) -> torch.dtype:
    """Of the stored ``n * gradient``: for fp16 it is fp32, for it overflows where the gradient itself does not."""
    return torch.float32 if pred.dtype == torch.float16 else pred.dtype


def align_distance_fwd(
    pred: Tensor, target: Tensor, kind: str, beta: float, need_grad: bool
) -> tuple[Tensor, Tensor]:
    B, T, D = pred.shape
    strides = (pred.stride(0), pred.stride(1), target.stride(0), target.stride(1))
    grad = pred.new_empty((B, T, D) if need_grad else (0,), dtype=grad_dtype(pred))
    if kind == "cosine_token":
        config = _tile_config(T, D)
        dist = pred.new_empty((B, D), dtype=torch.float32)
        grid = (B * triton.cdiv(D, config["BLOCK_D"]),)
        _align_channel_kernel[grid](
            pred, target, dist, grad, T, D, *strides, WRITE_GRAD=need_grad, **config
        )
    else:
        config = _row_config(D)
        dist = pred.new_empty((B, T), dtype=torch.float32)
        _align_token_kernel[(B * T,)](
            pred,
            target,
            dist,
            grad,
            T,
            D,
            *strides,
            beta,
            KIND=_CODES[kind],
            WRITE_GRAD=need_grad,
            **config,
        )
    return dist, grad


def align_distance_bwd(ddist: Tensor, grad: Tensor, per_token: bool) -> Tensor:
    B, T, D = grad.shape
    # 64 x 64: full 128-byte lines in bf16, widths of SiT divide evenly, and ddist adds 1.6 % to the bytes
    block_t = block_d = 64
    dpred = grad.new_empty(B, T, D)
    grid = (B * triton.cdiv(T, block_t) * triton.cdiv(D, block_d),)
    _align_bwd_kernel[grid](
        ddist,
        grad,
        dpred,
        T,
        D,
        ddist.stride(0),
        ddist.stride(1),
        PER_TOKEN=per_token,
        BLOCK_T=block_t,
        BLOCK_D=block_d,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return dpred
