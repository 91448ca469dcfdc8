"""A process for many cases: answers, errors, what ends it, and that the next case starts another."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.step.worker import ROOT, Failure, Worker

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


# dies while its child holds the output
CHILD_HOLDS_THE_OUTPUT = """
import subprocess, sys
child = subprocess.Popen(["sleep", "60"])
print(f"child {child.pid}")
sys.stdin.readline()
sys.exit("KeyError: gone")
"""


def is_running(pid: int) -> bool:
    """Whether the process exists and has not ended; nobody may have waited for it yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def ends_within(pid: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not is_running(pid)


def test_a_child_that_holds_the_output_is_not_waited_for(make_worker, capsys):
    worker = make_worker(CHILD_HOLDS_THE_OUTPUT)
    begin = time.monotonic()
    with pytest.raises(Failure, match=r"the process has ended \(1\): KeyError: gone"):
        worker.ask(["a"], 50)
    assert time.monotonic() - begin < 25
    # the child is ended as well
    child = int(capsys.readouterr().out.split()[1])
    assert ends_within(child, 10)


def test_a_process_that_only_closes_its_output_is_not_waited_for(make_worker):
    worker = make_worker("import os, time; os.close(1); time.sleep(60)")
    begin = time.monotonic()
    with pytest.raises(Failure, match="closed its output and does not end"):
        worker.ask(["a"], 2)
    assert time.monotonic() - begin < 25
    assert worker.process is None


def test_a_process_that_never_stops_printing_is_ended(make_worker):
    worker = make_worker("while True: print('again')")
    with pytest.raises(Failure, match="not finished in 1 s"):
        worker.ask(["a"], 1)


def test_bytes_of_another_encoding_cost_no_answer(make_worker, capsys):
    program = """
import sys
sys.stdin.readline()
sys.stdout.buffer.write(b"\\xff\\xfe from a library\\n")
print('RESULT {"ms": 1, "last": true}')
"""
    assert make_worker(program).ask(["a"], 60)["ms"] == 1
    assert "from a library" in capsys.readouterr().out


def test_half_an_answer_is_a_failure(make_worker):
    worker = make_worker("""input(); print('RESULT {"ms": 1', end='')""")
    with pytest.raises(Failure, match="half an answer: RESULT"):
        worker.ask(["a"], 60)
    assert worker.process is None


def test_the_process_ends_with_its_parent():
    """It has a session of its own, so a signal to the parent's group does not reach it."""
    program = f"""
import os, sys
from benchmarks.step.worker import Worker
worker = Worker([sys.executable, "-u", "-c", {PROGRAM!r}], dict(os.environ))
print(worker.ask(["a"], 60)["pid"], flush=True)
worker.ask(["sleep"], 60)
"""
    command = [sys.executable, "-u", "-c", program]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        pid = int(next(line for line in parent.stdout if line.strip().isdigit()))
        assert is_running(pid)
        parent.kill()
        assert ends_within(pid, 10)
