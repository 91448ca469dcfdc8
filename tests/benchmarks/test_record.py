"""Rows say which code was measured, and a file of rows holds every measurement once."""

import importlib
import json
import subprocess

import pytest

from benchmarks import integrations, record
from benchmarks.operators import run
from benchmarks.report import plot, table


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


@pytest.mark.parametrize("first, second", [("a", "b"), ("b", "a")])
def test_results_come_in_the_order_of_their_dates(first, second, tmp_path):
    """Whatever their files are called. Of a measurement that was repeated the newest counts."""
    row = {**ROW, "versions": {"torch": "2"}}
    old = {**row, "date": "2026-01-01", "ms": 1.0}
    other = {**old, "versions": {"torch": "1"}}
    new = {**row, "date": "2026-02-01", "ms": 2.0}
    newest = {**row, "date": "2026-02-02", "variant": "compile"}
    (tmp_path / f"{first}.json").write_text(json.dumps([new, newest]))
    (tmp_path / f"{second}.json").write_text(json.dumps([old, other]))
    assert record.load_results(tmp_path) == [new, other, newest]


PROGRAMS = {
    "benchmarks.operators.run": ["--device", "cpu"],
    "benchmarks.integrations": ["--model", "Flux", "--device", "cpu"],
    "benchmarks.step.train_step": ["--device", "cpu"],
    "benchmarks.cost_model.scaling": ["--assume-mfu", "0.4"],
    "benchmarks.operators.attention_backends": [],
    "benchmarks.operators.stacked_products": [],
}


@pytest.mark.parametrize("module", PROGRAMS)
def test_a_damaged_file_of_rows_is_refused_before_anything_is_measured(module, tmp_path, capsys):
    path = tmp_path / "rows.json"
    path.write_text('[{"kind": "op",')
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(module).main([*PROGRAMS[module], "--json", str(path)])
    assert stopped.value.code == 2
    assert (
        f"argument --json: {path}: expected rows in JSON, got a damaged" in capsys.readouterr().err
    )
    assert path.read_text() == '[{"kind": "op",'


@pytest.mark.parametrize("module", ["table", "plot"])
def test_damaged_results_leave_documents_and_pictures_as_they_are(
    module, tmp_path, monkeypatch, capsys
):
    program = importlib.import_module(f"benchmarks.report.{module}")
    (tmp_path / "rows.json").write_text("{}")
    monkeypatch.setattr(program, "load_results", lambda: record.load_results(tmp_path))
    monkeypatch.setattr(table, "DOCUMENTS", {tmp_path / "none.md": {}})
    monkeypatch.setattr(plot, "IMAGES", tmp_path / "none")
    assert program.main() == 2
    assert "rows.json: expected a list of rows, got dict" in capsys.readouterr().err
