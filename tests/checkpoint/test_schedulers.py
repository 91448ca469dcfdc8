"""What is taken from the scheduler of a diffusers pipeline, and what is refused."""

import json

import numpy as np
import pytest
import torch
from golden import assert_matches

from sra_fast.checkpoint.schedulers import check_dit_scheduler, time_shift_of
from sra_fast.diffusion.gaussian_diffusion import Schedule, linear_betas
from sra_fast.diffusion.samplers import spaced_times

# tokens of SD3 at 512 pixels
TOKENS = 1024


def folder_of(scheduler, folder):
    scheduler.save_pretrained(folder / "scheduler")
    return folder


def file_of(content, folder):
    (folder / "scheduler").mkdir()
    (folder / "scheduler/scheduler_config.json").write_text(
        content if isinstance(content, str) else json.dumps(content)
    )
    return folder


# schedulers of a DiT as they come with a pipeline
DIT = [
    ("DDIMScheduler", dict(clip_sample=False)),
    ("DDPMScheduler", dict(clip_sample=False, variance_type="learned_range")),
    ("DPMSolverMultistepScheduler", {}),
    ("EulerDiscreteScheduler", dict(beta_start=1e-4, beta_end=0.02, timestep_spacing="leading")),
    ("UniPCMultistepScheduler", dict(use_karras_sigmas=True)),
]


@pytest.mark.parametrize("name, options", DIT, ids=[name for name, _ in DIT])
def test_schedulers_of_a_dit_pass_without_a_word(tmp_path, caplog, name, options):
    diffusers = pytest.importorskip("diffusers")
    scheduler = getattr(diffusers, name)(**options)
    check_dit_scheduler(folder_of(scheduler, tmp_path))
    assert not caplog.text
    # they have our noise levels
    assert_matches(scheduler.alphas_cumprod, Schedule(linear_betas()).alpha_bar, 1e-6)


@pytest.mark.parametrize(
    "name, options, message",
    [
        (
            "DDIMScheduler",
            dict(prediction_type="v_prediction"),
            "prediction_type epsilon .* got v_",
        ),
        ("DDPMScheduler", dict(prediction_type="sample"), "prediction_type epsilon .* got sample"),
        ("DDIMScheduler", dict(num_train_timesteps=250), "num_train_timesteps 1000 .* got 250"),
        (
            "DDIMScheduler",
            dict(beta_schedule="scaled_linear"),
            "beta_schedule linear .* got scaled",
        ),
        ("DDPMScheduler", dict(beta_schedule="squaredcos_cap_v2"), "linear .* got squaredcos"),
        ("DDIMScheduler", dict(beta_end=0.012), "beta_end 0.02 .* got 0.012"),
        ("DDIMScheduler", dict(beta_start=0.00085), "beta_start 0.0001 .* got 0.00085"),
        ("DDIMScheduler", dict(trained_betas=[0.1] * 1000), "trained_betas None .* got"),
        ("DDIMScheduler", dict(rescale_betas_zero_snr=True), "zero_snr False .* got True"),
        ("FlowMatchEulerDiscreteScheduler", {}, "those of a FlowMatchEulerDiscreteScheduler"),
        (
            "DPMSolverMultistepScheduler",
            dict(use_flow_sigmas=True),
            "those of a DPMSolverMultistep",
        ),
        ("EDMEulerScheduler", {}, "expected the noise levels of a DiT .* of a EDMEulerScheduler"),
    ],
)
def test_other_noise_levels_and_predictions_are_refused(tmp_path, name, options, message):
    diffusers = pytest.importorskip("diffusers")
    with pytest.raises(ValueError, match=message):
        check_dit_scheduler(folder_of(getattr(diffusers, name)(**options), tmp_path))


@pytest.mark.parametrize(
    "options", [dict(clip_sample=True), dict(clip_sample=False, thresholding=True)]
)
def test_a_dit_s_sampler_that_clips_is_said(tmp_path, caplog, options):
    diffusers = pytest.importorskip("diffusers")
    check_dit_scheduler(folder_of(diffusers.DDIMScheduler(**options), tmp_path))
    assert "clips the images of every step: samplers here do not" in caplog.text


def test_defaults_of_a_file_that_says_little(tmp_path, caplog):
    check_dit_scheduler(
        file_of({"_class_name": "DDPMScheduler", "beta_schedule": "linear"}, tmp_path)
    )
    assert "clips the images of every step" in caplog.text


def test_a_dit_without_a_scheduler_is_said(tmp_path, caplog):
    for folder in (tmp_path, None):
        caplog.clear()
        check_dit_scheduler(folder)
        said = "noise levels (linear from 0.0001 to 0.02) and a prediction of the noise"
        assert said in caplog.text


def euler(diffusers, **options):
    return diffusers.FlowMatchEulerDiscreteScheduler(**options)


@pytest.mark.parametrize("options", [{}, dict(shift=3.0), dict(shift=0.5)])
@pytest.mark.parametrize("kind", ["Euler", "Heun"])
def test_the_shift_of_a_scheduler_is_ours(tmp_path, caplog, kind, options):
    """Times of the scheduler and of our samplers from the same evenly spaced ones."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = getattr(diffusers, f"FlowMatch{kind}DiscreteScheduler")(**options)
    shift = time_shift_of(folder_of(scheduler, tmp_path), TOKENS)
    assert shift == options.get("shift", 1.0)
    assert not caplog.text
    if kind == "Euler":
        scheduler.set_timesteps(sigmas=np.linspace(1, 0.25, 4))
        ours = torch.tensor(spaced_times(4, shift, "linear"))
        assert_matches(scheduler.sigmas.double(), ours, 1e-6)


@pytest.mark.parametrize("kind", ["exponential", "linear"])
@pytest.mark.parametrize("tokens", [64, 256, 1024, 5000])
def test_a_dynamic_shift_at_a_size_is_a_shift(tmp_path, kind, tokens):
    """Against the times of the scheduler with the exponent that the pipeline computes."""
    diffusers = pytest.importorskip("diffusers")
    from diffusers.pipelines.stable_diffusion_3 import pipeline_stable_diffusion_3 as pipeline

    scheduler = euler(
        diffusers, use_dynamic_shifting=True, time_shift_type=kind, base_shift=0.6, max_shift=1.3
    )
    shift = time_shift_of(folder_of(scheduler, tmp_path), tokens)
    scheduler.set_timesteps(
        sigmas=np.linspace(1, 0.25, 4), mu=pipeline.calculate_shift(tokens, 256, 4096, 0.6, 1.3)
    )
    ours = torch.tensor(spaced_times(4, shift, "linear"))
    assert_matches(scheduler.sigmas.double(), ours, 1e-6)


def test_a_solver_that_knows_flow_matching_has_its_shift(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=2.0
    )
    assert time_shift_of(folder_of(scheduler, tmp_path), TOKENS) == 2.0


@pytest.mark.parametrize(
    "option, value",
    [("shift_terminal", 0.1), ("use_karras_sigmas", True), ("stochastic_sampling", True)],
)
def test_other_spacings_are_said(tmp_path, caplog, option, value):
    diffusers = pytest.importorskip("diffusers")
    folder = folder_of(euler(diffusers, shift=2.0, **{option: value}), tmp_path)
    assert time_shift_of(folder, TOKENS) == 2.0
    assert f"no sampler here has it: {option}" in caplog.text


def test_times_without_a_scheduler_are_sd3_s(tmp_path, caplog):
    assert time_shift_of(tmp_path, TOKENS) == 3.0
    assert "no scheduler lies beside the weights: times get SD3's shift of 3" in caplog.text
    caplog.clear()
    assert time_shift_of(None, TOKENS) == 3.0
    assert "no scheduler lies beside the weights" in caplog.text


@pytest.mark.parametrize(
    "content, message",
    [
        (dict(num_train_timesteps=500), "expected num_train_timesteps 1000 in .* got 500"),
        (dict(invert_sigmas=True), "expected times from noise to data in .* got inverted"),
        (dict(_class_name="DDIMScheduler"), "a scheduler of flow matching in .* got DDIMScheduler"),
        (dict(shift=0), "expected a positive shift of times in .* got 0"),
        (dict(shift="3"), "expected a positive shift of times in .* got '3'"),
        (dict(shift=float("nan")), "expected a positive shift of times in .* got nan"),
        (
            dict(use_dynamic_shifting=True, max_image_seq_len=256),
            "expected numbers for a dynamic shift in .* got .*'max_image_seq_len': 256",
        ),
        (dict(use_dynamic_shifting=True, base_shift=None), "got .*'base_shift': None"),
        (
            dict(use_dynamic_shifting=True, time_shift_type="cubic"),
            "expected time_shift_type exponential or linear in .* got 'cubic'",
        ),
        (
            dict(use_dynamic_shifting=True, base_shift=1e5, max_shift=2e5),
            "expected a positive shift of times in .* got inf",
        ),
        (dict(shift=10**400), "expected a positive shift of times in .* got 1000"),
        (
            dict(use_dynamic_shifting=True, time_shift_type="linear", base_shift=-9.0),
            "expected a positive shift of times in .* got -",
        ),
    ],
)
def test_times_that_are_none_are_refused(tmp_path, content, message):
    held = {"_class_name": "FlowMatchEulerDiscreteScheduler", **content}
    with pytest.raises(ValueError, match=message):
        time_shift_of(file_of(held, tmp_path), TOKENS)


@pytest.mark.parametrize(
    "read", [check_dit_scheduler, lambda folder: time_shift_of(folder, TOKENS)]
)
@pytest.mark.parametrize(
    "text, message",
    [("[", "is no readable JSON file"), ("[1]", "the configuration of a scheduler in .* got .1.")],
)
def test_a_damaged_file_is_one_line(tmp_path, read, text, message):
    with pytest.raises(ValueError, match=message):
        read(file_of(text, tmp_path))
