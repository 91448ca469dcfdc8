"""Samples that are made during training have the times that its model was trained with."""

from dataclasses import replace

import pytest
import torch
from foreign import network
from tiny_config import config

from sra_fast.config.schema import DiffusionConfig
from sra_fast.data.dataset import make_dataset
from sra_fast.plots import report
from sra_fast.sampling.generate import generate
from sra_fast.training.monitor import Monitor
from sra_fast.training.monitor_files import picture_of
from sra_fast.training.plan import make_plan
from sra_fast.training.trainer import build
from sra_fast.zero.process_group import init_distributed

ARGS = (
    "--diffusion.time_shift 3 --sample.method euler --sample.steps 2 "
    "--monitor.every 2 --monitor.count 4 --monitor.grid 4 --monitor.batch 4"
).split()


@pytest.mark.parametrize(("own", "used"), [(None, 3.0), (0.5, 0.5)])
def test_a_picture_has_the_shift_of_the_training_or_that_of_the_sampler(own, used, tmp_path):
    """The same file as that of a direct call with this shift, and no other."""
    given = [] if own is None else ["--sample.time_shift", str(own)]
    cfg = config(*ARGS, *given)
    device = init_distributed()
    # a network that has not been trained gives 0 at every time
    model = network()
    trainer = build(make_plan(cfg), device, model.state_dict())
    monitor = Monitor(cfg, device, tmp_path, make_dataset(cfg))
    monitor.look(trainer, 2)
    shown = picture_of(tmp_path, 2).read_bytes()

    def drawn(shift):
        settings = (replace(cfg.sample, time_shift=None), DiffusionConfig(time_shift=shift))
        others = (cfg.train.seed, 4, device)
        with torch.no_grad():
            images = generate(model.to(device), torch.arange(4), *settings, *others)
        pixels = report.to_uint8(images, cfg.sample.rounding)
        file = tmp_path / "expected.png"
        report.save_grid(file, pixels, columns=10, scale=4, captions=monitor.captions)
        return file.read_bytes()

    assert shown == drawn(used)
    assert shown not in [drawn(shift) for shift in {1.0, 3.0, 0.5} - {used}]
