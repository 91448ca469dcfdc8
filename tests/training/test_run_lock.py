"""Two processes do not write into one run folder."""

import errno
import json
import os
import socket
import subprocess
import sys
import threading
import time

import pytest
from launch import ROOT, environment

from sra_fast.training.run_lock import LOCK, RunLock

HOLDS = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from sra_fast.training.run_lock import RunLock
lock = RunLock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def test_another_process_is_refused_until_the_holder_dies(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path)],
        stdout=subprocess.PIPE,
        env=environment(),
        text=True,
    )
    try:
        assert holder.stdout.readline() == "held\n"
        expected = f"{tmp_path} is in use by process {holder.pid} on {socket.gethostname()}"
        with pytest.raises(ValueError, match=expected):
            RunLock(tmp_path)
        # it was not taken away from the holder by the try
        with pytest.raises(ValueError, match=expected):
            RunLock(tmp_path)
    finally:
        holder.kill()
        holder.wait()
    # however it died
    lock = RunLock(tmp_path)
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    lock.release()


def test_a_second_run_of_the_same_process_is_refused(tmp_path):
    lock = RunLock(tmp_path)
    with pytest.raises(ValueError, match=f"is in use by process {os.getpid()} on"):
        RunLock(tmp_path)
    lock.release()
    assert (tmp_path / LOCK).read_bytes() == b""
    RunLock(tmp_path).release()


def test_a_child_does_not_give_it_back(tmp_path):
    """Forked workers of a data loader end before the run does."""
    lock = RunLock(tmp_path)
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    done = subprocess.run(
        [sys.executable, "-c", HOLDS, str(tmp_path)], capture_output=True, env=environment()
    )
    assert b"is in use by" in done.stderr
    lock.release()


def foreign(folder, age: float = 0.0) -> None:
    """The lock of a process on another machine, whose locks this one does not see."""
    path = folder / LOCK
    path.write_text(json.dumps({"host": "another", "pid": 12}))
    then = time.time() - age
    os.utime(path, (then, then))


def test_a_heartbeat_of_another_machine_is_seen(tmp_path):
    foreign(tmp_path)
    ended = threading.Event()

    def beat():
        while not ended.wait(0.05):
            os.utime(tmp_path / LOCK)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(ValueError, match="is in use by process 12 on another"):
            RunLock(tmp_path, beat=0.2, watch=5)
    finally:
        ended.set()
        thread.join()


def test_a_file_system_without_locks_has_the_heartbeat(tmp_path, monkeypatch):
    def unsupported(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.lockf", unsupported)
    lock = RunLock(tmp_path, beat=0.1)
    # another process of this machine, as this one sees it
    monkeypatch.setattr("sra_fast.training.run_lock._held", {})
    with pytest.raises(ValueError, match=f"is in use by process {os.getpid()}"):
        RunLock(tmp_path, beat=0.1, watch=10)
    lock.release()
    RunLock(tmp_path).release()


@pytest.mark.parametrize("age", [3600.0, 0.1])
def test_a_machine_that_is_gone_does_not_keep_it(tmp_path, age):
    """The heartbeat is old, or does not move any more."""
    foreign(tmp_path, age)
    begun = time.monotonic()
    lock = RunLock(tmp_path, beat=0.2, watch=30)
    took = time.monotonic() - begun
    assert took < 0.3 if age > 100 else 0.3 < took < 10
    assert json.loads((tmp_path / LOCK).read_text())["host"] == socket.gethostname()
    lock.release()
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]


def test_a_lock_beats(tmp_path):
    lock = RunLock(tmp_path, beat=0.02)
    first = (tmp_path / LOCK).stat().st_mtime_ns
    deadline = time.monotonic() + 10
    while (tmp_path / LOCK).stat().st_mtime_ns == first and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (tmp_path / LOCK).stat().st_mtime_ns > first
    lock.release()


@pytest.mark.parametrize("text", ["", "no json", "[1]", '{"pid": 3}'])
def test_what_a_crash_left_in_the_lock_does_not_matter(tmp_path, text):
    (tmp_path / LOCK).write_text(text)
    if text == '{"pid": 3}':
        old = time.time() - 3600
        os.utime(tmp_path / LOCK, (old, old))
    RunLock(tmp_path).release()
