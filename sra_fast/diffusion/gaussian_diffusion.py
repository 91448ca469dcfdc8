"""DiT's process: discrete Gaussian diffusion with noise prediction and learned variance.

DDPM (arXiv 2006.11239) and its learned-range variance with the variational term (improved DDPM,
arXiv 2102.09672).
"""

import math
from dataclasses import fields

import torch
from torch import Tensor

from sra_fast.config.schema import DiffusionConfig
from sra_fast.diffusion.process import Noised, check_prediction
from sra_fast.utils.checks import require_that
from sra_fast.utils.registry import PROCESSES

NUM_TIMES = 1000


class Schedule:
    """Per-time constants of a chain with noise levels ``betas [N]`` (float64), named as in the DDPM
    paper.

    ``alpha_bar``: fraction of signal power left; ``signal``, ``noise``: its root and that of the
    rest, in which float64 matters: 1 - alpha_bar starts at 1e-4; ``mean_*``, ``log_variance_min``:
    q(x_{t-1} | x_t, x_0), DDPM Eq. 7.
    """

    def __init__(self, betas: Tensor):
        # alpha_bar_t = prod(1 - beta_s) (DDPM, Sec. 2); it is 1 before the first time
        alpha_bar = (1 - betas).cumprod(0)
        previous = torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
        self.alpha_bar = alpha_bar
        # q(x_t | x_0): x_t = signal x_0 + noise eps (DDPM Eq. 4)
        self.signal = alpha_bar.sqrt()
        self.noise = (1 - alpha_bar).sqrt()
        # the same one step closer to the data, for DDIM
        self.signal_previous = previous.sqrt()
        self.noise_previous = (1 - previous).sqrt()
        # q(x_{t-1} | x_t, x_0) has the mean mean_x0 x_0 + mean_xt x_t (DDPM Eq. 7)
        self.mean_x0 = betas * previous.sqrt() / (1 - alpha_bar)
        self.mean_xt = (1 - previous) * (1 - betas).sqrt() / (1 - alpha_bar)
        # the posterior variance is 0 at the first time: its logarithm takes the next one's, as in
        # improved DDPM
        variance = betas * (1 - previous) / (1 - alpha_bar)
        clipped = torch.cat([variance[1:2], variance[1:]])
        # the learned variance lies between the posterior's and the forward step's
        self.log_variance_min = clipped.log()
        self.log_variance_max = betas.log()
        # (name, device) -> the constant in fp32 on that device
        self.constants = {}

    def at(self, name: str, t: Tensor, dim: int = 4) -> Tensor:
        """Constant ``name`` at integer times ``t [B]``, fp32, shaped to broadcast over ``dim``
        dimensions.
        """
        key = (name, t.device)
        if key not in self.constants:
            # copied once: a copy from the host in every step would wait, and a CUDA graph forbids
            # it
            self.constants[key] = getattr(self, name).float().to(t.device)
        return self.constants[key][t].view(-1, *[1] * (dim - 1))

    def noisy(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """A sample of q(x_t | x_0), DDPM Eq. 4; ``[B, C, H, W]``."""
        return self.at("signal", t) * x0 + self.at("noise", t) * noise

    def predict_x0(self, x: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """DDPM Eq. 4 solved for x_0."""
        return (x - self.at("noise", t) * eps) / self.at("signal", t)

    def posterior_mean(self, x0: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return self.at("mean_x0", t) * x0 + self.at("mean_xt", t) * x

    def log_variance(self, interpolation: Tensor, t: Tensor) -> Tensor:
        """Improved DDPM Eq. 15: the network's output in [-1, 1] interpolates between the two
        bounds.
        """
        fraction = (interpolation + 1) / 2
        high = self.at("log_variance_max", t)
        low = self.at("log_variance_min", t)
        return fraction * high + (1 - fraction) * low


def linear_betas() -> Tensor:
    """DDPM, Sec. 4: from 1e-4 to 0.02 over 1000 times."""
    return torch.linspace(1e-4, 0.02, NUM_TIMES, dtype=torch.float64)


def respaced(num_steps: int) -> tuple[list[int], Schedule]:
    """``num_steps`` evenly spaced times of the full chain (both ends kept), and the chain through
    them.

    Improved DDPM, Sec. 4: the shorter chain's betas follow from the full chain's alpha_bar.
    """
    if not 2 <= num_steps <= NUM_TIMES:
        raise ValueError(
            f"steps must lie in [2, {NUM_TIMES}] for a discrete chain, got {num_steps}"
        )
    # both ends are kept, so num_steps - 1 gaps
    stride = (NUM_TIMES - 1) / (num_steps - 1)
    times = [round(i * stride) for i in range(num_steps)]
    # the short chain has the same alpha_bar at its times: 1 - beta is the ratio of neighbours
    alpha_bar = (1 - linear_betas()).cumprod(0)[times]
    return times, Schedule(1 - alpha_bar / torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]]))


def _gaussian_kl(mean1: Tensor, log_var1: Tensor, mean2: Tensor, log_var2: Tensor) -> Tensor:
    # KL(N_1 || N_2) of each element
    return 0.5 * (
        log_var2
        - log_var1
        - 1
        + (log_var1 - log_var2).exp()
        + (mean1 - mean2).square() * (-log_var2).exp()
    )


def _normal_cdf(x: Tensor) -> Tensor:
    """The tanh approximation that the DDPM code line uses, so that published likelihoods
    compare.
    """
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _discrete_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log-probability of ``x`` in [-1, 1] rounded to 1/127.5 under a Gaussian (DDPM Eq. 13)."""
    # one of 256 grey values has the Gaussian's mass up to the midpoints with its neighbours
    centred = x - mean
    inverse = (-log_scale).exp()
    upper = _normal_cdf(inverse * (centred + 1 / 255))
    lower = _normal_cdf(inverse * (centred - 1 / 255))
    # the first and the last of the 256 values reach to infinity
    inside = (upper - lower).clamp(min=1e-12).log()
    below = upper.clamp(min=1e-12).log()
    above = (1 - lower).clamp(min=1e-12).log()
    return torch.where(x < -0.999, below, torch.where(x > 0.999, above, inside))


@PROCESSES.register("gaussian_diffusion")
class GaussianDiffusion:
    """Times, noisy inputs and the losses of DiT.

    Args:
        t_max: the teacher is earlier by an integer gap in ``[0, int(1000 * t_max))``.
    """

    default_sampler = "ddpm"

    def __init__(self, t_max: float = 0.2):
        self.max_gap = int(NUM_TIMES * t_max)
        self.schedule = Schedule(linear_betas())

    @classmethod
    def from_config(cls, diffusion: DiffusionConfig, t_max: float) -> "GaussianDiffusion":
        given = {option.name: getattr(diffusion, option.name) for option in fields(diffusion)}
        listed = ", ".join(
            f"diffusion.{name} {value}"
            for name, value in given.items()
            if value != getattr(DiffusionConfig, name)
        )
        require_that(not listed, f"DiT's process has no choices, expected none of {listed}")
        return cls(t_max)

    def times(self, uniform: Tensor, gap: Tensor) -> tuple[Tensor, Tensor]:
        """``[B]`` uniforms for the time and for the gap -> int64 student and teacher times
        ``[B]``.
        """
        # the product of a uniform just below 1 may round to 1000
        t = (uniform * NUM_TIMES).long().clamp(max=NUM_TIMES - 1)
        return t, (t - (gap * self.max_gap).long()).clamp(1, NUM_TIMES - 1)

    def corrupt(self, x0: Tensor, noise: Tensor, t: Tensor, t_teacher: Tensor) -> Noised:
        # fp32: at the first times the noise is 1e-2 of the signal
        x0 = x0.float()
        noise = noise.float()
        x = self.schedule.noisy(x0, noise, t)
        x_teacher = self.schedule.noisy(x0, noise, t_teacher)
        return Noised(x, t, x_teacher, t_teacher, noise, x0)

    def losses(self, prediction: Tensor, noised: Noised) -> dict[str, Tensor]:
        """``{"denoise": [B]}``. If the prediction has C channels of variance after its C of noise,
        also ``{"vb": [B]}`` in bits per dimension, to be added unscaled.
        """
        check_prediction(prediction, noised, variance=True)
        eps, interpolation = prediction.float().tensor_split([noised.target.shape[1]], dim=1)
        losses = {"denoise": (eps - noised.target).square().flatten(1).mean(1)}
        if interpolation.shape[1]:
            # improved DDPM, Sec. 3.1: the variational term trains the variance only
            losses["vb"] = self._variational_bound(eps.detach(), interpolation, noised)
        return losses

    def _variational_bound(self, eps: Tensor, interpolation: Tensor, noised: Noised) -> Tensor:
        """KL of the predicted step from the true one, the likelihood at t=0; ``[B]`` in bits."""
        schedule = self.schedule
        x, t, x0 = noised.x, noised.t, noised.x0
        # the true step, q(x_{t-1} | x_t, x_0)
        true_mean = schedule.posterior_mean(x0, x, t)
        # the predicted step: mean from eps, which is detached, and variance from the network
        mean = schedule.posterior_mean(schedule.predict_x0(x, t, eps), x, t)
        log_variance = schedule.log_variance(interpolation, t)
        # DDPM Eq. 5: L_{t-1} at t > 0, L_0 at t = 0; both are computed and one is chosen
        kl = _gaussian_kl(true_mean, schedule.at("log_variance_min", t), mean, log_variance)
        nll = -_discrete_log_likelihood(x0, mean, 0.5 * log_variance)
        # mean over the dimensions; from nats to bits
        in_bits = lambda term: term.flatten(1).mean(1) / math.log(2)
        return torch.where(t == 0, in_bits(nll), in_bits(kl))
