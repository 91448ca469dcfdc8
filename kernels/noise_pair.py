"""Two noisy versions of one latent and the velocity, for two times that share one draw of noise.

    x = scale * x0, or scale * (mean + std * e) from the moments of a VAE posterior
    x_t = a(t) x + s(t) n;   x_t' = a(t') x + s(t') n;   v = a'(t) x + s'(t) n
    a, s = 1 - t, t  or  cos, sin of pi t / 2

Every program handles BLOCK elements of one image, so the times are scalars.

Bytes moved, in elements: 2 reads and 3 fp32 writes; from moments 4 reads (20 and 28 bytes per
element in fp32).
Reference: sra_fast/ops/noise_pair.py::noise_pair_ref.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# 8 elements per thread at 4 warps
BLOCK = 1024
# upper limit of 32-bit registers per thread
REGISTERS = {"_noise_pair_kernel": 48}


@triton.jit
def _quarter_sine(u):
    """sin(pi u / 2) for u in [0, 1]: Taylor series to y^13, truncation error below 7e-10.

    The library's sin and cos reduce the range of large arguments, which costs 32 bytes of local
    memory.
    """
    y = 1.5707963267948966 * u
    z = y * y
    # Horner's rule in y^2
    p = 1.6059043836821613e-10
    p = p * z - 2.5052108385441720e-08
    p = p * z + 2.7557319223985893e-06
    p = p * z - 1.9841269841269841e-04
    p = p * z + 8.3333333333333333e-03
    p = p * z - 1.6666666666666666e-01
    return y + y * z * p


@triton.jit
def _interpolant(t, COSINE: tl.constexpr):
    """alpha, sigma and their derivatives at t (SiT, arXiv 2401.08740, Sec. 2)."""
    if COSINE:
        alpha = _quarter_sine(1.0 - t)
        sigma = _quarter_sine(t)
        dalpha = -1.5707963267948966 * sigma
        dsigma = 1.5707963267948966 * alpha
    else:
        alpha = 1.0 - t
        sigma = t
        dalpha = -1.0
        dsigma = 1.0
    return alpha, sigma, dalpha, dsigma


@triton.jit
def _noise_pair_kernel(
    x0_ptr,  # [B, N], or the mean and the std one after the other, [B, 2N]
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

    # the latent, or a draw from its posterior
    x = tl.load(x0_ptr + b * x0_stride + cols, mask=mask, other=0.0).to(tl.float32)
    if MOMENTS:
        std = tl.load(x0_ptr + b * x0_stride + N + cols, mask=mask, other=0.0).to(tl.float32)
        e = tl.load(latent_noise_ptr + b * latent_noise_stride + cols, mask=mask, other=0.0)
        x += std * e.to(tl.float32)
    x *= scale
    noise = tl.load(noise_ptr + b * noise_stride + cols, mask=mask, other=0.0).to(tl.float32)

    # coefficients at the student's and at the teacher's time
    t = tl.load(t_ptr + b * t_stride).to(tl.float32)
    t_teacher = tl.load(t_teacher_ptr + b * t_teacher_stride).to(tl.float32)
    alpha, sigma, dalpha, dsigma = _interpolant(t, COSINE)
    alpha_teacher, sigma_teacher, _, _ = _interpolant(t_teacher, COSINE)

    # student's input, teacher's input, velocity target
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
    """x_t, x_t' and v, ``[B, N]`` fp32; the rows of x0, latent_noise and noise have unit stride."""
    B, N = noise.shape
    x_t = noise.new_empty(noise.shape, dtype=torch.float32)
    x_teacher = noise.new_empty(noise.shape, dtype=torch.float32)
    v = noise.new_empty(noise.shape, dtype=torch.float32)
    # without moments the kernel does not read this operand
    e = noise if latent_noise is None else latent_noise
    _noise_pair_kernel[(B * triton.cdiv(N, BLOCK),)](
        x0,
        e,
        noise,
        t,
        t_teacher,
        x_t,
        x_teacher,
        v,
        N,
        x0.stride(0),
        e.stride(0),
        noise.stride(0),
        t.stride(0),
        t_teacher.stride(0),
        scale,
        MOMENTS=latent_noise is not None,
        COSINE=cosine,
        BLOCK=BLOCK,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return x_t, x_teacher, v
