"""A study runs, reports mean and standard deviation, and resumes after an interruption."""

import json
import re
from pathlib import Path

import pytest
from launch import ROOT, call, error_of, launch, run_python

from sra_fast.analysis import study as studies
from sra_fast.analysis.study import mean_and_std, outcome, read_study, run_one, table
from sra_fast.config.cli import parse_train
from sra_fast.training.plan import make_run_plan

STUDY = """
base: {base}
args: {{train.steps: 4, train.log_every: 2, train.save_every: 100, train.export: [], sample.steps: 2}}
seeds: [0, 1]
variants:
  given: {{}}
  heavier: {{align.weight: 2.0}}
"""


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs/ablations").glob("*.yaml")), ids=lambda p: p.stem
)
def test_every_variant_of_the_shipped_studies_is_a_valid_configuration(path, tmp_path, monkeypatch):
    study = read_study(path)
    assert len(study.variants) > 1
    assert study.seeds
    # paths of a study are relative to where it is started
    monkeypatch.chdir(tmp_path)
    if any("--data.features" in arguments for arguments in study.variants.values()):
        pytest.importorskip("transformers", reason="needs transformers")
        make_features(path)
    for arguments in study.variants.values():
        make_run_plan(parse_train(["--config", str(study.base), *arguments])[0], None)


def make_features(path):
    """Run the command that a study names for its features, in the working directory."""
    (command,) = re.findall(r"^#   python (.+)$", path.read_text(), re.MULTILINE)
    script, *args = command.split()
    done = run_python(ROOT / script, *args, "--steps", 2, cwd=Path.cwd())
    assert done.returncode == 0, done.stderr[-2000:]


def test_study_from_start_to_table(tmp_path):
    path = tmp_path / "weights.yaml"
    path.write_text(STUDY.format(base=ROOT / "configs/digits.yaml"))
    first = launch("ablate", path, "--out", tmp_path, "--seeds", 0)
    assert first.returncode == 0, first.stderr[-2000:]
    assert len(json.loads((tmp_path / "weights/rows.json").read_text())) == 2
    before = {p: p.stat().st_mtime_ns for p in tmp_path.glob("weights/*/*/summary.json")}
    second = call("ablate", path, "--out", tmp_path)
    rows = json.loads((tmp_path / "weights/rows.json").read_text())
    assert [(row["variant"], row["seed"]) for row in rows] == [
        ("given", 0),
        ("heavier", 0),
        ("given", 1),
        ("heavier", 1),
    ]
    # finished runs were not repeated
    assert all(p.stat().st_mtime_ns == time for p, time in before.items())
    assert [row["curve"] == 0 for row in rows] == [True, False, True, False]
    assert second.stdout.endswith(table(rows) + "\n")
    assert (tmp_path / "weights/plot.png").exists()


def test_mean_and_deviation():
    assert mean_and_std([1.0, 2.0, 3.0]) == "2 ± 1"
    assert mean_and_std([0.5]) == "0.5"
    rows = [{"variant": "a", "seed": s, "denoise": 1.0 + s, "curve": 0.0} for s in (0, 1)]
    assert table(rows).splitlines() == [
        "| variant | seeds | denoising loss | largest difference of the curve |",
        "|---|---|---|---|",
        "| a | 2 | 1.5 ± 0.71 | 0 ± 0 |",
    ]


@pytest.mark.parametrize(
    "text, message",
    [
        ("[", "readable YAML"),
        ("base: x", "must have"),
        (STUDY.replace("[0, 1]", "[]"), "none of seeds"),
        (STUDY.replace("[0, 1]", "[a]"), "seeds whole numbers"),
        (STUDY.replace("{{align.weight: 2.0}}", "2.0"), "each variant must be mappings"),
        (STUDY.replace("{base}", "nowhere.yaml"), "there is no base configuration"),
    ],
)
def test_bad_study_is_named(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(
        text.replace("{base}", str(ROOT / "configs/digits.yaml"))
        .replace("{{", "{")
        .replace("}}", "}")
    )
    done = call("ablate", path, "--out", tmp_path)
    assert done.returncode == 2
    assert message in error_of(done)


def test_runs_of_an_edited_study_are_not_reused(tmp_path, monkeypatch):
    def child(command, **_):
        (tmp_path / "out/01_seed0/000").mkdir(parents=True)
        (tmp_path / "out/01_seed0/000/summary.json").write_text("{}")

    monkeypatch.setattr(studies.subprocess, "run", child)
    path = tmp_path / "study.yaml"
    base = tmp_path / "base.yaml"
    base.write_text("train: {steps: 4}")
    path.write_text(STUDY.format(base=base))
    done = run_one(read_study(path), "heavier", 0, tmp_path / "out")
    assert run_one(read_study(path), "heavier", 0, tmp_path / "out") == done
    path.write_text(STUDY.format(base=base).replace("2.0", "3.0"))
    with pytest.raises(
        ValueError,
        match="01_seed0 was made with arguments .*2.0.*, heavier now has .*3.0.*choose another --out",
    ):
        run_one(read_study(path), "heavier", 0, tmp_path / "out")
    path.write_text(STUDY.format(base=base))
    base.write_text("train: {steps: 5}")
    with pytest.raises(ValueError, match="was made with base .*4.*now has .*5"):
        run_one(read_study(path), "heavier", 0, tmp_path / "out")


def test_a_failed_run_is_one_line(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(
        STUDY.format(base=ROOT / "configs/digits.yaml").replace("train.steps: 4", "train.steps: 0")
    )
    done = call("ablate", path, "--out", tmp_path / "out")
    assert done.returncode == 1
    expected = "error: bad: given, seed 0 failed: error: train.steps must be at least 1"
    assert error_of(done).startswith(expected)


def test_curves_of_different_lengths_are_refused(tmp_path):
    for name, rows in (("a", 2), ("b", 3)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "summary.json").write_text("{}")
        (tmp_path / name / "stats.jsonl").write_text('{"step": 1, "denoise": 1.0}\n' * rows)
    with pytest.raises(ValueError, match="must log the same steps: .*b logged 3, .*a 2"):
        outcome(tmp_path / "b", tmp_path / "a")
