"""A study's scores are of samples that have the times that the run was trained with."""

from dataclasses import asdict

import pytest
import torch
from foreign import network
from tiny_config import config

from sra_fast.analysis import run_scores
from sra_fast.analysis.run_scores import ScoreOptions, score_run
from sra_fast.checkpoint.export import write_export
from sra_fast.config.schema import DiffusionConfig, SampleConfig
from sra_fast.data.digits import Digits
from sra_fast.sampling.generate import generate, labels_like
from sra_fast.utils.files import plain

OPTIONS = ScoreOptions(held_out_images=0, samples=129, probe_images=0, distance_images=0, batch=129)
ARGS = "--sample.method euler --sample.steps 2".split()


def export(folder, *args):
    """A run folder with the same weights whatever the arguments; returns it."""
    settings = plain(asdict(config(*ARGS, *args)))
    # zeros would give the same samples at every time
    state = network().state_dict()
    write_export(folder / "ema.safetensors", state, settings, 7, Digits().facts())
    return folder


@pytest.fixture
def made(monkeypatch):
    """The samples of every scoring, in order; the scores themselves take a classifier."""
    seen = []

    def scores(network, made, labels, unseen, seen_images):
        seen.append(made)
        return {"frechet": made.double().square().mean().item()}

    monkeypatch.setattr(run_scores, "feature_network", lambda data, cache, device: None)
    monkeypatch.setattr(run_scores, "sample_scores", scores)
    return seen


@torch.no_grad()
def direct(shift):
    """The same samples, asked for directly."""
    labels = labels_like(129, Digits(held_out=True).labels)
    settings = (SampleConfig("euler", 2), DiffusionConfig(time_shift=shift))
    return generate(network(), labels, *settings, 0, 129, "cpu").clamp(-1, 1)


@pytest.mark.parametrize(
    ("args", "used"),
    [
        ((), 1.0),
        (("--diffusion.time_shift", "3"), 3.0),
        (("--diffusion.time_shift", "3", "--sample.time_shift", "0.5"), 0.5),
    ],
)
def test_scored_samples_have_the_shift_of_the_training_or_that_of_the_sampler(
    args, used, made, tmp_path
):
    score_run(export(tmp_path / "run", *args), OPTIONS, tmp_path)
    (found,) = made
    assert torch.equal(found, direct(used))
    assert not any(torch.equal(found, direct(shift)) for shift in {1.0, 3.0, 0.5} - {used})


def test_scores_of_weights_with_another_shift_are_made_anew(made, tmp_path):
    """Those of the same shift are read back: the weights themselves are equal."""
    run = tmp_path / "run"
    found = []
    for shift in ("1", "3", "2"):
        for _ in range(2):
            export(run, "--diffusion.time_shift", shift)
            found.append(score_run(run, OPTIONS, tmp_path))
    assert len(made) == 3
    assert found[0] == found[1]
    assert found[2] == found[3]
    assert found[4] == found[5]
    assert len({scores["frechet"] for scores in found}) == 3
    assert len({scores["made_of"]["digest"] for scores in found}) == 3
