"""Samplers of both processes, with classifier-free guidance in an interval of times."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from sra_fast.config.schema import ModelConfig, SampleConfig
from sra_fast.diffusion.flow_matching import shift_times
from sra_fast.diffusion.gaussian_diffusion import NUM_TIMES, respaced
from sra_fast.models import Conditioning, DiffusionTransformer
from sra_fast.ops.noise_pair import interpolant
from sra_fast.utils.checks import require_that
from sra_fast.utils.registry import PROCESSES, SAMPLERS

# runs the model: noisy input [B, C, H, W], times [B], conditioning -> output
Call = Callable[[Tensor, Tensor, Conditioning], Tensor]


class Guidance:
    """Model output with guidance ``u + scale (c - u)`` for times in ``interval``, plain conditional
    output outside.

    Args:
        model: in eval mode.
        condition: B conditionings, or labels ``[B]``.
        scale: 1 is no guidance.
        interval: (low, high), in units of t in [0, 1].
        channels: how many of the C are guided, the rest stay conditional; 0: all.
        call: what runs the model; default: the model.

    Raises:
        ValueError: guidance with a model that was built without a null class.
    """

    def __init__(
        self,
        model: DiffusionTransformer,
        condition: Conditioning | Tensor,
        scale: float = 1.0,
        interval: tuple[float, float] = (0.0, 1.0),
        channels: int = 0,
        call: Call | None = None,
    ):
        if scale != 1 and not model.has_null:
            raise ValueError(
                f"guidance {scale} needs a null class, but the model has class_dropout_prob=0"
            )
        self.call = call or model
        self.condition = model.as_condition(condition)
        if scale != 1:
            # one model call for both: conditional first, unconditional second
            self.both = self.condition.concatenated(self.condition.null())
        self.scale = scale
        self.interval = interval
        self.channels = channels or model.in_channels

    def __call__(self, x: Tensor, t: Tensor, inside: bool) -> Tensor:
        """``x [B, C, H, W]`` and one time ``t []`` -> model output.

        ``inside``: whether ``t`` lies in the interval.
        """
        if not inside:
            return self.call(x, t.expand(x.shape[0]), self.condition)
        both = self.call(torch.cat([x, x]), t.expand(2 * x.shape[0]), self.both)
        conditional, unconditional = both.chunk(2)
        # DiT's variance channels, after the first C, stay conditional
        c, rest = conditional.tensor_split([self.channels], dim=1)
        u = unconditional[:, : self.channels]
        return torch.cat([u + self.scale * (c - u), rest], dim=1)

    def applies(self, t: float) -> bool:
        """Whether there is guidance at a time in [0, 1]."""
        low, high = self.interval
        return self.scale != 1 and low <= t <= high

    def velocity(self, x: Tensor, t: float, inside: bool) -> Tensor:
        """SiT's output at one time, in float64."""
        # the network rounds the time to fp32; the solver computes in float64
        time = torch.tensor(t, dtype=torch.float64, device=x.device)
        return self(x, time, inside).to(torch.float64)


class Sampler(Protocol):
    """From noise to latents. Registered in ``SAMPLERS``.

    Attributes:
        process: name in ``PROCESSES`` of the process that it integrates.
        steps: smallest and largest number of steps.
        state_dtype: of the state between steps (the published samplers': float64 for SiT).
    """

    process: str
    steps: tuple[int, int]
    state_dtype: torch.dtype

    def __call__(
        self,
        guided: Guidance,
        x: Tensor,
        num_steps: int,
        path: str,
        shift: float,
        noise: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """``x [B, C, H, W]`` at the noisy end -> at the clean end.

        ``path``: interpolant of flow matching; ``shift``: of its times, see ``spaced_times``;
        ``noise``: draws standard normals like its argument.
        """
        ...


def spaced_times(num_steps: int, shift: float, path: str, last: float = 0.0) -> list[float]:
    """``num_steps + 1`` times of flow matching from 1 to ``last``, evenly spaced but for a shift of
    them all (``shift_times``).
    """
    # Python floats: reading them from the device would wait in every step
    evenly = torch.linspace(1, _shifted(last, 1 / shift, path), num_steps + 1, dtype=torch.float64)
    return shift_times(evenly, shift, path).tolist()


def _shifted(t: float, shift: float, path: str) -> float:
    return shift_times(torch.tensor(t, dtype=torch.float64), shift, path).item()


class _ODE:
    """dx/dt = v from t=1 to t=0 (SiT, Eq. 4)."""

    process = "flow_matching"
    steps = (1, 10**6)
    state_dtype = torch.float64
    # Heun's method: the slope is the mean of that here and that at the end of an Euler step
    heun = False

    def __call__(self, guided, x, num_steps, path, shift, noise):
        times = spaced_times(num_steps, shift, path)
        for i, (t, t_next) in enumerate(pairwise(times)):
            # whether there is guidance is decided where a step begins, for both of its ends
            inside = guided.applies(t)
            slope = guided.velocity(x, t, inside)
            # the last step stays an Euler step
            if self.heun and i < num_steps - 1:
                euler = x + (t_next - t) * slope
                slope = 0.5 * (slope + guided.velocity(euler, t_next, inside))
            x = x + (t_next - t) * slope
        return x


@SAMPLERS.register("euler")
class Euler(_ODE):
    """Euler's method: one model call a step."""


@SAMPLERS.register("heun")
class Heun(_ODE):
    """Heun's method: two model calls a step, one in the last."""

    heun = True


@SAMPLERS.register("euler_maruyama")
class EulerMaruyama:
    """The reverse SDE with diffusion w_t = 2t (SiT, Eq. 10).

    The last step, from t=0.04 to 0, has no noise.
    """

    process = "flow_matching"
    steps = (1, 10**6)
    state_dtype = torch.float64

    def __call__(self, guided, x, num_steps, path, shift, noise):
        times = [*spaced_times(num_steps - 1, shift, path, last=0.04), 0.0]
        for i, (t, t_next) in enumerate(pairwise(times)):
            v = guided.velocity(x, t, guided.applies(t))
            time = torch.tensor(t, dtype=torch.float64)
            # x = alpha x0 + sigma eps and v = alpha' x0 + sigma' eps, solved for eps
            alpha, sigma, dalpha, dsigma = interpolant(time, path)
            eps = (alpha * v - dalpha * x) / (alpha * dsigma - dalpha * sigma)
            # v - (w_t / 2) score, with score = -eps / sigma
            drift = v + t * eps / sigma
            x = x + (t_next - t) * drift
            if i < num_steps - 1:
                # variance w_t dt, with w_t = 2t
                x = x + (2 * t * (t - t_next)) ** 0.5 * noise(x)
        return x


class _Discrete:
    """A chain through ``num_steps`` of the 1000 times of Gaussian diffusion."""

    process = "gaussian_diffusion"
    steps = (2, NUM_TIMES)
    state_dtype = torch.float32

    def __call__(self, guided, x, num_steps, path, shift, noise):
        # i counts the steps of the short chain; the network knows the times of the full chain
        times, schedule = respaced(num_steps)
        for i in reversed(range(num_steps)):
            time = torch.tensor(times[i], device=x.device)
            output = guided(x, time, guided.applies(times[i] / NUM_TIMES)).float()
            eps, variance = output.tensor_split([x.shape[1]], dim=1)
            index = torch.full(x.shape[:1], i, device=x.device)
            x = self.step(schedule, x, index, eps, variance, noise if i > 0 else None)
        return x


@SAMPLERS.register("ddim")
class DDIM(_Discrete):
    """DDIM with eta=0 (arXiv 2010.02502, Eq. 12)."""

    def step(self, schedule, x, index, eps, variance, noise):
        x0 = schedule.predict_x0(x, index, eps)
        # eta = 0: the predicted noise comes back, no new noise is drawn
        signal = schedule.at("signal_previous", index)
        return signal * x0 + schedule.at("noise_previous", index) * eps


@SAMPLERS.register("ddpm")
class DDPM(_Discrete):
    """DDPM with the learned variance, where the model has one (arXiv 2102.09672)."""

    def step(self, schedule, x, index, eps, variance, noise):
        x0 = schedule.predict_x0(x, index, eps)
        mean = schedule.posterior_mean(x0, x, index)
        # the last step has no noise
        if noise is None:
            return mean
        if variance.shape[1]:
            log_variance = schedule.log_variance(variance, index)
        else:
            log_variance = schedule.at("log_variance_min", index)
        return mean + (0.5 * log_variance).exp() * noise(x)


def _sampler_class(name: str) -> type[Sampler]:
    """The sampler of a name; ValueError for one that lacks what ``Sampler`` says it has."""
    found = SAMPLERS[name]
    missing = [attribute for attribute in Sampler.__annotations__ if not hasattr(found, attribute)]
    require_that(
        not missing,
        f"the sampler {name} must have {', '.join(Sampler.__annotations__)}; it has no "
        f"{' and no '.join(missing)}",
    )
    return found


def samplers_of(process: str) -> list[str]:
    """Names of the samplers of a diffusion process."""
    return [name for name in SAMPLERS if _sampler_class(name).process == process]


def resolve_sampler(method: str, process: str) -> str:
    """The name of the sampler; ``auto`` is the process's default.

    Raises:
        ValueError: a sampler of another process.
    """
    if method == "auto":
        return PROCESSES[process].default_sampler
    names = samplers_of(process)
    if method not in names:
        raise ValueError(f"sample.method for {process} must be one of {names}, got {method!r}")
    return method


def check_sampling(settings: SampleConfig, model: ModelConfig | DiffusionTransformer) -> None:
    """ValueError for sampler settings that do not fit the model's process and channels."""
    method = resolve_sampler(settings.method, model.process)
    least, most = _sampler_class(method).steps
    require_that(
        least <= settings.steps <= most,
        f"sample.steps for {method} must lie in [{least}, {most}], got {settings.steps}",
    )
    _check_shift("sample.time_shift", settings.time_shift, model)
    low, high = settings.interval
    require_that(
        0 <= low <= high <= 1,
        f"sample.interval must be 0 <= low <= high <= 1, got {[low, high]}",
    )
    require_that(
        math.isfinite(settings.guidance),
        f"sample.guidance must be a finite number, got {settings.guidance}",
    )
    channels = settings.guided_channels
    require_that(
        0 <= channels <= model.in_channels,
        f"sample.guided_channels must lie in [0, {model.in_channels}], got {channels}",
    )


def _check_shift(name: str, shift: float | None, model: ModelConfig | DiffusionTransformer) -> None:
    """ValueError for a shift of times that is no positive number, or that the model's process does
    not have.
    """
    require_that(
        shift is None or 0 < shift < math.inf, f"{name} must be positive and finite, got {shift}"
    )
    require_that(
        shift in (None, 1) or model.process == "flow_matching",
        f"{name} is of SiT and MMDiT (flow_matching); {model.process} has none, got {shift}",
    )


@torch.no_grad()
def sample(
    model: DiffusionTransformer,
    z: Tensor,
    condition: Conditioning | Tensor,
    method: str,
    num_steps: int,
    *,
    guidance: float = 1.0,
    interval: tuple[float, float] = (0.0, 1.0),
    guided_channels: int = 0,
    path: str = "linear",
    time_shift: float = 1.0,
    noise: Callable[[Tensor], Tensor] = torch.randn_like,
    call: Call | None = None,
) -> Tensor:
    """Latents from noise.

    Args:
        model: in eval mode.
        z: ``[B, C, H, W]`` standard normal.
        condition: B conditionings, or labels ``[B]``.
        method: name of a sampler of the model's process, or ``auto``.
        num_steps: steps; Heun calls the model twice in each but the last.
        guidance: scale; 1 is none.
        interval: times in [0, 1] in which guidance applies; outside it the model runs once a step.
        guided_channels: how many of the C channels guidance applies to; 0: all.
        path: the interpolant that a flow-matching model was trained with.
        time_shift: of its evenly spaced times, see ``shift_times``.
        noise: draws the standard normals of the stochastic samplers, given the state.
        call: what runs the model (a CUDA graph of it); default: the model.

    Returns:
        ``[B, C, H, W]`` in the sampler's ``state_dtype``.

    Raises:
        ValueError: a method of another process, a number of steps or a shift that it does not have,
            guidance without a null class, or a sampler that gives something else than images like
            ``z``.
    """
    method = resolve_sampler(method, model.process)
    sampler = _sampler_class(method)()
    # check_sampling has checked a configuration; other callers pass any number
    low, high = sampler.steps
    if not low <= num_steps <= high:
        raise ValueError(f"steps of {method} must lie in [{low}, {high}], got {num_steps}")
    _check_shift("time_shift", time_shift, model)
    guided = Guidance(model, condition, guidance, interval, guided_channels, call)
    x = z.to(sampler.state_dtype)
    found = sampler(guided, x, num_steps, path, time_shift, noise)
    expected = (x.shape, x.dtype)
    is_tensor = isinstance(found, Tensor)
    require_that(
        is_tensor and (found.shape, found.dtype) == expected,
        f"the sampler {method} must give images {[*x.shape]} of {x.dtype}, as its noise is, got "
        + (f"{[*found.shape]} of {found.dtype}" if is_tensor else type(found).__name__),
    )
    return found
