"""Two noisy versions of one latent and the velocity, for two times that share one draw of noise.

x = scale * x0, or scale * (mean + std * e) from the moments of a VAE posterior;
x_t = a(t) x + s(t) n,   x_t' = a(t') x + s(t') n,   v = a'(t) x + s'(t) n,   a, s = 1-t, t or cos, sin of pi t / 2.
Every program handles BLOCK elements of one image, so the times are scalars.

Bytes moved, in elements: 2 reads and 3 fp32 writes; from moments 4 reads (20 and 28 bytes per element in fp32).
Reference: sra_fast/ops/noise_pair.py::noise_pair_ref.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# 8 elements per thread at 4 warps
BLOCK = 1024
# 32-bit registers per thread, at most
REGISTERS = {"_noise_pair_kernel": 48}


@triton.jit
def _quarter_sine(u):
    """sin(pi u / 2) for u in [0, 1]: Taylor to y^13, truncation below 7e-10.

    The library's sin and cos keep a range reduction for large arguments, which costs 32 bytes of local memory.
    """
    y = 1.5707963267948966 * u
    z = y * y
    p = 1.6059043836821613e-10
    p = p * z - 2.5052108385441720e-08
    p = p * z + 2.7557319223985893e-06
    p = p * z - 1.9841269841269841e-04
    p = p * z + 8.3333333333333333e-03
    p = p * z - 1.6666666666666666e-01
    return y + y * z * p


@triton.jit
def _interpolant(t, COSINE: tl.constexpr):
    if COSINE:
        alpha, sigma = _quarter_sine(1.0 - t), _quarter_sine(t)
        dalpha, dsigma = -1.5707963267948966 * sigma, 1.5707963267948966 * alpha
    else:
        alpha, sigma = 1.0 - t, t
        dalpha, dsigma = -1.0, 1.0
    return alpha, sigma, dalpha, dsigma


@triton.jit
def _noise_pair_kernel(
    x0_ptr,  # [B, N], or the mean and the std side by side, [B, 2N]
    latent_noise_ptr,  # [B, N], or unused
    noise_ptr,  # [B, N]
    t_ptr,  # [B]
    t_teacher_ptr,  # [B]
    x_t_ptr,  # [B, N] fp32
    x_teacher_ptr,  # [B, N] fp32
    v_ptr,  # [B, N] fp32
    N,
    x0_stride,
    latent_noise_stride,
    noise_stride,
    t_stride,
    t_teacher_stride,
    scale,
    MOMENTS: tl.constexpr,
    COSINE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    num_blocks = tl.cdiv(N, BLOCK)
    b = tl.program_id(0).to(tl.int64) // num_blocks
    cols = tl.program_id(0) % num_blocks * BLOCK + tl.arange(0, BLOCK)
    mask = cols < N

    x = tl.load(x0_ptr + b * x0_stride + cols, mask=mask, other=0.0).to(tl.float32)
    if MOMENTS:
        std = tl.load(x0_ptr + b * x0_stride + N + cols, mask=mask, other=0.0).to(tl.float32)
        e = tl.load(latent_noise_ptr + b * latent_noise_stride + cols, mask=mask, other=0.0).to(
            tl.float32
        )
        x += std * e
    x *= scale
    noise = tl.load(noise_ptr + b * noise_stride + cols, mask=mask, other=0.0).to(tl.float32)

    t = tl.load(t_ptr + b * t_stride).to(tl.float32)
    t_teacher = tl.load(t_teacher_ptr + b * t_teacher_stride).to(tl.float32)
    alpha, sigma, dalpha, dsigma = _interpolant(t, COSINE)
    alpha_teacher, sigma_teacher, _, _ = _interpolant(t_teacher, COSINE)
    out = b * N + cols
    tl.store(x_t_ptr + out, alpha * x + sigma * noise, mask=mask)
    tl.store(x_teacher_ptr + out, alpha_teacher * x + sigma_teacher * noise, mask=mask)
    tl.store(v_ptr + out, dalpha * x + dsigma * noise, mask=mask)


def noise_pair(
    x0: Tensor,
    latent_noise: Tensor | None,
    noise: Tensor,
    t: Tensor,
    t_teacher: Tensor,
    cosine: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    B, N = noise.shape
    outs = tuple(noise.new_empty(noise.shape, dtype=torch.float32) for _ in range(3))
    e = noise if latent_noise is None else latent_noise
    strides = (x0.stride(0), e.stride(0), noise.stride(0), t.stride(0), t_teacher.stride(0))
    _noise_pair_kernel[(B * triton.cdiv(N, BLOCK),)](
        x0,
        e,
        noise,
        t,
        t_teacher,
        *outs,
        N,
        *strides,
        scale,
        MOMENTS=latent_noise is not None,
        COSINE=cosine,
        BLOCK=BLOCK,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return outs
