"""Names that nobody has registered."""

import subprocess
import sys

import pytest
from launch import ROOT

from sra_fast.utils import registry

REGISTRIES = {
    name: part for name, part in vars(registry).items() if isinstance(part, registry.Registry)
}


def python(statement: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", statement], cwd=ROOT, capture_output=True, text=True
    )


def test_a_config_before_its_targets_are_imported():
    done = python("from sra_fast.config.schema import Config; Config()")
    assert done.stderr.splitlines()[-1] == (
        "ValueError: expected an alignment target, got 'ema_teacher' before any is registered: "
        "import sra_fast.alignment"
    )


@pytest.mark.parametrize(
    "kind, expected", [("evaluation", "an evaluation"), ("logger", "a logger")]
)
def test_a_name_that_does_not_exist(kind, expected):
    names = registry.Registry(kind, "room")
    names.register("first")(int)
    names.register("second")(float)
    with pytest.raises(ValueError, match=f"^expected {expected} of first, second, got 'third'$"):
        names["third"]


def test_what_a_message_asks_for_registers_the_parts():
    """In one new process: the modules in the order of the registries."""
    checks = [
        f"import {part.room}; assert list(registry.{name}), {name!r}"
        for name, part in REGISTRIES.items()
    ]
    done = python("; ".join(["from sra_fast.utils import registry", *checks]))
    assert done.returncode == 0, done.stderr
