"""What ranks tell each other: the same maxima at the same step on all of them."""

import json

import pytest
from ranks import run_ranks

from sra_fast.training.agreement import Agreement

RANKS = """
import json
from sra_fast.training.agreement import Agreement

def main(rank):
    for every in (1, 2, 5):
        agreement = Agreement(("stop", "error"), every)
        seen = {}
        for step in range(1, 9):
            if step == 3 and rank == 1:
                agreement.tell(stop=15)
            if step == 4 and rank == 2:
                agreement.tell(stop=2, error=7)
            if decided := agreement.step(step):
                seen[step] = list(decided.values())
        # what the last all-reduce has not told, and what was told since
        agreement.tell(error=rank)
        last = list(agreement.now().values())
        agreement.close()
        # in one write: the ranks share the pipe
        sys.stdout.write(json.dumps([every, seen, last]) + "\\n")
"""
# every: {step: stop and error}
EXPECTED = {
    # what is told at step 3 is in the all-reduce of step 3, which is taken at step 4
    1: {2: [0, 0], 3: [0, 0], 4: [15, 0], 5: [2, 7], 6: [0, 0], 7: [0, 0], 8: [0, 0]},
    # both are told before the all-reduce of step 4
    2: {3: [0, 0], 5: [15, 7], 7: [0, 0]},
    5: {6: [15, 7]},
}


def test_all_ranks_see_the_maxima_at_one_step(tmp_path):
    done = run_ranks(RANKS, 3, tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == 9
    for every, seen, last in lines:
        assert {int(step): maxima for step, maxima in seen.items()} == EXPECTED[every]
        assert last == [0, 2]


def test_one_process_is_told_at_once(one_process):
    agreement = Agreement(("stop",), every=2)
    assert agreement.step(1) == {"stop": 0}
    agreement.tell(stop=3)
    agreement.tell(stop=1)
    assert agreement.step(2) == {"stop": 3}
    assert agreement.step(3) == {"stop": 0}
    assert agreement.close() is None


def test_a_name_that_nobody_agreed_on_is_an_error(one_process):
    with pytest.raises(KeyError, match="halt"):
        Agreement(("stop",)).tell(halt=1)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        Agreement(("stop",), every=0)
