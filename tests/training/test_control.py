"""What ends or interrupts training: updates that are not finite, signals, the clock, failed saves."""

import logging
import math
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from bare_training import train
from tiny_config import config

from sra_fast.checkpoint.average_snapshots import read_snapshot, snapshot_folders
from sra_fast.checkpoint.manifest import Progress, read_manifest
from sra_fast.checkpoint.reading import CHECKPOINTS
from sra_fast.data.dataset import make_dataset
from sra_fast.training import control, run_folder, saver, saving
from sra_fast.training.endings import Diverged
from sra_fast.training.loop import image_order
from sra_fast.training.monitor_files import append_row
from sra_fast.training.plan import RunPlan, make_plan
from sra_fast.training.rows import read_rows
from sra_fast.training.run import logged, run
from sra_fast.training.signals import Stopped, StopSignals
from sra_fast.training.step_watch import History
from sra_fast.training.trainer import build
from sra_fast.zero.process_group import init_distributed

pytestmark = pytest.mark.usefixtures("rooms")
STEPS = 6
BASE = (
    f"--train.steps {STEPS} --train.log_every 1 --train.save_every 2 --train.precision fp32 "
    "--train.loggers [] --train.export [] --sample.steps 2 --train.keep 0"
).split()


def made(*args):
    cfg = config(*BASE, *args)
    trainer = build(make_plan(cfg), init_distributed())
    return trainer, make_dataset(cfg)


def poison(data, trainer, *steps):
    """Make an image of each of these 0-based steps NaN, and return their numbers."""
    order = image_order(trainer, len(data), Progress(0))
    numbers = [order.numbers(step, 0)[3] for step in steps]
    data.images = data.images.clone()
    data.images[numbers] = math.nan
    return numbers


def state(trainer):
    masters = trainer.masters
    kinds = {key: masters.gather(masters.state(key)) for key in ("exp_avg", "exp_avg_sq", "ema")}
    return {"master": masters.gather(masters.flats), **kinds}


def same(a, b):
    return all(torch.equal(a[kind][name], b[kind][name]) for kind in a for name in a[kind])


def steps_in(folder):
    return sorted(int(path.name[5:]) for path in (folder / CHECKPOINTS).glob("step_*"))


def whole_run(tmp_path, data, *args):
    """A run with this data, through ``run``."""
    cfg = config(*BASE, "--train.out", str(tmp_path), *args)
    plan = make_plan(cfg)
    data.evaluation = None
    return run(RunPlan(plan, data, None, {}, False), init_distributed())


def test_one_bad_image_costs_one_update(tmp_path, caplog):
    trainer, data = made()
    (number,) = poison(data, trainer, 3)
    with caplog.at_level(logging.WARNING):
        rows = train(trainer, data, tmp_path)
    assert [row["skipped"] for row in rows] == [0, 0, 0, 1, 0, 0]
    assert all(math.isfinite(row["loss"]) != (row["step"] == 4) for row in rows)
    assert f"step 4, rank 0: the loss is nan; not finite: {data.locate(number)}" in caplog.messages
    assert trainer.guard.counts.tolist() == [5, 1, 0]
    # step 4 was to be saved: the next step, whose update was taken, is saved in its place
    assert steps_in(tmp_path) == [2, 5, 6]
    assert read_manifest(tmp_path / CHECKPOINTS / "step_00000006").counts == [5, 1, 0]


def test_the_logged_rate_is_that_of_the_update(tmp_path):
    """Without moments every weight moves by the rate; a warm-up does not count skipped updates."""
    trainer, data = made(
        *("--optim.warmup_steps", "4", "--optim.betas", "[0, 0]", "--optim.eps", "1e-20"),
        *("--optim.lr", "0.001"),
    )
    poison(data, trainer, 1, 2)
    moved = []
    taken = trainer.after_step
    before = [flat.clone() for flat in trainer.masters.flats]

    def after_step(teacher_runs):
        taken(teacher_runs)
        pairs = zip(trainer.masters.flats, before, strict=True)
        moved.append(max(float((new - old).abs().max()) for new, old in pairs))
        before[:] = [flat.clone() for flat in trainer.masters.flats]

    trainer.after_step = after_step
    rates = [row["lr"] for row in train(trainer, data, tmp_path)]
    assert rates == [0.001 * quarters / 4 for quarters in (1, 1, 1, 2, 3, 4)]
    assert moved == pytest.approx([0.00025, 0, 0, 0.0005, 0.00075, 0.001], rel=1e-3)


@pytest.mark.parametrize("slow", [False, True])
def test_stop_at_the_first(tmp_path, monkeypatch, slow):
    """Also while the checkpoint is still being written: the error waits for it and names it."""
    if slow:
        monkeypatch.setattr(saver, "at_phase", lambda name: time.sleep(0.3))
    trainer, data = made("--train.on_nan", "stop")
    poison(data, trainer, 3)
    said = "1 update was skipped up to step 4; the checkpoint of step 2 is whole: resume it with"
    with pytest.raises(FloatingPointError, match=said):
        train(trainer, data, tmp_path)
    assert steps_in(tmp_path) == [2]


def test_too_many_in_a_row(tmp_path):
    trainer, data = made("--train.skip_limit", "2", "--train.save_every", "100")
    poison(data, trainer, 1, 2)
    with pytest.raises(FloatingPointError, match="2 updates in a row were skipped up to step 3;"):
        train(trainer, data, tmp_path)
    assert steps_in(tmp_path) == []


def test_bad_images_at_the_end_lose_nothing(tmp_path, caplog):
    trainer, data = made("--train.save_every", "100")
    poison(data, trainer, STEPS - 2, STEPS - 1)
    with caplog.at_level(logging.WARNING):
        train(trainer, data, tmp_path)
    assert steps_in(tmp_path) == [STEPS]
    assert f"the last updates were skipped, 2 in a row up to step {STEPS}" in caplog.messages


@pytest.mark.parametrize("args", ["", "--train.precision bf16", "--train.zero_stage 3"])
def test_weights_that_are_to_blame_do_not_end_well(tmp_path, args):
    """Fewer skipped updates than the limit, because the run is over."""
    short = "--optim.lr 1e30 --optim.clip 0 --train.steps 3 --train.save_every 100"
    trainer, data = made(*short.split(), *args.split())
    with pytest.raises(FloatingPointError, match="2 updates in a row were skipped up to step 3"):
        train(trainer, data, tmp_path)
    assert steps_in(tmp_path) == []


def test_a_run_without_a_single_update_does_not_end_well(tmp_path):
    trainer, data = made("--train.steps", "3", "--train.save_every", "100")
    poison(data, trainer, 0, 1, 2)
    with pytest.raises(FloatingPointError, match="3 updates in a row were skipped up to step 3;"):
        train(trainer, data, tmp_path)
    assert steps_in(tmp_path) == []


def test_a_signal_after_bad_images_saves(tmp_path):
    trainer, data = made("--train.save_every", "100")
    poison(data, trainer, 1, 2)
    stop = StopSignals()
    taken = trainer.after_step

    def after_step(teacher_runs):
        taken(teacher_runs)
        if int(trainer.guard.counts[2]) == 2:
            stop.code = 15

    trainer.after_step = after_step
    with pytest.raises(Stopped, match=r"after step 3; .* step_00000003 is whole"):
        train(trainer, data, tmp_path, stop=stop)
    manifest = read_manifest(tmp_path / CHECKPOINTS / "step_00000003")
    assert manifest.counts == [1, 2, 2]


def test_rollback_leaves_the_images_out(tmp_path, caplog, monkeypatch):
    """Back to step 2, on with the images after the bad step; the same as such a run by hand.

    Averages are among what is restored, and snapshots of them after step 2 are not kept, nor what
    was seen after it.
    """
    averages = (
        "--train.averages",
        "{slow: {decay: 0.5}, narrow: {sigma_rel: 0.05}, wide: {sigma_rel: 0.1}}",
    )
    trainer, data = made(*averages)
    poison(data, trainer, 3)
    removed = []
    remove = run_folder.remove_after

    def remove_after(run, step):
        append_row(run / "samples.jsonl", {"step": 3})
        removed.append((step, remove(run, step)))
        assert [path.name for path in snapshot_folders(run)] == ["step_00000002", "step_00000001"]
        return removed[-1][1]

    monkeypatch.setattr(run_folder, "remove_after", remove_after)
    more = ("--train.average_snapshots", "1", "--sample.weights", "power:0.08")
    with caplog.at_level(logging.WARNING):
        summary = whole_run(tmp_path / "run", data, "--train.on_nan", "rollback", *averages, *more)
    said = "back to the checkpoint of step 2; the images of the 2 steps after it are left out"
    assert said in caplog.messages
    folder = tmp_path / "run/000"
    last = folder / CHECKPOINTS / "step_00000006"
    manifest = read_manifest(last)
    assert manifest.progress == Progress(6, 2)
    assert manifest.counts == [6, 0, 0], "the state before the bad step has no skipped update"
    assert [row["step"] for row in read_rows(folder / "stats.jsonl")] == [1, 2, 3, 4, 5, 6]
    ((step, lines),) = removed
    assert step == 2 and lines[0].startswith("snapshots of averages after step 2 are removed: ")
    assert lines[1:] == ["samples and held-out losses after step 2 are removed: 1"]
    assert (folder / "samples.jsonl").read_text() == ""
    snapshots = [read_snapshot(path) for path in snapshot_folders(folder)]
    assert [(held.step, held.updates) for held in snapshots] == [(s, s) for s in range(6, 0, -1)]
    # the summary is of weights that were made of them
    assert summary["weights"] == "power:0.08"
    assert "power:0.08 of step 6 is made from 12 averages of width 0.05, 0.1" in caplog.text

    clean = make_dataset(trainer.cfg)
    other, _ = made(*averages)
    saving.load(other, folder / CHECKPOINTS / "step_00000002")
    (tmp_path / "by_hand").mkdir()
    train(other, clean, tmp_path / "by_hand", Progress(2, 2))
    resumed, _ = made(*averages)
    assert saving.load(resumed, last) == Progress(6, 2)
    assert same(state(other), state(resumed))
    assert all(
        torch.equal(resumed.weights(name)[key], value)
        for name in other.averages
        for key, value in other.weights(name).items()
    )


def test_the_start_is_a_checkpoint_to_go_back_to(tmp_path):
    trainer, data = made()
    poison(data, trainer, 0)
    whole_run(tmp_path, data, "--train.on_nan", "rollback")
    assert steps_in(tmp_path / "000") == [0, 2, 4, 6]
    last = read_manifest(tmp_path / "000" / CHECKPOINTS / "step_00000006")
    assert last.progress.shift >= 1 and last.counts == [6, 0, 0]


@pytest.mark.parametrize("log_every", [1, 100])
def test_many_bad_steps_are_left_out_however_rarely_rows_come(tmp_path, log_every):
    """More than skip_limit in a row: what a rollback leaves out grows."""
    args = ("--train.on_nan", "rollback", "--train.skip_limit", "4", "--train.steps", "12")
    trainer, data = made(*args)
    poison(data, trainer, 3, 4, 5, 6, 7, 8)
    whole_run(tmp_path, data, *args, "--train.log_every", str(log_every))
    last = read_manifest(tmp_path / "000" / CHECKPOINTS / "step_00000012")
    assert last.progress.shift >= 7 and last.counts == [12, 0, 0]


def test_a_spike_after_a_rollback_or_a_resume_is_seen(tmp_path, monkeypatch):
    """What is usual is known from before."""
    args = (
        *("--train.on_spike", "rollback", "--train.spike", "5", "--train.steps", "40"),
        *("--train.save_every", "25", "--optim.lr", "1e-5"),
    )
    trainer, data = made(*args)
    order = image_order(trainer, len(data), Progress(0))
    images = data.images.clone()
    for step in (29, 35):
        images[order.numbers(step, 0)] *= 100
    data.images = images
    whole_run(tmp_path, data, *args)
    rows = read_rows(tmp_path / "000/stats.jsonl")
    assert max(row["loss"] for row in rows) < 10
    last = read_manifest(tmp_path / "000" / CHECKPOINTS / "step_00000040")
    assert last.progress.shift >= 2

    # only the rows of the log know it here
    history = History()
    history.read([row for row in rows if row["step"] <= 25])
    assert history.usual("loss") == pytest.approx(rows[12]["loss"], rel=0.5)
    assert len(history.values["loss"]) == 25
    history.forget(10)
    assert [step for step, _ in history.values["loss"]] == list(range(10))
    assert history.usual("loss") is None


def test_an_error_of_a_save_is_not_found_again_after_going_back(tmp_path, monkeypatch):
    """A slow save that fails while training goes back for another reason: one rollback."""
    trainer, data = made()
    poison(data, trainer, 4)
    slow = saver.Saver._write

    def write(self, task):
        if task.progress == Progress(4):
            time.sleep(1.0)
            raise Diverged("the EMA is not finite")
        return slow(self, task)

    monkeypatch.setattr(saver.Saver, "_write", write)
    whole_run(tmp_path, data, "--train.on_nan", "rollback", "--train.save_every", "2")
    last = read_manifest(tmp_path / "000" / CHECKPOINTS / "step_00000006")
    assert last.progress.shift == 3


def test_a_failed_save_rolls_back_even_if_the_next_one_is_due(tmp_path, monkeypatch):
    """The save takes longer than the steps to the next one, which waits for it."""
    _, data = made()
    slow = saver.Saver._write
    failed = []

    def write(self, task):
        if task.progress == Progress(4) and not failed:
            failed.append(task)
            time.sleep(2.0)
            raise Diverged("the EMA is not finite")
        return slow(self, task)

    monkeypatch.setattr(saver.Saver, "_write", write)
    whole_run(tmp_path, data, "--train.on_nan", "rollback", "--train.save_every", "2")
    assert failed and steps_in(tmp_path / "000") == [0, 2, 4, 6]


def test_an_error_does_not_wait_for_a_save_that_hangs(tmp_path, monkeypatch):
    trainer, data = made()
    done = threading.Event()
    monkeypatch.setattr(saver.Saver, "_write", lambda self, task: done.wait(60))
    monkeypatch.setattr(saver, "GRACE", 0.1)
    monkeypatch.setattr(control.Control, "agree_now", lambda self, step: step < 4 or 1 / 0)
    try:
        with (
            pytest.raises(ZeroDivisionError),
            saver.Saver(trainer, tmp_path / CHECKPOINTS) as writer,
        ):
            train(trainer, data, tmp_path, saver=writer)
        assert not done.is_set()
    finally:
        done.set()


def test_losses_of_a_summary_are_numbers():
    rows = [{"loss": x} for x in (math.nan, 2.0, 1.0, math.nan)]
    assert logged(rows, 4) == {"images_per_s": None, "loss_first": 2.0, "loss_last": 1.0}
    assert logged(rows[:1], 4)["loss_last"] is None


def test_going_back_again_and_again_ends(tmp_path, monkeypatch):
    trainer, data = made()
    # every image after the first checkpoint
    order = image_order(trainer, len(data), Progress(0))
    seen = {number for step in (0, 1) for number in order.numbers(step, 0)}
    bad = [number for number in range(len(data)) if number not in seen]
    data.images = data.images.clone()
    data.images[bad] = math.nan
    args = ("--train.on_nan", "rollback", "--train.skip_limit", "2")
    with pytest.raises(FloatingPointError, match="went back to step 2 2 times without reaching"):
        whole_run(tmp_path, data, *args)


@pytest.mark.parametrize("kind", ["ema", "exp_avg_sq", "master"])
def test_what_is_not_finite_is_not_committed(tmp_path, kind):
    """Behind the teacher's layers nothing in a step would notice it."""
    trainer, data = made("--align", "none")
    flats = trainer.masters.flats if kind == "master" else trainer.masters.state(kind)
    flats[0][-1] = math.nan
    with pytest.raises(FloatingPointError, match=r"is not finite|updates in a row"):
        train(trainer, data, tmp_path)
    assert steps_in(tmp_path) == []


def test_an_ema_that_is_not_finite_goes_back(tmp_path, monkeypatch):
    trainer, data = made()
    spoiled = []
    finished = control.Control.after_step

    def after_step(self, done):
        # once, in the step that is saved next
        if done == 4 and not spoiled:
            spoiled.append(done)
            self.trainer.ema.flats[0][5] = math.nan
        finished(self, done)

    monkeypatch.setattr(control.Control, "after_step", after_step)
    whole_run(tmp_path, data, "--train.on_nan", "rollback", "--align", "none")
    assert spoiled and steps_in(tmp_path / "000") == [0, 2, 4, 6]
    last, _ = made("--align", "none")
    saving.load(last, tmp_path / "000" / CHECKPOINTS / "step_00000006")
    assert all(flat.isfinite().all() for flat in last.ema.flats)


def test_a_signal_ends_the_run_with_a_checkpoint(tmp_path):
    trainer, data = made("--train.save_every", "100")
    stop = StopSignals()
    stop.code = 15
    with pytest.raises(
        Stopped, match=r"stopped by SIGTERM after step 1; .* step_00000001 is whole"
    ):
        train(trainer, data, tmp_path, stop=stop)
    assert steps_in(tmp_path) == [1]
    # and the run that goes on is the uninterrupted one
    whole, data = made("--train.save_every", "100")
    (tmp_path / "whole").mkdir()
    train(whole, data, tmp_path / "whole")
    resumed, data = made("--train.save_every", "100")
    start = saving.load(resumed, tmp_path / CHECKPOINTS / "step_00000001")
    train(resumed, data, tmp_path, start)
    assert same(state(whole), state(resumed))


def test_minutes_between_checkpoints(tmp_path, monkeypatch):
    """A clock that shows one minute more at every look."""
    minutes = iter(range(1000))
    clock = SimpleNamespace(monotonic=lambda: 60.0 * next(minutes))
    monkeypatch.setattr(control, "time", clock)
    trainer, data = made("--train.save_every", "100", "--train.save_minutes", "2.5")
    train(trainer, data, tmp_path)
    assert steps_in(tmp_path) == [3, STEPS]
    trainer, data = made("--train.save_every", "100", "--train.save_minutes", "0")
    (tmp_path / "never").mkdir()
    train(trainer, data, tmp_path / "never")
    assert steps_in(tmp_path / "never") == [STEPS]


def test_a_failed_save_is_an_error_at_the_next_step(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device", "the file")

    trainer, data = made()
    monkeypatch.setattr(saver, "write_pieces", full)
    with pytest.raises(
        ValueError, match=r"checkpoint of step 2 .*No space left .*is no checkpoint"
    ):
        train(trainer, data, tmp_path)
    assert steps_in(tmp_path) == []
