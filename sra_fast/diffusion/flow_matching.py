"""SiT's process: an interpolant between data (t=0) and noise (t=1) with velocity prediction (arXiv 2401.08740)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sra_fast import ops


@dataclass
class Noised:
    """What both branches see of one micro-batch, and what the loss needs.

    ``x``, ``x_teacher``: ``[B, C, H, W]`` noisy inputs; ``t``, ``t_teacher``: ``[B]``; ``target``: ``[B, C, H, W]``;
    ``x0``: the clean latents.
    """

    x: Tensor
    t: Tensor
    x_teacher: Tensor
    t_teacher: Tensor
    target: Tensor
    x0: Tensor


class FlowMatching:
    """Times, noisy inputs and the velocity loss of SiT.

    Args:
        path: ``"linear"`` or ``"cosine"`` interpolant.
        time: distribution of the student's time: ``"uniform"`` on [0, 1], or ``"lognormal"``: the noise-to-data ratio
            sigma/alpha is the exponential of a standard normal.
        t_max: the teacher is earlier by ``k ~ U(0, t_max)``.
    """

    def __init__(self, path: str = "linear", time: str = "uniform", t_max: float = 0.2):
        self.path, self.time, self.t_max = path, time, t_max

    def times(self, uniform: Tensor, gap: Tensor) -> tuple[Tensor, Tensor]:
        """``[B]`` uniforms for the time and for the gap -> student and teacher times ``[B]`` (SRA, Sec. 3.2)."""
        if self.time == "lognormal":
            log_ratio = torch.special.ndtri(uniform)
            t = (
                log_ratio.sigmoid()
                if self.path == "linear"
                else (2 / math.pi) * log_ratio.exp().atan()
            )
        else:
            t = uniform
        return t, (t - gap * self.t_max).clamp(0, 1)

    def corrupt(self, x0: Tensor, noise: Tensor, t: Tensor, t_teacher: Tensor) -> Noised:
        x, x_teacher, velocity = ops.noise_pair(x0, noise, t, t_teacher, self.path)
        return Noised(x, t, x_teacher, t_teacher, velocity, x0)

    def losses(self, prediction: Tensor, noised: Noised) -> dict[str, Tensor]:
        """``{"denoise": [B]}``, the mean squared error of the velocity in fp32."""
        return {"denoise": (prediction.float() - noised.target).square().flatten(1).mean(1)}
