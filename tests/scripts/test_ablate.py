"""A study runs its variants, several at once, goes on after an interruption, and says what it shows."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from launch import ROOT, call, error_of, launch, run_python
from safetensors.torch import save_file
from toy_data import write_idx

from sra_fast.analysis import study_plans
from sra_fast.analysis.study import read_study
from sra_fast.analysis.study_plans import check_made_like, plan_variants
from sra_fast.analysis.study_schedule import Options, run_study
from sra_fast.analysis.study_table import table
from sra_fast.config.cli import parse_train
from sra_fast.data.preprocess import Options as Preprocessing
from sra_fast.data.preprocess import make_jobs
from sra_fast.data.writer import run_jobs
from sra_fast.training import provenance
from sra_fast.utils.files import write_json

STUDY = """
base: {base}
args:
  model.hidden_size: 32
  model.depth: 2
  model.num_heads: 2
  align.student_layer: 1
  align.teacher_layer: 2
  optim.warmup_steps: 0
  train.steps: 4
  train.log_every: 2
  train.save_every: 100
  train.export: []
  sample.steps: 2
seeds: [0, 1]
variants:
  given: {{}}
  heavier: {{align.weight: 2.0}}
scores: none
"""
OWN = STUDY.replace("scores: none", "score: fake_work:quality")
CLAIMS = """
claims:
- {{claim: more is better, variant: heavier, score: quality, expect: higher}}
- {{claim: more is worse, variant: heavier, score: own_frechet, expect: higher}}
"""


def study_of(tmp_path, text=STUDY, base=ROOT / "configs/digits.yaml"):
    path = tmp_path / "study.yaml"
    path.write_text(text.format(base=base))
    return read_study(path)


@pytest.fixture
def run_fake(tmp_path, monkeypatch):
    """Run a study whose runs are fake, in ``tmp_path/out``."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def run(study, asked=lambda: None, **options):
        said = []
        fake = {"start": "fake_work:start", "path": [ROOT / "tests"]}
        ended = run_study(study, tmp_path / "out", Options(**options, **fake), asked, said.append)
        return ended, said

    return run


def test_study_from_start_to_table(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    # its workers as well: a checkpoint is compared with one of the CPU
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    path = tmp_path / "weights.yaml"
    # a stage 3 leaves the most behind in its process
    first_variant = "given: {{train.zero_stage: 3}}"
    text = STUDY.replace("given: {{}}", first_variant).format(base=ROOT / "configs/digits.yaml")
    path.write_text(text)
    first = call("ablate", path, "--out", tmp_path, "--seeds", 0)
    assert first.returncode == 0, first.stderr[-2000:]
    assert "2 of 4 runs left, 512 images" in first.stdout
    assert "(from a trial of a few steps of given: training alone)" in first.stdout
    assert len(json.loads((tmp_path / "weights/rows.json").read_text())) == 2
    # the second run of its worker, and the same one in a process of its own
    settings = yaml.safe_load(text)["args"]
    args = [word for key, value in settings.items() for word in (f"--{key}", value)]
    config = ["--config", ROOT / "configs/digits.yaml", *args, "--align.weight", 2.0]
    alone = launch("train", *config, "--train.seed", 0, "--train.out", tmp_path / "alone")
    assert alone.returncode == 0, alone.stderr[-2000:]
    shard = "000/checkpoints/step_00000004/rank_00000.safetensors"
    ours = (tmp_path / "weights/01_seed0" / shard).read_bytes()
    assert ours == (tmp_path / "alone" / shard).read_bytes()

    before = {p: p.stat().st_mtime_ns for p in tmp_path.glob("weights/*/*/summary.json")}
    second = call("ablate", path, "--out", tmp_path, "--jobs", 2)
    assert second.returncode == 0, second.stderr[-2000:]
    rows = json.loads((tmp_path / "weights/rows.json").read_text())
    assert sorted((row["seed"], row["variant"]) for row in rows) == [
        (0, "given"),
        (0, "heavier"),
        (1, "given"),
        (1, "heavier"),
    ]
    # finished runs were not repeated
    assert all(p.stat().st_mtime_ns == time for p, time in before.items())
    assert [row["curve"] == 0 for row in rows] == [True, False, True, False]
    assert second.stdout.endswith((tmp_path / "weights/table.md").read_text() + "\n")
    assert (tmp_path / "weights/plot.png").exists()
    assert "4/4" in (tmp_path / "weights/01_seed1/log.txt").read_text()


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs/ablations").glob("*.yaml")), ids=lambda p: p.stem
)
def test_every_variant_of_the_shipped_studies_is_a_valid_configuration(path, tmp_path, monkeypatch):
    study = read_study(path)
    assert len(study.variants) > 1
    # paths of a study are relative to where it is started
    monkeypatch.chdir(tmp_path)
    if any("--data.features" in arguments for arguments in study.variants.values()):
        pytest.importorskip("transformers", reason="needs transformers")
        make_features(path)
    if study.base.stem.startswith("fashion"):
        make_fashion()
    # counted elsewhere; for every variant of every study it takes most of the time
    monkeypatch.setattr(study_plans, "flops_of_run", lambda cfg: 1.0)
    assert plan_variants(study, tmp_path).keys() == study.variants.keys()


def make_features(path):
    """Run the command that a study names for its features, in the working directory."""
    (command,) = re.findall(r"^#   python (.+)$", path.read_text(), re.MULTILINE)
    script, *args = command.split()
    done = run_python(ROOT / script, *args, "--steps", 2, cwd=Path.cwd())
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_part_of_the_variants(tmp_path, run_fake):
    study = study_of(tmp_path, OWN)
    ended, said = run_fake(study, variants=["heavier"])
    assert ended.left == 0
    assert said[1:] == ["heavier, seed 0: done", "heavier, seed 1: done"]
    # what was done before is in the table of the rest
    ended, said = run_fake(study)
    assert said[1:] == ["given, seed 0: done", "given, seed 1: done"]
    assert len(ended.results.rows) == 4
    with pytest.raises(
        ValueError, match=r"variants must be among \['given', 'heavier'\], got lighter"
    ):
        run_fake(study, variants=["given", "lighter"])


def test_a_part_of_the_seeds(tmp_path, run_fake, monkeypatch):
    """The table has all that is finished, and all runs are made in one way."""
    study = study_of(tmp_path, OWN + CLAIMS)
    whole, _ = run_fake(study)
    part, said = run_fake(study, seeds=[0])
    assert (said, part.left) == ([], 0)
    assert part.results.rows == whole.results.rows
    more, said = run_fake(study, seeds=[5])
    assert said[1:] == ["given, seed 5: done", "heavier, seed 5: done"]
    assert {row["seed"] for row in more.results.rows} == {0, 1, 5}
    monkeypatch.setenv("FAKE_WORK_ABOUT", '{"device": "cpu", "threads": 2, "torch": "0"}')
    with pytest.raises(ValueError, match="was made with threads 1, now there are threads 2"):
        run_fake(study, seeds=[6])


def test_a_function_that_has_changed_scores_again(tmp_path, run_fake):
    study = study_of(tmp_path, OWN.replace("fake_work:quality", "changing_scores:one"))
    for value in (1.0, 2.0):
        text = f"def one(run):\n    return {{'quality': {value}}}\n"
        (tmp_path / "changing_scores.py").write_text(text)
        ended, _ = run_fake(study)
        assert {row["quality"] for row in ended.results.rows} == {value}


def test_a_function_whose_helper_has_changed_scores_again(tmp_path, run_fake):
    study = study_of(tmp_path, OWN.replace("fake_work:quality", "scores_with_helper:one"))
    (tmp_path / "scores_with_helper.py").write_text(
        "def one(run):\n    from nearer_helper import value\n    return {'quality': value()}\n"
    )
    (tmp_path / "nearer_helper.py").write_text(
        "import json\nimport further_helper\ndef value():\n    return further_helper.VALUE\n"
    )
    for value in (1.0, 2.0):
        (tmp_path / "further_helper.py").write_text(f"VALUE = {value}\n")
        # not of the study's concern
        (tmp_path / "stranger.py").write_text(f"VALUE = {value}\n")
        ended, _ = run_fake(study)
        assert {row["quality"] for row in ended.results.rows} == {value}
    assert study.scoring.identity()["imports"].keys() == {"nearer_helper", "further_helper"}
    (tmp_path / "stranger.py").write_text("")
    assert run_fake(study)[1] == []


def test_initial_weights_that_change_within_a_study(tmp_path, run_fake):
    """A path stays the same when other weights are put there."""
    weights = tmp_path / "initial.safetensors"
    text = STUDY.replace("args:", f"args:\n  train.init_from: {weights}")
    study = study_of(tmp_path, text)

    def put(seed):
        torch.manual_seed(seed)
        cfg = parse_train(study.command("given", 0, tmp_path))[0]
        save_file(cfg.model.build().state_dict(), weights)

    put(0)
    assert len(run_fake(study, seeds=[0])[0].results.rows) == 2
    # the same weights in a file that was written again
    put(0)
    assert run_fake(study, variants=["given"])[1][1:] == ["given, seed 1: done"]
    put(1)
    with pytest.raises(ValueError, match="00_seed0 started from other weights than there were at"):
        run_fake(study)


def test_initial_weights_that_are_replaced_while_a_study_runs(tmp_path, monkeypatch):
    """The plan was read before the first run was trained: the runs are no study of that plan."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    weights = tmp_path / "initial.safetensors"
    study = study_of(tmp_path, STUDY.replace("args:", f"args:\n  train.init_from: {weights}"))

    def put(seed):
        torch.manual_seed(seed)
        cfg = parse_train(study.command("given", 0, tmp_path))[0]
        save_file(cfg.model.build().state_dict(), weights)

    said = []

    def replace_weights(line):
        if not said:
            # the cost: everything is planned, and nothing has begun
            put(1)
        said.append(line)

    fake = {"start": "fake_work:start", "path": [ROOT / "tests"]}
    options = Options(seeds=[0], variants=["given"], **fake)
    put(0)
    message = (
        f"out/00_seed0 started from other weights than there were at train.init_from {weights} "
        "when this command began: delete it or choose another --out"
    )
    with pytest.raises(ValueError, match=message):
        run_study(study, tmp_path / "out", options, lambda: None, replace_weights)
    assert said[1:] == ["given, seed 0: done"]
    # what it has noted is what it started from
    run_study(study, tmp_path / "out", options, lambda: None, said.append)
    put(0)
    with pytest.raises(ValueError, match=message):
        run_study(
            study, tmp_path / "out", replace(options, seeds=[0, 1]), lambda: None, said.append
        )


def test_settings_and_data_that_change_within_a_study(tmp_path, rooms):
    study = study_of(tmp_path)
    planned = plan_variants(study, tmp_path)["heavier"]
    run = tmp_path / "000"
    run.mkdir()
    provenance.record(run, planned.cfg, planned.ds_config, None)
    write_json(run / "data.json", planned.facts.as_json())
    check_made_like(planned, run)
    other = replace(planned, facts=replace(planned.facts, fingerprint="another"))
    with pytest.raises(ValueError, match="000 was made with other data than there are now"):
        check_made_like(other, run)
    other = replace(planned, ds_config={**planned.ds_config, "gradient_clipping": 7})
    with pytest.raises(ValueError, match="another configuration of DeepSpeed"):
        check_made_like(other, run)
    # scores of a run are made with its samples
    sampled = replace(planned.cfg, sample=replace(planned.cfg.sample, steps=3))
    with pytest.raises(ValueError, match=r"was made with sample.steps 2, now it is 3"):
        check_made_like(replace(planned, cfg=sampled), run)
    # in a file that an argument names, say
    planned.cfg.optim.lr = 7.0
    with pytest.raises(ValueError, match=r"was made with optim.lr 0.003, now it is 7.0"):
        check_made_like(planned, run)


def make_fashion():
    """Random images of Fashion-MNIST's sizes, as `make fashion` leaves its data."""
    for part in ("train", "t10k"):
        write_idx(Path("raw"), part, 256, side=28, classes=10)
    for side in (16, 28):
        options = Preprocessing("raw", f"data/fashion/{side}", pixels=True, resolution=side)
        list(run_jobs(make_jobs(options)))


def test_scores_and_claims(tmp_path, run_fake):
    study = study_of(tmp_path, OWN + CLAIMS)
    ended, said = run_fake(study, jobs=2)
    assert (ended.failed, ended.left) == ([], 0)
    assert said[0].startswith("study: 4 of 4 runs left, 1,024 images, ")
    # a trial says 2 * 0.5 s for 2 * 64 images, and both variants cost the same
    assert said[0].endswith("about 0.0011 hours with 2 jobs (from a trial of a few steps of given: "
                            "training alone)")  # fmt: skip
    assert sorted(said[1:]) == [
        f"{name}, seed {seed}: done" for name in ("given", "heavier") for seed in (0, 1)
    ]
    # seed by seed
    assert [(row["seed"], row["variant"]) for row in ended.results.rows] == [
        (0, "given"),
        (0, "heavier"),
        (1, "given"),
        (1, "heavier"),
    ]
    text = (tmp_path / "out/table.md").read_text()
    assert text == table(ended.results)
    claims = re.findall(r"^\| more is .*\| (.*) \|$", text, re.MULTILINE)
    assert claims == ["contradicted", "shown"]

    # other training options are not scored anew, other scores are
    again, said = run_fake(study)
    assert said == []
    assert again.results.rows == ended.results.rows
    (tmp_path / "other_scores.py").write_text("def one(run):\n    return {'quality': 1.0}\n")
    other = study_of(tmp_path, OWN.replace("fake_work:quality", "other_scores:one"))
    scored, said = run_fake(other, score_only=True)
    assert said[0].startswith("study: 0 of 4 runs left, 4 more to score, 0 images")
    assert {row["quality"] for row in scored.results.rows} == {1.0}
    assert (tmp_path / "out/00_seed0/scored").read_text() == "x"


def test_score_only_trains_nothing(tmp_path, run_fake):
    run_fake(study_of(tmp_path), jobs=2)
    study = study_of(tmp_path, OWN.replace("[0, 1]", "[0, 1, 2]"))
    ended, _ = run_fake(study, score_only=True)
    assert ended.left == 2
    assert all("quality" in row for row in ended.results.rows)
    assert not (tmp_path / "out/00_seed2").exists()


def test_a_dry_run_only_tells(tmp_path, run_fake):
    ended, said = run_fake(study_of(tmp_path), dry_run=True)
    assert len(said) == 1
    assert not (tmp_path / "out").exists()
    assert ended.results.rows == []
    run_fake(study_of(tmp_path))
    more = study_of(tmp_path, STUDY.replace("[0, 1]", "[0, 1, 2]"))
    _, said = run_fake(more, dry_run=True)
    assert said[0].startswith("study: 2 of 6 runs left, 512 images, ")
    assert said[0].endswith("hours with 1 job (from the speed of its runs)")


def test_a_stop_leaves_runs_and_the_same_command_goes_on(tmp_path, run_fake):
    study = study_of(tmp_path, STUDY.replace("2.0", "9"))
    begun = tmp_path / "out/01_seed0/000"
    ended, said = run_fake(study, asked=begun.exists)
    assert (ended.failed, ended.left) == ([], 3)
    assert said[-1].startswith("heavier, seed 0: stopped by SIGTERM after step 7; checkpoint")
    assert len(ended.results.rows) == 1
    # the fake run of seed 1 stops once more
    (tmp_path / "out/01_seed1/000").mkdir(parents=True)
    ended, _ = run_fake(study)
    assert (ended.failed, ended.left) == ([], 0)


def test_a_failed_run_is_one_line_and_takes_nothing_along(tmp_path, run_fake):
    ended, _ = run_fake(study_of(tmp_path, STUDY.replace("2.0", "7")), jobs=2)
    assert sorted(ended.failed) == [
        f"study: heavier, seed {seed} failed: no such weight" for seed in (0, 1)
    ]
    assert [(row["variant"], row["seed"]) for row in ended.results.rows] == [
        ("given", 0),
        ("given", 1),
    ]
    assert ended.left == 0
    assert "the reason" in (tmp_path / "out/01_seed0/log.txt").read_text()


def test_runs_of_an_edited_study_are_not_reused(tmp_path, run_fake, monkeypatch):
    base = tmp_path / "base.yaml"
    base.write_text((ROOT / "configs/digits.yaml").read_text())
    run_fake(study_of(tmp_path, base=base))
    message = (
        "01_seed0 was made with arguments .*2.0.*, heavier now has .*3.0.*choose another --out"
    )
    with pytest.raises(ValueError, match=message):
        run_fake(study_of(tmp_path, STUDY.replace("2.0", "3.0"), base))
    monkeypatch.setenv("FAKE_WORK_ABOUT", '{"device": "cpu", "threads": 2, "torch": "0"}')
    more = study_of(tmp_path, STUDY.replace("[0, 1]", "[0, 1, 2]"), base)
    with pytest.raises(ValueError, match="was made with threads 1, now there are threads 2: runs"):
        run_fake(more)
    assert not (tmp_path / "out/00_seed2").exists()
    file = tmp_path / "out/01_seed1/study.json"
    file.write_text(file.read_text().replace('"threads": 1', '"threads": 4'))
    with pytest.raises(
        ValueError, match="00_seed0 was made with threads 1, .*seed1 with threads 4"
    ):
        run_fake(more)
    base.write_text(base.read_text().replace("depth: 6", "depth: 5"))
    with pytest.raises(ValueError, match="was made with base .*6.*now has .*5"):
        run_fake(more)


def test_runs_of_other_parts_from_outside_are_refused(tmp_path, run_fake, monkeypatch):
    """Edits are noticed in a module of SRA_FAST_IMPORT, in what it imports, and in packages."""
    monkeypatch.syspath_prepend(tmp_path)
    package = tmp_path / "study_package"
    package.mkdir()
    (package / "__init__.py").write_text("from . import inner\n")
    (package / "inner.py").write_text("A = 1\n")
    (tmp_path / "study_module.py").write_text("import study_beside\n")
    (tmp_path / "study_beside.py").write_text("A = 1\n")
    study = study_of(tmp_path)
    names = "study_module,study_package"
    monkeypatch.setenv("SRA_FAST_IMPORT", names)
    run_fake(study)
    # the same parts: nothing is trained again
    ended, said = run_fake(study)
    assert len(ended.results.rows) == 4 and not said
    for file, name in (
        (tmp_path / "study_module.py", "study_module"),
        (tmp_path / "study_beside.py", "study_module"),
        (package / "inner.py", "study_package"),
    ):
        before = file.read_text()
        file.write_text(before + "B = 2\n")
        message = rf"was made with other code of {name} \(SRA_FAST_IMPORT\) than there is now: del"
        with pytest.raises(ValueError, match=message):
            run_fake(study)
        file.write_text(before)
    for other in ("", "study_module"):
        monkeypatch.setenv("SRA_FAST_IMPORT", other)
        message = f"was made with SRA_FAST_IMPORT {names}, now it is {other or 'unset'}: delete"
        with pytest.raises(ValueError, match=message):
            run_fake(study)


def test_runs_of_before_there_were_parts_go_on(tmp_path, run_fake):
    study = study_of(tmp_path)
    run_fake(study)
    for file in (tmp_path / "out").glob("*/study.json"):
        held = json.loads(file.read_text())
        assert held.pop("parts") is None
        file.write_text(json.dumps(held))
    ended, said = run_fake(study)
    assert len(ended.results.rows) == 4 and not said


@pytest.mark.parametrize(
    "change, message",
    [
        ("train.steps: 8", "must share train.steps: heavier has 8, given 4"),
        ("train.global_batch: 32", "must share train.global_batch: heavier has 32, given 64"),
        ("model.class_dropout_prob: 0.2", "must share model.class_dropout_prob: heavier has 0.2"),
        ("train.log_every: 1", "must share train.log_every: heavier has 1, given 2"),
        ("data.name: other_digits", "must share their data: heavier has other images"),
        ("diffusion.path: cosine", "must share diffusion.path: heavier has cosine, given linear"),
        ("train.steps: 0", "study: heavier: train.steps must be at least 1, got 0"),
        ("train.stepps: 8", "study: heavier: .*train.stepps"),
        ("data.path: nowhere", "study: heavier: "),
        ("model.class_dropout_prob: 0", "study: .*class_dropout_prob"),
    ],
)
def test_variants_that_cannot_be_compared_or_trained(tmp_path, change, message, monkeypatch):
    from sra_fast.data.digits import Digits
    from sra_fast.utils.registry import DATASETS

    def other(data):
        found = Digits()
        found.fingerprint = "another"
        return found

    monkeypatch.setitem(DATASETS._parts, "other_digits", other)
    # with scores, of which the held-out loss is one
    text = STUDY.replace("align.weight: 2.0", change).replace("scores: none", "")
    with pytest.raises(ValueError, match=message):
        plan_variants(study_of(tmp_path, text), tmp_path)


@pytest.mark.parametrize(
    "text, message",
    [
        ("[", "readable YAML"),
        ("base: x", "must have"),
        (STUDY + "more: 1", "may have"),
        (STUDY.replace("heavier", "given"), "given is there twice"),
        (STUDY.replace("heavier", "2"), "names of variants must be text"),
        (STUDY.replace("[0, 1]", "[]"), "none of seeds"),
        (STUDY.replace("[0, 1]", "[a]"), "seeds whole numbers"),
        (STUDY.replace("[0, 1]", "[1, 1]"), "each of the seeds must be there once, got [1, 1]"),
        (STUDY.replace("{{align.weight: 2.0}}", "2.0"), "each variant must be mappings"),
        (STUDY.replace("align.weight: 2.0", "train.seed: 2"), "train.seed is set for each run"),
        (STUDY.replace("{base}", "nowhere.yaml"), "there is no base configuration"),
        (STUDY + "baseline: x", "baseline must name a variant, one of ['given', 'heavier'], got"),
        (STUDY + "rounding: x", "rounding must name a variant"),
        (STUDY + "rounding: given", "rounding must be another variant than the baseline given"),
        (STUDY.replace("none", "some"), "scores must be a mapping of options, or none, got 'some'"),
        (OWN + "scores: {{samples: 1}}", "scores are no options of fake_work:quality"),
        (STUDY + "score: a:b", "expected one of them"),
        (OWN.replace("fake_work:quality", "fake"), "score must be module:function, got 'fake'"),
        (
            OWN.replace("fake_work:quality", "absent:f"),
            "scores: absent:f: No module named 'absent'",
        ),
        (STUDY + CLAIMS, "score of a claim must be one of"),
        (
            STUDY + CLAIMS.replace("score: quality", "score: align_distance"),
            "score of a claim must be one that variants are compared by, got 'align_distance'",
        ),
        (STUDY.replace("none", "{{samples: -5}}"), "scores.samples must be"),
        (
            STUDY.replace("none", "{{images: 5}}"),
            "bad.yaml: scores has no 'images': expected keys of weights, seed, held_out_images, ",
        ),
        (OWN + CLAIMS.replace("expect: higher", "expect: more"), "must be lower or higher, got 'm"),
        (OWN + CLAIMS.replace("variant: heavier", "variant: x"), "variant of a claim must name"),
        (OWN + CLAIMS.replace("variant: heavier", "variant: given"), "about two variants, got giv"),
        (OWN + "claims: [{{claim: x}}]", "a claim must have"),
    ],
)
def test_bad_study_is_named(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(
        text.replace("{base}", str(ROOT / "configs/digits.yaml"))
        .replace("{{", "{")
        .replace("}}", "}")
    )
    done = call("ablate", path, "--out", tmp_path / "out")
    assert done.returncode == 2
    assert message in error_of(done)
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "args, message",
    [
        (["--jobs", "0"], "--jobs must be at least 1, got 0"),
        (["--minutes", "0"], "--minutes must be more than 0, got 0"),
        (["--seeds", "1", "1"], "each of the seeds must be there once"),
        (["--dry-run", "--score-only"], "not allowed with"),
        (["--score-only"], "scores says none: nothing to do"),
        (["--job", "2"], "there is no option --job, did you mean --jobs?"),
        (["--jobs", "two"], "jobs: expected a whole number, got two"),
    ],
)
def test_bad_arguments(tmp_path, args, message):
    study = study_of(tmp_path)
    done = call("ablate", study.path, "--out", tmp_path / "out", *args)
    assert done.returncode == 2
    assert message in error_of(done)
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
