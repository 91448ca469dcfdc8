"""Every command that the documents show is one that its program takes; some are executed.

A new command needs a class in document_classes.py: `ParseOnly` with the reason, or `Execute` with
what makes it small.
"""

import re
import shlex
from dataclasses import fields
from pathlib import Path

import documents
import pytest
from document_classes import CLASSES, COMMANDS, Execute, executed, key_of
from documents import (
    DOCUMENTS,
    WAITING,
    Command,
    commands_of,
    named_options,
    options_of,
    parse,
    shown_commands,
)
from launch import ROOT

from sra_fast.config.cli import SECTIONS, SHORT_FORMS
from sra_fast.config.schema import constructor_arguments
from sra_fast.utils.registry import MODEL_FAMILIES, TARGETS


def test_every_command_has_a_class():
    without = [str(command) for command in COMMANDS if key_of(command) is None]
    assert without == [], "give it a class in document_classes.py"


def test_every_class_has_a_command():
    assert set(CLASSES) == {key_of(command) for command in COMMANDS}


def test_every_stand_in_stands_for_a_word():
    """A misspelt one would leave the document's word, and the test another meaning."""
    for command in COMMANDS:
        how = CLASSES[key_of(command)]
        if isinstance(how, Execute):
            assert how.stand_ins.keys() <= {*shlex.split(command.text)}, command


@pytest.mark.parametrize("document", [*DOCUMENTS, WAITING], ids=lambda path: path.name)
def test_programs_take_the_commands_of(document, monkeypatch):
    """Their own parsers read the arguments: an option that is gone or misspelt is noticed."""
    monkeypatch.chdir(ROOT)
    refused = []
    for command in commands_of(document):
        try:
            parse(command)
        except ValueError as error:
            refused.append(f"{command}: {error}")
    assert refused == []


# programs whose options the documents name by themselves
PROGRAMS = [
    *sorted(f"sra_fast.{path.stem}" for path in ROOT.glob("sra_fast/[a-z]*.py")),
    *("benchmarks.gpu_suite", "benchmarks.integrations", "benchmarks.operators.run"),
    "benchmarks.step.train_step",
]
# options of what a page adds, or of other programs
OTHER_OPTIONS = {
    "--align.norm_eps": "the alignment target that CONTRIBUTING.md adds",
    "--model.options.share": "an argument that CONTRIBUTING.md speaks of",
    "--standalone": "torchrun",
    "--num_gpus": "deepspeed",
    "--hostfile": "deepspeed",
    "--quiet": "deepspeed",
    "--mixed_precision": "accelerate",
    "--dynamo_backend": "accelerate",
    "--signal": "sbatch",
}


def test_options_in_prose_exist(monkeypatch, rooms):
    """An option that a sentence or a table names is one of some program."""
    monkeypatch.chdir(ROOT)
    # --help lists those of one target
    of_targets = {
        f"--{section}.{item.name}"
        for section in SECTIONS
        for part in dict(TARGETS.items()).values()
        for item in fields(part.config)
    }
    of_families = {
        f"--model.options.{name}"
        for part in dict(MODEL_FAMILIES.items()).values()
        for name in constructor_arguments(part)
    }
    known = set().union(
        *map(options_of, PROGRAMS), SHORT_FORMS, OTHER_OPTIONS, of_targets, of_families
    )
    named = [
        (path.name, number, option)
        for path in [*DOCUMENTS, WAITING]
        for number, option in named_options(path.read_text())
    ]
    assert len(named) > 30
    assert [found for found in named if found[2] not in known] == []


# execution


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    return documents.make_workspace(tmp_path_factory.mktemp("checkout"))


@pytest.fixture(scope="module")
def results() -> dict[str, documents.Result]:
    """What each executed command has left, by its text."""
    return {}


def run_once(command: Command, workspace: Path, results: dict) -> documents.Result:
    how = CLASSES[key_of(command)]
    if command.text not in results:
        for beginning in how.after:
            first = next(other for other in executed() if other.text.startswith(beginning))
            run_once(first, workspace, results)
        more = how.more.split()
        results[command.text] = documents.execute(command, workspace, more, how.stand_ins)
    return results[command.text]


@pytest.mark.parametrize("command", [*executed()], ids=lambda command: command.text)
def test_the_command_does_what_the_document_says(command, workspace, results):
    done = run_once(command, workspace, results)
    assert done.returncode == 0, done.stderr[-3000:]
    how = CLASSES[key_of(command)]
    assert [name for name in how.makes if not (workspace / name).is_file()] == []
    assert re.search(how.says, done.stdout, re.MULTILINE), done.stdout


# the harness


def test_commands_are_found():
    """Indented, fenced and in backticks, with continued lines, variables and comments."""
    text = """
Run `make test`, `make` or `deepspeed
x.py --a 1`; not `import deepspeed`.

    .venv/bin/python a.py --b '[0.5, 1]' \\
        --c "x # y"   # a comment
    A=1 sra-fast train && make lint
    runs/digits/
      deepspeed.json

```bash
$ torchrun --nproc_per_node 2 t.py
```

```python
make = 1
```
"""
    assert [found for _, found in shown_commands(text)] == [
        "make test",
        "deepspeed x.py --a 1",
        "python a.py --b '[0.5, 1]' --c \"x # y\"",
        "A=1 sra-fast train",
        "make lint",
        "torchrun --nproc_per_node 2 t.py",
    ]
    assert Command("", 1, "A=1 sra-fast train ARGS --n N").words() == [
        *("sra-fast", "train", "--n", "8")
    ]
    assert Command("", 1, "sra-fast train --n N --a RUN").words({"RUN": "runs/x", "N": "9"}) == [
        *("sra-fast", "train", "--n", "9", "--a", "runs/x")
    ]
    assert len(COMMANDS) > 40


@pytest.mark.parametrize(
    "text, message",
    [
        ("deepspeed sra_fast/train.py --config configs/digits.yaml --train.stps 3", "stps"),
        ("deepspeed --num_gpu sra_fast/train.py", "exit code 2"),
        ("deepspeed sra_fast/retrain.py", "expected a script"),
        ("torchrun --nproc_per_node 2 sra_fast/train.py --train.zero_stage many", "zero_stage"),
        ("accelerate launch sra_fast/train.py --no.such option", "no.such"),
        ("python sra_fast/sample.py --checkpoint a --cuont 3", "cuont"),
        ("python sra_fast/export.py --out a.safetensors", "--checkpoint"),
        ("sra-fast samples --checkpoint a", "expected a command"),
        ("sra-fast evaluate --reference", "reference"),
        ("python -m benchmarks.report.table --all", "takes no arguments"),
        ("python -m benchmarks.gpu_suite third", "third"),
        ("make tset", "no target"),
        ("python -m pytest -q tests/test_nothing.py", "expected tests"),
        ("pytest -q tests/test_documents.py::test_nothing", "has no test_nothing"),
        ("python -m benchmarks.step.train_step --variants sra+train.stps=3", "stps"),
        ("pip install '.[train,evla]'", "no extra"),
        ("pip install --user .", "no document had"),
        ("pip install -c constraint.txt .", "expected a file"),
    ],
)
def test_what_no_program_takes_is_noticed(text, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ValueError, match=message):
        parse(Command("a document", 1, text))


def test_other_launchers_are_parsed(monkeypatch):
    monkeypatch.chdir(ROOT)
    options = "sra_fast/train.py --config configs/digits.yaml --train.steps 3"
    parse(Command("", 1, f"torchrun --nproc_per_node 2 {options}"))
    parse(Command("", 1, f"accelerate launch --num_processes 2 {options}"))
