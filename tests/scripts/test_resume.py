"""Resuming as a user does it: what is taken, what is refused, what is said and what is recorded."""

import json
import logging
import os
import pickle
import shutil

import pytest
import torch
import yaml
from launch import ROOT, call, error_of
from safetensors.torch import load_file

from sra_fast.checkpoint.manifest import MANIFEST, file_name, read_manifest
from sra_fast.training import run as training_run
from sra_fast.training.run_lock import RunLock

TINY = (
    *("--config", ROOT / "configs/digits.yaml", "--model.hidden_size", 32, "--model.depth", 4),
    *("--model.num_heads", 2, "--align.student_layer", 2, "--align.teacher_layer", 3),
    *("--train.global_batch", 16, "--train.log_every", 2, "--train.loggers", "[]"),
    *("--train.save_every", 2, "--train.keep", 0, "--sample.steps", 1),
)
STEPS = 6


def train(out, *args):
    return call("train", *TINY, "--train.out", out, "--train.steps", STEPS, *args)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of six steps with checkpoints of steps 2, 4 and 6."""
    out = tmp_path_factory.mktemp("whole")
    done = train(out)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.fixture
def out(whole, tmp_path):
    """The same run, killed after step 4."""
    shutil.copytree(whole / "000", tmp_path / "000")
    shutil.rmtree(step(tmp_path, 6))
    (tmp_path / "000/checkpoints/latest").write_text("step_00000004")
    for name in ("summary.json", "ema.safetensors"):
        (tmp_path / "000" / name).unlink()
    return tmp_path


@pytest.fixture(autouse=True)
def said(caplog):
    caplog.set_level(logging.WARNING, "sra_fast")


def step(out, number: int):
    return out / f"000/checkpoints/step_{number:08d}"


def assert_same_run(out, whole) -> None:
    ours = load_file(out / "000/ema.safetensors")
    theirs = load_file(whole / "000/ema.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    rows = [json.loads(line) for line in (out / "000/stats.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 4, 6]


def test_the_resumed_run_is_the_uninterrupted_one(out, whole, caplog):
    done = train(out, "--train.resume", "auto")
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_run(out, whole)
    assert caplog.text == ""
    ids = {read_manifest(step(out, number)).run_id for number in (2, 4, 6)}
    assert len(ids) == 1 and read_manifest(step(out, 6)).parent == 4
    # nothing was changed: nothing is recorded
    assert not list((out / "000").glob("config_*"))


def test_a_damaged_checkpoint_is_passed_over(out, whole, caplog):
    file = step(out, 4) / file_name(0)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)
    done = train(out, "--train.resume", "auto")
    assert done.returncode == 0, done.stderr[-3000:]
    assert (
        f"checkpoint step 4 is damaged: {file_name(0)} has another SHA-256; going on from step 2"
        in caplog.messages
    )
    assert_same_run(out, whole)
    # what was damaged is kept aside
    assert (out / "000/checkpoints/abandoned/step_00000004").is_dir()


def test_a_damaged_checkpoint_that_was_named_is_refused(out):
    (step(out, 4) / file_name(0)).write_bytes(b"")
    done = train(out, "--train.resume", step(out, 4))
    assert done.returncode == 2
    assert f"train.resume {step(out, 4)} is damaged: {file_name(0)} has 0 bytes" in error_of(done)
    assert (step(out, 4) / MANIFEST).exists()


def test_no_new_run_begins_where_every_checkpoint_is_damaged(out):
    for number in (2, 4):
        (step(out, number) / MANIFEST).write_text("")
    done = train(out, "--train.resume", "auto")
    assert done.returncode == 2
    assert "is whole; the newest, step 4, is damaged: manifest.json" in error_of(done)
    assert [path.name for path in out.iterdir()] == ["000"]


def test_a_pickle_in_the_folder_is_not_read(out, whole, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "pwned"),)

    for name in ("mp_rank_00_model_states.pt", "ema_rank_00000.pt", "rank_00001.safetensors"):
        (step(out, 4) / name).write_bytes(pickle.dumps(Evil()))
    done = train(out, "--train.resume", "auto")
    assert done.returncode == 0, done.stderr[-3000:]
    assert not (tmp_path / "pwned").exists()
    assert_same_run(out, whole)


def test_a_rollback_is_final(out, whole, caplog, monkeypatch):
    """Resumed from step 2 and killed before its first save: step 4 does not come back."""

    def killed(*args):
        raise FloatingPointError("killed")

    monkeypatch.setattr(training_run, "train", killed)
    done = train(out, "--train.resume", step(out, 2))
    assert done.returncode == 1, done.stderr[-3000:]
    assert f"{step(out, 4)} is given up: moved to" in caplog.text
    monkeypatch.undo()
    done = train(out, "--train.resume", "auto")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resumed after step 2" in done.stderr
    assert_same_run(out, whole)
    assert (out / "000/checkpoints/abandoned/step_00000004" / MANIFEST).exists()


def test_what_was_changed_is_said_and_recorded(out, caplog):
    before = (out / "000/config.yaml").read_text()
    changed = ("--optim.lr", 0.002, "--train.ema_decay", 0.5)
    done = train(out, "--train.resume", "auto", *changed)
    assert done.returncode == 0, done.stderr[-3000:]
    lr = yaml.safe_load(before)["optim"]["lr"]
    decay = yaml.safe_load(before)["train"]["ema_decay"]
    expected = f"changed since step 4: optim.lr {lr} -> 0.002, train.ema_decay {decay} -> 0.5"
    assert caplog.messages == [expected]
    assert (out / "000/config.yaml").read_text() == before
    recorded = yaml.safe_load((out / "000/config_00000004.yaml").read_text())
    assert recorded["optim"]["lr"] == 0.002
    assert read_manifest(step(out, 6)).settings["optim"]["lr"] == 0.002
    assert read_manifest(step(out, 4)).settings["optim"]["lr"] == lr
    # DeepSpeed gets the same
    assert not (out / "000/deepspeed_00000004.json").exists()


def test_another_stage_is_recorded_for_deepspeed_too(out, caplog):
    before = (out / "000/deepspeed.json").read_text()
    done = train(out, "--train.resume", "auto", "--train.zero_stage", 2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert caplog.messages == ["changed since step 4: train.zero_stage 1 -> 2"]
    assert (out / "000/deepspeed.json").read_text() == before
    recorded = json.loads((out / "000/deepspeed_00000004.json").read_text())
    assert recorded["zero_optimization"]["stage"] == 2


@pytest.mark.parametrize(
    "args, message",
    [
        (("--train.seed", 1), "it was made with train.seed 0, this run has 1"),
        (("--train.global_batch", 32), "it was made with train.global_batch 16, this run has 32"),
        (("--model.depth", 5), "it was made with model.depth 4, this run has 5"),
        (("--diffusion.path", "cosine"), "made with diffusion.path linear, this run has cosine"),
        (("--align.target", "none", "--align.head", "none"), "made with align.head mlp"),
        (("--train.steps", 4), "train.steps 4 is not above step 4 of"),
        (("--train.steps", 3), "--out FILE.safetensors writes its weights"),
    ],
)
def test_what_may_not_differ_is_refused_by_name(out, args, message):
    (out / "000/summary.json").write_text('{"step": 4}')
    before = sorted(out.rglob("*"))
    done = train(out, "--train.resume", "auto", *args)
    assert done.returncode == 2
    assert message in error_of(done)
    assert [path for path in sorted(out.rglob("*")) if path.name != "lock"] == [
        path for path in before if path.name != "lock"
    ]


def test_other_images_are_refused(out, monkeypatch):
    from sra_fast.data.digits import Digits

    original = Digits.__init__

    def changed(self, held_out=False):
        original(self, held_out)
        self.fingerprint = "0" * 64

    monkeypatch.setattr(Digits, "__init__", changed)
    done = train(out, "--train.resume", "auto")
    assert done.returncode == 2
    assert "on other data: other images" in error_of(done)


def test_a_run_killed_before_its_summary_still_exports(out, whole):
    """All steps are taken: nothing is trained, and the export is that of the whole run."""
    shutil.rmtree(out / "000")
    shutil.copytree(whole / "000", out / "000")
    for name in ("summary.json", "ema.safetensors"):
        (out / "000" / name).unlink()
    done = train(out, "--train.resume", "auto")
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_run(out, whole)
    # now it has a summary
    done = train(out, "--train.resume", "auto")
    assert done.returncode == 2 and "train.steps 6 is not above step 6" in error_of(done)


def test_a_run_that_is_in_use_is_refused(out):
    lock = RunLock(out / "000")
    try:
        done = train(out, "--train.resume", "auto")
    finally:
        lock.release()
    assert done.returncode == 2
    assert f"{out / '000'} is in use by process {os.getpid()}" in error_of(done)
    done = train(out, "--train.resume", "auto")
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_run_without_a_finished_checkpoint_is_passed_over(out, caplog):
    (out / "001/checkpoints/step_00000002").mkdir(parents=True)
    done = train(out, "--train.resume", "auto")
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{out / '001'} is passed over: its first checkpoint was not finished" in caplog.text
    assert "resumed after step 4" in done.stderr
    assert sorted(path.name for path in out.iterdir()) == ["000", "001"]
