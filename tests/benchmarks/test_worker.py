"""A process for many cases: answers, errors, what ends it, and that the next case starts another."""

import os
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))

from clocks import FIELDS, Clocks  # noqa: E402
from worker import Failure, Worker  # noqa: E402

# answers with its process and what it was asked; some requests go wrong
PROGRAM = """
import os, sys, time
sys.path.insert(0, "{folder}")
from worker import serve

def handle(request):
    print("a library says something")
    what = request[0]
    if what == "sleep":
        time.sleep(60)
    if what == "die":
        print("Traceback\\nTorchError: the device is gone\\na warning after it", file=sys.stderr)
        sys.stderr.flush()
        os._exit(7)
    if what == "raise":
        raise ValueError("expected this, got that\\nand a second line")
    held.append(what)
    return {{"pid": os.getpid(), "asked": held[-1]}}

held = []
serve(handle, lambda: held[-1:] != ["breaks"])
"""


@pytest.fixture
def make(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(folder=ROOT / "benchmarks"))
    made = []

    def make(**options):
        made.append(Worker([sys.executable, "-u", str(program)], dict(os.environ), **options))
        return made[-1]

    yield make
    for worker in made:
        worker.stop()


def test_one_process_answers_and_survives_an_error(make, capsys):
    worker = make()
    first = worker.ask(["a"], 30)
    with pytest.raises(Failure, match="^ValueError: expected this, got that$"):
        worker.ask(["raise"], 30)
    second = worker.ask(["b"], 30)
    assert (first["asked"], second["asked"]) == ("a", "b") and first["pid"] == second[
        "pid"
    ] != os.getpid()
    assert "a library says something" in capsys.readouterr().out


def test_what_ends_the_process_costs_its_own_case_only(make):
    worker = make()
    pids = [worker.ask(["a"], 30)["pid"]]
    with pytest.raises(
        Failure, match=r"the process has ended \(7\): TorchError: the device is gone"
    ):
        worker.ask(["die"], 30)
    pids.append(worker.ask(["a"], 30)["pid"])
    with pytest.raises(Failure, match="not finished in 1 s"):
        worker.ask(["sleep"], 1.0)
    pids.append(worker.ask(["breaks"], 30)["pid"])
    # its answer counts; what it leaves behind is nobody's
    pids.append(worker.ask(["a"], 30)["pid"])
    assert len(set(pids)) == 4
    for pid in pids[:3]:
        assert not Path(f"/proc/{pid}").exists()


def test_a_process_for_every_request(make):
    worker = make(separate=True)
    assert worker.ask(["a"], 30)["pid"] != worker.ask(["a"], 30)["pid"]


def test_clock_power_and_throttling_of_a_time(tmp_path):
    lines = [
        "1980, 2619, 610.5, 55, 0x0000000000000000",
        "[N/A], 2619, [N/A], 55, 0x0000000000000004",
        "no device",
        "1410, 2619, 690.5, 60, 0x24",
    ]
    command = [sys.executable, "-c", f"print({chr(10).join(lines)!r})"]
    clocks = Clocks(tmp_path / "clocks.csv", command)
    clocks.process.wait()
    deadline = time.monotonic() + 30
    while len(clocks.readings) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    now = clocks.readings[0][0]
    assert clocks.between(now, now + 5) == {
        "sm_mhz": 1695.0,
        "watts": 650.5,
        "throttled": "power cap",
    }
    assert clocks.between(now + 60, now + 70) == {}
    text = (tmp_path / "clocks.csv").read_text().splitlines()
    assert (
        text[0] == "seconds," + ",".join(FIELDS)
        and len(text) == 4
        and text[1].endswith(",1980,2619,610.5,55,0x0000000000000000")
    )
    clocks.stop()


def test_without_a_driver_nothing_is_read():
    clocks = Clocks(command=["no-such-program"])
    assert clocks.between(0, 1e12) == {}
    clocks.stop()


def test_the_parent_survives_a_worker_that_cannot_start(tmp_path):
    worker = Worker([sys.executable, "-c", "raise SystemExit('no such model')"], dict(os.environ))
    with pytest.raises(Failure, match="the process has ended"):
        worker.ask(["a"], 30)
