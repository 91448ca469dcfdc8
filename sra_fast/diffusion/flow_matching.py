"""SiT's process: data (t=0) and noise (t=1) interpolated, velocity predicted (arXiv 2401.08740)."""

import math
import sys

import torch
from torch import Tensor

from sra_fast import ops
from sra_fast.config.schema import DiffusionConfig
from sra_fast.diffusion.process import Noised, check_prediction
from sra_fast.utils.checks import require_that
from sra_fast.utils.registry import PROCESSES


def shift_times(t: Tensor, shift: float, path: str) -> Tensor:
    """The times at which the noise-to-data ratio sigma/alpha is ``shift`` times that of ``t``
    (arXiv 2403.03206, Eq. 23, for any interpolant). The inverse is the shift by ``1 / shift``.

    Args:
        t: times in [0, 1], of any shape.
        shift: positive; 1 gives ``t`` itself.
        path: ``"linear"`` or ``"cosine"`` interpolant.
    """
    if shift == 1:
        return t
    if path == "linear":
        # sigma/alpha = t / (1 - t)
        noise = shift * t
        return noise / (noise + (1 - t))
    # sigma/alpha = tan(pi t / 2), which is infinite at 1
    angle = (math.pi / 2) * t
    # rounding may end just above 1
    return ((2 / math.pi) * torch.atan2(shift * angle.sin(), angle.cos())).clamp(max=1)


def check_time_shift(shift: object, source: str) -> None:
    """ValueError unless what a file says is a positive number that a float can hold."""
    require_that(
        type(shift) in (int, float) and 0 < shift <= sys.float_info.max,
        f"expected a positive shift of times in {source}, got {shift!r}",
    )


@PROCESSES.register("flow_matching")
class FlowMatching:
    """Times, noisy inputs and the velocity loss of SiT.

    Args:
        path: ``"linear"`` or ``"cosine"`` interpolant.
        time: distribution of the student's time: ``"uniform"`` on [0, 1], or ``"lognormal"``: the
            logarithm of the noise-to-data ratio sigma/alpha is normal.
        t_max: the teacher is earlier by ``k ~ U(0, t_max)``.
        mean, std: of the normal of ``"lognormal"``.
        shift: of the student's times, see ``shift_times``.
    """

    default_sampler = "euler_maruyama"

    def __init__(
        self,
        path: str = "linear",
        time: str = "uniform",
        t_max: float = 0.2,
        *,
        mean: float = 0.0,
        std: float = 1.0,
        shift: float = 1.0,
    ):
        self.path = path
        self.time = time
        self.t_max = t_max
        self.mean = mean
        self.std = std
        self.shift = shift

    @classmethod
    def from_config(cls, diffusion: DiffusionConfig, t_max: float) -> "FlowMatching":
        mean, std, shift = diffusion.time_mean, diffusion.time_std, diffusion.time_shift
        for name, value in {"time_std": std, "time_shift": shift}.items():
            require_that(
                0 < value < math.inf,
                f"diffusion.{name} must be positive and finite, got {value}",
            )
        require_that(math.isfinite(mean), f"diffusion.time_mean must be finite, got {mean}")
        require_that(
            diffusion.time == "lognormal" or (mean, std) == (0, 1),
            "diffusion.time_mean and diffusion.time_std are of diffusion.time lognormal, got "
            f"{mean} and {std} with {diffusion.time}",
        )
        return cls(diffusion.path, diffusion.time, t_max, mean=mean, std=std, shift=shift)

    def times(self, uniform: Tensor, gap: Tensor) -> tuple[Tensor, Tensor]:
        """Two uniforms ``[B]`` -> student's and teacher's times ``[B]`` (SRA, Sec. 3.2)."""
        t = self._lognormal(uniform) if self.time == "lognormal" else uniform
        t = shift_times(t, self.shift, self.path)
        # t = 0 is data, so an earlier time is a cleaner input
        return t, (t - gap * self.t_max).clamp(0, 1)

    def _lognormal(self, uniform: Tensor) -> Tensor:
        """The time at which the logarithm of sigma/alpha is a normal's."""
        log_ratio = self.mean + self.std * torch.special.ndtri(uniform)
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
