"""A small part of `make chaos`, and that its driver would notice what it looks for."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from damage import DAMAGES, PowerCut, swap
from launch import ROOT, environment

HERE = Path(__file__).parent
# launchers take ten seconds each, and tests/scripts launches them; the others have tests of their own
LEFT_OUT = ("signal_to_launcher", "kill_at_random", "settings_changed")
SMALL = ("--settings", "2", "--jobs", "2", "--without", *LEFT_OUT)


def driver(source: str) -> subprocess.CompletedProcess:
    """Python with the driver as ``run``, in a process of its own: it forks and has no threads."""
    before = f"import sys; sys.path.insert(0, {str(HERE)!r}); import run\n"
    return subprocess.run(
        [sys.executable, "-c", before + source],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )


def counts(done: subprocess.CompletedProcess) -> dict[str, int]:
    """The verdicts of the table's last line."""
    lines = done.stdout.splitlines()
    names = next(line.split()[2:] for line in lines if line.startswith("kind "))
    return dict(zip(names, map(int, lines[-1].split()[2:]), strict=True))


def test_a_run_comes_through_a_case_of_every_kind(tmp_path):
    options = ["--cases", "1", "--seed", "3", "--folder", str(tmp_path), *SMALL]
    done = driver(f"sys.exit(run.main({options}))")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    found = counts(done)
    assert found["survived"] + found["refused"] >= 12
    assert found["silent"] == found["lost"] == found["executed"] == 0


# faults of the program, each with a kind of case that notices it, one that a shuffle does not move
PLANTED = """
from sra_fast.training import run_folder, saving
from sra_fast.checkpoint import steps

def no_hashes():
    run_folder.hash_fault = lambda *arguments: None

def loads_pickles():
    load = saving.load
    def loads(trainer, path, **options):
        for file in path.glob("*.pt"):
            pickle.loads(file.read_bytes())
        return load(trainer, path, **options)
    saving.load = loads

def knows_only_the_newest():
    choose = steps.choose
    def newest(folder, fault_of, among):
        return choose(folder, fault_of, (among[0][:1], among[1]))
    steps.choose = newest

folder = Path(FOLDER)
bench = run.Bench(folder)
del run.SETTINGS[1:]
run.warm.warm_up(bench.arguments(folder / "warm", run.SETTINGS[0]), folder)
jobs = run.Jobs(2)
run.prepare(bench, jobs)
for plant, kind, wanted in (
    (no_hashes, "damaged_file", "flip checkpoints/step_00000006/rank_"),
    (loads_pickles, "pickle_with_code", "model states"),
    (knows_only_the_newest, "damaged_file", "flip checkpoints/step_00000006/rank_"),
):
    def work(plant=plant, kind=kind, wanted=wanted):
        plant()
        for number in range(200):
            place = folder / f"{plant.__name__}_{number}"
            what = description(kind, place, number)
            if wanted in what:
                what, verdict = run.run_case(bench, place, 0, kind, number)
                sys.stdout.write(f"{plant.__name__} {verdict.name}: {what} {verdict.detail}\\n")
                return
    jobs.start(work)
jobs.finish()
"""
DESCRIPTION = """
import pickle, shutil, sys
from pathlib import Path

class Unjudged:
    # everything of a bench but the runs
    def __init__(self, bench):
        self.bench = bench
    def __getattr__(self, name):
        return getattr(self.bench, name)
    def judge(self, *arguments, **options):
        return run.Verdict("survived")

def description(kind, place, number):
    what, _ = run.run_case(Unjudged(bench), place, 0, kind, number)
    shutil.rmtree(place)
    return what
"""


def test_the_driver_notices_planted_faults(tmp_path):
    source = DESCRIPTION + PLANTED.replace("FOLDER", repr(str(tmp_path)))
    done = driver(source)
    said = {line.split()[0]: line.split()[1] for line in done.stdout.splitlines() if ": " in line}
    assert said == {
        "no_hashes": "silent:",
        "loads_pickles": "executed:",
        "knows_only_the_newest": "lost:",
    }, done.stdout[-4000:] + done.stderr[-4000:]


@pytest.fixture
def disk(tmp_path, monkeypatch):
    """A folder whose changes are noted; what the model patches is put back."""
    for name in ("fsync", "replace", "rename", "unlink", "remove"):
        monkeypatch.setattr(os, name, getattr(os, name))
    folder = tmp_path / "disk"
    folder.mkdir()
    cut = PowerCut(folder, tmp_path / "journal")
    cut.install(0)
    return folder, cut


def write(path: Path, text: str, flush: bool) -> None:
    with open(path, "w") as file:
        file.write(text)
        file.flush()
        if flush:
            os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


class Certain(random.Random):
    """Nothing that is not flushed gets to the disk."""

    def random(self):
        return 1.0


def test_a_power_cut_takes_what_was_not_flushed(disk):
    folder, cut = disk
    write(folder / "flushed", "a", flush=True)
    write(folder / "not_flushed", "b", flush=False)
    write(folder / "changed_later", "c", flush=True)
    write(folder / "changed_later", "cc", flush=False)
    cut.apply(Certain())
    content = {path.name: path.read_text() for path in folder.iterdir()}
    assert content == {"flushed": "a", "not_flushed": "", "changed_later": ""}


@pytest.mark.parametrize("flushed", [True, False])
def test_a_power_cut_undoes_renames_and_removals(disk, flushed):
    folder, cut = disk
    write(folder / "latest", "old", flush=True)
    write(folder / "removed", "x", flush=True)
    flush_folder(folder)
    write(folder / "tmp", "new", flush=True)
    os.replace(folder / "tmp", folder / "latest")
    (folder / "removed").unlink()
    if flushed:
        flush_folder(folder)
    cut.apply(Certain())
    content = {path.name: path.read_text() for path in folder.iterdir()}
    before = {"latest": "old", "removed": "x", "tmp": "new"}
    assert content == ({"latest": "new"} if flushed else before)


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_changes_a_file(tmp_path, name):
    path = tmp_path / "file"
    path.write_bytes(bytes(range(200)))
    DAMAGES[name](path, random.Random(0))
    assert not path.is_file() or path.read_bytes() != bytes(range(200))


def test_swap(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_text("1")
    other.write_text("2")
    swap(one, other)
    assert (one.read_text(), other.read_text()) == ("2", "1")
