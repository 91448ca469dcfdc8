"""A pool of workers: order, threads, logs, what dies, what stops, and what is left behind."""

import os
import signal
import subprocess
import sys
import time

import pytest
from launch import ROOT

from sra_fast.analysis.jobs import Pool, Task, threads_of
from sra_fast.utils.processes import num_cores


@pytest.fixture
def pool(monkeypatch):
    """A pool of two workers that do fake work."""
    monkeypatch.setenv("FAKE_WORK_ABOUT", '{"threads": 1}')
    with Pool("fake_work:start", jobs=2, threads=3, path=[ROOT / "tests"]) as made:
        yield made


def task(tmp_path, name, **arguments):
    return Task(name, tmp_path / f"{name}.txt", arguments)


def test_a_worker_does_many_tasks_with_its_threads(pool, tmp_path):
    files = [tmp_path / f"note{i}" for i in range(6)]
    tasks = [task(tmp_path, f"task{i}", kind="note", file=str(f)) for i, f in enumerate(files)]
    begun = []
    outcomes = []
    pool.run(tasks, outcomes.append, before=lambda each: begun.append(each.name))
    assert begun == [f"task{i}" for i in range(6)]
    assert {outcome.state for outcome in outcomes} == {"done"}
    pids, threads = zip(*(file.read_text().split() for file in files), strict=True)
    assert len(set(pids)) <= 2
    assert {str(outcome.result) for outcome in outcomes} == set(pids)
    assert all(0 < outcome.seconds < 60 for outcome in outcomes)
    assert set(threads) == {"3"}
    assert (tmp_path / "task5.txt").read_text() == "begins note\n"


def test_what_fails_takes_nothing_along(pool, tmp_path):
    kinds = ["die", "crash", "exit", "refuse", "raise"]
    tasks = [task(tmp_path, kind, kind=kind) for kind in kinds]
    note = str(tmp_path / "note")
    tasks += [task(tmp_path, f"note{i}", kind="note", file=note) for i in range(3)]
    outcomes = []
    pool.run(tasks, outcomes.append)
    found = {outcome.task.name: outcome for outcome in outcomes}
    assert len(found) == 8
    reasons = {kind: found[kind].reason for kind in kinds}
    assert reasons["die"].startswith("its process was ended by SIGKILL (is the machine out of mem")
    assert reasons["crash"].startswith("its process was ended by SIGSEGV")
    assert reasons["exit"] == "its process ended with exit code 3: begins exit"
    assert reasons["refuse"] == "error: a reason"
    assert reasons["raise"] == "RuntimeError: a fault"
    assert {found[kind].state for kind in kinds} == {"failed"}
    assert {found[f"note{i}"].state for i in range(3)} == {"done"}
    # the whole error is in the log
    assert "Traceback" in (tmp_path / "raise.txt").read_text()
    assert "Traceback" not in (tmp_path / "refuse.txt").read_text()


def test_a_log_that_cannot_be_written_is_the_fault_of_its_task(pool, tmp_path):
    (tmp_path / "bad.txt").mkdir()
    note = str(tmp_path / "note")
    tasks = [task(tmp_path, name, kind="note", file=note) for name in ("bad", "good")]
    outcomes = []
    pool.run(tasks, outcomes.append)
    found = {outcome.task.name: (outcome.state, outcome.reason) for outcome in outcomes}
    expected = f"{tmp_path / 'bad.txt'} cannot be written: Is a directory"
    assert found == {"bad": ("failed", expected), "good": ("done", "")}


def test_modules_of_the_current_folder_are_not_taken(tmp_path, monkeypatch):
    """There may be another sra_fast, or a yaml.py."""
    for name in ("yaml.py", "sra_fast.py"):
        (tmp_path / name).write_text("raise SystemExit('taken')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FAKE_WORK_ABOUT", '{"threads": 1}')
    outcomes = []
    with Pool("fake_work:start", jobs=1, threads=1, path=[ROOT / "tests"]) as pool:
        pool.run([task(tmp_path, "one", kind="note", file=str(tmp_path / "note"))], outcomes.append)
    assert [outcome.state for outcome in outcomes] == ["done"]


def test_the_last_line_is_not_that_of_an_earlier_attempt(pool, tmp_path):
    (tmp_path / "die.txt").write_text("an earlier end\n")
    outcomes = []
    pool.run([task(tmp_path, "die", kind="die")], outcomes.append)
    assert outcomes[0].reason.endswith(": begins die")


def test_a_stop_ends_what_runs_and_begins_nothing(pool, tmp_path):
    begun = [tmp_path / f"begun{i}" for i in range(3)]
    tasks = [task(tmp_path, f"wait{i}", kind="wait", begun=str(f)) for i, f in enumerate(begun)]
    outcomes = []
    pool.run(tasks, outcomes.append, asked=lambda: begun[0].exists() and begun[1].exists())
    assert sorted((outcome.task.name, outcome.state) for outcome in outcomes) == [
        ("wait0", "stopped"),
        ("wait1", "stopped"),
    ]
    assert outcomes[0].reason.startswith("stopped by SIGTERM after step 7; checkpoint")
    assert not begun[2].exists()


def test_a_worker_that_ends_at_a_stop_has_stopped(pool, tmp_path):
    begun = tmp_path / "begun"
    outcomes = []
    leave = task(tmp_path, "leave", kind="leave", begun=str(begun))
    pool.run([leave], outcomes.append, asked=begun.exists)
    assert [(each.state, each.reason) for each in outcomes] == [("stopped", "left the scores")]


def test_a_worker_that_nobody_asked_to_stop_has_failed(pool, tmp_path):
    begun = tmp_path / "begun"
    outcomes = []

    def kill_it():
        if begun.exists() and not outcomes:
            pool._workers[0].process.send_signal(signal.SIGTERM)
        return False

    pool.run([task(tmp_path, "wait", kind="wait", begun=str(begun))], outcomes.append, kill_it)
    assert outcomes[0].state == "failed"
    assert outcomes[0].reason.startswith("stopped by SIGTERM")


def test_what_cannot_start_is_one_line(tmp_path):
    with (
        pytest.raises(RuntimeError, match="exit code 1 at its start: ValueError: absent:start: No"),
        Pool("absent:start", jobs=1, threads=1) as pool,
    ):
        pool.run([task(tmp_path, "never", kind="note")], print)


PARENT = """
import sys
from pathlib import Path
from sra_fast.analysis.jobs import Pool, Task
folder = Path(sys.argv[1])
with Pool("fake_work:start", jobs=1, threads=1, path=[Path(sys.argv[2])]) as pool:
    arguments = {"kind": "wait", "begun": str(folder / "begun")}
    pool.run([Task("wait", folder / "log.txt", arguments)], print)
"""


def test_a_parent_that_is_killed_leaves_no_worker(tmp_path):
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, tmp_path, ROOT / "tests"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    wait_for((tmp_path / "begun").exists)
    parent.kill()
    parent.wait()
    log = tmp_path / "log.txt"
    wait_for(lambda: "stopped by the end of its launcher" in log.read_text())


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_threads(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert threads_of(1) == num_cores()
    assert threads_of(10**6) == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert threads_of(2) == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    with pytest.raises(ValueError, match="must be a number of threads, got 'many'"):
        threads_of(2)
