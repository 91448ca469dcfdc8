"""Loader processes outlive every signal, and end with the training process however that ends."""

import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from itertools import product

import psutil
import pytest
import torch
from bare_training import train
from launch import ROOT, environment
from loader_worker import ENDINGS, WORK, started
from tiny_config import config

from sra_fast.data.digits import Digits
from sra_fast.data.loader import Batches
from sra_fast.training import signals
from sra_fast.training.plan import make_plan
from sra_fast.training.signals import Stopped, StopSignals
from sra_fast.training.trainer import build
from sra_fast.zero.process_group import init_distributed

# seconds after which something that was waited for has not happened: no test measures time by it
LIMIT = 60


def children() -> set[psutil.Process]:
    return set(psutil.Process().children())


def is_gone(pid: int) -> bool:
    """Whether a process has ended, or does so within the limit.

    Nobody may collect its exit code: then it stays in the table.
    """
    until = time.monotonic() + LIMIT
    while time.monotonic() < until:
        with suppress(psutil.NoSuchProcess):
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.05)
                continue
        return True
    return False


def test_they_outlive_stop_signals():
    batches, worker = started("idle")
    with batches:
        for number in (*signals.NOTED, signal.SIGTERM):
            # from a process that is not its parent
            send = f"import os; os.kill({worker}, {int(number)})"
            subprocess.run([sys.executable, "-c", send], check=True)
        # one that a signal ends would be missed by then
        time.sleep(0.2)
        assert all(int(batch[0]) == worker for batch in batches)


class Programs:
    """``loader_worker.py``, and what it says."""

    def __init__(self, run: subprocess.Popen):
        self.run = run
        # read without a buffer, in which a line could wait unseen
        self.said = b""

    def start(self, ending: str, work: str) -> int:
        """The number of the loader process of a new program."""
        self.run.stdin.write(f"{ending}, {work}\n".encode())
        return self.number()

    def number(self) -> int:
        """The next line; AssertionError if it does not come within the limit."""
        until = time.monotonic() + LIMIT
        while b"\n" not in self.said:
            left = until - time.monotonic()
            assert left > 0 and select.select([self.run.stdout], [], [], left)[0], "no answer"
            part = os.read(self.run.stdout.fileno(), 100)
            assert part, "it has ended"
            self.said += part
        line, _, self.said = self.said.partition(b"\n")
        return int(line)


@pytest.fixture(scope="module")
def programs():
    command = [sys.executable, ROOT / "tests/loader_worker.py"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "bufsize": 0}
    # a group of its own, of which nothing is left afterwards
    with subprocess.Popen(command, env=environment(), process_group=0, **pipes) as run:
        yield Programs(run)
        with suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)


# one that is stuck ends by its parent's hand, or when it is stuck no longer
@pytest.mark.parametrize(
    "ending, work",
    [
        (ending, work)
        for ending, work in product(ENDINGS, WORK)
        if work != "is stuck" or ending in ("returns", "exits")
    ],
)
def test_they_end_with_their_parent(programs, ending, work):
    worker = programs.start(ending, work)
    try:
        assert programs.number() == ENDINGS[ending]
        assert is_gone(worker)
    finally:
        with suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL)


@pytest.mark.parametrize("work", WORK)
def test_they_are_gone_when_the_batches_are_closed(work):
    if torch.cuda.is_available():
        # else the thread that pins batches opens the device after the files are listed
        torch.empty(1, pin_memory=True).cuda()
    # what other tests have left in this process may be closed at any time
    files = set(os.listdir("/proc/self/fd"))
    before = children()
    batches, _ = started(work)
    assert children() - before
    # started later, they have copies of what was open
    others, other = started("idle")
    with others:
        batches.close()
        assert {child.pid for child in children() - before} == {other}
        assert list(batches) == []
        batches.close()
        assert len(list(others)) == 59
    assert not children() - before
    # threads of multiprocessing close the queues
    until = time.monotonic() + LIMIT
    while set(os.listdir("/proc/self/fd")) - files and time.monotonic() < until:
        time.sleep(0.05)
    assert set(os.listdir("/proc/self/fd")) <= files


def test_they_are_gone_when_an_error_still_holds_the_iterator():
    before = children()
    batches, _ = started("fails")
    with batches, pytest.raises(ZeroDivisionError) as raised:
        next(batches)
    assert raised.tb is not None
    assert not children() - before


def test_a_run_leaves_none_behind(tmp_path, monkeypatch):
    """Even while the traceback of what has ended it holds its frames."""
    monkeypatch.setattr(Digits, "in_memory", False)
    before = children()
    seen = set()
    following = Batches.__next__
    cfg = config(*"--train.steps 3 --train.loggers [] --train.precision fp32".split())
    trainer = build(make_plan(cfg), init_distributed())
    with StopSignals() as stop, pytest.raises(Stopped) as raised:

        def stopped_meanwhile(self):
            stop.code = signal.SIGTERM
            seen.update(children() - before)
            return following(self)

        monkeypatch.setattr(Batches, "__next__", stopped_meanwhile)
        train(trainer, Digits(), tmp_path, stop=stop)
    assert seen and raised.tb is not None
    assert not children() - before
