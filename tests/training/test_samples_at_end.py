"""The samples that a run ends with have the times that its model was trained with."""

from dataclasses import replace

import pytest
import torch
from foreign import network
from tiny_config import config

from sra_fast.config.schema import DiffusionConfig
from sra_fast.data.dataset import make_dataset
from sra_fast.sampling.generate import generate
from sra_fast.training import run as runs
from sra_fast.training.plan import make_plan
from sra_fast.training.trainer import build
from sra_fast.zero.process_group import init_distributed

ARGS = "--diffusion.time_shift 3 --sample.method euler --sample.steps 2".split()


class Seen:
    """An evaluation whose scores are the images themselves."""

    num_images = 6
    columns = 3
    gap_after = None
    scale = 1

    def picture(self, images, labels):
        return images

    def scores(self, images, labels):
        return {"images": images}


@pytest.mark.parametrize(("own", "used"), [(None, 3.0), (0.5, 0.5)])
def test_samples_at_the_end_have_the_shift_of_the_training_or_that_of_the_sampler(
    own, used, tmp_path, monkeypatch
):
    monkeypatch.setattr(runs, "EVALUATIONS", {"seen": Seen})
    given = [] if own is None else ["--sample.time_shift", str(own)]
    cfg = config(*ARGS, *given)
    device = init_distributed()
    # a network that has not been trained gives 0 at every time
    model = network()
    trainer = build(make_plan(cfg), device, model.state_dict())
    data = make_dataset(cfg)
    data.evaluation = "seen"
    found = runs.evaluate_samples(trainer, data, trainer.weights("ema"), tmp_path)["images"]

    def direct(shift):
        settings = (replace(cfg.sample, time_shift=None), DiffusionConfig(time_shift=shift))
        with torch.no_grad():
            others = (cfg.train.seed, Seen.num_images, device)
            return generate(model.to(device), torch.arange(Seen.num_images), *settings, *others)

    assert torch.equal(found, direct(used))
    assert not any(torch.equal(found, direct(shift)) for shift in {1.0, 3.0, 0.5} - {used})
