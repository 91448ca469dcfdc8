"""evaluate.py as a user runs it: samples and a reference in, a table and JSON out; what it refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sra_fast.data.digits import Digits
from sra_fast.plots.report import to_uint8

ROOT = Path(__file__).parents[2]
FEATURES = "def pixels(x):\n    return x.flatten(1).float(), x.flatten(1)[:, :10].float() / 8\n"


def evaluate(folder, *args):
    return subprocess.run(
        [sys.executable, str(ROOT / "sra_fast/evaluate.py"), *map(str, args)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )


@pytest.fixture
def folder(tmp_path):
    np.savez(tmp_path / "ref.npz", to_uint8(Digits().images))
    np.savez(tmp_path / "samples.npz", to_uint8(Digits(held_out=True).images))
    np.savez(tmp_path / "large.npz", to_uint8(Digits().images).repeat(2, 1).repeat(2, 2))
    np.savez(tmp_path / "three.npz", to_uint8(Digits().images[:3]))
    (tmp_path / "my_pixels.py").write_text(
        FEATURES + "def eight(x):\n    return x.reshape(len(x), 64).float()\n"
    )
    return tmp_path


def test_scores_table_and_json(folder):
    done = evaluate(
        folder,
        "--samples",
        "samples.npz",
        "--reference",
        "ref.npz",
        "--features",
        "my_pixels:pixels",
    )
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads((folder / "scores.json").read_text())
    assert (
        report["fid"] > 0
        and report["sfid"] is None
        and 0.5 < report["precision"] < 1
        and 0.5 < report["recall"] < 1
    )
    assert report["inception_score"] > 1
    assert report["comparable"]["fid"].startswith(
        "not comparable: other extractor; 360 samples instead of 50000; "
    )
    assert report["samples"] == {"path": "samples.npz", "images": 360, "shape": [8, 8, 1]}
    assert report["reference"] == {
        "path": "ref.npz",
        "images": 1437,
        "shape": [8, 8, 1],
        "statistics": "of its images",
    }
    assert (
        report["extractor"]["name"].startswith("my_pixels.pixels-")
        and report["extractor"]["dimensions"] == 64
    )
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == [
        "fid",
        "sfid",
        "inception_score",
        "precision",
        "recall",
    ]
    assert (
        f"{report['fid']:.4f}  not comparable: other extractor" in lines[0]
        and "-  not computed" in lines[1]
    )
    assert "360/360" in done.stderr, "a progress bar"
    again = evaluate(
        folder,
        "--samples",
        "samples.npz",
        "--reference",
        "ref.npz",
        "--features",
        "my_pixels:pixels",
        "--batch",
        7,
        "--out",
        "again.json",
    )
    assert "ref.npz:" not in again.stderr, "the reference's statistics were kept"
    assert json.loads((folder / "again.json").read_text())["fid"] == pytest.approx(
        report["fid"], rel=1e-6
    )


@pytest.mark.parametrize(
    "args, message",
    [
        (("--samples", "samples.npz"), "give either inception"),
        (
            ("--samples", "samples.npz", "--inception", "a", "--features", "b"),
            "give either inception",
        ),
        (
            ("--samples", "nowhere.npz", "--features", "my_pixels:pixels"),
            "nowhere.npz is no readable .npz file",
        ),
        (
            ("--samples", "three.npz", "--features", "my_pixels:pixels"),
            "samples must be more than 3 images, got 3",
        ),
        (
            ("--samples", "samples.npz", "--features", "my_pixels:pixels", "--manifold_images", 0),
            "manifold_images must be more than 3",
        ),
        (
            ("--samples", "samples.npz", "--inception", "my_pixels.py"),
            "my_pixels.py does not hold the weights of",
        ),
        (
            (
                "--samples",
                "samples.npz",
                "--features",
                "my_pixels:pixels",
                "--out",
                "no/scores.json",
            ),
            "out must be a file in a folder",
        ),
        (
            (
                "--samples",
                "samples.npz",
                "--features",
                "my_pixels:pixels",
                "--out",
                "/proc/scores.json",
            ),
            "/proc/scores.json",
        ),
        (
            (
                "--samples",
                "samples.npz",
                "--features",
                "my_pixels:eight",
                "--reference",
                "large.npz",
            ),
            "failed on uint8 [1, 1, 16, 16]",
        ),
    ],
)
def test_bad_input_is_one_line(folder, args, message):
    done = evaluate(folder, "--reference", "ref.npz", *args)
    assert done.returncode in (1, 2) and not list(folder.glob("*.json"))
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ") and message in last and "Traceback" not in done.stderr
