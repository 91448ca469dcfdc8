"""What must not happen to checkpoints.

Code from a pickle is not run, a half-written one is not read, a diverged run is not saved.
"""

import argparse
import os

import pytest
import torch
from bare_training import train
from tiny_config import config

from sra_fast.checkpoint import sources
from sra_fast.checkpoint.load_model import load_model
from sra_fast.checkpoint.manifest import Progress, read_manifest
from sra_fast.models import DiT
from sra_fast.training import saving
from sra_fast.training.host_copy import flats_by_kind
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


@pytest.mark.parametrize("content", [b"", b"train:\n  steps: 2\n", b"\x8a" * 99, b"PK\x03\x04"])
def test_files_that_torch_cannot_load_are_named_in_own_words(tmp_path, content):
    """torch advises to load such a file all the same, and to run what it holds."""
    file = tmp_path / "x.yaml"
    file.write_bytes(content)
    with pytest.raises(ValueError) as refused:
        sources.read_weights(str(file))
    assert str(refused.value) == (
        f"{file} is no checkpoint that can be read safely: it is damaged, or was not written by "
        "torch.save"
    )


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
    with pytest.raises(
        FloatingPointError, match="updates in a row were skipped .*; there is no checkpoint yet"
    ):
        train(trainer, data, tmp_path)
    assert not (tmp_path / "checkpoints/latest").exists()


def test_resume_takes_the_configured_optimizer_settings(tmp_path):
    trainer, data = trainer_of()
    train(trainer, data, tmp_path)
    other, _ = trainer_of("--optim.weight_decay", "0.3", "--optim.betas", "[0.8, 0.9]")
    assert saving.load(other, tmp_path / "checkpoints/step_00000003") == Progress(3)
    for group in other.engine.optimizer.param_groups:
        assert group["weight_decay"] == 0.3 and group["betas"] == (0.8, 0.9)
    with pytest.raises(ValueError, match="made with train.seed 0, this run has 1"):
        saving.load(trainer_of("--train.seed", "1")[0], tmp_path / "checkpoints/step_00000003")


def test_a_run_with_and_without_an_fp8_teacher_is_one_run(tmp_path):
    """The teacher in e4m3 is another group of the optimizer; the checkpoint is the same."""
    fp8 = ("--train.precision", "bf16", "--align.teacher_dtype", "fp8")
    first, data = trainer_of(*fp8[:2])
    train(first, data, tmp_path)
    path = tmp_path / "checkpoints/step_00000006"
    second, _ = trainer_of(*fp8)
    saving.load(second, path)
    assert same_state(first, second)
    third, data = trainer_of(*fp8)
    (tmp_path / "fp8").mkdir()
    train(third, data, tmp_path / "fp8")
    path = tmp_path / "fp8/checkpoints/step_00000006"
    scales = read_manifest(path).scales
    assert sorted(scales) == sorted(third.teacher.fp8_weights()) and len(scales) == 9
    plain, _ = trainer_of(*fp8[:2])
    saving.load(plain, path)
    assert same_state(third, plain)
    # with the same scales, and so the same bits
    again, _ = trainer_of(*fp8)
    saving.load(again, path)
    assert torch.equal(again.teacher.scales(), third.teacher.scales())
    for a, b in zip(again.teacher.groups, third.teacher.groups, strict=True):
        assert torch.equal(a.buffer.view(torch.uint8), b.buffer.view(torch.uint8))


def same_state(a, b) -> bool:
    """Masters, moments and EMA of every parameter, bit for bit."""
    kinds = zip(flats_by_kind(a).values(), flats_by_kind(b).values(), strict=True)
    for ours, theirs in kinds:
        whole = a.masters.gather(ours)
        other = b.masters.gather(theirs)
        if not all(torch.equal(whole[name], other[name]) for name in whole):
            return False
    return True
