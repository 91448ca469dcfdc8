"""A process for many cases: answers, errors, what ends it, and that the next case starts another."""

import os
import sys
from pathlib import Path

import pytest

from benchmarks.step.worker import Failure, Worker

# answers with its process and what it was asked; some requests fail
PROGRAM = """
import os, sys, time
from benchmarks.step.worker import serve

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
    return {"pid": os.getpid(), "asked": held[-1]}

held = []
serve(handle, lambda: held[-1:] != ["breaks"])
"""


@pytest.fixture
def make_worker():
    made = []

    def make(program: str = PROGRAM, **options) -> Worker:
        # the worker's directory, the root of the checkout, is on the path of -c
        worker = Worker([sys.executable, "-u", "-c", program], dict(os.environ), **options)
        made.append(worker)
        return worker

    yield make
    for worker in made:
        worker.stop()


def test_one_process_for_many_cases_until_it_ends(make_worker, capsys):
    worker = make_worker()
    first = worker.ask(["a"], 60)
    with pytest.raises(Failure, match="^ValueError: expected this, got that$"):
        worker.ask(["raise"], 60)
    second = worker.ask(["b"], 60)
    assert (first["asked"], second["asked"]) == ("a", "b")
    # an error in a case does not end the process
    assert first["pid"] == second["pid"] != os.getpid()
    assert "a library says something" in capsys.readouterr().out

    pids = [first["pid"]]
    with pytest.raises(
        Failure, match=r"the process has ended \(7\): TorchError: the device is gone"
    ):
        worker.ask(["die"], 60)
    pids.append(worker.ask(["a"], 60)["pid"])
    with pytest.raises(Failure, match="not finished in 1 s"):
        worker.ask(["sleep"], 1.0)
    # memory is not released after this case: its answer counts, and the process ends
    pids.append(worker.ask(["breaks"], 60)["pid"])
    pids.append(worker.ask(["a"], 60)["pid"])
    assert len(set(pids)) == 4
    for pid in pids[:3]:
        assert not Path(f"/proc/{pid}").exists()


def test_a_process_for_every_request(make_worker):
    worker = make_worker(separate=True)
    assert worker.ask(["a"], 60)["pid"] != worker.ask(["a"], 60)["pid"]


def test_the_parent_survives_a_worker_that_cannot_start(make_worker):
    worker = make_worker("raise SystemExit('no such model')")
    with pytest.raises(Failure, match="the process has ended"):
        worker.ask(["a"], 60)
