"""Which checkpoint of a run is taken: the newest whole one, never one that was given up."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from foreign import write_checkpoint

from sra_fast.checkpoint import steps
from sra_fast.checkpoint.manifest import MANIFEST, DamagedCheckpoint, file_name, read_manifest
from sra_fast.checkpoint.reading import newest, read_kinds
from sra_fast.checkpoint.sources import run_of

KINDS = {"master": {"a": torch.arange(4.0)}}


@pytest.fixture
def run(tmp_path):
    """Checkpoints of steps 3, 6 and 9; ``latest`` names the last."""
    for step in (3, 6, 9):
        write_checkpoint(tmp_path, KINDS, step, {})
    return tmp_path


def chosen(run) -> str:
    choice = steps.choose(run / "checkpoints")
    return choice.path.name if choice else "none"


def folder(run, step: int):
    return run / f"checkpoints/step_{step:08d}"


def test_the_newest_is_taken_in_silence(run):
    choice = steps.choose(run / "checkpoints")
    assert (choice.path, choice.manifest.step, choice.remarks) == (folder(run, 9), 9, [])
    assert newest(run) == folder(run, 9)


def test_a_damaged_one_is_passed_over_with_a_line(run):
    (folder(run, 9) / file_name(1)).unlink()
    (folder(run, 6) / MANIFEST).write_text("{}")
    choice = steps.choose(run / "checkpoints")
    assert choice.path == folder(run, 3)
    assert choice.remarks == [
        f"checkpoint step 9 is damaged: {file_name(1)} cannot be read: No such file or directory; "
        "going on from step 3",
        f"checkpoint step 6 is damaged: {MANIFEST} cannot be read: it is not what was written; "
        "going on from step 3",
        "no manifest tells whether step 3 came before step 9: it is taken because it lies in "
        f"{run / 'checkpoints'}",
    ]


def test_none_is_whole(run):
    for step in (3, 6, 9):
        (folder(run, step) / MANIFEST).write_text("")
    with pytest.raises(ValueError, match=f"is whole; the newest, step 9, is damaged: {MANIFEST}"):
        steps.choose(run / "checkpoints")


def test_the_manifest_of_the_named_one_is_gone(run):
    (folder(run, 9) / MANIFEST).unlink()
    choice = steps.choose(run / "checkpoints")
    assert choice.path == folder(run, 6)
    assert f"step 9 is damaged: {MANIFEST} cannot be read" in choice.remarks[0]


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "step_",
        "step_00000099",
        "../checkpoints/step_00000003",
        "/etc",
        "..",
        "step_00000003\0",
        "step_00000003/../step_00000003",
        "\u0665" * 8,
        "x" * 10**6,
    ],
)
def test_latest_that_names_nothing_of_the_run(run, text):
    """The newest whole one is taken, with a line; nothing outside of the run is looked at."""
    latest = run / "checkpoints/latest"
    latest.unlink() if text is None else latest.write_text(text)
    choice = steps.choose(run / "checkpoints")
    assert choice.path == folder(run, 9)
    assert len(choice.remarks) == 1 and str(latest) in choice.remarks[0]
    assert "looking for the newest whole checkpoint" in choice.remarks[0]
    assert len(choice.remarks[0]) < 400


def test_a_step_that_latest_does_not_name_yet_is_given_up(run):
    """A rollback to step 6, or a commit of step 9 that was not finished."""
    steps.write_latest(run / "checkpoints", "step_00000006")
    assert chosen(run) == "step_00000006"
    (folder(run, 6) / file_name(0)).write_bytes(b"")
    assert chosen(run) == "step_00000003"


def test_links_out_of_the_run_are_no_checkpoints(run, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    shutil.move(folder(run, 9), elsewhere)
    os.symlink(elsewhere, folder(run, 9))
    assert [steps.step_of(path) for path in steps.step_folders(run / "checkpoints")] == [6, 3]


@pytest.mark.parametrize("name", ["step_3", "step_0000000a", "xstep_00000004", "step_00000004.old"])
def test_other_folders_are_left_alone(run, name):
    shutil.copytree(folder(run, 9), run / "checkpoints" / name)
    assert len(steps.step_folders(run / "checkpoints")) == 3


def test_a_first_save_that_was_not_finished_is_no_checkpoint(tmp_path):
    assert steps.choose(tmp_path / "checkpoints") is None
    path = write_checkpoint(tmp_path, KINDS, 3, {})
    (path / MANIFEST).unlink()
    (tmp_path / "checkpoints/latest").unlink()
    assert steps.choose(tmp_path / "checkpoints") is None and not steps.is_begun(path.parent)
    (tmp_path / "checkpoints/latest").write_text("step_00000003")
    with pytest.raises(ValueError, match="the newest, step 3, is damaged"):
        steps.choose(tmp_path / "checkpoints")
    shutil.rmtree(path)
    with pytest.raises(ValueError, match="is whole: expected manifest.json"):
        steps.choose(tmp_path / "checkpoints")


def test_steps_of_more_digits_are_newer(run):
    write_checkpoint(run, KINDS, 10**9, {})
    assert chosen(run) == "step_1000000000"


def test_the_fallback_follows_the_parents(run, tmp_path_factory):
    """Step 12 goes on from step 6; step 9, of a branch that was given up, was moved back."""
    shutil.move(folder(run, 9), run / "aside")
    steps.write_latest(run / "checkpoints", "step_00000006")
    write_checkpoint(run, KINDS, 12, {})
    shutil.move(run / "aside", folder(run, 9))
    found = steps.candidates(run / "checkpoints")
    assert ([steps.step_of(path) for path in found.paths], found.proven) == ([12, 6, 3], 3)
    (folder(run, 12) / file_name(0)).unlink()
    assert chosen(run) == "step_00000006"


def test_another_checkpoint_of_the_parents_step_is_no_parent(run):
    """Step 6 was made once more by another branch: step 9 is not of it."""
    shutil.rmtree(folder(run, 6))
    steps.write_latest(run / "checkpoints", "step_00000003")
    write_checkpoint(run, {"master": {"a": torch.zeros(4)}}, 6, {})
    steps.write_latest(run / "checkpoints", "step_00000009")
    found = steps.candidates(run / "checkpoints")
    assert ([steps.step_of(path) for path in found.paths], found.proven) == ([9, 3], 1)


def test_a_broken_line_is_said(run):
    """Step 6 was pruned: step 3, which train.keep_every has kept, may be an ancestor."""
    shutil.rmtree(folder(run, 6))
    (folder(run, 9) / file_name(0)).unlink()
    choice = steps.choose(run / "checkpoints")
    assert choice.path == folder(run, 3)
    assert choice.remarks[-1].startswith("no manifest tells whether step 3 came before step 9")


def test_the_first_checkpoint_of_a_run_has_no_ancestors(run):
    """What lies in its folder with earlier steps is of another run."""
    for step in (3, 6):
        shutil.move(folder(run, step), run / f"{step}")
    shutil.rmtree(folder(run, 9))
    (run / "checkpoints/latest").unlink()
    write_checkpoint(run, KINDS, 9, {})
    shutil.move(run / "3", folder(run, 3))
    assert [steps.step_of(path) for path in steps.candidates(run / "checkpoints").paths] == [9]


def test_latest_that_could_not_be_read_is_no_missing_one(run, monkeypatch):
    """It may name an older step than the newest."""

    def failing(*arguments):
        raise OSError(5, os.strerror(5))

    monkeypatch.setattr("builtins.open", failing)
    with pytest.raises(ValueError, match=r"latest could not be read: Input/output error; nothing"):
        steps.candidates(run / "checkpoints")


def test_an_empty_latest_without_steps_is_no_run(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/latest").touch()
    assert not steps.is_begun(tmp_path / "checkpoints")
    assert steps.choose(tmp_path / "checkpoints") is None


@pytest.mark.parametrize("content", [b"step_00000003\xdf", b"\xff" * 5000, b"x" * 5000, None])
def test_no_latest_stops_no_reader(run, content):
    latest = run / "checkpoints/latest"
    latest.unlink()
    latest.mkdir() if content is None else latest.write_bytes(content)
    assert newest(run) == folder(run, 9)


def test_a_copy_or_a_link_may_have_any_name(run, tmp_path_factory, monkeypatch):
    """And is none of the run's checkpoints."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    shutil.copytree(folder(run, 6), run / "checkpoints/best")
    shutil.copytree(folder(run, 6), elsewhere / "copy")
    (elsewhere / "link").symlink_to(folder(run, 6))
    (run / "config.yaml").write_text("")
    assert run_of(elsewhere / "link") == run and run_of(elsewhere / "copy") is None
    monkeypatch.chdir(folder(run, 6))
    for path in (run / "checkpoints/best", elsewhere / "copy", elsewhere / "link", Path()):
        manifest, held = read_kinds(path, ["master"])
        assert manifest.step == 6
        assert torch.equal(held["master"]["a"], KINDS["master"]["a"])
    assert [path.name for path in steps.candidates(run / "checkpoints").paths] == [
        f"step_{step:08d}" for step in (9, 6, 3)
    ]


def test_a_damaged_copy_is_named(run):
    """No whole checkpoint is known to come before it."""
    copy = run / "checkpoints/best"
    shutil.copytree(folder(run, 6), copy)
    tensors = copy / file_name(0)
    tensors.write_bytes(tensors.read_bytes()[:-1] + b"!")
    with pytest.raises(ValueError, match=f"^checkpoint {copy} is damaged: {file_name(0)} [^;]*$"):
        read_kinds(copy, ["master"])


def test_a_name_of_another_step_is_refused(run, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    folder(run, 6).rename(folder(run, 7))
    (elsewhere / "link").symlink_to(folder(run, 7))
    (elsewhere / "step_00000008").symlink_to(folder(run, 9))
    for path, name in (
        (folder(run, 7), "step_00000007"),
        (elsewhere / "link", "step_00000007"),
        (elsewhere / "step_00000008", "step_00000008"),
    ):
        with pytest.raises(DamagedCheckpoint, match=f"is that of step [69], not of {name}"):
            read_manifest(path)
