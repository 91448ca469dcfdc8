"""Rows say which code was measured, and a file of rows holds every measurement once."""

import json
import subprocess

import pytest

from benchmarks import integrations, record
from benchmarks.operators import run


@pytest.fixture
def git(tmp_path, monkeypatch):
    """A function that runs git in a small checkout, which is the root of the benchmarks."""
    root = tmp_path / "checkout"
    monkeypatch.delenv("SRA_FAST_COMMIT", raising=False)
    monkeypatch.setattr(record, "ROOT", root)

    def run(*words: str) -> None:
        author = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *author, *words], cwd=root, check=True, capture_output=True)

    for path in ("benchmarks/record.py", "sra_fast/ops/gelu.py", ".gitignore"):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text("build/\n")
    run("init")
    run("add", ".")
    run("commit", "-m", "a")
    return run


@pytest.mark.parametrize(
    "path, is_dirty",
    [
        ("sra_fast/ops/gelu.py", True),
        # files that git does not know
        ("sra_fast/ops/new.py", True),
        ("sra_fast/new/new.py", True),
        ("kernels/new.py", True),
        ("csrc/new.cu", True),
        ("benchmarks/new.py", True),
        # no code, or none that is measured
        ("benchmarks/results/new.json", False),
        ("notes.py", False),
        ("sra_fast/build/new.py", False),
    ],
)
def test_new_files_of_code_make_a_commit_dirty(git, path, is_dirty):
    clean = record.commit()
    assert len(clean) == 10
    (record.ROOT / path).parent.mkdir(parents=True, exist_ok=True)
    (record.ROOT / path).write_text("x = 1")
    assert record.commit() == (f"{clean}-dirty" if is_dirty else clean)


def test_a_copy_without_git_takes_no_hash_of_the_repository_around_it(git, monkeypatch):
    monkeypatch.setattr(record, "ROOT", record.ROOT / "sra_fast")
    assert record.commit() == "unknown"
    monkeypatch.setenv("SRA_FAST_COMMIT", "0123abc")
    assert record.commit() == "0123abc"


ROW = {
    "kind": "op",
    "name": "gelu.forward",
    "variant": "ours",
    "model": "SiT-XL/2",
    "resolution": 256,
    "batch": 32,
    "dtype": "bfloat16",
    "device": "NVIDIA X",
    "commit": "abc",
}


@pytest.mark.parametrize("name", ROW)
def test_only_the_same_measurement_is_replaced(tmp_path, name):
    file = record.RowFile(tmp_path / "rows.json", {"device": "NVIDIA X", "commit": "abc"})
    other = {**ROW, name: "another", "ms": 2.0}
    file.add({**ROW, "ms": 1.0})
    file.add(other)
    file.add({**ROW, "ms": 3.0})
    assert json.loads(file.path.read_text()) == [other, {**ROW, "ms": 3.0}]


@pytest.mark.parametrize("name", record.VARIABLES)
@pytest.mark.parametrize(
    "program, words",
    [(run, ["--device", "cpu"]), (integrations, ["--list"])],
    ids=["operators", "integrations"],
)
def test_a_variable_that_rows_do_not_show_is_refused(program, words, name, monkeypatch, capsys):
    for other in record.VARIABLES:
        monkeypatch.delenv(other, raising=False)
    program.parse(words)
    monkeypatch.setenv(name, "0")
    with pytest.raises(SystemExit):
        program.parse(words)
    assert f"expected no {name}, which rows do not show" in capsys.readouterr().err
