"""What must not happen to checkpoints.

Code from a pickle is not run, a half-written one is not read, a diverged run is not saved.
"""

import argparse
import os

import pytest
import torch
from tiny_config import config

from sra_fast.checkpoint import reading, sources
from sra_fast.checkpoint.load_model import load_model
from sra_fast.models import DiT
from sra_fast.training import saving
from sra_fast.training.loop import train
from sra_fast.training.plan import make_run_plan
from sra_fast.training.trainer import build
from sra_fast.utils.files import write_atomic
from sra_fast.zero.process_group import init_distributed

ARGS = "--train.steps 6 --train.save_every 3 --train.zero_stage 1".split()


class Evil:
    def __reduce__(self):
        return os.system, ("echo pwned > pwned",)


def test_pickled_code_does_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"ema": {"x_embedder.proj.weight": torch.zeros(1)}, "args": Evil()}, "evil.pt")
    with pytest.raises(ValueError, match="cannot|no checkpoint that can be read safely"):
        sources.read_published("evil.pt")
    assert not (tmp_path / "pwned").exists()


def test_files_that_are_no_checkpoints_are_named(tmp_path):
    torch.save({"weights": 1}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="neither a SiT or DiT state dict nor"):
        sources.read_published(str(tmp_path / "other.pt"))
    (tmp_path / "short.safetensors").write_bytes(b"1234")
    with pytest.raises(ValueError, match="no readable safetensors"):
        sources.read_weights(str(tmp_path / "short.safetensors"))
    with pytest.raises(ValueError, match="neither an export nor a checkpoint"):
        load_model(str(tmp_path))


def test_published_arguments_say_what_shapes_do_not(tmp_path):
    model = DiT(
        8, 2, 1, 32, 2, num_heads=2, class_dropout_prob=0.0, num_classes=10, learn_sigma=False
    )
    args = argparse.Namespace(model="DiT-S/2", num_classes=10, num_heads=2)
    torch.save({"ema": model.state_dict(), "args": args}, tmp_path / "ref.pt")
    loaded = load_model(str(tmp_path / "ref.pt")).model
    assert (
        loaded.family,
        loaded.num_classes,
        loaded.y_embedder.dropout_prob,
        loaded.learn_sigma,
    ) == ("DiT", 10, 0.0, False)


def test_latest_is_the_newest_complete_one(tmp_path):
    assert reading.latest(tmp_path) is None
    for step in (3, 6):
        (tmp_path / f"step_{step:08d}").mkdir()
        (tmp_path / f"step_{step:08d}" / reading.STATE).write_text("{}")
    assert reading.latest(tmp_path) is None, "without `latest` no save has finished"
    (tmp_path / "latest").write_text("step_00000003")
    assert reading.latest(tmp_path).name == "step_00000003", "step 6 was interrupted"
    for text in ("", "step_00000099"):
        (tmp_path / "latest").write_text(text)
        assert reading.latest(tmp_path).name == "step_00000006"


def test_missing_ema_file_is_named(tmp_path):
    (tmp_path / reading.STATE).write_text('{"world_size": 2}')
    torch.save({"a": (0, torch.zeros(3))}, tmp_path / "ema_rank_00000.pt")
    with pytest.raises(ValueError, match="ema_rank_00001.pt is missing or broken"):
        reading.load_ema(tmp_path)


def test_ema_files_fit_any_number_of_ranks(tmp_path):
    (tmp_path / reading.STATE).write_text('{"world_size": 3}')
    values = torch.arange(7.0)
    for rank, (start, stop) in enumerate([(4, 7), (0, 1), (1, 4)]):
        torch.save({"a": (start, values[start:stop].clone())}, tmp_path / f"ema_rank_{rank:05d}.pt")
    assert torch.equal(reading.load_ema(tmp_path)["a"], values)


def test_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def broken(temporary):
        temporary.write_text("half")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        write_atomic(path, broken)
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["file"]


def trainer_of(*args):
    plan = make_run_plan(config(*ARGS, *args))
    return build(plan.plan, init_distributed()), plan.data


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_diverged_weights_are_not_saved(tmp_path, precision):
    args = f"--train.precision {precision} --optim.lr 1e30 --optim.weight_decay 0"
    trainer, data = trainer_of(*args.split())
    with pytest.raises(FloatingPointError, match="resume from the last checkpoint"):
        train(trainer, data, tmp_path)
    assert not (tmp_path / "checkpoints/latest").exists()


def test_resume_takes_the_configured_optimizer_settings(tmp_path):
    trainer, data = trainer_of()
    train(trainer, data, tmp_path)
    other, _ = trainer_of("--optim.weight_decay", "0.3", "--optim.betas", "[0.8, 0.9]")
    assert saving.load(other, tmp_path / "checkpoints/step_00000003") == 3
    for group in other.engine.optimizer.param_groups:
        assert group["weight_decay"] == 0.3 and group["betas"] == (0.8, 0.9)
    with pytest.raises(ValueError, match="made with seed 0, this run has 1"):
        saving.load(trainer_of("--train.seed", "1")[0], tmp_path / "checkpoints/step_00000003")


def test_an_fp8_teacher_groups_parameters_otherwise(tmp_path):
    """This is said before DeepSpeed fails on it."""
    fp8 = ("--train.precision", "bf16", "--align.teacher_dtype", "fp8")
    trainer, data = trainer_of(*fp8[:2])
    train(trainer, data, tmp_path)
    path = tmp_path / "checkpoints/step_00000003"
    with pytest.raises(ValueError, match="made with fp8_group False, this run has True"):
        saving.load(trainer_of(*fp8)[0], path)
    assert saving.load(trainer_of(*fp8[:2])[0], path) == 3
    trainer, data = trainer_of(*fp8)
    (tmp_path / "fp8").mkdir()
    train(trainer, data, tmp_path / "fp8")
    with pytest.raises(ValueError, match="made with fp8_group True, this run has False"):
        saving.load(trainer_of(*fp8[:2])[0], tmp_path / "fp8/checkpoints/step_00000003")
