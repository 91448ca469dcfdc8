"""Which process stalls, and where: with processes that really do."""

import logging
import re
import time

import pytest
from launch import free_port
from ranks import run_ranks

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


def test_one_process_says_where_it_is_at_doubling_intervals(caplog):
    with caplog.at_level(logging.WARNING), Watchdog(0.2 / 60, rank=0, world=1) as watchdog:
        for step in range(1, 4):
            watchdog.at(step, "next batch")
            time.sleep(0.05)
        watchdog.at(3, "save")
        assert caplog.messages == []
        until = time.monotonic() + 20
        while len(caplog.messages) < 3 and time.monotonic() < until:
            time.sleep(0.01)
    seconds = [float(re.search(r"for (\d+) s", line)[1]) for line in caplog.messages]
    assert seconds == sorted(seconds)
    assert all(line.endswith("rank 0 is in step 3, phase save") for line in caplog.messages)
    times = [record.created for record in caplog.records]
    assert times[2] - times[1] > 1.5 * (times[1] - times[0])


def test_no_minutes_no_threads():
    with Watchdog(0, rank=0, world=2) as watchdog:
        watchdog.at(1, "next batch")
        assert watchdog._threads == []


RANKS = """
import logging
from sra_fast.training.watchdog import Watchdog

def main(rank):
    logging.basicConfig(format="from %(message)s")
    pids = [None] * WORLD
    dist.all_gather_object(pids, os.getpid())
    with Watchdog({minutes}, period={period}) as watchdog:
        for step in (11, 12):
            watchdog.at(step, "next batch")
            watchdog.at(step, "gradients")
            dist.barrier()
        watchdog.at(13, "next batch")
        if rank == {who}:
            # the others hear of this step, then nothing more
            time.sleep(1.0)
            {stalls}
        watchdog.at(13, "gradients")
        time.sleep({seconds})
        if rank == {speaker}:
            {after}
"""


def warned(done) -> list[str]:
    lines = [line for line in done.stderr.splitlines() if "no step for" in line]
    return [re.sub(r"for \d+ s", "for N s", line) for line in lines]


@pytest.mark.parametrize("who", [0, 1])
def test_a_stopped_process_is_named(tmp_path, who):
    speaker = 1 - who
    source = RANKS.format(
        minutes=3.0 / 60,
        # silent after 0.4 s
        period=0.1,
        who=who,
        stalls="os.kill(os.getpid(), signal.SIGSTOP)",
        seconds=4.5,
        speaker=speaker,
        after=f"os.kill(pids[{who}], signal.SIGKILL)",
    )
    # the store of a launcher that has none is in rank 0, which stops too
    done = run_ranks(source, 2, tmp_path, port=free_port())
    assert warned(done)[:1] == [
        f"from no step for N s: rank {who} has not been heard of since step 13, phase next batch; "
        f"rank {speaker} waits in step 13, phase gradients"
    ], done.stderr


def test_a_slow_loader_is_named(tmp_path):
    source = RANKS.format(
        minutes=3.0 / 60,
        period=0.3,
        who=1,
        stalls="time.sleep(5.0)",
        seconds=4.5,
        speaker=0,
        after="pass",
    )
    done = run_ranks(source, 3, tmp_path, port=free_port())
    assert done.returncode == 0, done.stderr
    assert warned(done)[:1] == [
        "from no step for N s: rank 1 is in step 13, phase next batch; "
        "ranks 0, 2 wait in step 13, phase gradients"
    ], done.stderr
