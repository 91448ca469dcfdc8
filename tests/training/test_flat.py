"""What a run holds does not grow, however often it saves."""

import gc
import os
import threading

import pytest
import torch
from tiny_config import config

from sra_fast.data.dataset import make_dataset
from sra_fast.training import control
from sra_fast.training.loop import train
from sra_fast.training.plan import make_plan
from sra_fast.training.trainer import build
from sra_fast.zero.process_group import init_distributed

pytestmark = pytest.mark.usefixtures("rooms")
# equally long after a row of the log and after a save
EARLY, LATE = 85, 205


def held() -> dict[str, int]:
    """Tensors, open files and threads of this process."""
    gc.collect()
    return {
        "tensors": sum(isinstance(item, torch.Tensor) for item in gc.get_objects()),
        "files": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
    }


def test_what_a_run_holds(tmp_path, monkeypatch):
    args = f"--train.steps {LATE + 3} --train.save_every 10 --train.log_every 20 --train.keep 2"
    cfg = config(*args.split(), "--train.loggers", "[]", "--train.precision", "fp32")
    trainer = build(make_plan(cfg), init_distributed())
    seen = []
    finished = control.Control.after_step

    def after_step(self, done):
        if done in (EARLY, LATE):
            self.saver.wait()
            seen.append(held())
        finished(self, done)

    monkeypatch.setattr(control.Control, "after_step", after_step)
    train(trainer, make_dataset(cfg), tmp_path)
    assert len(seen) == 2 and seen[0] == seen[1]
    assert seen[0]["tensors"] > 100
    assert len(list((tmp_path / "checkpoints").glob("step_*"))) == 2
