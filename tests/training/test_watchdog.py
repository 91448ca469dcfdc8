"""Which process stalls, and where: with processes that really do."""

import logging
import re
import time
from functools import partial

import pytest
from launch import free_port
from ranks import run_ranks

from sra_fast.training import watchdog as module
from sra_fast.training.watchdog import Place, Watchdog, stall_line

NEXT = Place(13, 0, "next batch")
GRADIENTS = Place(13, 1, "gradients")
BEFORE = Place(12, 0, "next batch")


@pytest.mark.parametrize(
    "waited, places, silent, line",
    [
        (
            605,
            {0: GRADIENTS, 1: BEFORE},
            {1},
            "no step for 10 min: rank 1 has not been heard of since step 12, phase next batch; "
            "rank 0 waits in step 13, phase gradients",
        ),
        (
            600,
            {0: GRADIENTS, 1: GRADIENTS, 2: NEXT, 3: GRADIENTS},
            set(),
            "no step for 10 min: rank 2 is in step 13, phase next batch; "
            "ranks 0-1, 3 wait in step 13, phase gradients",
        ),
        (
            1200,
            dict.fromkeys(range(8), GRADIENTS),
            set(),
            "no step for 20 min: ranks 0-7 are in step 13, phase gradients",
        ),
        (
            30,
            {1: NEXT},
            {0, 2, 3},
            "no step for 30 s: ranks 0, 2-3 have not been heard of; "
            "rank 1 waits in step 13, phase next batch",
        ),
    ],
)
def test_the_line_names_who_does_not_follow(waited, places, silent, line):
    assert stall_line(waited, places, silent) == line


class Clock:
    """Time that passes only while somebody waits, in the place of ``time`` and of an event."""

    def __init__(self, end: float):
        self.now = 0.0
        self.end = end
        self.at = {}

    def monotonic(self) -> float:
        return self.now

    def wait(self, seconds: float) -> bool:
        self.now += seconds
        if action := self.at.pop(self.now, None):
            action()
        return self.now >= self.end


def test_a_line_at_doubling_intervals(monkeypatch, caplog):
    clock = Clock(end=120 * 60)
    monkeypatch.setattr(module, "time", clock)
    watchdog = Watchdog(10, rank=0, world=1, period=5.0)
    monkeypatch.setattr(watchdog, "_closing", clock)
    # a step per minute for half an hour, then a long save, and one more step
    for minute in range(30):
        clock.at[60.0 * minute] = partial(watchdog.at, minute, "next batch")
    clock.at[60.0 * 29 + 5] = partial(watchdog.at, 29, "save")
    clock.at[60.0 * 105] = partial(watchdog.at, 30, "gradients")
    with caplog.at_level(logging.WARNING):
        watchdog._judge()
    assert caplog.messages == [
        "no step for 10 min: rank 0 is in step 29, phase save",
        "no step for 20 min: rank 0 is in step 29, phase save",
        "no step for 40 min: rank 0 is in step 29, phase save",
        "no step for 10 min: rank 0 is in step 30, phase gradients",
    ]


def test_a_thread_of_its_own_says_it(caplog):
    watchdog = Watchdog(0.1 / 60, rank=0, world=1)
    watchdog.at(3, "save")
    with caplog.at_level(logging.WARNING), watchdog:
        until = time.monotonic() + 60
        while not caplog.messages and time.monotonic() < until:
            time.sleep(0.01)
    assert caplog.messages[0].endswith("rank 0 is in step 3, phase save")


def test_no_minutes_no_threads():
    with Watchdog(0, rank=0, world=2) as watchdog:
        watchdog.at(1, "next batch")
        assert watchdog._threads == []


# no rank goes on before what it waits for has happened: a slow machine only takes longer
RANKS = """
import logging
from sra_fast.training import watchdog as module

said = []
def note(record):
    said.append(record.getMessage())
    return True

def until(condition):
    # a test must end: what was waited for is then missing from its output
    end = time.monotonic() + 80
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)

def happened(name):
    return os.path.exists(os.path.join(FOLDER, name))

def happens(name):
    open(os.path.join(FOLDER, name), "w").close()

def main(rank):
    logging.basicConfig(format="from %(message)s")
    module.log.addFilter(note)
    pids = [None] * WORLD
    dist.all_gather_object(pids, os.getpid())
    watchdog = module.Watchdog(1.0 / 60, period=0.1)
    module.SILENT_PERIODS = {silent_periods}
    with watchdog:
        for step in (11, 12):
            watchdog.at(step, "next batch")
            watchdog.at(step, "gradients")
            dist.barrier()
        watchdog.at(13, "next batch")
        if rank == {who}:
            until(lambda: happened("heard"))
            {stalls}
        else:
            watchdog.at(13, "gradients")
        if rank == {speaker}:
            heard = watchdog._heard
            until(lambda: {who} in heard and heard[{who}].place.step == 13)
            happens("heard")
            until(lambda: said and said[-1].endswith({line!r}))
            {after}
            happens("said")
        until(lambda: happened("said"))
"""


def warned(done) -> list[str]:
    """What the warnings say, in order, without the seconds."""
    lines = [line for line in done.stderr.splitlines() if "no step for" in line]
    return [re.sub(r"^from no step for \d+ s: ", "", line) for line in lines]


@pytest.mark.parametrize("who", [0, 1])
def test_a_stopped_process_is_named(tmp_path, who):
    speaker = 1 - who
    line = (
        f"rank {who} has not been heard of since step 13, phase next batch; "
        f"rank {speaker} waits in step 13, phase gradients"
    )
    source = RANKS.format(
        silent_periods=4,
        who=who,
        stalls="os.kill(os.getpid(), signal.SIGSTOP)",
        speaker=speaker,
        line=line,
        after=f"os.kill(pids[{who}], signal.SIGKILL)",
    )
    # the store of a launcher that has none is in rank 0, which stops too
    done = run_ranks(source, 2, tmp_path, port=free_port())
    assert line in warned(done), done.stderr


def test_a_slow_loader_is_named(tmp_path):
    line = "rank 1 is in step 13, phase next batch; ranks 0, 2 wait in step 13, phase gradients"
    source = RANKS.format(
        # nobody is stopped, however slow the machine is
        silent_periods=1_000_000,
        who=1,
        stalls="pass",
        speaker=0,
        line=line,
        after="pass",
    )
    done = run_ranks(source, 3, tmp_path, port=free_port())
    assert done.returncode == 0, done.stderr
    assert warned(done)[-1:] == [line], done.stderr
    assert "heard of" not in done.stderr
