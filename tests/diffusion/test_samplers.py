import math

import pytest
import torch
from golden import Golden, assert_matches

from sra_fast.config.schema import SampleConfig
from sra_fast.diffusion.gaussian_diffusion import Schedule, linear_betas
from sra_fast.diffusion.samplers import Guidance, check_sampling, sample
from sra_fast.models import ClassLabels
from sra_fast.sampling.generate import generate
from sra_fast.utils.registry import SAMPLERS

SIT_CASES = {
    "ode20": dict(method="euler", num_steps=20),
    "ode10_heun": dict(method="heun", num_steps=10),
    "ode20_cfg1.8_hi0.7": dict(method="euler", num_steps=20, guidance=1.8, interval=(0.0, 0.7)),
    "sde20_zero_noise": dict(method="euler_maruyama", num_steps=20),
    "sde20_cfg1.8_hi0.7_zero_noise": dict(
        method="euler_maruyama", num_steps=20, guidance=1.8, interval=(0.0, 0.7)
    ),
}


@pytest.mark.parametrize("key", SIT_CASES)
def test_sit_matches_the_published_code(key):
    golden = Golden("SiT")
    model = golden.model("after").eval()
    out = sample(model, golden["z"], golden["ys"], noise=torch.zeros_like, **SIT_CASES[key])
    assert_matches(out, golden[key], 1e-4)


@pytest.mark.parametrize("key", ["ddim20", "ddpm20_zero_noise"])
def test_dit_matches_the_published_code(key):
    golden = Golden("DiT")
    out = sample(
        golden.model().eval(), golden["z"], golden["ys"], key[:4], 20, noise=torch.zeros_like
    )
    assert_matches(out, golden[key], 1e-4)


@pytest.mark.parametrize("guidance", [math.nan, math.inf, -math.inf])
def test_guidance_that_is_no_number_is_refused(guidance):
    """Nothing is above NaN: every image would be NaN."""
    model = Golden("SiT").model()
    with pytest.raises(ValueError, match="sample.guidance must be a finite number, got"):
        check_sampling(SampleConfig(guidance=guidance), model)


@pytest.mark.parametrize("family", ["SiT", "DiT"])
@pytest.mark.parametrize("channels", [0, 1, 3])
def test_some_channels_are_guided(family, channels):
    golden = Golden(family)
    model = golden.model().eval()
    x = golden["z"]
    y = golden["ys"]
    t = torch.tensor(0.5 if family == "SiT" else 500)
    out = Guidance(model, y, 3.0, channels=channels)(x, t, inside=True)
    times = t.expand(len(x))
    c = model(x, times, y)
    u = model(x, times, torch.full_like(y, model.num_classes))
    n = channels or x.shape[1]
    assert_matches(out[:, :n], u[:, :n] + 3 * (c - u)[:, :n])
    if out.shape[1] > n:
        assert_matches(out[:, n:], c[:, n:])
    assert (c - u)[:, :n].abs().amax((0, 2, 3)).min() > 1e-3, "the classes differ"


def test_guided_channels_reach_the_samplers():
    golden = Golden("DiT")
    model = golden.model().eval()
    for method in ("ddim", "ddpm"):
        z = golden["z"]
        few = dict(guidance=3.0, noise=torch.zeros_like)
        full = sample(model, z, golden["ys"], method, 2, guided_channels=model.in_channels, **few)
        assert torch.equal(full, sample(model, z, golden["ys"], method, 2, **few))
        some = sample(model, z, golden["ys"], method, 2, guided_channels=3, **few)
        assert not torch.equal(full, some)
    images = []
    for channels in (3, 4):
        settings = SampleConfig(steps=2, guidance=3.0, guided_channels=channels)
        images.append(generate(model, golden["ys"], settings, "linear", 0, 4, "cpu"))
    assert not torch.equal(*images)
    with pytest.raises(ValueError, match=r"steps of ddim must lie in \[2, 1000\]"):
        sample(model, z, golden["ys"], "ddim", 1)


class GaussianData(torch.nn.Module):
    """The exact network for data of one class with distribution N(0, s^2)."""

    in_channels = 4
    input_size = 2
    has_null = True
    as_condition = staticmethod(ClassLabels)

    def __init__(self, process: str, s: float):
        super().__init__()
        self.process = process
        self.s = s
        self.schedule = Schedule(linear_betas())

    def forward(self, x, t, y):
        t = t.view(-1, 1, 1, 1)
        if self.process == "flow_matching":
            # E[eps - x0 | x_t]
            return x * (t - (1 - t) * self.s**2) / ((1 - t) ** 2 * self.s**2 + t**2)
        signal, noise = (self.schedule.at(name, t.flatten()) for name in ("signal", "noise"))
        eps = x * noise / (signal**2 * self.s**2 + noise**2)
        # the true posterior's variance lies between the two bounds of the learned one
        return torch.cat([eps, torch.zeros_like(eps)], dim=1)


@pytest.mark.parametrize("method", list(SAMPLERS))
def test_gaussian_data_comes_back(method):
    """Every sampler gives back the spread of the data.

    If the noise of a stochastic sampler were wrong by a root of two, the spread would be off by a
    tenth.
    """
    generator = torch.Generator().manual_seed(0)
    draws = []

    def noise(x):
        draws.append(torch.randn(x.shape, generator=generator, dtype=x.dtype))
        return draws[-1]

    z = torch.randn(4000, 4, 2, 2, generator=generator)
    y = torch.zeros(4000, dtype=torch.int64)
    model = GaussianData(SAMPLERS[method].process, 0.5)
    out = sample(model, z, y, method, 100, noise=noise)
    assert out.std() == pytest.approx(0.5, abs=0.015) and out.mean().abs() < 0.01
    assert len(draws) == (99 if method in ("euler_maruyama", "ddpm") else 0), (
        "the last step adds none"
    )
