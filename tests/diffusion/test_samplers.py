import math
from itertools import pairwise

import pytest
import torch
from golden import Golden, assert_matches

from sra_fast.config.schema import DiffusionConfig, SampleConfig
from sra_fast.diffusion.gaussian_diffusion import Schedule, linear_betas
from sra_fast.diffusion.samplers import Guidance, check_sampling, sample
from sra_fast.models import ClassLabels, SiT
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


@pytest.fixture
def add():
    """Registers a sampler as ``added`` until the test ends."""
    yield SAMPLERS.register("added")
    SAMPLERS.remove("added")


@pytest.mark.parametrize(
    ("result", "got"),
    [
        (lambda x: x[:, :, :4], r"\[2, 4, 4, 8\] of torch.float64"),
        (lambda x: x.float(), r"\[2, 4, 8, 8\] of torch.float32"),
        (lambda x: None, "NoneType"),
    ],
)
def test_a_sampler_that_gives_no_images_is_named(add, result, got):
    @add
    class Added:
        process = "flow_matching"
        steps = (1, 5)
        state_dtype = torch.float64

        def __call__(self, guided, x, num_steps, path, shift, noise):
            return result(x)

    model = SiT(input_size=8, in_channels=4, hidden_size=32, depth=1, num_heads=2).eval()
    z = torch.randn(2, 4, 8, 8)
    message = r"the sampler added must give images \[2, 4, 8, 8\] of torch.float64, .* got " + got
    with pytest.raises(ValueError, match=message):
        sample(model, z, torch.tensor([0, 1]), "added", 1)


def test_a_sampler_without_steps_is_named(add):
    @add
    class NoSteps:
        process = "flow_matching"

    with pytest.raises(ValueError, match="sampler added .* has no steps and no state_dtype"):
        check_sampling(SampleConfig(method="added"), Golden("SiT").model())


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
        images.append(generate(model, golden["ys"], settings, DiffusionConfig(), 0, 4, "cpu"))
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


# bounds of the interval are times of steps; the time of every call, and whether it is guided
GUIDED_CALLS = [
    ("euler", 4, (0.25, 0.75), [(1, False), (0.75, True), (0.5, True), (0.25, True)]),
    (
        "heun",
        4,
        (0.5, 0.75),
        [
            # both ends of a step are what its beginning is
            *[(1, False), (0.75, False)],
            *[(0.75, True), (0.5, True)],
            *[(0.5, True), (0.25, True)],
            (0.25, False),
        ],
    ),
    ("euler_maruyama", 3, (0.04, 0.52), [(1, False), (0.52, True), (0.04, True)]),
    # times of 1000, of which 999 is the last
    ("ddim", 4, (0.333, 0.666), [(999, False), (666, True), (333, True), (0, False)]),
    ("ddpm", 4, (0.333, 0.666), [(999, False), (666, True), (333, True), (0, False)]),
]


@pytest.mark.parametrize("method, num_steps, interval, expected", GUIDED_CALLS)
def test_guidance_includes_both_ends_of_its_interval(method, num_steps, interval, expected):
    """With guidance a call has twice the images."""
    model = GaussianData(SAMPLERS[method].process, 0.5)
    calls = []

    def call(x, t, condition):
        assert len(t) == len(condition) == len(x) and len(set(t.tolist())) == 1
        calls.append((t[0].item(), len(x)))
        return model(x, t, condition)

    y = torch.zeros(3, dtype=torch.int64)
    how = dict(guidance=2.0, interval=interval, call=call)
    sample(model, torch.randn(3, 4, 2, 2), y, method, num_steps, **how)
    assert calls == [(pytest.approx(t, rel=1e-6), 6 if inside else 3) for t, inside in expected]


@pytest.mark.parametrize("shift", [1.0, 0.5, 3.0])
@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_shifted_times_of_every_sampler(path, shift):
    """The times of all calls, from the formula of the linear interpolant and from the definition of
    the other. The stochastic sampler still ends at 0.04.
    """
    model = GaussianData("flow_matching", 0.5)

    def ratio(t):
        return t / (1 - t) if path == "linear" else math.tan(math.pi / 2 * t)

    def time(r):
        return r / (1 + r) if path == "linear" else 2 / math.pi * math.atan(r)

    def shifted(t):
        return 1.0 if t == 1 else time(shift * ratio(t))

    def times_of(method, num_steps):
        called = []

        def call(x, t, condition):
            called.append(t[0].item())
            return model(x, t, condition)

        how = dict(call=call, path=path, time_shift=shift)
        sample(model, torch.randn(1, 4, 2, 2), torch.tensor([0]), method, num_steps, **how)
        return called

    quarters = [shifted(t) for t in (1, 0.75, 0.5, 0.25)]
    assert times_of("euler", 4) == pytest.approx(quarters, rel=1e-6)
    both = [t for pair in pairwise(quarters) for t in pair] + quarters[-1:]
    assert times_of("heun", 4) == pytest.approx(both, rel=1e-6)
    # evenly spaced before the shift
    last = 0.04 if shift == 1 else time(ratio(0.04) / shift)
    middle = shifted((1 + last) / 2)
    assert times_of("euler_maruyama", 3) == pytest.approx([1, middle, 0.04], rel=1e-6)
    assert times_of("euler_maruyama", 1) == [1]


def test_gaussian_data_come_back_at_shifted_times():
    model = GaussianData("flow_matching", 0.5)
    z = torch.randn(4000, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    y = torch.zeros(4000, dtype=torch.int64)
    exact = sample(model, z, y, "heun", 400)
    coarse = [sample(model, z, y, "heun", 50, time_shift=shift) for shift in (0.5, 2.0)]
    for x in coarse:
        assert_matches(x, exact, 5e-3)
    assert not torch.equal(*coarse)


def test_the_training_s_shift_samples_unless_another_is_given():
    golden = Golden("SiT")
    model = golden.model().eval()

    def made(own, trained):
        settings = SampleConfig("euler", 3, time_shift=own)
        diffusion = DiffusionConfig(time_shift=trained)
        return generate(model, golden["ys"], settings, diffusion, 0, 4, "cpu")

    assert torch.equal(made(None, 3.0), made(3.0, 1.0))
    assert torch.equal(made(1.0, 3.0), made(None, 1.0))
    assert not torch.equal(made(None, 3.0), made(None, 1.0))


@pytest.mark.parametrize(
    "family, shift, message",
    [
        ("SiT", 0.0, "sample.time_shift must be positive and finite, got 0.0"),
        ("SiT", math.nan, "sample.time_shift must be positive and finite, got nan"),
        (
            "DiT",
            3.0,
            r"sample.time_shift is of SiT and MMDiT \(flow_matching\); "
            "gaussian_diffusion has none, got 3.0",
        ),
    ],
)
def test_a_shift_that_is_none_is_refused(family, shift, message):
    with pytest.raises(ValueError, match=message):
        check_sampling(SampleConfig(time_shift=shift), Golden(family).model())
    golden = Golden(family)
    with pytest.raises(ValueError, match=message.removeprefix("sample.")):
        sample(golden.model(), golden["z"], golden["ys"], "auto", 2, time_shift=shift)


def test_ddpm_without_a_learned_variance_has_the_posterior_s():
    """Every step of a chain of ten against DDPM Eq. 7, of a model with C output channels."""
    model = GaussianData("gaussian_diffusion", 0.5)
    calls = []
    draws = []

    def call(x, t, condition):
        eps = model(x, t, condition)[:, :4]
        calls.append((x, int(t[0]), eps))
        return eps

    def noise(x):
        draws.append(torch.randn_like(x))
        return draws[-1]

    z = torch.randn(3, 4, 2, 2)
    out = sample(model, z, torch.zeros(3, dtype=torch.int64), "ddpm", 10, noise=noise, call=call)
    states = [x for x, _, _ in calls[1:]] + [out]
    times = [t for _, t, _ in calls]
    assert times == [999, 888, 777, 666, 555, 444, 333, 222, 111, 0]
    alpha_bar = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
    before = [*alpha_bar[times[1:]], torch.ones((), dtype=torch.float64)]
    added = [*draws, torch.zeros_like(z)]
    for (x, t, eps), previous, drawn, found in zip(calls, before, added, states, strict=True):
        alpha = alpha_bar[t] / previous
        x0 = (x - (1 - alpha_bar[t]).sqrt() * eps) / alpha_bar[t].sqrt()
        weights = previous.sqrt() * (1 - alpha), alpha.sqrt() * (1 - previous)
        mean = (weights[0] * x0 + weights[1] * x) / (1 - alpha_bar[t])
        variance = (1 - previous) / (1 - alpha_bar[t]) * (1 - alpha)
        assert_matches(found, mean + variance.sqrt() * drawn, 1e-4)
