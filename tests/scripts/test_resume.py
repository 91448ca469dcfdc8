"""Resuming as a user does it: what is taken, what is refused, what is said and what is recorded."""

import argparse
import errno
import json
import logging
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from launch import ROOT, call, error_of
from safetensors.torch import load_file
from tiny_config import config

from sra_fast.checkpoint.load_model import load_model
from sra_fast.checkpoint.manifest import MANIFEST, file_name, read_manifest
from sra_fast.checkpoint.reading import newest
from sra_fast.checkpoint.sources import find_weights
from sra_fast.training import run as training_run
from sra_fast.training.plan import find_resume
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


ENDS = ("ema.safetensors", "published.pt", "samples.png", "summary.json")


@pytest.fixture
def ended(whole, tmp_path):
    """The whole run, with its end."""
    shutil.copytree(whole / "000", tmp_path / "000")
    return tmp_path


def test_a_rollback_is_final_for_readers_too(ended, caplog, monkeypatch):
    """Killed anywhere after `latest` was written, nobody takes the end of what was given up."""
    run = ended / "000"
    for name in ("ema.safetensors", "summary.json"):
        assert read_manifest(step(ended, 6)).digest in (run / name).read_bytes().decode("latin1")
    assert find_weights(str(run)) == run / "ema.safetensors"
    torch.save({"steps": 6, "args": argparse.Namespace(model="SiT-S/2")}, run / "published.pt")

    def killed(*arguments):
        raise OSError("killed")

    # before anything is moved
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", once(os.replace, killed))
        done = train(ended, "--train.resume", step(ended, 2), "--train.steps", 4)
        assert done.returncode == 2 and (run / "summary.json").exists()
    assert find_weights(str(run)) == step(ended, 2)
    # with another end, at an earlier step and without an export
    resume = ("--train.resume", step(ended, 2), "--train.steps", 4, "--train.export", "[]")
    done = train(ended, *resume)
    assert done.returncode == 0, done.stderr[-3000:]
    assert find_weights(str(run)) == step(ended, 4) and load_model(str(run)).step == 4
    assert json.loads((run / "summary.json").read_text())["step"] == 4
    moved = run / "checkpoints/abandoned/end_00000002"
    assert sorted(path.name for path in moved.iterdir()) == sorted(ENDS)
    assert f"export and summary of a step that was given up: moved to {moved}" in caplog.messages
    assert caplog.text.count("to restart this run use --train.resume auto") == 1


def once(plain, failing):
    """The first call goes through, the others fail."""
    calls = []

    def wrapped(*arguments):
        calls.append(arguments)
        return plain(*arguments) if len(calls) == 1 else failing(*arguments)

    return wrapped


def test_the_summary_of_another_branch_does_not_end_this_one(ended, monkeypatch):
    """Resumed from step 2 with another rate, and killed after the last commit, before its end."""
    old = (ended / "000/summary.json").read_bytes()
    changed = ("--train.resume", step(ended, 2), "--optim.lr", 0.002)

    def killed(*arguments):
        raise FloatingPointError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(training_run, "export", killed)
        assert train(ended, *changed).returncode == 1
    assert read_manifest(step(ended, 6)).settings["optim"]["lr"] == 0.002
    # as if its move had been lost
    (ended / "000/summary.json").write_bytes(old)
    assert find_weights(str(ended / "000")) == step(ended, 6)
    done = train(ended, "--train.resume", "auto", "--optim.lr", 0.002)
    assert done.returncode == 0, done.stderr[-3000:]
    digest = read_manifest(step(ended, 6)).digest
    assert json.loads((ended / "000/summary.json").read_text())["checkpoint"] == digest
    assert find_weights(str(ended / "000")) == ended / "000/ema.safetensors"


def test_the_same_command_again_goes_back_and_keeps_little(ended, caplog):
    """What earlier starts have given up does not pile up."""
    again = ("--train.resume", step(ended, 2), "--train.steps", 4, "--train.keep", 2)
    for _ in range(3):
        done = train(ended, *again)
        assert done.returncode == 0 and "resumed after step 2" in done.stderr, done.stderr[-3000:]
    left = sorted(path.name for path in (ended / "000/checkpoints/abandoned").iterdir())
    assert left == ["end_00000002.1", "end_00000002.2", "step_00000004.1", "step_00000004.2"]


def test_a_step_is_named_in_other_ways(out, caplog, monkeypatch):
    """From within the folder, and by a link: it is that step and not the newest."""
    monkeypatch.chdir(step(out, 2).parent)
    (out / "best").symlink_to(step(out, 2))
    cfg = config("--train.out", str(out))
    for given in ("step_00000002", "./step_00000002", out / "best"):
        cfg.train.resume = str(given)
        assert find_resume(cfg) == step(out, 2)
    done = train(out / "elsewhere", "--train.resume", out / "best", "--train.steps", 3)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resumed after step 2" in done.stderr
    said = f"the run goes on in {out / '000'}, train.out {out / 'elsewhere'} is not used"
    assert said in caplog.messages
    assert not (out / "elsewhere").exists()


@pytest.mark.parametrize("latest", [None, b"x" * 5000, b"step_00000004\xdf", "a folder"])
def test_no_latest_stops_auto(out, latest):
    """The one rule of `auto` and of readers: the newest whole one."""
    checkpoints = out / "000/checkpoints"
    (checkpoints / "step_4").mkdir()
    (checkpoints / "latest").unlink()
    if latest == "a folder":
        (checkpoints / "latest").mkdir()
    elif latest is not None:
        (checkpoints / "latest").write_bytes(latest)
    for resume in ("auto", str(out / "000"), str(step(out, 4))):
        cfg = config("--train.out", str(out), "--train.resume", resume)
        assert find_resume(cfg) == step(out, 4)
    assert newest(out / "000") == step(out, 4)


def test_folders_that_are_no_runs_stop_nothing(out, caplog):
    (out / "001/checkpoints").mkdir(parents=True)
    (out / "001/checkpoints/latest").touch()
    (out / "\u00b2").mkdir()
    (out / "7").touch()
    done = train(out, "--train.resume", "auto")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resumed after step 4" in done.stderr
    assert f"{out / '001'} is passed over: its first checkpoint was not finished" in caplog.text
    done = train(out, "--train.steps", 1)
    assert done.returncode == 0 and (out / "008/summary.json").exists(), done.stderr[-3000:]


def test_a_checkpoint_that_cannot_be_read_is_left_alone(out, monkeypatch):
    read = Path.read_bytes

    def failing(path):
        if path == step(out, 4) / MANIFEST:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", failing)
    before = sorted(out.rglob("*"))
    done = train(out, "--train.resume", "auto")
    assert done.returncode == 2
    said = f"{step(out, 4) / MANIFEST} could not be read: Input/output error; nothing was changed"
    assert said in error_of(done)
    assert sorted(out.rglob("*")) == before


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
        (("--align2", "vae_latent"), "made with align2.target none, this run has vae_latent"),
        (("--train.steps", 4), "train.steps 4 is not above step 4 of"),
        (("--train.steps", 3), "--out FILE.safetensors writes its weights"),
    ],
)
def test_what_may_not_differ_is_refused_by_name(out, args, message):
    digest = read_manifest(step(out, 4)).digest
    (out / "000/summary.json").write_text(json.dumps({"step": 4, "checkpoint": digest}))
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

    def changed(self, *args, **options):
        original(self, *args, **options)
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
