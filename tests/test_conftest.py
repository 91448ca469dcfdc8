"""What `make test-fast` leaves out: names of tests that exist, each matched as a whole word."""

from pathlib import Path

import pytest
from conftest import SLOW, is_slow

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", [name for group in SLOW.values() for name in group])
def test_what_is_called_slow_exists(name):
    """A test that was renamed would become a fast one, and nobody would notice."""
    path, _, function = name.partition("::")
    assert (ROOT / path).exists()
    if function:
        assert f"def {function.partition('[')[0]}(" in (ROOT / path).read_text()


def test_there_is_one_conftest():
    """Tests import from it by name, and a second one would hide it."""
    assert list((ROOT / "tests").rglob("conftest.py")) == [ROOT / "tests" / "conftest.py"]


def test_names_end_with_a_word():
    assert is_slow("tests/ops/test_ddp.py::test_gradients_are_those_of_one_process")
    assert is_slow("tests/scripts/test_scripts.py::test_any[1-2]")
    assert is_slow("tests/ops/test_concat_columns.py::test_columns_side_by_side[33-1152-3-float32]")
    assert not is_slow("tests/ops/test_concat_columns.py::test_columns_side_by_side[5-1-2-float32]")
    assert not is_slow("tests/ops/test_adaln.py::test_operator_registration_of_another")


def test_nothing_that_must_be_fast_is_slow():
    """The rule that patterns of planted bugs occur once guards every edit of a kernel."""
    assert not is_slow("tests/test_planted_bugs.py::test_every_pattern_occurs_exactly_once")
    assert not is_slow("tests/alignment/test_objective.py")
