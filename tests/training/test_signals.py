"""Signals are noted, and nothing else happens until the step ends."""

import os
import signal
import subprocess
import sys
import threading
import time
from textwrap import dedent

import pytest
import torch
from launch import ROOT, environment

from sra_fast.data.order import ShuffledBatches, make_loader
from sra_fast.data.training_data import TrainingData
from sra_fast.training import signals
from sra_fast.training.signals import StopSignals, stopped
from sra_fast.utils import processes
from sra_fast.utils.processes import is_launcher


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
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.asked == "SIGINT"
        monkeypatch.setattr(signals, "SAME_INTERRUPT", 0.0)
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


def start(source: str) -> subprocess.Popen:
    """Python in a process of its own; it prints `ready` when it can be signalled."""
    child = subprocess.Popen(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{dedent(source)}"],
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
    time.sleep(0.3)
    assert child.poll() is None
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=20)
    assert child.returncode == signals.INTERRUPTED
    assert err == ""


# a launcher that ends while the process that it started goes on
LAUNCHER = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {child!r}, {root!r}])
time.sleep(60)
"""
LAUNCHED = """
import sys, time
sys.path.insert(0, sys.argv[1])
from sra_fast.training.signals import StopSignals, outlive_streams
outlive_streams()
with StopSignals() as stop:
    print("ready", flush=True)
    until = time.monotonic() + 20
    while not stop.asked and time.monotonic() < until:
        time.sleep(0.05)
    # nobody reads these any more
    print("x" * 100000, flush=True)
    print("x" * 100000, flush=True, file=sys.stderr)
with open({out!r}, "w") as file:
    file.write(str(stop.asked))
"""


def test_an_orphan_stops_and_outlives_its_streams(tmp_path):
    said = tmp_path / "asked"
    launcher = tmp_path / "torchrun"
    launched = LAUNCHED.format(out=str(said))
    launcher.write_text(LAUNCHER.format(child=launched, root=str(ROOT)))
    child = subprocess.Popen(
        [sys.executable, launcher],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout.readline() == "ready\n"
    child.kill()
    child.wait()
    child.stdout.close()
    child.stderr.close()
    until = time.monotonic() + 20
    while not (said.exists() and said.read_text()) and time.monotonic() < until:
        time.sleep(0.05)
    assert said.read_text() == "the end of its launcher"


@pytest.mark.parametrize(
    "command, expected",
    [
        ("/usr/bin/python3 /env/bin/deepspeed --num_gpus 8 train.py", True),
        ("python -u -m deepspeed.launcher.launch --world_info x train.py", True),
        ("python -m torch.distributed.run train.py", True),
        ("/env/bin/python /env/bin/torchrun train.py", True),
        ("/env/bin/python /env/bin/accelerate launch train.py", True),
        ("pdsh -S -f 1024 -w a,b", True),
        ("python sra_fast/ablate.py --study x", True),
        ("/env/bin/python /env/bin/sra-fast ablate --study x", True),
        ("/env/bin/python /env/bin/sra-fast train", False),
        ("-bash", False),
        ("/usr/sbin/slurmstepd", False),
        ("python run_all.py --with some thing torchrun", False),
        ("", False),
    ],
)
def test_launchers_are_known_by_their_command(command, expected):
    assert is_launcher(command.split()) == expected


def test_only_launchers_that_follow_each_other_count(monkeypatch):
    # pid: (parent, command)
    tree = {9: (8, "python -m deepspeed.launcher.launch"), 8: (7, "deepspeed x"), 7: (6, "bash")}
    tree[6] = (1, "torchrun")
    monkeypatch.setattr(os, "getppid", lambda: 9)
    monkeypatch.setattr(processes, "_command", lambda pid: tree[pid][1].split())
    monkeypatch.setattr(processes, "_status", lambda pid: (processes.Process(pid, 0), tree[pid][0]))
    assert [p.pid for p in processes.launchers()] == [9, 8]


def test_the_line_of_a_stop():
    assert str(stopped(signal.SIGTERM, 1234, saved=True)) == (
        "stopped by SIGTERM after step 1234; checkpoint step_00001234 is whole; "
        "resume with --train.resume auto"
    )
    assert str(stopped(signals.LAUNCHER_GONE, 0, saved=False)) == (
        "stopped by the end of its launcher after step 0; there was nothing to save"
    )


class SlowData(TrainingData):
    """Says which process reads."""

    def __init__(self):
        self.labels = torch.zeros(64, dtype=torch.long)

    def __getitems__(self, indices):
        return torch.tensor([os.getpid()]), self.labels[indices]


def test_loader_processes_outlive_stop_signals_but_not_their_parent():
    order = ShuffledBatches(64, 0, 1, 1, 0, 1, 0, 60)
    batches = iter(make_loader(SlowData(), order, 1, cuda=False))
    worker = int(next(batches)[0])
    for number in (*signals.NOTED, signal.SIGTERM):
        # from a process that is not its parent
        subprocess.run(["kill", f"-{int(number)}", str(worker)], check=True)
    time.sleep(0.2)
    assert all(int(batch[0]) == worker for batch in batches)

    batches = iter(make_loader(SlowData(), order, 1, cuda=False))
    next(batches)
    process = batches._workers[0]
    # the loader would report that it is gone
    batches._shutdown = True
    os.kill(process.pid, signal.SIGTERM)
    process.join(20)
    assert process.exitcode == 0
