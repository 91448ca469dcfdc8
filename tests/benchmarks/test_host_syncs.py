"""The lines that wait for the GPU, counted; here PyTorch's part of it is played by the test."""

import warnings

import pytest
import torch
from tiny_config import TINY, config

from benchmarks.step import host_syncs
from sra_fast.checkpoint.reading import manifest_of
from sra_fast.data.dataset import make_dataset
from sra_fast.training.logger import read_rows
from sra_fast.training.plan import make_plan
from sra_fast.training.trainer import build
from sra_fast.zero.process_group import init_distributed


@pytest.fixture
def mode(monkeypatch) -> list:
    """The modes that are set, as on a machine with a GPU."""
    modes = ["default"]
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    return modes


def wait():
    warnings.warn(f"{host_syncs.WARNING} (here)", stacklevel=2)


def test_every_line_is_counted_and_the_mode_put_back(mode):
    def work():
        assert mode[-1] == "warn"
        for _ in range(3):
            wait()
        wait()
        warnings.warn("something else", stacklevel=1)

    found = host_syncs.synchronising_lines(work)
    first = work.__code__.co_firstlineno
    assert found == {f"{__file__}:{first + 3}": 3, f"{__file__}:{first + 4}": 1}
    assert mode == ["default", "warn", "default"]


def test_the_mode_is_put_back_after_an_error(mode):
    with pytest.raises(ZeroDivisionError):
        host_syncs.synchronising_lines(lambda: 1 / 0)
    assert mode[-1] == "default"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    with pytest.raises(SystemExit):
        host_syncs.main(["--steps", "2", "--", "--train.precision", "fp32", *TINY])
    assert "expected a GPU to wait for, the device is cpu" in capsys.readouterr().err


def test_a_training_is_watched(mode, monkeypatch, capsys):
    """The whole program, with a loop that waits once a step."""
    monkeypatch.setattr(host_syncs, "init_distributed", lambda: torch.device("cuda"))
    monkeypatch.setattr(host_syncs, "build", lambda plan, device: plan.cfg.train)

    def train(trainer, data, folder):
        assert folder.is_dir()
        for _ in range(trainer.steps):
            wait()

    monkeypatch.setattr(host_syncs, "whole_training", train)
    host_syncs.main(["--steps", "4", "--", "--train.precision", "fp32", *TINY])
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == "4 calls of 1 lines waited for the GPU in 4 steps"
    assert "    4 " in said[-2] and "test_host_syncs.py:" in said[-2]


def test_what_is_watched_logs_and_saves(tmp_path):
    args = "--train.steps 2 --train.log_every 1 --train.precision fp32 --train.loggers []"
    cfg = config(*args.split())
    trainer = build(make_plan(cfg), init_distributed())
    host_syncs.whole_training(trainer, make_dataset(cfg), tmp_path)
    assert [row["step"] for row in read_rows(tmp_path / "stats.jsonl")] == [1, 2]
    assert manifest_of(tmp_path / "checkpoints/step_00000002").step == 2
