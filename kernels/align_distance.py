"""Alignment distances and their gradient from one read of the student's and the teacher's features.

    per token     dist[b, t] = (1/D) sum_d f(p - q), f = smooth-L1, |.| or (.)^2
                  or 1 - cos(p, q) over the channels
    per channel   dist[b, d] = 1 - cos(p, q) over the tokens

The forward also stores g = n * d dist / d p (n = D or T) in the dtype of p (fp32 for fp16). The
backward is dp = ddist * g / n. Without the factor n the entries of g would be about 1/D.

Bytes moved, in elements of [B, T, D]: forward 3 (2 without gradient), backward 2; the fp32
distances add 4/D per element.
Reference: sra_fast/ops/align_distance.py::align_distance_ref.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# cosine_token holds [T, 16] elements of both inputs in registers: at 2048 tokens sm_90 spills (272
# bytes of stack)
MAX_TOKENS = 1024
# the other kinds hold a row in at most this many blocks, in a program of at most 16 warps
MAX_BLOCKS = 5
MAX_WIDTH = 16384
# upper limits of 32-bit registers per thread, checked by tests/ops/test_codegen_flat.py
REGISTERS = {"_align_token_kernel": 128, "_align_channel_kernel": 128, "_align_bwd_kernel": 64}

SMOOTH_L1, L1, L2, COSINE = (tl.constexpr(i) for i in range(4))
_CODES = {"smooth_l1": 0, "l1": 1, "l2": 2, "cosine_patch": 3}


@triton.jit
def _cosine(pp, qq, pq, n):
    """1 - cos from the sums of p p, q q and p q; and the factors of p and q in n times its
    gradient.

    Norms below 1e-8 are clamped in the value only, as torch clamps them.
    """
    # rounded to nearest: 1 - cos of similar features cancels, and a GPU's default approximations
    # of the root and the division have a larger error than fp32
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
    """f and f' of diff = p - q."""
    if KIND == SMOOTH_L1:
        size = tl.abs(diff)
        quadratic = size < beta
        loss = tl.where(quadratic, 0.5 * diff * (diff / beta), size - 0.5 * beta)
        # keeps a NaN: diff itself where neither comparison holds
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
    NUM_BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    pred_ptr += row // T * pred_stride_b + row % T * pred_stride_t
    target_ptr += row // T * target_stride_b + row % T * target_stride_t
    grad_ptr += row * D
    # issue the loads of the whole row before any of it is used
    preds = ()
    targets = ()
    for i in tl.static_range(NUM_BLOCKS):
        cols = i * BLOCK + tl.arange(0, BLOCK)
        preds += (tl.load(pred_ptr + cols, mask=cols < D, other=0.0),)
        targets += (tl.load(target_ptr + cols, mask=cols < D, other=0.0),)

    # each thread adds up its own columns first: one reduction across threads
    if KIND == COSINE:
        zero = tl.zeros((BLOCK,), dtype=tl.float32)
        pp = zero
        qq = zero
        pq = zero
        for i in tl.static_range(NUM_BLOCKS):
            p = preds[i].to(tl.float32)
            q = targets[i].to(tl.float32)
            pp += p * p
            qq += q * q
            pq += p * q
        dist, along, across = _cosine(
            tl.sum(pp, axis=0), tl.sum(qq, axis=0), tl.sum(pq, axis=0), D * 1.0
        )
        tl.store(dist_ptr + row, dist)
        # the gradient is a combination of p and q, which are still in registers
        if WRITE_GRAD:
            for i in tl.static_range(NUM_BLOCKS):
                cols = i * BLOCK + tl.arange(0, BLOCK)
                grad = along * preds[i].to(tl.float32) - across * targets[i].to(tl.float32)
                tl.store(grad_ptr + cols, grad, mask=cols < D)
    else:
        total = tl.zeros((BLOCK,), dtype=tl.float32)
        for i in tl.static_range(NUM_BLOCKS):
            cols = i * BLOCK + tl.arange(0, BLOCK)
            diff = preds[i].to(tl.float32) - targets[i].to(tl.float32)
            loss, grad = _elementwise(diff, beta, KIND)
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

    # one tile holds all tokens of BLOCK_D channels
    p_tile = b * pred_stride_b + t * pred_stride_t + cols[None, :]
    q_tile = b * target_stride_b + t * target_stride_t + cols[None, :]
    p = tl.load(pred_ptr + p_tile, mask=mask, other=0.0).to(tl.float32)
    q = tl.load(target_ptr + q_tile, mask=mask, other=0.0).to(tl.float32)

    # distance of every channel, and its gradient from the same tile
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
    num_d = tl.cdiv(D, BLOCK_D)
    num_t = tl.cdiv(T, BLOCK_T)
    pid = tl.program_id(0).to(tl.int64)
    b = pid // num_d // num_t
    t = pid // num_d % num_t * BLOCK_T + tl.arange(0, BLOCK_T)
    cols = pid % num_d * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = (t < T)[:, None] & (cols < D)[None, :]

    # loaded in one dimension: of a [BLOCK_T, 1] tile every thread would load 32 numbers, where it
    # needs 4 or 8
    ddist_ptr += b * ddist_stride_b
    if PER_TOKEN:
        ddist = (tl.load(ddist_ptr + t * ddist_stride_n, mask=t < T, other=0.0) / D)[:, None]
    else:
        ddist = (tl.load(ddist_ptr + cols * ddist_stride_n, mask=cols < D, other=0.0) / T)[None, :]
    # scale the stored gradient
    tile = (b * T + t)[:, None] * D + cols[None, :]
    grad = tl.load(grad_ptr + tile, mask=mask, other=0.0).to(tl.float32)
    tl.store(dpred_ptr + tile, ddist * grad, mask=mask)


def _row_config(D: int) -> dict:
    """Blocks of a row and warps of its program; a thread has 8 columns of each block, 128 bits in
    bf16.

    As few warps as possible, so that many rows are in progress on an SM, each in another phase:
    SiT-XL's 1152 columns are 5 blocks of one warp.
    """
    num_warps = 1
    while triton.cdiv(D, 256 * num_warps) > MAX_BLOCKS:
        num_warps *= 2
    return {
        "NUM_BLOCKS": triton.cdiv(D, 256 * num_warps),
        "BLOCK": 256 * num_warps,
        "num_warps": num_warps,
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
    """Dtype of the stored ``n * gradient``: fp32 for fp16, where n times the gradient could
    overflow.
    """
    return torch.float32 if pred.dtype == torch.float16 else pred.dtype


def align_distance_fwd(
    pred: Tensor, target: Tensor, kind: str, beta: float, need_grad: bool
) -> tuple[Tensor, Tensor]:
    """Distances ``[B, T]`` (cosine_token: ``[B, D]``) in fp32, and n times their gradient.

    The gradient is empty unless ``need_grad``. pred and target ``[B, T, D]`` have dense channels.
    """
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
    """The gradient of pred from ddist ``[B, T]`` (``[B, D]`` unless per_token) and the stored
    gradient.
    """
    B, T, D = grad.shape
    # 64 x 64: full 128-byte lines in bf16, divides the widths of SiT, and ddist adds 1.6 % to the
    # bytes
    block_t = 64
    block_d = 64
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
