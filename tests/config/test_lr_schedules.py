"""How the learning rate falls, alone and in a run."""

import math

import pytest
import torch
from bare_training import train
from tiny_config import config

from sra_fast.config.lr_schedules import scheduled_lr
from sra_fast.config.schema import OptimConfig
from sra_fast.data.dataset import make_dataset
from sra_fast.training.plan import make_plan
from sra_fast.training.trainer import build
from sra_fast.utils.registry import LR_SCHEDULES
from sra_fast.zero.process_group import init_distributed

pytestmark = pytest.mark.usefixtures("rooms")


@pytest.mark.parametrize(
    "schedule, expected",
    [
        ("constant", [1.0] * 7),
        ("linear", [1.0, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2]),
        ("cosine", [1.0, 1.0, *(0.5 + 0.5 * math.cos(math.pi * i / 5) for i in range(5))]),
    ],
)
@pytest.mark.parametrize("floor", [0.0, 0.125])
def test_a_schedule_begins_after_the_warm_up_and_ends_after_the_last_step(
    schedule, expected, floor
):
    """The last update still has a rate."""
    optim = OptimConfig(lr=0.5, min_lr=floor, schedule=schedule, warmup_steps=2)
    found = [scheduled_lr(optim, step, 7) for step in range(7)]
    assert found == pytest.approx([floor + share * (0.5 - floor) for share in expected])
    # a run that is shorter than its warm-up, and steps after its end
    assert scheduled_lr(optim, 1, 2) == 0.5
    end = 0.5 if schedule == "constant" else floor
    assert scheduled_lr(optim, 100, 7) == pytest.approx(end)


def test_a_schedule_stays_between_both_rates():
    @LR_SCHEDULES.register("too high")
    def too_high(progress):
        return 1.5

    try:
        with pytest.raises(ValueError, match="optim.schedule too high must give shares in .* 1.5"):
            scheduled_lr(OptimConfig(schedule="too high"), 0, 4)
    finally:
        LR_SCHEDULES.remove("too high")


def test_a_run_takes_these_steps(tmp_path):
    """What the log says is what AdamW used: its first update of a weight is about the rate."""
    words = (
        "--optim.schedule cosine --optim.lr 0.01 --optim.min_lr 0.001 --optim.warmup_steps 2 "
        "--train.steps 5 --train.log_every 1 --train.precision fp32"
    )
    cfg = config(*words.split())
    trainer = build(make_plan(cfg), init_distributed())
    before = trainer.masters.flats[0].clone()
    moved = []
    update = trainer.engine.optimizer.step

    def watched(*args, **kwargs):
        result = update(*args, **kwargs)
        now = trainer.masters.flats[0]
        moved.append((now - before).abs().max().item())
        before.copy_(now)
        return result

    trainer.engine.optimizer.step = watched
    rows = train(trainer, make_dataset(cfg), tmp_path)
    fallen = [0.001 + 0.009 * (0.5 + 0.5 * math.cos(math.pi * i / 3)) for i in range(3)]
    expected = [0.005, 0.01, *fallen]
    assert [row["lr"] for row in rows] == pytest.approx(expected)
    # |m| / sqrt(v) is 1 in the first update, and hardly more in the next ones
    assert moved[0] == pytest.approx(0.005, rel=1e-3)
    assert all(step <= 1.1 * rate for step, rate in zip(moved, expected, strict=True))
    assert torch.isfinite(trainer.masters.flats[0]).all()
