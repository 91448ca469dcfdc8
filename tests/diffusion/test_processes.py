"""Flow matching (SiT) and Gaussian diffusion (DiT): the published code and closed forms."""

import math

import pytest
import torch
from golden import Golden, assert_matches

from sra_fast.config.schema import DiffusionConfig
from sra_fast.diffusion.flow_matching import FlowMatching, shift_times
from sra_fast.diffusion.gaussian_diffusion import (
    GaussianDiffusion,
    Schedule,
    linear_betas,
    respaced,
)


def test_sit_inputs_and_loss_match_the_published_code():
    golden = Golden("SiT")
    process = FlowMatching()
    noised = process.corrupt(golden["x0"], golden["noise"], golden["t"], golden["t_teacher"])
    assert_matches(noised.x, golden["xt"])
    assert_matches(noised.x_teacher, golden["xt_teacher"])
    assert_matches(noised.target, golden["v_target"])
    assert_matches(process.losses(golden["v_pred"], noised)["denoise"], golden["denoise_loss"])


def test_dit_losses_match_the_published_code():
    golden = Golden("DiT")
    process = GaussianDiffusion()
    teacher = (golden["t"] - golden["gap"]).clamp(1, 999)
    noised = process.corrupt(golden["x0"], golden["noise"], golden["t"], teacher)
    losses = process.losses(golden["eps_and_var"], noised)
    assert_matches(losses["denoise"], golden["mse"])
    assert_matches(losses["vb"], golden["vb"])
    assert_matches(losses["denoise"] + losses["vb"], golden["loss"])


def test_variational_term_at_the_first_time_is_a_likelihood():
    """t=0 is the decoder term. Its probabilities of all 256 pixel values add up to one."""
    process = GaussianDiffusion()
    x0 = torch.linspace(-1, 1, 256).view(256, 1, 1, 1)
    t = torch.zeros(256, dtype=torch.int64)
    noised = process.corrupt(x0, torch.zeros_like(x0), t, t)
    # one noisy value, every possible clean one
    noised.x = torch.full_like(x0, 0.3)
    out = torch.zeros(256, 2, 1, 1)
    bits = process.losses(out, noised)["vb"]
    assert (2.0**-bits).sum().item() == pytest.approx(1, abs=1e-3)


def test_variational_term_trains_the_variance_only():
    process = GaussianDiffusion()
    x0 = torch.randn(4, 2, 4, 4)
    t = torch.tensor([0, 10, 500, 999])
    out = torch.randn(4, 4, 4, 4, requires_grad=True)
    process.losses(out, process.corrupt(x0, torch.randn_like(x0), t, t))["vb"].sum().backward()
    assert out.grad[:, :2].abs().max() == 0 and (out.grad[:, 2:].abs().amax((1, 2, 3)) > 0).all()


def test_without_channels_of_variance_noise_is_all_that_is_learned():
    process = GaussianDiffusion()
    noise = torch.randn(4, 2, 4, 4)
    t = torch.tensor([0, 10, 500, 999])
    noised = process.corrupt(torch.randn(4, 2, 4, 4), noise, t, t)
    prediction = torch.randn(4, 2, 4, 4)
    losses = process.losses(prediction, noised)
    assert set(losses) == {"denoise"}
    assert_matches(losses["denoise"], (prediction - noise).square().mean((1, 2, 3)), 1e-6)


@pytest.mark.parametrize("process", [FlowMatching(), GaussianDiffusion()])
@pytest.mark.parametrize("shape", [(4, 1, 4, 4), (4, 3, 4, 4), (1, 2, 4, 4), (4, 2, 4, 1)])
def test_a_prediction_of_another_shape_is_refused(process, shape):
    """PyTorch would broadcast most of these."""
    t = process.times(torch.rand(4), torch.zeros(4))
    noised = process.corrupt(torch.randn(4, 2, 4, 4), torch.randn(4, 2, 4, 4), *t)
    expected = r"expected a prediction \[4, 2, 4, 4\]( or \[4, 4, 4, 4\])?, the model gave \["
    with pytest.raises(ValueError, match=expected):
        process.losses(torch.randn(shape), noised)


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_velocity_is_the_time_derivative(path):
    process = FlowMatching(path)
    torch.manual_seed(0)
    x0, noise = torch.randn(2, 8, 1, 2, 2, dtype=torch.float64)
    t = torch.rand(8, dtype=torch.float64) * 0.9 + 0.05
    h = 1e-6
    up, down = (process.corrupt(x0, noise, t + s, t).x for s in (h, -h))
    assert_matches(process.corrupt(x0, noise, t, t).target, (up - down) / (2 * h), 1e-7)
    ends = process.corrupt(x0, noise, torch.ones_like(t), torch.zeros_like(t))
    assert_matches(ends.x, noise, 1e-12)
    assert_matches(ends.x_teacher, x0, 1e-12)


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_lognormal_times(path):
    """The noise-to-data ratio is the exponential of a standard normal."""
    u = (torch.arange(20000) + 0.5) / 20000
    t, _ = FlowMatching(path, "lognormal").times(u, torch.zeros_like(u))
    ratio = t / (1 - t) if path == "linear" else torch.tan(t * math.pi / 2)
    log = ratio.double().log()
    assert log.mean().item() == pytest.approx(0, abs=1e-3)
    assert log.std().item() == pytest.approx(1, abs=5e-3)
    assert FlowMatching(path, "lognormal").times(torch.zeros(1), torch.zeros(1))[0].item() == 0


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_lognormal_times_of_a_mean_and_a_deviation(path):
    """The shift adds its logarithm to the mean."""
    u = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
    process = FlowMatching(path, "lognormal", mean=-0.8, std=0.6, shift=2.0)
    log = noise_to_data(process.times(u, torch.zeros_like(u))[0], path).log()
    assert log.mean().item() == pytest.approx(-0.8 + math.log(2), abs=1e-6)
    assert log.std().item() == pytest.approx(0.6, abs=1e-3)


def noise_to_data(t, path):
    """sigma / alpha."""
    return t / (1 - t) if path == "linear" else torch.tan(t * math.pi / 2)


@pytest.mark.parametrize("path", ["linear", "cosine"])
@pytest.mark.parametrize("shift", [0.25, 3.0, 6.93])
def test_shifted_times(path, shift):
    """arXiv 2403.03206, Eq. 23: the noise-to-data ratio is ``shift`` times that of before; both
    ends stay, and the teacher's gap is one of shifted times.
    """
    u = torch.linspace(0, 1, 101, dtype=torch.float64)
    gap = torch.full_like(u, 0.5)
    t, teacher = FlowMatching(path, t_max=0.2, shift=shift).times(u, gap)
    inner = slice(1, -1)
    ratios = noise_to_data(t, path) / noise_to_data(u, path)
    assert_matches(ratios[inner], torch.full_like(u, shift)[inner], 1e-12)
    assert t[0] == 0 and t[-1].item() == pytest.approx(1, abs=1e-15)
    assert (t.diff() > 0).all() and t.max() <= 1
    assert_matches(teacher, (t - 0.1).clamp(min=0), 1e-15)
    assert_matches(shift_times(t, 1 / shift, path), u, 1e-14)
    if path == "linear":
        assert_matches(t, shift * u / (1 + (shift - 1) * u), 1e-15)
    # in fp32 too, where the largest uniform is just below 1
    single = shift_times(u.float(), shift, path)
    assert_matches(single, t, 1e-6)
    assert single.max() <= 1


def test_a_shift_of_one_keeps_the_bits():
    u = torch.rand(1000)
    assert torch.equal(FlowMatching(shift=1.0).times(u, torch.zeros_like(u))[0], u)


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(time_shift=0.0), "diffusion.time_shift must be positive and finite, got 0.0"),
        (dict(time_shift=math.inf), "diffusion.time_shift must be positive and finite, got inf"),
        (dict(time_shift=math.nan), "diffusion.time_shift must be positive and finite, got nan"),
        (dict(time="lognormal", time_std=-1.0), "diffusion.time_std must be positive .* got -1.0"),
        (dict(time="lognormal", time_mean=math.nan), "diffusion.time_mean must be finite, got nan"),
        (dict(time_mean=0.5), "are of diffusion.time lognormal, got 0.5 and 1.0 with uniform"),
        (dict(time_std=0.5), "are of diffusion.time lognormal, got 0.0 and 0.5 with uniform"),
    ],
)
def test_times_that_are_none_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        FlowMatching.from_config(DiffusionConfig(**given), 0.2)


@pytest.mark.parametrize(
    "given", [dict(time_shift=3.0), dict(path="cosine"), dict(time="lognormal", time_std=0.5)]
)
def test_a_dit_has_no_choices(given):
    listed = ", ".join(f"diffusion.{name} {value}" for name, value in given.items())
    with pytest.raises(ValueError, match=f"DiT's process has no choices, .* none of {listed}"):
        GaussianDiffusion.from_config(DiffusionConfig(**given), 0.2)


def test_teacher_is_earlier_by_at_most_t_max():
    u = torch.rand(1000)
    gap = torch.rand(1000)
    t, t_teacher = FlowMatching(t_max=0.2).times(u, gap)
    assert torch.equal(t, u)
    assert torch.equal(t_teacher, (u - 0.2 * gap).clamp(0, 1)) and t_teacher.min() == 0
    t, t_teacher = GaussianDiffusion(t_max=0.2).times(u, gap)
    assert (t.min() >= 0) and (t.max() <= 999) and t.dtype == torch.int64
    assert (t_teacher >= 1).all()
    earlier_by = (t - t_teacher)[t >= 200]
    assert (earlier_by >= 0).all() and (earlier_by < 200).all()
    assert GaussianDiffusion(t_max=0.0).times(u, gap)[1].equal(t.clamp(min=1))


def test_respaced_chain_keeps_the_noise_levels():
    times, schedule = respaced(20)
    assert times[0] == 0 and times[-1] == 999 and len(set(times)) == 20
    assert_matches(schedule.alpha_bar, Schedule(linear_betas()).alpha_bar[times], 1e-12)
    for bad in (0, 1001):
        with pytest.raises(ValueError, match="steps must lie"):
            respaced(bad)
