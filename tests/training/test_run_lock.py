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

from sra_fast.training.run_lock import LOCK, RunLock, check_held, token_in

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


@pytest.mark.parametrize("age", [3600.0, 0.0])
def test_a_machine_that_is_gone_does_not_keep_it(tmp_path, monkeypatch, age):
    """The heartbeat is old, or does not move any more: only then it is watched for a while."""
    foreign(tmp_path, age)
    # the file system's clock, which goes on with every look at the heartbeat
    now = (tmp_path / LOCK).stat().st_mtime_ns + int(age * 1e9)
    looks = []

    def server_time(lock):
        looks.append(lock)
        return now + int((len(looks) - 1) * 0.2e9)

    monkeypatch.setattr(RunLock, "_server_time", server_time)
    lock = RunLock(tmp_path, beat=0.2, watch=600)
    # more than three beats of 0.2 s must have passed
    assert len(looks) == (1 if age > 100 else 5)
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


@pytest.mark.parametrize("text", ["", "no json", "[1]", '{"pid": 3}', "[" * 4000])
def test_what_a_crash_left_in_the_lock_does_not_matter(tmp_path, text):
    (tmp_path / LOCK).write_text(text)
    if text == '{"pid": 3}':
        old = time.time() - 3600
        os.utime(tmp_path / LOCK, (old, old))
    RunLock(tmp_path).release()


@pytest.mark.parametrize("kind", ["a folder", "a link"])
def test_something_else_in_its_place_is_named(tmp_path, kind):
    """A link would lock, and empty, a file elsewhere."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("of somebody")
    path = tmp_path / LOCK
    path.mkdir() if kind == "a folder" else path.symlink_to(elsewhere)
    with pytest.raises(ValueError, match=f"expected a file {path}, found {kind}: remove it"):
        RunLock(tmp_path)
    assert elsewhere.read_text() == "of somebody"


def test_a_lock_that_was_lost_is_noticed(tmp_path):
    check_held(tmp_path)
    lock = RunLock(tmp_path)
    check_held(tmp_path)
    mine = (tmp_path / LOCK).read_bytes()
    (tmp_path / LOCK).rename(tmp_path / "aside")
    with pytest.raises(ValueError, match="lock was removed: another process may write"):
        check_held(tmp_path)
    # what another process would make there
    (tmp_path / LOCK).write_bytes(mine)
    with pytest.raises(ValueError, match="lock is another file now"):
        check_held(tmp_path)
    (tmp_path / "aside").replace(tmp_path / LOCK)
    check_held(tmp_path)
    # a machine that does not see this one's lock
    (tmp_path / LOCK).write_text(json.dumps({"host": "another", "pid": 12, "token": "0"}))
    with pytest.raises(ValueError, match="was taken over by process 12 on another"):
        check_held(tmp_path)
    lock.release()
    # it is the other's now
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == 12
    check_held(tmp_path)


def test_other_processes_see_its_token(tmp_path):
    assert token_in(tmp_path) is None
    for text in ("", "[1]", "[" * 4000, "{}"):
        (tmp_path / LOCK).write_text(text)
        assert token_in(tmp_path) is None
    (tmp_path / LOCK).write_text('{"token": "a"}')
    assert token_in(tmp_path) == "a"
