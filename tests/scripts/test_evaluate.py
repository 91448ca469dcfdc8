"""evaluate.py: samples and an FID reference in, a table and JSON out; what it refuses."""

import json
import sys

import numpy as np
import pytest
from launch import call, error_of, launch

from sra_fast.data.digits import Digits
from sra_fast.plots.report import to_uint8

FEATURES = """
def pixels(x):
    return x.flatten(1).float(), x.flatten(1)[:, :10].float() / 8

def eight(x):
    return x.reshape(len(x), 64).float()
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with images of digits and a module of features."""
    # evaluate.py appends the working directory to the path and imports the module from it
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "digit_pixels", raising=False)
    (tmp_path / "digit_pixels.py").write_text(FEATURES)
    np.savez(tmp_path / "ref.npz", to_uint8(Digits().images))
    np.savez(tmp_path / "samples.npz", to_uint8(Digits(held_out=True).images))
    np.savez(tmp_path / "large.npz", to_uint8(Digits().images).repeat(2, 1).repeat(2, 2))
    np.savez(tmp_path / "three.npz", to_uint8(Digits().images[:3]))
    return tmp_path


def test_scores_table_and_json(folder):
    args = "--samples samples.npz --reference ref.npz --features digit_pixels:pixels".split()
    done = launch("evaluate", *args, cwd=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "360/360" in done.stderr, "a progress bar"
    report = json.loads((folder / "scores.json").read_text())
    assert report["fid"] > 0
    assert report["sfid"] is None
    assert report["inception_score"] > 1
    assert 0.5 < report["precision"] < 1
    assert 0.5 < report["recall"] < 1
    reasons = "not comparable: other extractor; 360 samples instead of 50000; "
    assert report["comparable"]["fid"].startswith(reasons)
    assert report["samples"] == {"path": "samples.npz", "images": 360, "shape": [8, 8, 1]}
    assert report["reference"] == {
        "path": "ref.npz",
        "images": 1437,
        "shape": [8, 8, 1],
        "statistics": "of its images",
    }
    assert report["extractor"]["name"].startswith("digit_pixels.pixels-")
    assert report["extractor"]["dimensions"] == 64

    names = ["fid", "sfid", "inception_score", "precision", "recall"]
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == names
    assert f"{report['fid']:.4f}  not comparable: other extractor" in lines[0]
    assert "-  not computed" in lines[1]

    # the second time the reference's statistics come from the cache
    again = call("evaluate", *args, "--batch", 7, "--out", "again.json", cwd=folder)
    assert again.returncode == 0, again.stderr[-2000:]
    assert "ref.npz:" not in again.stderr
    fid = json.loads((folder / "again.json").read_text())["fid"]
    assert fid == pytest.approx(report["fid"], rel=1e-6)


@pytest.mark.parametrize(
    "args, message",
    [
        ("", "give either inception"),
        ("--inception a --features b", "give either inception"),
        ("--features {f} --samples nowhere.npz", "nowhere.npz is no readable .npz file"),
        ("--features {f} --samples three.npz", "samples must be more than 3 images, got 3"),
        ("--features {f} --manifold_images 0", "manifold_images must be more than 3"),
        ("--inception digit_pixels.py", "digit_pixels.py does not hold the weights of"),
        ("--features {f} --out no/scores.json", "out must be a file in a folder"),
        ("--features {f} --out /proc/scores.json", "/proc/scores.json"),
        (
            "--features digit_pixels:eight --reference large.npz",
            "failed on uint8 [1, 1, 16, 16]",
        ),
    ],
)
def test_bad_input_is_one_line(folder, args, message):
    args = args.format(f="digit_pixels:pixels").split()
    files = ("--samples", "samples.npz", "--reference", "ref.npz")
    done = call("evaluate", *files, *args, cwd=folder)
    assert not list(folder.glob("*.json"))
    line = error_of(done)
    assert line.startswith("error: ")
    assert message in line
