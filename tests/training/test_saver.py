"""Saving in the background: the same files, nothing that is not finite, whole wherever it stops."""

import errno
import json
import os
import signal
import sys
import threading
import time
from dataclasses import replace

import pytest
import torch
from bare_training import save
from tiny_config import config

from sra_fast.checkpoint import steps
from sra_fast.checkpoint.manifest import MANIFEST, Progress, read_manifest
from sra_fast.checkpoint.shards import Shards
from sra_fast.data.digits import Digits
from sra_fast.training import abandoned, run_folder, saver, saving
from sra_fast.training.host_copy import HostCopy, flats_by_kind
from sra_fast.training.plan import make_plan
from sra_fast.training.run_lock import LOCK, RunLock
from sra_fast.training.saver import Saver, prune
from sra_fast.training.trainer import build
from sra_fast.utils import files
from sra_fast.zero.process_group import init_distributed

PHASES = [
    "copied",
    "file_begun",
    "file_half",
    "file_written",
    "file_renamed",
    "exchanged",
    "manifest_written",
    "latest_written",
    "pruning",
    "pruned",
]
# from here on the new checkpoint counts
COMMITTED = "latest_written"


@pytest.fixture(scope="module")
def trainer():
    """One for all tests: building it takes longer than they do. Its state is random."""
    built = build(
        make_plan(config("--train.zero_stage", "1", "--train.keep", "2")), init_distributed()
    )
    shake(built, 0)
    return built


def shake(trainer, seed: int) -> None:
    """Give every master, moment and EMA another value, as a step does."""
    generator = torch.Generator().manual_seed(seed)
    for flats in flats_by_kind(trainer).values():
        for flat in flats:
            flat.copy_(torch.rand(flat.shape, generator=generator))


def contents(trainer) -> dict:
    return {
        kind: [flat.clone() for flat in flats] for kind, flats in flats_by_kind(trainer).items()
    }


def is_saved(path, expected: dict) -> bool:
    """Whether a checkpoint holds exactly these flats (of one process)."""
    manifest = read_manifest(path)
    shards = Shards(path, manifest.files)
    for kind, flats in expected.items():
        held = torch.cat([value for value in shards.whole(kind).values()])
        live = torch.cat(flats)[: len(held)].cpu()
        # sorted: the file may have another order of the parameters
        if held.sort().values.ne(live.sort().values).any():
            return False
    return True


def test_what_is_saved_is_the_state_of_that_step(trainer, tmp_path, monkeypatch):
    """Steps that are taken while the thread writes change nothing of what it writes."""
    going = threading.Event()
    monkeypatch.setattr(saver, "at_phase", lambda name: going.wait() if name == "copied" else None)
    background = Saver(trainer, tmp_path / "a", Digits().facts())
    expected = contents(trainer)
    background.save(Progress(3, shift=4), epoch=1)
    assert background.last is None, "it is not committed yet"
    shake(trainer, 1)
    going.set()
    background.wait()
    assert background.error is None and background.last == Progress(3, shift=4)
    path = tmp_path / "a/step_00000003"
    assert is_saved(path, expected) and not is_saved(path, contents(trainer))
    manifest = read_manifest(path)
    assert (manifest.progress, manifest.epoch) == (Progress(3, shift=4), 1)
    assert manifest.data == json.loads(json.dumps(Digits().facts().as_json()))
    assert manifest.settings["model"]["depth"] == 4
    assert manifest.emas == {"main": {"decay": trainer.cfg.train.ema_decay}}


def test_in_the_background_or_not_the_files_are_the_same(trainer, tmp_path):
    waited = save(trainer, tmp_path / "a", Progress(5), 0)
    background = Saver(trainer, tmp_path / "b")
    background.save(Progress(5), 0)
    background.close()
    for name in ("rank_00000.safetensors",):
        assert (waited / name).read_bytes() == (tmp_path / "b/step_00000005" / name).read_bytes()
    first, second = read_manifest(waited), read_manifest(tmp_path / "b/step_00000005")
    assert replace(first, run_id="", created="") == replace(second, run_id="", created="")


def test_checkpoints_of_a_run_are_linked(trainer, tmp_path):
    first = Saver(trainer, tmp_path)
    for step in (1, 2):
        first.save(Progress(step), 0)
    first.wait()
    # a process that resumes the run
    second = Saver(trainer, tmp_path)
    assert second.parent == 2
    second.save(Progress(3), 0)
    second.wait()
    manifests = [read_manifest(tmp_path / f"step_{step:08d}") for step in (2, 3)]
    assert [manifest.parent for manifest in manifests] == [1, 2]
    assert len({manifest.run_id for manifest in manifests}) == 1
    other = Saver(trainer, tmp_path / "other")
    assert other.run_id != first.run_id


def test_a_second_save_waits_for_the_first(trainer, tmp_path, monkeypatch):
    going = threading.Event()
    monkeypatch.setattr(
        saver, "at_phase", lambda name: going.wait() if name == "file_half" else None
    )
    background = Saver(trainer, tmp_path)
    background.save(Progress(1), 0)
    # it has returned while the file is half written
    assert background.last is None and background.thread.is_alive()
    first = background.thread
    joined = first.join

    def join(*arguments):
        # the second save has come to wait for the first
        going.set()
        joined(*arguments)

    monkeypatch.setattr(first, "join", join)
    background.save(Progress(2), 0)
    assert going.is_set() and not first.is_alive() and background.last == Progress(1)
    background.save(Progress(2), 0)
    assert background.last == Progress(2) and background.thread is None, "it is there already"


def test_a_run_that_ends_with_an_error_finishes_its_save(trainer, tmp_path, monkeypatch):
    """The lock of its folder is given back after that."""
    monkeypatch.setattr(
        saver, "at_phase", lambda name: time.sleep(0.2) if name == "file_half" else None
    )
    with pytest.raises(RuntimeError, match="of the run"), Saver(trainer, tmp_path) as background:
        background.save(Progress(1), 0)
        raise RuntimeError("of the run")
    assert background.last == Progress(1) and not background.thread.is_alive()


@pytest.mark.parametrize("kind", ["master", "exp_avg", "exp_avg_sq", "ema.main"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_committed(trainer, tmp_path, kind, value):
    background = Saver(trainer, tmp_path)
    background.save(Progress(1), 0)
    segment = trainer.masters.segments[7]
    place = segment.of(flats_by_kind(trainer)[kind])[-1]
    before = place.clone()
    place.fill_(value)
    try:
        background.save(Progress(2), 0)
        background.wait()
    finally:
        place.copy_(before)
    said = str(background.error)
    assert isinstance(background.error, FloatingPointError)
    assert said.startswith(f"{kind} of {segment.name} is not finite on rank 0")
    assert said.endswith(f"the last whole checkpoint is {tmp_path / 'step_00000001'}")
    assert steps.named_by_latest(tmp_path).name == "step_00000001"
    assert not (tmp_path / "step_00000002").exists()
    with pytest.raises(FloatingPointError, match="is not finite"):
        background.save(Progress(3), 0)


def test_padding_may_hold_anything(trainer):
    taken = HostCopy(trainer)
    taken.take()
    taken.wait()
    # as a device would have found it between two pieces
    taken.ranges = torch.tensor([float("nan")])
    assert taken.not_finite() is None


def test_a_full_disk_names_what_is_left(trainer, tmp_path, monkeypatch):
    background = Saver(trainer, tmp_path)
    background.save(Progress(1), 0)
    background.wait()

    def full(name):
        if name == "file_half":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/disk/file")

    monkeypatch.setattr(saver, "at_phase", full)
    background.save(Progress(2), 0)
    background.wait()
    said = str(background.error)
    assert isinstance(background.error, ValueError) and "\n" not in said
    assert said.startswith(
        "the checkpoint of step 2 could not be written: /disk/file: No space left"
    )
    assert "MiB are free there" in said
    assert said.endswith(f"the last whole checkpoint is {tmp_path / 'step_00000001'}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000001"]


def exit_code_of_a_killed_save(trainer, folder, phase: str, monkeypatch) -> int:
    """Exit code of a forked process that kills itself in a phase of saving step 3."""
    # memory that CUDA has pinned need not be there after a fork
    monkeypatch.setattr(HostCopy, "_host_memory", ordinary_memory)
    killed = Saver(trainer, folder)
    # CUDA works in the parent only: everything on the device comes before the fork
    killed.host_copy.take()
    killed.host_copy.wait()
    killed.host_copy.event = None

    def at_phase(name: str) -> None:
        if name == phase:
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        # never back into pytest, which would run the other tests in this process too
        try:
            monkeypatch.setattr(saver, "at_phase", at_phase)
            # a thread does not outlive a fork: write in this one
            killed._run(saver._Task(Progress(3), 0))
            print(f"not killed in {phase}: {killed.error}", file=sys.stderr, flush=True)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def ordinary_memory(_, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """In place of ``HostCopy._host_memory``."""
    return torch.empty(shape, dtype=dtype)


@pytest.mark.parametrize("phase", PHASES)
def test_killed_in_any_phase_the_run_can_be_resumed(trainer, tmp_path, monkeypatch, phase):
    """A child is killed while it saves step 3; steps 1 and 2 are there, and two are kept."""
    for step in (1, 2):
        save(trainer, tmp_path / "checkpoints", Progress(step), 0)

    code = exit_code_of_a_killed_save(trainer, tmp_path / "checkpoints", phase, monkeypatch)
    assert code == -signal.SIGKILL

    choice = run_folder.choose_checkpoint(tmp_path)
    committed = PHASES.index(phase) >= PHASES.index(COMMITTED)
    expected = "step_00000003" if committed else "step_00000002"
    assert choice.path.name == expected and choice.remarks == []
    moved = run_folder.settle(tmp_path, choice.path)
    # the manifest was committed, and `latest` does not name it yet
    assert len(moved) == (phase == "manifest_written")
    left = {path.name for path in (tmp_path / "checkpoints").iterdir()} - {"abandoned"}
    whole = {"step_00000001", "step_00000002"}
    if committed:
        whole = {"step_00000002", "step_00000003"} | (whole if phase != "pruned" else set())
    assert left == {"latest", *whole}
    assert not list(tmp_path.rglob("*.tmp"))
    # and it goes on
    assert saving.load(trainer, choice.path).step == int(expected[-1])
    save(trainer, tmp_path / "checkpoints", Progress(3 + committed), 0)
    assert steps.named_by_latest(tmp_path / "checkpoints").name == f"step_0000000{3 + committed}"


@pytest.mark.parametrize(
    "keep, keep_every, left",
    [
        (0, 0, [2, 4, 6, 8, 10, 12]),
        (1, 0, [12]),
        (3, 0, [8, 10, 12]),
        (2, 4, [4, 8, 10, 12]),
        (1, 100, [12]),
    ],
)
def test_what_is_kept(trainer, tmp_path, keep, keep_every, left):
    for step in range(2, 13, 2):
        folder = tmp_path / f"step_{step:08d}"
        folder.mkdir()
        (folder / MANIFEST).write_text("")
    steps.write_latest(tmp_path, "step_00000012")
    cfg = replace(trainer.cfg.train, keep=keep, keep_every=keep_every)
    prune(tmp_path, cfg)
    assert sorted(steps.step_of(path) for path in steps.step_folders(tmp_path)) == left


def test_the_one_that_latest_names_is_kept_and_another_folder_left_alone(trainer, tmp_path):
    for step in (1, 2, 3):
        save(trainer, tmp_path / "checkpoints", Progress(step), 0)
    (tmp_path / "ema").mkdir()
    (tmp_path / "checkpoints/notes").mkdir()
    steps.write_latest(tmp_path / "checkpoints", "step_00000002")
    prune(tmp_path / "checkpoints", replace(trainer.cfg.train, keep=1))
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == ["latest", "notes", "step_00000002", "step_00000003"]
    assert (tmp_path / "ema").is_dir()


@pytest.mark.parametrize("phase", ["copied", "exchanged"])
def test_a_run_that_has_lost_its_lock_commits_nothing(trainer, tmp_path, monkeypatch, phase):
    """Another process may write there: neither is anything of it removed."""
    checkpoints = tmp_path / "checkpoints"
    save(trainer, checkpoints, Progress(1), 0)
    lock = RunLock(tmp_path)
    background = Saver(trainer, checkpoints)

    def taken(name):
        if name == phase:
            (tmp_path / LOCK).unlink()

    monkeypatch.setattr(saver, "at_phase", taken)
    background.save(Progress(2), 0)
    background.wait()
    lock.release()
    said = str(background.error)
    assert isinstance(background.error, ValueError) and "\n" not in said
    assert f"{tmp_path / LOCK} was removed: another process may write into this run" in said
    assert steps.named_by_latest(checkpoints).name == "step_00000001"
    left = checkpoints / "step_00000002"
    assert left.exists() == (phase == "exchanged") and not (left / MANIFEST).exists()


@pytest.mark.parametrize("what", ["a file", "a link", "a folder"])
def test_what_lies_in_place_of_a_step_is_moved_away(trainer, tmp_path, what):
    checkpoints = tmp_path / "checkpoints"
    save(trainer, checkpoints, Progress(1), 0)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/precious").touch()
    place = checkpoints / "step_00000002"
    if what == "a link":
        place.symlink_to(tmp_path / "elsewhere")
    elif what == "a file":
        place.touch()
    else:
        # a save that was not finished
        place.mkdir()
    path = save(trainer, checkpoints, Progress(2), 0)
    assert read_manifest(path).step == 2 and not path.is_symlink()
    assert (tmp_path / "elsewhere/precious").exists()
    assert os.path.lexists(checkpoints / "abandoned/step_00000002") == (what != "a folder")


def test_a_file_in_place_of_the_abandoned_ones_is_named(trainer, tmp_path):
    checkpoints = tmp_path / "checkpoints"
    for step in (1, 2):
        save(trainer, checkpoints, Progress(step), 0)
    (checkpoints / "abandoned").touch()
    with pytest.raises(ValueError, match=f"expected a folder {checkpoints / 'abandoned'}, found"):
        run_folder.settle(tmp_path, checkpoints / "step_00000001")
    assert (checkpoints / "step_00000002" / MANIFEST).exists()


def test_branches_do_not_mix(trainer, tmp_path):
    """Step 4 of a branch that was given up is moved back and named: step 3 is none of its line."""
    checkpoints = tmp_path / "checkpoints"
    for step in (1, 4):
        save(trainer, checkpoints, Progress(step), 0)
    run_folder.settle(tmp_path, checkpoints / "step_00000001")
    save(trainer, checkpoints, Progress(3), 0)
    os.replace(checkpoints / "abandoned/step_00000004", checkpoints / "step_00000004")
    moved = run_folder.settle(tmp_path, checkpoints / "step_00000004", exact=True)
    assert [step.name for step in steps.step_folders(checkpoints)] == [
        "step_00000004",
        "step_00000001",
    ]
    assert len(moved) == 2 and "use --train.resume auto" in moved[-1]
    assert [path.name for path in (checkpoints / "abandoned").iterdir()] == ["step_00000003"]


def test_names_are_on_the_disk_before_what_is_in_them(trainer, tmp_path, monkeypatch):
    """Every folder that is made or renamed: else a power cut leaves `latest` without its step."""
    synced = []
    monkeypatch.setattr(files, "sync_folder", synced.append)
    monkeypatch.setattr(saver, "sync_folder", synced.append)
    monkeypatch.setattr(abandoned, "sync_folder", synced.append)
    monkeypatch.setattr(run_folder, "sync_folder", synced.append)
    run = run_folder.new_folder(tmp_path / "a/out")
    checkpoints = run / "checkpoints"
    for step in (1, 2):
        save(trainer, checkpoints, Progress(step), 0)
    for made in (
        tmp_path / "a",
        tmp_path / "a/out",
        run,
        checkpoints,
        checkpoints / "step_00000001",
    ):
        assert made.parent in synced, made
    synced.clear()
    run_folder.settle(run, checkpoints / "step_00000001")
    assert {checkpoints, checkpoints / "abandoned"} <= set(synced)


def test_the_manifest_says_what_the_teacher_follows(trainer, tmp_path, monkeypatch):
    path = save(trainer, tmp_path / "a", Progress(1), 0)
    assert read_manifest(path).teacher == "main"
    monkeypatch.setattr(trainer, "teacher", None)
    path = save(trainer, tmp_path / "b", Progress(1), 0)
    assert read_manifest(path).teacher is None


def test_no_memory_and_no_files_are_left_behind(trainer, tmp_path):
    background = Saver(trainer, tmp_path)
    background.save(Progress(1), 0)
    background.wait()
    addresses = {key: copy.data_ptr() for key, copy in background.host_copy.copies.items()}
    # what other tests have left in this process may be closed at any time
    files = set(os.listdir("/proc/self/fd"))
    threads = set(threading.enumerate())
    for step in range(2, 12):
        background.save(Progress(step), 0)
    background.wait()
    assert {key: copy.data_ptr() for key, copy in background.host_copy.copies.items()} == addresses
    assert set(os.listdir("/proc/self/fd")) <= files
    assert set(threading.enumerate()) <= threads
