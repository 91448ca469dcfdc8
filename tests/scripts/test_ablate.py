"""A study runs, reports mean and standard deviation, and resumes after an interruption."""

import json
import re
from pathlib import Path

import pytest
from launch import ROOT, call, error_of, launch, run_python

from sra_fast.analysis.study import mean_and_std, outcome, read_study, run_study, table
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
    # a stage 3 leaves the most behind in its process
    first_variant = "given: {{train.zero_stage: 3}}"
    text = STUDY.replace("given: {{}}", first_variant).format(base=ROOT / "configs/digits.yaml")
    path.write_text(text)
    first = launch("ablate", path, "--out", tmp_path, "--seeds", 0)
    assert first.returncode == 0, first.stderr[-2000:]
    assert len(json.loads((tmp_path / "weights/rows.json").read_text())) == 2
    # the second run of its worker, and the same one in a process of its own
    args = "--align.weight 2.0 --train.steps 4 --train.export [] --sample.steps 2".split()
    config = ["--config", ROOT / "configs/digits.yaml", *args]
    alone = launch("train", *config, "--train.seed", 0, "--train.out", tmp_path / "alone")
    assert alone.returncode == 0, alone.stderr[-2000:]
    shard = "000/checkpoints/step_00000004/rank_00000.safetensors"
    ours = (tmp_path / "weights/01_seed0" / shard).read_bytes()
    assert ours == (tmp_path / "alone" / shard).read_bytes()

    before = {p: p.stat().st_mtime_ns for p in tmp_path.glob("weights/*/*/summary.json")}
    second = launch("ablate", path, "--out", tmp_path, "--jobs", 2)
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


def study_of(tmp_path, text=STUDY):
    """A study whose runs are fake."""
    path = tmp_path / "study.yaml"
    base = tmp_path / "base.yaml"
    if not base.exists():
        base.write_text("train: {steps: 4}")
    path.write_text(text.format(base=base))
    return read_study(path)


def run_fake(study, folder, **options):
    return run_study(study, folder, start="fake_work:start", path=[ROOT / "tests"], **options)


def test_runs_of_an_edited_study_are_not_reused(tmp_path, monkeypatch):
    folder = tmp_path / "out"
    study = study_of(tmp_path)
    first = run_fake(study, folder)
    assert (len(first.rows), first.failed, first.left) == (4, [], 0)
    assert run_fake(study, folder).rows == first.rows
    message = (
        "01_seed0 was made with arguments .*2.0.*, heavier now has .*3.0.*choose another --out"
    )
    with pytest.raises(ValueError, match=message):
        run_fake(study_of(tmp_path, STUDY.replace("2.0", "3.0")), folder)
    monkeypatch.setenv("FAKE_WORK_ABOUT", '{"device": "cpu", "threads": 2, "torch": "0"}')
    more = study_of(tmp_path, STUDY.replace("[0, 1]", "[0, 1, 2]"))
    with pytest.raises(ValueError, match="made with machine .*'threads': 1.*'threads': 2"):
        run_fake(more, folder)
    assert not (folder / "00_seed2/000").exists()
    (tmp_path / "base.yaml").write_text("train: {steps: 5}")
    with pytest.raises(ValueError, match="was made with base .*4.*now has .*5"):
        run_fake(study_of(tmp_path), folder)


def test_a_failed_run_is_one_line_and_takes_nothing_along(tmp_path):
    study = study_of(tmp_path, STUDY.replace("2.0", "-1.0"))
    result = run_fake(study, tmp_path / "out", jobs=2)
    assert result.failed == [
        f"study: heavier, seed {seed} failed: error: align.weight must be positive"
        for seed in (0, 1)
    ]
    assert [(row["variant"], row["seed"]) for row in result.rows] == [("given", 0), ("given", 1)]
    assert result.left == 0
    assert "the reason" in (tmp_path / "out/01_seed0/log.txt").read_text()


def test_curves_of_different_lengths_are_refused(tmp_path):
    for name, rows in (("a", 2), ("b", 3)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "summary.json").write_text("{}")
        (tmp_path / name / "stats.jsonl").write_text('{"step": 1, "denoise": 1.0}\n' * rows)
    with pytest.raises(ValueError, match="must log the same steps: .*b logged 3, .*a 2"):
        outcome(tmp_path / "b", tmp_path / "a")
