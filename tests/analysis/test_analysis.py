"""The analysis scripts on a small model that has learned digits."""

import json
from unittest.mock import patch

import numpy as np
import pytest
import torch
from launch import ROOT, call, error_of, launch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sra_fast.analysis.features import split
from sra_fast.analysis.linear_probe import probe_layers
from sra_fast.analysis.pca_maps import draw_maps
from sra_fast.checkpoint.load_model import load_model
from sra_fast.config.cli import parse_train
from sra_fast.config.schema import DataConfig
from sra_fast.models import SiT
from sra_fast.training.plan import make_run_plan
from sra_fast.training.run import run
from sra_fast.zero.process_group import init_distributed

DIGITS = DataConfig(name="digits")
TRAINING = (
    f"--config {ROOT}/configs/digits.yaml --model.hidden_size 48 --model.depth 4 --model.num_heads 2 "
    "--align.student_layer 1 --align.teacher_layer 3 --train.global_batch 32 --train.steps 200 "
    "--train.log_every 25 --sample.steps 1"
).split()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run folder after 200 steps."""
    out = tmp_path_factory.mktemp("trained")
    run(
        make_run_plan(parse_train([*TRAINING, "--train.out", str(out)])[0], None),
        init_distributed(),
    )
    return out / "000"


def probes(model, times, **settings) -> dict:
    probed = probe_layers(
        model, "linear", split(DIGITS, model), times, [1, 2, 3, 4], draws=1, **settings
    )
    return {(row["time"], row["layer"]): row["accuracy"] for row in probed.rows}


@pytest.fixture(scope="module")
def mean_pooled(trained):
    return probes(load_model(str(trained)).model, [0.1, 0.3, 0.5])


def test_cleaner_inputs_give_better_features(mean_pooled):
    at = {
        time: np.mean([mean_pooled[time, layer] for layer in range(1, 5)])
        for time in (0.1, 0.3, 0.5)
    }
    assert at[0.1] > at[0.3] + 0.05
    assert at[0.3] > at[0.5] + 0.1
    # chance is 0.1
    assert at[0.5] > 0.2


def test_depth_helps_at_noisy_times(mean_pooled):
    for time in (0.3, 0.5):
        assert max(mean_pooled[time, layer] for layer in (2, 3, 4)) > mean_pooled[time, 1] + 0.02


def test_learned_features_beat_noisy_pixels(trained):
    """All patches side by side against the whole noisy image. An untrained network adds nothing to
    the pixels.
    """
    found = probes(load_model(str(trained)).model, [0.3], how="all")
    assert max(found[0.3, layer] for layer in (2, 3, 4)) > found[0.3, 0] + 0.015, found
    torch.manual_seed(0)
    untrained = probes(SiT(8, 2, 1, 48, 4, 2, num_classes=10).eval(), [0.3], how="all")
    assert untrained[0.3, 4] == pytest.approx(untrained[0.3, 0], abs=0.01)
    assert untrained[0.3, 0] == found[0.3, 0]


def test_probes_see_no_label(trained):
    """The model gets the null class: embeddings that would give the answer away change nothing."""
    model = load_model(str(trained)).model
    expected = probes(model, [0.5], count=500)
    model.y_embedder.embedding_table.weight.data[:10] *= 100
    assert probes(model, [0.5], count=500) == expected


def test_maps_follow_the_image(trained):
    """After training, a component tells bright patches from dark ones, whatever their position."""
    loaded = load_model(str(trained))
    model, path = loaded.model, loaded.path
    images = split(DIGITS, model)[1].read(16, seed=0)
    maps = draw_maps(model, path, images, [0.9, 0.0], [2, 4])
    # mean brightness of each 2 x 2 patch of the clean input: [image, 4, 4]
    pixels = maps[:, 1, 0].astype(float).mean(-1)
    brightness = pixels.reshape(16, 4, 2, 4, 2).mean((2, 4))
    # one pixel of each patch is enough: [image, layer, 4, 4, 3]
    components = maps[:, 1, 1:, ::2, ::2].astype(float)
    # without the mean over the images, which depends on the position
    brightness -= brightness.mean(0)
    components -= components.mean(0)
    patches = components.transpose(1, 4, 0, 2, 3).reshape(6, -1)
    correlation = [np.corrcoef(brightness.ravel(), values)[0, 1] for values in patches]
    assert np.abs(correlation).max() > 0.5, correlation


def test_probe_command(trained, tmp_path):
    args = ("--times", "[0.0, 0.4]", "--images", 200)
    done = launch("probe", "--checkpoint", trained, "--out", tmp_path, *args)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads((tmp_path / "probe.json").read_text())
    assert [(row["time"], row["layer"]) for row in report["rows"]] == [
        (t, l) for t in (0.0, 0.4) for l in range(5)
    ]
    top = report["best"]
    assert top["layer"] > 0
    assert top["accuracy"] == max(row["accuracy"] for row in report["rows"] if row["layer"])
    # a line per time, then the best
    *lines, last = done.stdout.splitlines()
    assert [line.split()[2] for line in lines if line.startswith("t = ")] == ["0", "0.4"]
    assert f"best: block {top['layer']} at t = {top['time']:g}, {top['accuracy']:.1%}" in last
    # 16 patches of width 48 are few: side by side
    assert lines[0] == "pool: all (16 patches of 48 features)"
    assert (report["options"]["pool"], report["pool"]) == ("auto", "all")
    # 40 held-out digits
    assert report["chance"] == pytest.approx(round(40 * report["chance"]) / 40)
    assert 0.1 <= report["chance"] < 0.3
    events = EventAccumulator(str(trained / "tensorboard/probe"))
    events.Reload()
    for time in (0.0, 0.4):
        curve = [(e.step, e.value) for e in events.Scalars(f"probe/t={time:g}")]
        accuracies = [row["accuracy"] for row in report["rows"] if row["time"] == time]
        assert curve == [(i, pytest.approx(value)) for i, value in enumerate(accuracies)]
    chances = [e.value for e in events.Scalars("probe/chance")]
    assert chances == [pytest.approx(report["chance"])] * 5
    assert events.Images("probe/accuracy")[0].width == Image.open(tmp_path / "probe.png").width
    assert report["options"]["data"]["name"] == "digits"
    assert Image.open(tmp_path / "probe.png").size > (400, 300)
    # nothing temporary is left
    assert sorted(p.name for p in tmp_path.iterdir()) == ["probe.json", "probe.png"]


def test_visualize_command(trained, tmp_path):
    rng = np.random.default_rng(0)
    for name in "ab":
        images = rng.integers(256, size=(4, 8, 8, 3), dtype=np.uint8)
        np.savez(tmp_path / f"{name}.npz", arr_0=images, arr_1=np.arange(4))
    done = launch(
        "visualize",
        *("--checkpoint", trained, "--images", 2, "--times", "[0.5]"),
        *("--runs", f"[{trained}]"),
        *("--samples", f"[{tmp_path}/a.npz, {tmp_path}/b.npz]", "--columns", 2, "--scale", 2),
        *("--out", tmp_path / "out"),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    names = ["pca.png", "curves.png", "samples.png"]
    assert done.stdout.split() == [str(tmp_path / "out" / name) for name in names]
    assert sorted(names) == sorted(p.name for p in (tmp_path / "out").iterdir())
    assert Image.open(tmp_path / "out/samples.png").size == (2 * 2 * 9, 2 * 2 * (2 * 9 + 2))


@pytest.mark.parametrize(
    "name, args, message",
    [
        (
            "probe",
            ("--checkpoint", "{run}", "--layers", "[5]"),
            "layers must lie in [1, 4], got [5]",
        ),
        ("visualize", ("--runs", "[nowhere]"), "found no losses in nowhere/stats.jsonl"),
        ("visualize", ("--runs", "[{other}]"), "found no losses in"),
        (
            "visualize",
            ("--runs", "[{run}]", "--out", "README.md/out"),
            "out README.md/out cannot be made",
        ),
    ],
)
def test_bad_input_is_one_line(trained, tmp_path, name, args, message):
    (tmp_path / "stats.jsonl").write_text('5\n{"denoise": 1}\n')
    args = [arg.format(run=trained, other=tmp_path) for arg in args]
    done = call(name, "--out", tmp_path / "out", *args)
    assert done.returncode == 2
    line = error_of(done)
    assert line.startswith("error: ")
    assert message in line


@pytest.mark.parametrize("images, few", [(12, True), (150, False)])
def test_accuracies_of_few_images_are_a_warning(trained, tmp_path, caplog, images, few):
    args = ("--times", "[0.5]", "--layers", "[1]", "--draws", 1, "--images", images)
    done = call("probe", "--checkpoint", trained, "--out", tmp_path, *args)
    assert done.returncode == 0, done.stderr
    assert ("the accuracies are those of 2 held-out images, below 30" in caplog.text) == few
    assert ("held-out images, below" in caplog.text) == few


def test_a_folder_that_cannot_be_written_is_named_before_anything_is_computed(trained, tmp_path):
    for name in ("probe", "visualize"):
        with patch("os.access", lambda *_: False):
            done = call(name, "--checkpoint", trained, "--out", tmp_path)
        assert done.returncode == 2
        assert "cannot be written: its folder is read-only" in error_of(done)
    assert not list(tmp_path.iterdir())


def test_the_grid_of_samples_is_not_replaced(tmp_path):
    images = np.zeros((4, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "samples.npz", arr_0=images, arr_1=np.arange(4))
    (tmp_path / "samples.png").write_text("of sample.py")
    for samples in (tmp_path, tmp_path / "samples.npz"):
        done = call("visualize", "--samples", f"[{samples}]", "--out", tmp_path)
        assert done.returncode == 2
        message = f"out {tmp_path}/samples.png would replace a file of samples {tmp_path}"
        assert message in error_of(done)
    assert (tmp_path / "samples.png").read_text() == "of sample.py"
