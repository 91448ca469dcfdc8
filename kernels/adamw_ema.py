"""Gradient clipping, AdamW, half-precision weights, EMA and half-precision teacher in one pass over flat buffers.

g <- clip g;  p <- (1 - lr wd) p;  m <- m + (1 - b1)(g - m);  v <- b2 v + (1 - b2) g^2;
p <- p - lr / (1 - b1^k) m / (sqrt(v / (1 - b2^k)) + eps);  weights <- p;
ema <- ema + (1 - decay)(p - ema);  ema_copy <- ema

Bytes moved per element: 24 for p, m and v, 4 (2) for an fp32 (bf16) gradient, 2 for the weights, 8 for the EMA and 2
for its copy: 40 in all.  Reference: sra_fast/ops/adamw_ema.py::adamw_ema_ref_.
"""
import triton
import triton.language as tl
from torch import Tensor

# 8 elements per thread at 4 warps: two 128-bit accesses of each fp32 buffer, one of each half-precision buffer
BLOCK = 1024
# 32-bit registers per thread, at most, of wide launches
REGISTERS = {"_adamw_ema_kernel": 56}


@triton.jit
def _adamw_ema_kernel(
    param_ptr,  # [N] fp32
    grad_ptr,  # [N]
    exp_avg_ptr,  # [N] fp32
    exp_avg_sq_ptr,  # [N] fp32
    weights_ptr,  # [N] half precision, or unused
    ema_ptr,  # [N] fp32, or unused
    ema_copy_ptr,  # [N] half precision, or unused
    clip_scale_ptr,  # one fp32 number, or unused
    N,
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
    BLOCK: tl.constexpr,
):
    cols = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < N
    param = tl.load(param_ptr + cols, mask=mask, other=0.0)
    grad = tl.load(grad_ptr + cols, mask=mask, other=0.0).to(tl.float32)
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
        ema = tl.where(ema_weight < 0.5, ema + ema_weight * (param - ema), param - decay * (param - ema))
        tl.store(ema_ptr + cols, ema, mask=mask)
        if EMA_COPY:
            tl.store(ema_copy_ptr + cols, ema, mask=mask)


def adamw_ema_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    weights: Tensor | None,
    ema: Tensor | None,
    ema_copy: Tensor | None,
    clip_scale: Tensor | None,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decay: float,
) -> None:
    """One-dimensional contiguous buffers of one length; optional ones are None."""
    step_size, inv_sqrt_bias2 = lr / (1 - beta1**step), (1 - beta2**step) ** -0.5
    scalars = (1 - lr * weight_decay, 1 - beta1, beta2, 1 - beta2, step_size, inv_sqrt_bias2, eps, 1 - decay, decay)
    options = {"WEIGHTS": weights is not None, "EMA": ema is not None, "EMA_COPY": ema_copy is not None}
    options |= {"CLIP": clip_scale is not None, "BLOCK": BLOCK, "num_warps": 4, "enable_fp_fusion": True}
    buffers = [param, grad, exp_avg, exp_avg_sq, *(param if x is None else x for x in (weights, ema, ema_copy))]
    clip = param if clip_scale is None else clip_scale
    # a length that is no multiple of 16 would narrow every access of the launch, so the rest goes alone
    N, even = param.numel(), param.numel() // 16 * 16
    for start, stop in ((0, even), (even, N)):
        if start < stop:
            views = [x[start:stop] for x in buffers]
            grid = (triton.cdiv(stop - start, BLOCK),)
            _adamw_ema_kernel[grid](*views, clip, stop - start, *scalars, **options)
