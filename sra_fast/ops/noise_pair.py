"""Student's and teacher's noisy inputs and the velocity target, from one image and one draw of noise."""
import math

from torch import Tensor

from sra_fast.ops._backend import upcast

PATHS = ("linear", "cosine")


def interpolant(t: Tensor, path: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``alpha, sigma, d alpha/dt, d sigma/dt`` of ``x_t = alpha x0 + sigma eps`` (SiT, arXiv 2401.08740, Sec. 2).

    t=0 is data, t=1 is noise.  ``path``: "linear" (1-t, t) or "cosine" (cos(pi t/2), sin(pi t/2)).
    """
    if path == "linear":
        one = t.new_ones(())
        return 1 - t, t, -one, one
    if path == "cosine":
        half_pi = math.pi / 2
        cos, sin = (half_pi * t).cos(), (half_pi * t).sin()
        return cos, sin, -half_pi * sin, half_pi * cos
    raise ValueError(f"path must be one of {PATHS}, got {path!r}")


def noise_pair(
    x0: Tensor, noise: Tensor, t: Tensor, t_teacher: Tensor, path: str = "linear"
) -> tuple[Tensor, Tensor, Tensor]:
    """``x_t``, ``x_t'`` and the velocity ``d x_t / dt`` for two times that share the noise (SRA, Sec. 3.2).

    Args:
        x0: ``[B, C, H, W]`` clean latents.
        noise: ``[B, C, H, W]`` standard normal.
        t: ``[B]`` student times in [0, 1].
        t_teacher: ``[B]`` teacher times, at most ``t``.
        path: ``"linear"`` or ``"cosine"``.

    Returns:
        ``(x_t, x_t', v)``, each ``[B, C, H, W]`` in fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: the shapes do not fit, or ``path`` is unknown.
    """
    if noise.shape != x0.shape or t.shape != x0.shape[:1] or t_teacher.shape != t.shape:
        raise ValueError(
            f"expected x0, noise [B, C, H, W] and t, t_teacher [B], "
            f"got {[*x0.shape]}, {[*noise.shape]}, {[*t.shape]}, {[*t_teacher.shape]}"
        )
    x0, noise = upcast(x0), upcast(noise)
    t, t_teacher = (upcast(s).view(-1, *[1] * (x0.dim() - 1)) for s in (t, t_teacher))
    alpha, sigma, dalpha, dsigma = interpolant(t, path)
    alpha_teacher, sigma_teacher, _, _ = interpolant(t_teacher, path)
    return alpha * x0 + sigma * noise, alpha_teacher * x0 + sigma_teacher * noise, dalpha * x0 + dsigma * noise
