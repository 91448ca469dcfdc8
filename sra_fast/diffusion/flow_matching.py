"""SiT's process: data (t=0) and noise (t=1) interpolated, velocity predicted (arXiv 2401.08740)."""

import math

import torch
from torch import Tensor

from sra_fast import ops
from sra_fast.config.schema import DiffusionConfig
from sra_fast.diffusion.process import Noised, check_prediction
from sra_fast.utils.registry import PROCESSES


@PROCESSES.register("flow_matching")
class FlowMatching:
    """Times, noisy inputs and the velocity loss of SiT.

    Args:
        path: ``"linear"`` or ``"cosine"`` interpolant.
        time: distribution of the student's time: ``"uniform"`` on [0, 1], or ``"lognormal"``: the
            noise-to-data ratio sigma/alpha is the exponential of a standard normal.
        t_max: the teacher is earlier by ``k ~ U(0, t_max)``.
    """

    default_sampler = "euler_maruyama"

    def __init__(self, path: str = "linear", time: str = "uniform", t_max: float = 0.2):
        self.path = path
        self.time = time
        self.t_max = t_max

    @classmethod
    def from_config(cls, diffusion: DiffusionConfig, t_max: float) -> "FlowMatching":
        return cls(diffusion.path, diffusion.time, t_max)

    def times(self, uniform: Tensor, gap: Tensor) -> tuple[Tensor, Tensor]:
        """Two uniforms ``[B]`` -> student's and teacher's times ``[B]`` (SRA, Sec. 3.2)."""
        t = self._lognormal(uniform) if self.time == "lognormal" else uniform
        # t = 0 is data, so an earlier time is a cleaner input
        return t, (t - gap * self.t_max).clamp(0, 1)

    def _lognormal(self, uniform: Tensor) -> Tensor:
        """The time at which sigma/alpha is the exponential of a standard normal."""
        log_ratio = torch.special.ndtri(uniform)
        if self.path == "linear":
            # sigma/alpha = t / (1 - t)
            return log_ratio.sigmoid()
        # sigma/alpha = tan(pi t / 2)
        return (2 / math.pi) * log_ratio.exp().atan()

    def corrupt(self, x0: Tensor, noise: Tensor, t: Tensor, t_teacher: Tensor) -> Noised:
        # latents and noise are read once for both inputs and the target, dx/dt
        x, x_teacher, velocity = ops.noise_pair(x0, noise, t, t_teacher, self.path)
        return Noised(x, t, x_teacher, t_teacher, velocity, x0)

    def losses(self, prediction: Tensor, noised: Noised) -> dict[str, Tensor]:
        """``{"denoise": [B]}``, the mean squared error of the velocity in fp32."""
        check_prediction(prediction, noised)
        # bf16 has 8 bits of precision: its difference would lose small errors
        error = prediction.float() - noised.target
        return {"denoise": error.square().flatten(1).mean(1)}
