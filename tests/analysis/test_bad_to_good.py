"""examples/bad_to_good.py: probes of two runs while they train."""

import json
import runpy
import sys

import pytest
from launch import ROOT, call
from tiny_config import TINY

from sra_fast.analysis.features import data_of, split
from sra_fast.analysis.linear_probe import probe_layers
from sra_fast.checkpoint.load_model import load_model
from sra_fast.config.schema import DataConfig

STEPS = "--train.steps 4 --train.log_every 4 --train.keep 0 --train.precision fp32 --sample.steps 1"
SHORT = f"{STEPS} --train.ema_decay 0.5 --optim.lr 0.01".split()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two run folders with checkpoints of steps 2 and 4, and a third with one of step 4 only."""
    folder = tmp_path_factory.mktemp("runs")
    for name, more in (
        ("plain", ["--align.target", "none", "--train.save_every", 2]),
        ("sra", ["--train.save_every", 2]),
        ("short", ["--train.save_every", 3, "--train.steps", 3]),
    ):
        done = call(
            "train", *TINY, *SHORT, *more, "--train.export", "[]", "--train.out", folder / name
        )
        assert done.returncode == 0, done.stderr[-2000:]
    return folder


def run_example(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["bad_to_good.py", *map(str, words)])
    runpy.run_path(str(ROOT / "examples/bad_to_good.py"), run_name="__main__")


def test_rows_are_those_of_the_three_networks(runs, monkeypatch, tmp_path):
    pair = [runs / "plain/000", runs / "sra/000"]
    options = ["--times", 0.2, 0.6, "--images", 200, "--out", tmp_path]
    run_example(monkeypatch, *pair, *options)
    rows = json.loads((tmp_path / "bad_to_good.json").read_text())
    # two steps, three networks, two times, four blocks
    assert len(rows) == 2 * 3 * 2 * 4
    assert (tmp_path / "bad_to_good.png").exists()
    for network, run, weights in (
        ("plain", pair[0], "model"),
        ("SRA, student", pair[1], "model"),
        ("SRA, teacher", pair[1], "ema"),
    ):
        loaded = load_model(str(run / "checkpoints/step_00000004"), weights)
        parts = split(data_of(DataConfig(), loaded.facts), loaded.model, loaded.facts)
        probed = probe_layers(
            loaded.model, loaded.path, parts, [0.6], [2], how="mean", count=200, draws=1
        )
        (expected,) = [row["accuracy"] for row in probed.rows if row["layer"] == 2]
        key = (network, 4, 0.6, 2)
        names = ("network", "step", "time", "layer")
        (found,) = [row["accuracy"] for row in rows if tuple(row[n] for n in names) == key]
        assert found == expected
    teacher, student = (
        [row["accuracy"] for row in rows if row["network"] == f"SRA, {who}"]
        for who in ("teacher", "student")
    )
    assert teacher != student


def test_runs_without_a_common_step(runs, monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        run_example(monkeypatch, runs / "plain/000", runs / "short/000", "--out", tmp_path)
    assert stopped.value.code == 2
    expected = (
        r"error: expected checkpoints of the same steps (train.keep 0 keeps all), got [2, 4] in "
    )
    assert capsys.readouterr().err.startswith(expected)
    with pytest.raises(SystemExit):
        run_example(monkeypatch, runs / "plain/000", runs / "sra/000", "--steps", 3)
    assert "--steps must be among [2, 4], got [3]" in capsys.readouterr().err
