"""Samplers for SiT (ODE, SDE) and DiT (DDIM, DDPM), with classifier-free guidance in an interval of times."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from sra_fast.diffusion.gaussian_diffusion import NUM_TIMES, respaced
from sra_fast.models import SiT
from sra_fast.ops.noise_pair import interpolant

METHODS = {"SiT": ("euler", "heun", "euler_maruyama"), "DiT": ("ddim", "ddpm")}


class Guidance:
    """Model output with guidance ``u + scale (c - u)`` for times in ``interval``, plain conditional output elsewhere.

    Args:
        model: SiT or DiT in eval mode.
        y: ``[B]`` labels.
        scale: 1 is no guidance.
        interval: (low, high), in units of t in [0, 1].
        channels: how many of the C are guided, the rest conditional; 0: all.
        call: what runs the model, ``(x, t, y)`` -> output; default: the model.

    Raises:
        ValueError: guidance with a model that was built without a null class.
    """

    def __init__(
        self,
        model: SiT,
        y: Tensor,
        scale: float = 1.0,
        interval: tuple[float, float] = (0.0, 1.0),
        channels: int = 0,
        call: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    ):
        if scale != 1 and model.y_embedder.dropout_prob == 0:
            raise ValueError(
                f"guidance {scale} needs a null class, but the model has class_dropout_prob=0"
            )
        self.call, self.y, self.scale, self.interval = call or model, y, scale, interval
        self.channels = channels or model.in_channels
        self.y_both = torch.cat([y, torch.full_like(y, model.null_class)])

    def __call__(self, x: Tensor, t: Tensor, inside: bool) -> Tensor:
        """``x [B, C, H, W]`` and one time ``t []`` -> model output; ``inside``: whether ``t`` is in the interval."""
        if not inside:
            return self.call(x, t.expand(x.shape[0]), self.y)
        both = self.call(torch.cat([x, x]), t.expand(2 * x.shape[0]), self.y_both)
        conditional, unconditional = both.chunk(2)
        # DiT's variance channels, behind the first C, stay conditional
        c, rest = conditional.tensor_split([self.channels], dim=1)
        u = unconditional[:, : self.channels]
        return torch.cat([u + self.scale * (c - u), rest], dim=1)

    def applies(self, t: float) -> bool:
        low, high = self.interval
        return self.scale != 1 and low <= t <= high


def _velocity(guided: Guidance, x: Tensor, t: float, inside: bool) -> Tensor:
    return guided(x, torch.tensor(t, dtype=torch.float64, device=x.device), inside).to(
        torch.float64
    )


def _ode(guided: Guidance, x: Tensor, num_steps: int, heun: bool) -> Tensor:
    """Euler or Heun on dx/dt = v from t=1 to t=0; Heun's last step is an Euler step."""
    times = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64).tolist()
    for i, (t, t_next) in enumerate(pairwise(times)):
        inside = guided.applies(t)
        slope = _velocity(guided, x, t, inside)
        euler = x + (t_next - t) * slope
        if heun and i < num_steps - 1:
            slope = 0.5 * (slope + _velocity(guided, euler, t_next, inside))
            euler = x + (t_next - t) * slope
        x = euler
    return x


def _euler_maruyama(
    guided: Guidance, x: Tensor, num_steps: int, path: str, noise: Callable
) -> Tensor:
    """The reverse SDE with diffusion w_t = 2t (SiT, Eq. 10); the last step, from t=0.04 to 0, is drift alone."""
    times = [*torch.linspace(1, 0.04, num_steps, dtype=torch.float64).tolist(), 0.0]
    for i, (t, t_next) in enumerate(pairwise(times)):
        v = _velocity(guided, x, t, guided.applies(t))
        alpha, sigma, dalpha, dsigma = interpolant(torch.tensor(t, dtype=torch.float64), path)
        eps = (alpha * v - dalpha * x) / (alpha * dsigma - dalpha * sigma)
        drift = v + t * eps / sigma  # v - (w_t / 2) score, score = -eps / sigma
        x = x + (t_next - t) * drift
        if i < num_steps - 1:
            x = x + (2 * t * (t - t_next)) ** 0.5 * noise(x)
    return x


def _discrete(guided: Guidance, x: Tensor, num_steps: int, method: str, noise: Callable) -> Tensor:
    """DDIM with eta=0 (arXiv 2010.02502, Eq. 12) or DDPM with the learned variance, on a respaced chain."""
    times, schedule = respaced(num_steps)
    for i in reversed(range(num_steps)):
        out = guided(
            x, torch.tensor(times[i], device=x.device), guided.applies(times[i] / NUM_TIMES)
        ).float()
        eps, variance = out[:, : x.shape[1]], out[:, x.shape[1] :]
        index = torch.full(x.shape[:1], i, device=x.device)
        x0 = schedule.predict_x0(x, index, eps)
        if method == "ddim":
            x = (
                schedule.at("signal_previous", index) * x0
                + schedule.at("noise_previous", index) * eps
            )
            continue
        mean = schedule.posterior_mean(x0, x, index)
        if variance.shape[1]:
            log_variance = schedule.log_variance(variance, index)
        else:
            log_variance = schedule.at("log_variance_min", index)
        x = mean + (0.5 * log_variance).exp() * noise(x) if i > 0 else mean
    return x


@torch.no_grad()
def sample(
    model: SiT,
    z: Tensor,
    y: Tensor,
    method: str,
    num_steps: int,
    *,
    guidance: float = 1.0,
    interval: tuple[float, float] = (0.0, 1.0),
    guided_channels: int = 0,
    path: str = "linear",
    noise: Callable[[Tensor], Tensor] = torch.randn_like,
    call: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """Latents from noise.

    Args:
        model: SiT or DiT in eval mode.
        z: ``[B, C, H, W]`` standard normal.
        y: ``[B]`` int64 labels.
        method: SiT: ``euler``, ``heun``, ``euler_maruyama``; DiT: ``ddim``, ``ddpm``.
        num_steps: steps; Heun calls the model twice in each but the last.
        guidance: scale; 1 is none.
        interval: times in [0, 1] in which guidance applies; outside it the model runs once per step.
        guided_channels: how many of the C channels guidance applies to; 0: all.
        path: the interpolant SiT was trained with.
        noise: draws the standard normals of the stochastic samplers, given the state.
        call: what runs the model (a CUDA graph of it); default: the model.

    Returns:
        ``[B, C, H, W]``: float64 for SiT (the state of the reference's samplers), fp32 for DiT.

    Raises:
        ValueError: a method of the other family, fewer than one step, or guidance without a null class.
    """
    if method not in METHODS[model.family]:
        raise ValueError(
            f"method for {model.family} must be one of {METHODS[model.family]}, got {method!r}"
        )
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
    guided = Guidance(model, y, guidance, interval, guided_channels, call)
    if model.family == "DiT":
        return _discrete(guided, z.float(), num_steps, method, noise)
    if method == "euler_maruyama":
        return _euler_maruyama(guided, z.to(torch.float64), num_steps, path, noise)
    return _ode(guided, z.to(torch.float64), num_steps, heun=method == "heun")
