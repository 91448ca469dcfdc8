"""Signals are noted, and nothing else happens until the step ends."""

import math
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from textwrap import dedent

import pytest
from launch import ROOT, environment

from sra_fast.training import signals
from sra_fast.training.signals import StopSignals, stopped
from sra_fast.utils.stopping import INTERRUPTED

# seconds after which something that was waited for has not happened: no test measures time by it
LIMIT = 60


@pytest.mark.parametrize("number", signals.NOTED)
def test_a_signal_is_noted_and_its_handler_comes_back(number):
    before = signal.getsignal(number)
    with StopSignals() as stop:
        assert stop.asked is None and stop.code == 0
        os.kill(os.getpid(), number)
        # a handler runs before the next instruction of the main thread
        assert stop.asked == number.name
        # the first one counts
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.code == number
    assert signal.getsignal(number) == before


def test_what_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.asked is None
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_forwarded_interrupt_is_no_second_one(monkeypatch):
    monkeypatch.setattr(signals, "SAME_INTERRUPT", math.inf)
    # a slow machine must not end the tests
    monkeypatch.setattr(signals, "INTERRUPT_GRACE", math.inf)
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.asked == "SIGINT"
        monkeypatch.setattr(signals, "SAME_INTERRUPT", -1.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_another_thread_installs_no_handlers():
    before = [signal.getsignal(number) for number in signals.NOTED]
    found = []

    def run():
        with StopSignals() as stop:
            found.extend(signal.getsignal(number) for number in signals.NOTED)
            found.append(stop.asked)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [*before, None]


# a shell lets its background jobs ignore Ctrl-C, and their children inherit that
HEARS = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "


@pytest.fixture(autouse=True)
def hears_interrupts():
    """As in a terminal, also where the tests run as a background job."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def start(source: str) -> subprocess.Popen:
    """Python in a process of its own; it prints `ready` when it can be signalled."""
    child = subprocess.Popen(
        [sys.executable, "-c", f"{HEARS}sys.path.insert(0, {str(ROOT)!r})\n{dedent(source)}"],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout.readline() == "ready\n", child.stderr.read()
    return child


STUCK = """
from sra_fast.training import signals
signals.SAME_INTERRUPT = 0.1
signals.INTERRUPT_GRACE = 0.2
with signals.StopSignals():
    print("ready", flush=True)
    # in a library's call that no signal interrupts, like one that waits for another process
    import ctypes
    mutex = ctypes.create_string_buffer(64)
    for _ in range(2):
        ctypes.CDLL(None).pthread_mutex_lock(mutex)
"""


def test_a_second_interrupt_ends_a_process_whose_main_thread_is_stuck():
    child = start(STUCK)
    child.send_signal(signal.SIGINT)
    # one never ends it, and this only gives a wrong end the time to happen
    time.sleep(0.5)
    assert child.poll() is None
    until = time.monotonic() + LIMIT
    while child.poll() is None and time.monotonic() < until:
        # a slow process may see two as one
        child.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            child.wait(0.15)
    # more of them, within the grace of the one before, do not put off the end
    assert child.poll() == INTERRUPTED
    _, err = child.communicate()
    assert err == ""


# a launcher that has ended, and a main thread that does not get to a checkpoint
LATE = """
from sra_fast.training import signals
from sra_fast.utils.processes import LauncherWatch
signals.ORPHAN_GRACE = 0.2
signals.LINE_GRACE = {line_grace}
launchers = LauncherWatch()
launchers.orphaned = True
with signals.StopSignals(launchers) as stop:
    assert stop.asked == "the end of its launcher"
    print("ready", flush=True)
    {stuck}
"""
HOLDS_STDERR = """
    import os
    while True:
        os.write(2, b"x" * 100000)
"""


def test_an_orphan_that_does_not_stop_is_ended_and_has_saved_nothing():
    child = start(LATE.format(line_grace=60, stuck="import time; time.sleep(600)"))
    _, err = child.communicate(timeout=LIMIT)
    # 75 would say that there is a checkpoint
    assert child.returncode == 1
    assert err == (
        "error: the launcher has ended, and the run did not stop within 0.2 s; "
        "--train.resume auto resumes from the last whole checkpoint\n"
    )


def test_an_orphan_whose_stderr_is_full_is_ended():
    child = start(LATE.format(line_grace=0.2, stuck=HOLDS_STDERR))
    # nobody reads its pipe
    assert child.wait(LIMIT) == 1
    child.communicate()


# a launcher that ends while the process that it started goes on
LAUNCHER = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, *sys.argv[1:]])
time.sleep(600)
"""


def orphaned(tmp_path: Path, source: str, *args) -> None:
    """Run Python under a launcher that is killed once it prints `ready`; then nobody reads stdout.

    Its stderr goes to the file ``err``.
    """
    launcher = tmp_path / "torchrun"
    launcher.write_text(LAUNCHER)
    script = tmp_path / "launched.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{dedent(source)}")
    with (tmp_path / "err").open("w") as err:
        child = subprocess.Popen(
            [sys.executable, launcher, script, *map(str, args)],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=err,
            text=True,
        )
    # what the libraries print comes before it
    assert "ready\n" in iter(child.stdout.readline, ""), (tmp_path / "err").read_text()
    child.stdout.close()
    child.kill()
    child.wait()


def read_when_written(file: Path) -> str:
    until = time.monotonic() + LIMIT
    while not (file.exists() and file.read_text()) and time.monotonic() < until:
        time.sleep(0.05)
    return file.read_text()


LAUNCHED = """
import time
from pathlib import Path
from sra_fast.training.signals import StopSignals
from sra_fast.utils.streams import outlive_streams
outlive_streams()
with StopSignals() as stop:
    print("ready", flush=True)
    until = time.monotonic() + 60
    while not stop.asked and time.monotonic() < until:
        time.sleep(0.05)
    # nobody reads this any more
    print("x" * 100000, flush=True)
Path(sys.argv[1]).write_text(str(stop.asked))
"""


def test_an_orphan_stops_and_outlives_its_streams(tmp_path):
    orphaned(tmp_path, LAUNCHED, tmp_path / "asked")
    assert read_when_written(tmp_path / "asked") == "the end of its launcher"


# its launcher ends when the training program begins to import the libraries
IMPORTING = """
import os, time
from pathlib import Path
from sra_fast import train

class AtTheFirst:
    def find_spec(self, name, *rest):
        if name == "torch":
            sys.meta_path.remove(self)
            launcher = os.getppid()
            print("ready", flush=True)
            until = time.monotonic() + 60
            while os.getppid() == launcher and time.monotonic() < until:
                time.sleep(0.01)

assert "torch" not in sys.modules
sys.meta_path.insert(0, AtTheFirst())
code, *sys.argv[1:] = sys.argv[1:]
try:
    train.main()
except SystemExit as end:
    import logging
    # its handler keeps the stream that it finds at its import
    logging.getLogger("DeepSpeed").error("x" * 100000)
    Path(code).write_text(str(end.code))
"""


def test_a_launcher_that_ends_during_the_imports_is_noticed(tmp_path):
    run = ("--data.name", "digits", "--train.out", tmp_path / "runs", "--train.loggers", "[]")
    orphaned(tmp_path, IMPORTING, tmp_path / "code", *run)
    said = (tmp_path / "err").read_text
    assert read_when_written(tmp_path / "code") == "75", said()
    assert said() == (
        "stopped by the end of its launcher after step 0; there was nothing to save\n"
    )
    assert not list(tmp_path.glob("runs/*/checkpoints/step_*"))


def test_the_line_of_a_stop():
    assert str(stopped(signal.SIGTERM, 1234, saved=True)) == (
        "stopped by SIGTERM after step 1234; checkpoint step_00001234 is whole; "
        "resume with --train.resume auto"
    )
    assert str(stopped(signals.LAUNCHER_GONE, 0, saved=False)) == (
        "stopped by the end of its launcher after step 0; there was nothing to save"
    )
