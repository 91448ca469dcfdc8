"""Ranks that fail: all of them end with one line, whatever the error is and whoever has it."""

import errno
import json
import os

import pytest
import torch
from ranks import run_ranks

from sra_fast.utils.collectives import agreed, gathered, reason

RANKS = """
import json
from sra_fast.utils.collectives import agreed, gathered

class Odd(Exception):
    # nothing that can be pickled
    def __init__(self, first, second):
        super().__init__(first)
        self.handle = lambda: second

class Refused(ValueError):
    pass

def fails(error):
    raise error

def no_words(error):
    raise KeyError("no words")

def main(rank):
    # a rank that waits for ever ends the test
    signal.alarm(60)
    group = dist.new_group(backend="gloo")
    full = OSError(28, "No space left on device", "/disk/file")
    cases = {
        "value": lambda: agreed(lambda: rank and fails(ValueError("expected 1, got 2"))),
        "disk": lambda: agreed(lambda: rank and fails(full)),
        "program": lambda: agreed(lambda: rank and fails(KeyError("key"))),
        "first rank": lambda: agreed(lambda: fails(TypeError("type")), ranks=(0,)),
        "odd": lambda: agreed(lambda: rank and fails(Odd("odd\\n thing", 2))),
        "memory": lambda: agreed(lambda: rank and fails(torch.OutOfMemoryError("too much"))),
        "both": lambda: agreed(lambda: fails(ValueError(f"of rank {rank}"))),
        "line": lambda: agreed(
            lambda: rank and fails(full),
            group=group,
            line_of=lambda error: f"{error.filename} is full",
            raises=Refused,
        ),
        "no words": lambda: agreed(lambda: rank and fails(full), line_of=no_words),
    }
    told = {}
    for name, case in cases.items():
        try:
            told[name] = case()
        except Exception as error:
            told[name] = f"{type(error).__name__}: {error}"
    told["results"] = [
        agreed(lambda: 10 + rank),
        agreed(lambda: 10 + rank, ranks=(1,)),
        agreed(lambda: 10 + rank, group=group),
        gathered(rank, group),
    ]
    sys.stdout.write(json.dumps(told) + "\\n")
"""
EXPECTED = {
    "value": "ValueError: expected 1, got 2",
    "disk": "ValueError: [Errno 28] No space left on device: '/disk/file'",
    "program": "RuntimeError: KeyError: 'key'",
    "first rank": "RuntimeError: TypeError: type",
    "odd": "RuntimeError: Odd: odd thing",
    "memory": "OutOfMemoryError: OutOfMemoryError: too much",
    "both": "ValueError: of rank 0",
    "line": "Refused: /disk/file is full",
    "no words": "ValueError: [Errno 28] No space left on device: '/disk/file'",
    "results": [[10, 11], [None, 11], [10, 11], [0, 1]],
}


def test_an_error_of_one_rank_is_the_same_line_on_all(tmp_path):
    done = run_ranks(RANKS, 2, tmp_path)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line) for line in done.stdout.splitlines()] == [EXPECTED, EXPECTED]
    # faults of the program only, each from the rank that has it
    logged = [
        line for line in done.stderr.splitlines() if line.startswith("a fault of the program")
    ]
    assert sorted(logged) == [f"a fault of the program on rank {rank}" for rank in (0, 1, 1, 1)]
    ends = [line for line in done.stderr.splitlines() if line.startswith(("KeyError", "TypeError"))]
    assert sorted(ends) == ["KeyError: 'key'", "KeyError: 'no words'", "TypeError: type"]


def raising(error: BaseException):
    def work():
        raise error

    return work


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3)])
def test_what_ends_a_process_is_no_error_of_the_work(one_process, caplog, error):
    with pytest.raises(type(error)) as caught:
        agreed(raising(error))
    assert caught.value is error and caplog.text == ""


def test_the_traceback_of_a_fault_of_the_program_is_kept(one_process, caplog):
    fault = KeyError("key")
    with pytest.raises(RuntimeError, match="^KeyError: 'key'$") as caught:
        agreed(raising(fault))
    assert caught.value.__cause__ is fault
    (record,) = caplog.records
    assert record.levelname == "ERROR" and record.exc_info[1] is fault


def test_what_a_user_can_change_has_no_traceback(one_process, caplog):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/disk/file")
    with pytest.raises(ValueError) as caught:
        agreed(raising(full))
    assert str(caught.value) == str(full) and caplog.text == ""


def test_one_process_sends_nothing(one_process):
    """What it has need not be something that can be pickled."""
    value = object()
    assert agreed(lambda: value) == [value]
    assert agreed(lambda: value, ranks=(1,)) == [None]
    assert gathered(value) == [value]


def test_reasons():
    assert reason(ValueError("expected 1,\ngot 2")) == "expected 1,\ngot 2"
    assert reason(torch.OutOfMemoryError("too\n  much")) == "OutOfMemoryError: too much"
