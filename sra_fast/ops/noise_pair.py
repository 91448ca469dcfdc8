"""Student's and teacher's noisy inputs and the velocity target, from one image and one draw of
noise.
"""

import math

import torch
from torch import Tensor

from sra_fast.kernels import noise_pair as kernels
from sra_fast.ops._backend import FLOAT_DTYPES, check_tensors, log_once, takes_kernel, upcast
from sra_fast.ops._memory import with_dense_columns
from sra_fast.ops._register import register, wants_grad

PATHS = ("linear", "cosine")


def interpolant(t: Tensor, path: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``alpha, sigma, d alpha/dt, d sigma/dt`` of ``x_t = alpha x0 + sigma eps`` (SiT, arXiv
    2401.08740, Sec. 2).

    t=0 is data, t=1 is noise.  ``path``: "linear" (1-t, t) or "cosine" (cos(pi t/2), sin(pi t/2)).
    """
    if path == "linear":
        one = t.new_ones(())
        return 1 - t, t, -one, one
    if path == "cosine":
        half_pi = math.pi / 2
        cos = (half_pi * t).cos()
        sin = (half_pi * t).sin()
        return cos, sin, -half_pi * sin, half_pi * cos
    raise ValueError(f"path must be one of {PATHS}, got {path!r}")


def noise_pair_ref(
    x0: Tensor,
    noise: Tensor,
    t: Tensor,
    t_teacher: Tensor,
    path: str = "linear",
    *,
    latent_noise: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition, in fp32 (fp64 for fp64).

    Tests, benchmarks and backend="torch" all use this one function.
    """
    x0 = upcast(x0)
    noise = upcast(noise)
    # a draw from the VAE's posterior
    if latent_noise is not None:
        mean, std = x0.chunk(2, dim=1)
        x0 = mean + std * upcast(latent_noise)
    x0 = x0 if scale == 1 else x0 * scale
    # one time per image
    per_image = (-1, *[1] * (x0.dim() - 1))
    t = upcast(t).view(per_image)
    t_teacher = upcast(t_teacher).view(per_image)
    # coefficients at the student's and at the teacher's time
    alpha, sigma, dalpha, dsigma = interpolant(t, path)
    alpha_teacher, sigma_teacher, _, _ = interpolant(t_teacher, path)
    x_t = alpha * x0 + sigma * noise
    x_teacher = alpha_teacher * x0 + sigma_teacher * noise
    return x_t, x_teacher, dalpha * x0 + dsigma * noise


def _fake(x0, latent_noise, noise, t, t_teacher, cosine, scale):
    x_t, x_teacher, v = (noise.new_empty(noise.shape, dtype=torch.float32) for _ in range(3))
    return x_t, x_teacher, v


_op = register(
    "noise_pair(Tensor x0, Tensor? latent_noise, Tensor noise, Tensor t, Tensor t_teacher, bool cosine,"
    " float scale) -> (Tensor, Tensor, Tensor)",
    kernels.noise_pair,
    _fake,
)


def _rows(x: Tensor) -> Tensor:
    """Reshape to ``[B, N]`` with unit stride within an image; copies only if it must."""
    return with_dense_columns(x.reshape(x.shape[0], -1))


def _check(
    x0: Tensor,
    noise: Tensor,
    t: Tensor,
    t_teacher: Tensor,
    path: str,
    latent_noise: Tensor | None,
    scale: float,
) -> None:
    """Raise ValueError unless the arguments fit."""
    named = {"x0": x0, "noise": noise, "t": t, "t_teacher": t_teacher}
    if latent_noise is not None:
        named["latent_noise"] = latent_noise
    check_tensors("noise_pair", named)
    expected = list(noise.shape)
    what = "x0 [B, C, H, W]"
    if latent_noise is not None:
        what = "moments x0 [B, 2C, H, W], latent_noise [B, C, H, W]"
        if noise.dim() > 1:
            expected[1] *= 2
    fits = list(x0.shape) == expected and t.shape == noise.shape[:1] and t_teacher.shape == t.shape
    latent_fits = latent_noise is None or latent_noise.shape == noise.shape
    if noise.dim() < 2 or not fits or not latent_fits:
        got = ", ".join(f"{name} {[*s.shape]}" for name, s in named.items())
        raise ValueError(
            f"noise_pair: expected {what}, noise [B, C, H, W] and t, t_teacher [B], got {got}"
        )
    if path not in PATHS:
        raise ValueError(f"noise_pair: path must be one of {PATHS}, got {path!r}")
    # comparisons: a compiler can trace them for a number that changes. A NaN compares with nothing
    if not isinstance(scale, int | float) or not -math.inf < scale < math.inf:
        raise ValueError(f"noise_pair: expected scale as a finite number, got {scale!r}")
    if any(s.dtype not in FLOAT_DTYPES or s.device != x0.device for s in named.values()):
        got = ", ".join(f"{name} {s.dtype} {s.device}" for name, s in named.items())
        raise ValueError(f"noise_pair: expected floating-point tensors on one device, got {got}")


def _runs_kernel(noise: Tensor, tensors: list[Tensor], backend: str | None) -> bool:
    """Whether the kernel takes the inputs; it has no backward, which is logged once."""
    if not takes_kernel("noise_pair", backend, noise, *tensors):
        return False
    if wants_grad(*tensors):
        log_once(
            "noise_pair runs unfused in PyTorch: its kernel has no backward, and an input wants one"
        )
        return False
    return True


def noise_pair(
    x0: Tensor,
    noise: Tensor,
    t: Tensor,
    t_teacher: Tensor,
    path: str = "linear",
    *,
    latent_noise: Tensor | None = None,
    scale: float = 1.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``x_t``, ``x_t'`` and the velocity ``d x_t / dt`` for two times that share the noise (SRA,
    Sec. 3.2).

    One pass over the data. Inputs that want a gradient go to the PyTorch reference.

    Args:
        x0: ``[B, C, H, W]`` clean latents, any floating dtype. With ``latent_noise`` the mean and
            the standard deviation of the VAE's posterior, ``[B, 2C, H, W]``; the latent is ``mean
            + std * latent_noise``.
        noise: ``[B, C, H, W]`` standard normal.
        t: ``[B]`` student times in [0, 1]; 0 is data, 1 is noise.
        t_teacher: ``[B]`` teacher times in [0, 1], at most ``t``.
        path: ``"linear"`` or ``"cosine"``.
        latent_noise: ``[B, C, H, W]`` standard normal, the draw from the posterior; None: ``x0``
            holds latents.
        scale: multiplies the latent: 0.18215 for the SD-VAE's unscaled latents, 1 for scaled ones.
        backend: ``"triton"``, ``"torch"`` or ``"auto"``; default: ``$SRA_FAST_BACKEND``, else auto.

    Returns:
        ``(x_t, x_t', v)``, each ``[B, C, H, W]`` in fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: the shapes do not fit, ``path`` is unknown, ``scale`` is no finite number,
            integer tensors, or tensors on different devices.
    """
    _check(x0, noise, t, t_teacher, path, latent_noise, scale)
    tensors = [s for s in (x0, noise, t, t_teacher, latent_noise) if s is not None]
    if not _runs_kernel(noise, tensors, backend):
        return noise_pair_ref(x0, noise, t, t_teacher, path, latent_noise=latent_noise, scale=scale)
    latent_rows = None if latent_noise is None else _rows(latent_noise)
    cosine = path == "cosine"
    outs = _op(_rows(x0), latent_rows, _rows(noise), t, t_teacher, cosine, scale)
    x_t, x_teacher, v = (out.view(noise.shape) for out in outs)
    return x_t, x_teacher, v
