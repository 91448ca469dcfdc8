"""What a study says: differences, verdicts, costs; how a run is scored; the picture."""

import json
import sys
import time
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from sra_fast.alignment.schedule import align_weight
from sra_fast.analysis import study_runs
from sra_fast.analysis.intervals import bootstrap_interval
from sra_fast.analysis.run_scores import ScoreOptions
from sra_fast.analysis.study import Claim, Study
from sra_fast.analysis.study_plans import flops_of_run, parsed, seconds_left, share_of_steps
from sra_fast.analysis.study_runs import score_one
from sra_fast.analysis.study_scores import held_out_file, recorded_scores, training_scores
from sra_fast.analysis.study_table import (
    Results,
    difference,
    mean_and_std,
    panels,
    table,
    verdict,
)
from sra_fast.analysis.worker import find_function
from sra_fast.evaluation.held_out import HeldOutLoss
from sra_fast.plots.study import plot_study
from sra_fast.training.flops import training_flops

SEEDS = [0, 1, 2]
# of each variant and seed; the seeds differ far more than the variants do
LOSSES = {
    "plain": [1.0, 2.0, 3.0],
    "better": [0.89, 1.9, 2.91],
    "worse": [1.1, 2.12, 3.1],
    "same": [1.1, 1.9, 3.01],
    "other order": [1.2, 2.0, 2.8],
    "slightly better": [0.98, 1.979, 2.981],
}


def study(rounding="other order", seeds=SEEDS, claims=(), variants=LOSSES):
    arguments = {name: [] for name in variants}
    return Study(
        path=Path("some/name.yaml"),
        base=Path("base.yaml"),
        seeds=[*seeds],
        variants=arguments,
        baseline="plain",
        rounding=rounding,
        claims=[*claims],
    )


def results(key="held_out", seeds=SEEDS, **options):
    rows = [
        {"variant": variant, "seed": seed, key: LOSSES[variant][seed]}
        for seed in seeds
        for variant in LOSSES
    ]
    return Results(study(seeds=seeds, **options), rows)


def claim(variant, expect, score="held_out"):
    return Claim("some words", variant, "plain", score, expect)


def test_difference_is_the_paired_t_test():
    found = difference(results(), "better", "plain", "held_out")
    test = stats.ttest_rel(LOSSES["better"], LOSSES["plain"])
    assert found.interval == pytest.approx(tuple(test.confidence_interval()))
    assert found.text() == "-0.1 [-0.125, -0.0752]"
    assert difference(results(), "better", "plain", "absent") is None


@pytest.mark.parametrize(
    "variant, expect, word",
    [
        ("better", "lower", "shown, smaller than rounding alone"),
        ("better", "higher", "contradicted, smaller than rounding alone"),
        ("worse", "lower", "contradicted, smaller than rounding alone"),
        ("same", "lower", "not shown, smaller than rounding alone"),
    ],
)
def test_verdicts(variant, expect, word):
    known = claim(variant, expect)
    assert verdict(results(), known)[1] == word
    # the same without a variant that shows what rounding does
    short = word.partition(",")[0]
    assert verdict(results(rounding=None), known)[1] == short
    assert verdict(results(seeds=[0]), known)[1] == "one seed: no interval"


def test_a_claim_of_a_study_that_is_not_finished():
    known = claim("better", "lower")
    found = results(rounding=None)
    part = replace(found, rows=[row for row in found.rows if row["seed"] < 2])
    assert verdict(part, known)[1] == "shown (1 of 3 seeds missing)"
    assert verdict(replace(found, rows=[]), known) == (None, "not finished")
    with pytest.raises(ValueError, match="'some words' is about the score probe, which no run has"):
        verdict(found, claim("better", "lower", "probe"))
    # runs that are trained and not scored yet
    trained = results("own_frechet", rounding=None)
    assert verdict(trained, claim("better", "lower", "probe")) == (None, "not finished")
    with pytest.raises(ValueError, match="score own_other, which no run has"):
        verdict(trained, claim("better", "lower", "own_other"))


def test_table_says_everything_in_words():
    lines = table(results(claims=[claim("better", "lower")])).splitlines()
    assert lines[:5] == [
        "### Claims",
        "",
        "| claim | variants | expected | difference [95 %] | verdict |",
        "| --- | --- | --- | --- | --- |",
        "| some words | better against plain | held-out loss lower | -0.1 [-0.125, -0.0752] "
        "| shown, smaller than rounding alone |",
    ]
    assert "### Held-out loss (lower is better)" in lines
    findings = {line.split(" | ")[0][2:]: line.split(" | ")[2:] for line in lines if " | " in line}
    assert findings["plain"] == ["", "", "baseline |"]
    assert findings["better"][1:] == ["3", "better, smaller than rounding alone |"]
    assert findings["worse"][2] == "worse, smaller than rounding alone |"
    assert findings["same"][1:] == ["10", "no difference shown, smaller than rounding alone |"]
    assert findings["other order"][2] == "what rounding alone does |"
    assert "Spread of the 3 seeds of plain: standard deviation 1 (50.0% of the mean)." in lines
    assert "Rounding alone (other order): 0 [-0.497, +0.497], at most 0.2 in a seed." in lines
    assert not any("*" in line for line in lines)


def test_a_score_of_some_seeds_says_so():
    """Means over different seeds stand beside each other."""
    found = results()
    rows = [row for row in found.rows if (row["variant"], row["seed"]) != ("better", 2)]
    text = table(replace(found, rows=rows))
    assert (
        "| better | 1.395 ± 0.71 (2 of 3 seeds) | -0.105 [-0.169, -0.0415] (2 of 3 seeds) |" in text
    )
    found = results()
    for row in found.rows:
        row["probe"] = 0.5
    del found.rows[0]["probe"]
    assert "| plain | 3 | 2 ± 1 | 0.5 ± 0 (2 of 3 seeds) |" in table(found)


def test_differences_that_do_not_vary_have_no_interval():
    """Student's t would be certain of them, whatever their number."""
    found = results()
    for row in found.rows:
        row["probe"] = 0.1 * row["seed"] + 0.005 * (row["variant"] == "better")
    word = "the same in every seed: no interval"
    assert verdict(found, claim("better", "higher", "probe"))[1] == word
    assert f"+0.005 ({word})" in table(found)


def test_table_of_one_seed_has_no_interval():
    text = table(results(seeds=[0]))
    assert (
        "-0.11 (one seed: no interval) | – | one seed: no interval, smaller than rounding" in text
    )
    assert "[" not in text.replace("[95 % over seeds]", "")


def test_direction_of_a_score():
    higher = table(results("probe", rounding=None))
    assert "### Probe (higher is better)" in higher
    assert "| better | 1.9 ± 1 | -0.1 [-0.125, -0.0752] | 3 | worse |" in higher
    unknown = table(results("my_score", rounding=None))
    assert "| better | 1.9 ± 1 | -0.1 [-0.125, -0.0752] | 3 | lower |" in unknown


def test_a_score_that_is_no_number_shows_nothing():
    found = results(rounding=None)
    found.rows[1]["held_out"] = float("nan")
    assert "| better | nan ± nan | – | – | a score is not finite |" in table(found)
    assert verdict(found, claim("better", "lower")) == (None, "a score is not finite")


class FakeLoss:
    """As ``HeldOutLoss``: losses of images, and a key."""

    def __init__(self, losses, key):
        self.losses = losses
        self.key = key

    @classmethod
    def load(cls, path):
        held = np.load(path)
        return cls(held["losses"], str(held["key"]))

    def paired(self, other):
        if self.key != other.key:
            raise ValueError("not measured alike")
        return self.losses - other.losses


def test_held_out_loss_has_an_interval_over_images_in_each_seed(tmp_path, monkeypatch):
    module = types.ModuleType("held_out")
    module.HeldOutLoss = FakeLoss
    monkeypatch.setitem(sys.modules, "sra_fast.evaluation.held_out", module)
    files = {}
    losses = np.random.default_rng(0).normal(size=(2, 500))
    for name, values in zip(("plain", "better"), losses, strict=True):
        files[name, 1] = tmp_path / f"{name}.npz"
        np.savez(files[name, 1], losses=values, key="a")
    text = table(replace(results(rounding=None), held_out=files))
    low, high = bootstrap_interval(losses[1] - losses[0])
    mean = (losses[1] - losses[0]).mean()
    assert "| difference in each seed [95 % over images] | seed 0 | seed 1 | seed 2 |" in text
    assert f"| better | – | {mean:+.3g} [{low:+.3g}, {high:+.3g}] | – |" in text
    # rounding makes 0.2
    assert "] (smaller than rounding) |" in table(replace(results(), held_out=files))
    other = tmp_path / "other.npz"
    np.savez(other, losses=losses[1], key="b")
    with pytest.raises(ValueError, match="better and plain, seed 1: not measured alike; `scores"):
        table(replace(results(), held_out={**files, ("better", 1): other}))


def test_mean_and_deviation():
    assert mean_and_std([1.0, 2.0, 3.0]) == "2 ± 1"
    assert mean_and_std([0.5]) == "0.5"


def leave_run(folder, losses, every=1, **summary):
    """A finished run; ``losses``: of steps 1, 2, ..., or pairs of a step and the loss up to it."""
    folder.mkdir(parents=True)
    pairs = [loss if isinstance(loss, tuple) else (i, loss) for i, loss in enumerate(losses, 1)]
    rows = [json.dumps({"step": step, "denoise": loss}) + "\n" for step, loss in pairs]
    (folder / "stats.jsonl").write_text("".join(rows))
    (folder / "config.yaml").write_text(f"train: {{log_every: {every}}}")
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def test_scores_of_training(tmp_path):
    base = leave_run(
        tmp_path / "a", [2.0, 1.0], images_per_s=5.0, frechet=3.0, step=2, weights="ema"
    )
    run = leave_run(tmp_path / "b", [2.0, 1.1], images_per_s=None)
    assert training_scores(base, base) == {
        "denoise": 1.0,
        "curve": 0.0,
        "images_per_s": 5.0,
        "own_frechet": 3.0,
    }
    assert training_scores(run, base) == {"denoise": 1.1, "curve": pytest.approx(0.1)}
    assert training_scores(run, None) == {"denoise": 1.1}
    longer = leave_run(tmp_path / "c", [1.0] * 3)
    with pytest.raises(
        ValueError, match="must log the same steps: .*c logged 3 times up to step 3"
    ):
        training_scores(longer, base)


def test_rows_of_interruptions_change_no_score(tmp_path):
    """A checkpoint, a stop or the monitor leaves a row of the steps since the row before."""
    by_step = [float(step % 7) for step in range(1, 41)]
    mean_of = lambda first, end: sum(by_step[first:end]) / (end - first)
    whole = [(1, mean_of(0, 1)), *((end, mean_of(end - 10, end)) for end in (20, 30, 40))]
    whole.insert(1, (10, mean_of(1, 10)))
    ends = [1, 7, 10, 13, 17, 20, 30, 39, 40]
    cut = [(end, mean_of(first, end)) for first, end in zip([0, *ends], ends, strict=False)]
    base = leave_run(tmp_path / "whole", whole, every=10)
    run = leave_run(tmp_path / "cut", cut, every=10)
    scores = training_scores(run, base)
    assert scores["curve"] == pytest.approx(0, abs=1e-12)
    assert scores["denoise"] == pytest.approx(mean_of(30, 40))
    assert training_scores(base, None)["denoise"] == pytest.approx(mean_of(30, 40))


def test_a_summary_that_cannot_be_read_is_named(tmp_path):
    run = leave_run(tmp_path / "a", [1.0])
    (run / "summary.json").write_text("{")
    with pytest.raises(ValueError, match="a/summary.json is no readable JSON file"):
        training_scores(run, None)


def scores_of(returned, monkeypatch):
    """A module with a function that scores, and what it was called with."""
    calls = []
    module = types.ModuleType("some_scores")
    module.score = lambda *args: calls.append(args) or returned
    monkeypatch.setitem(sys.modules, "some_scores", module)
    return calls


def test_a_run_is_scored_once(tmp_path, monkeypatch):
    losses = HeldOutLoss(np.ones((3, 2), np.float32), np.ones((3, 2), np.float32), np.arange(3), {})
    returned = {"held_out": 0.5, "held_out_bins": [1.0], "made_of": {"held_out_key": losses.key}}
    calls = scores_of(returned, monkeypatch)
    monkeypatch.setattr(study_runs, "init_distributed", lambda: "device")
    runs = tmp_path / "00_seed0"
    how = {"function": "some_scores:score", "options": {"samples": 0}}
    given = {**how, "own": False, "cache": str(tmp_path / "cache"), "how": how}
    with pytest.raises(ValueError, match="expected a finished run"):
        score_one(runs, **given)
    run = leave_run(runs / "000", [1.0], checkpoint="abc")
    assert recorded_scores(runs, how) is None
    score_one(runs, **given)
    assert calls == [(run, ScoreOptions(samples=0), tmp_path / "cache", "device")]
    # the losses of the images are not there yet
    assert recorded_scores(runs, how) is None
    file = run / "scores/ema/held_out.npz"
    file.parent.mkdir(parents=True)
    losses.save(file)
    assert recorded_scores(runs, how) == {"held_out": 0.5}
    assert held_out_file(runs) == file
    # somebody has measured others there
    replace(losses, settings={"seed": 1}).save(file)
    assert recorded_scores(runs, how) is None
    losses.save(file)
    # neither of other options nor of other weights
    assert recorded_scores(runs, {**how, "options": {}}) is None
    (run / "summary.json").write_text('{"checkpoint": "other"}')
    assert recorded_scores(runs, how) is None
    # a study's own function knows nothing but the run
    returned.clear()
    returned["a"] = np.float32(2)
    returned["b"] = torch.tensor(3)
    score_one(runs, "some_scores:score", {}, own=True, cache="unused", how=how)
    assert calls[1:] == [(run,)]
    assert recorded_scores(runs, how) == {"a": 2.0, "b": 3.0}
    assert held_out_file(runs) is None


@pytest.mark.parametrize(
    "returned, message",
    [
        ([1.0], r"must return numbers by name, got \[1.0\]"),
        ({"a": 1.0, "b": "text"}, "must return numbers by name, got b of type str"),
        ({"a": 1.0, "b": [1.0]}, "must return numbers by name, got b of type list"),
        ({"a": True}, "must return numbers by name, got a of type bool"),
        ({}, "must return numbers by name, got {}"),
        ({"a": 1.0, "b": float("nan")}, "returned scores that are not finite: b"),
    ],
)
def test_what_is_no_score(tmp_path, monkeypatch, returned, message):
    scores_of(returned, monkeypatch)
    leave_run(tmp_path / "000", [1.0])
    with pytest.raises(ValueError, match=message):
        score_one(tmp_path, "some_scores:score", {}, own=True, cache="unused", how={})


def test_a_stop_ends_the_process_while_it_scores(monkeypatch, capfd):
    codes = []
    monkeypatch.setattr(study_runs.os, "_exit", codes.append)
    stop = types.SimpleNamespace(code=0, asked="SIGTERM")
    with study_runs.ending_at(stop):
        assert codes == []
        stop.code = 15
        end = time.monotonic() + 30
        while not codes and time.monotonic() < end:
            time.sleep(0.05)
    # the process lives on in this test alone
    assert codes[0] == 75
    assert "stopped by SIGTERM while the run was scored" in capfd.readouterr().err


def test_a_function_that_is_not_there():
    assert find_function("json:dumps") is json.dumps
    for name, message in [
        ("json", "expected module:function, got 'json'"),
        ("json:absent", "the module json has no function absent"),
        ("absent.module:f", "absent.module:f: No module named 'absent'"),
    ]:
        with pytest.raises(ValueError, match=message):
            find_function(name)


def config(*args):
    base = Path(__file__).parents[2] / "configs/digits.yaml"
    cfg, _ = parsed(["--config", str(base), "--train.steps", "100", *args])
    cfg.model.fill_in()
    return cfg


@pytest.mark.parametrize(
    "args",
    [
        ["--align.stop_at_step", "30"],
        ["--align.every", "4", "--align.stop_at_step", "40"],
        ["--align.schedule", "milestones", "--align.milestones", "{10: 0.0, 60: 0.5, 200: 0.0}"],
        ["--align.schedule", "milestones", "--align.milestones", "{0: 0.0}"],
        ["--align", "none"],
        [],
    ],
)
def test_flops_of_a_run_are_those_of_its_steps(args, rooms):
    cfg = config(*args)
    plain, aligned = training_flops(replace(cfg, align=replace(cfg.align, every=1)))
    # every image of every step that is aligned
    on = sum(align_weight(cfg.align, step, 0) > 0 for step in range(100))
    expected = cfg.train.global_batch * (100 * plain + on * (aligned - plain))
    assert flops_of_run(cfg) == pytest.approx(expected, rel=1e-12)
    if cfg.align.active:
        share = on * cfg.align.every / 100
        assert share_of_steps(cfg.align, 100) == pytest.approx(share)


def test_seconds_left_go_by_flops_where_a_variant_was_not_timed():
    planned = {
        "plain": types.SimpleNamespace(flops=100.0, images=10),
        "dear": types.SimpleNamespace(flops=300.0, images=10),
    }
    times = {"plain": [{"seconds": 4.0, "images": 8}, {"seconds": 6.0, "images": 2}], "dear": []}
    assert seconds_left(planned, {"plain": 3, "dear": 5}, times) == pytest.approx(3 + 5 * 3)
    assert seconds_left(planned, {"plain": 3}, {"plain": []}) is None


def test_a_bad_argument_is_one_line(rooms):
    with pytest.raises(ValueError, match="train.steps") as error:
        parsed(["--train.steps", "many"])
    assert "\n" not in str(error.value)


def test_plot_of_fourteen_variants(tmp_path):
    pytest.importorskip("matplotlib")
    names = ["plain", *(f"variant {i} with a name that is long" for i in range(13))]
    rows = [
        {"variant": name, "seed": seed, "held_out": i + 0.1 * seed, "probe": 1.0, "frechet": 2.0}
        for i, name in enumerate(names)
        for seed in SEEDS
    ]
    found = panels(Results(study(rounding=names[1], variants=names), rows))
    assert [panel.title.partition(":")[0] for panel in found] == [
        "held-out loss",
        "Fréchet distance",
        "probe",
    ]
    assert found[0].differences[names[3]] == pytest.approx([3.0, 3.0, 3.0])
    assert found[0].rounding == pytest.approx(1.0)
    plot_study(tmp_path / "plot.png", found)
    from PIL import Image

    # wide enough for three panels, high enough for the names
    width, height = Image.open(tmp_path / "plot.png").size
    assert width > 1200
    assert height > 450
    plot_study(tmp_path / "none.png", [])
    assert not (tmp_path / "none.png").exists()
