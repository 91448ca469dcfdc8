"""Samples in parts: any number of processes, interrupted anywhere, the same .npz."""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sra_fast.engine import sampling
from sra_fast.engine.files import write_atomic
from sra_fast.models import SiT

ROOT = Path(__file__).parents[2]
COUNT = 11


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(sampling, "PART", 4)


def make(first, end):
    """Image i is filled with i."""
    return np.arange(first, end, dtype=np.uint8)[:, None, None, None].repeat(3, 1).repeat(2, 2).repeat(3, 3)


def join(folder, out):
    return sampling.join_parts(folder, COUNT, np.arange(COUNT), out, keep=5)


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_any_number_of_processes_gives_the_same_file(tmp_path, world):
    parts = tmp_path / "parts"
    sampling.open_parts(parts, {"seed": 0})
    made = [sampling.make_parts(make, COUNT, parts, rank, world, tmp_path) for rank in range(world)]
    assert sum(made) == COUNT and max(made) <= 4 * -(-3 // world)
    shown = join(parts, tmp_path / "samples.npz")
    with np.load(tmp_path / "samples.npz") as held:
        assert np.array_equal(held["arr_0"], make(0, COUNT)) and held["arr_1"].tolist() == list(range(COUNT))
    assert np.array_equal(shown, make(0, 5)) and not parts.exists()
    assert [int(np.asarray(Image.open(tmp_path / f"{i:06d}.png"))[0, 0, 0]) for i in range(COUNT)] == list(range(COUNT))


def test_what_was_made_is_kept_and_not_made_again(tmp_path):
    parts, calls = tmp_path / "parts", []

    def dies(first, end):
        calls.append(first)
        if first == 4:
            raise OSError(28, "No space left on device")
        return make(first, end)

    sampling.open_parts(parts, {"seed": 0})
    with pytest.raises(OSError, match="No space left"):
        sampling.make_parts(dies, COUNT, parts, 0, 1)
    (parts / ".000001.npy.77.tmp").write_bytes(b"half")  # what a killed process leaves
    sampling.open_parts(parts, {"seed": 0})
    assert sampling.make_parts(make, COUNT, parts, 0, 1) == COUNT - 4 and calls == [0, 4]
    join(parts, tmp_path / "samples.npz")
    assert np.array_equal(np.load(tmp_path / "samples.npz")["arr_0"], make(0, COUNT))


def test_parts_of_other_samples_are_refused(tmp_path):
    sampling.open_parts(tmp_path / "parts", {"seed": 0, "sample": {"interval": (0.0, 1.0)}})
    sampling.open_parts(tmp_path / "parts", {"seed": 0, "sample": {"interval": (0.0, 1.0)}})
    with pytest.raises(ValueError, match="unfinished samples with seed 0, this run has 1"):
        sampling.open_parts(tmp_path / "parts", {"seed": 1, "sample": {"interval": (0.0, 1.0)}})
    write_atomic(tmp_path / "file", lambda p: p.write_text(""))
    with pytest.raises(ValueError, match="cannot be written"):
        sampling.open_parts(tmp_path / "file" / "parts", {})


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    model = SiT(8, 2, 1, 32, 2, 2, num_classes=10)
    for p in model.parameters():
        p.data.normal_(std=0.05)
    path = tmp_path_factory.mktemp("weights") / "model.pt"
    torch.save({"ema": model.state_dict()}, path)
    return path


def sample(weights, out, rank, world, *args):
    command = [sys.executable, "sra_fast/sample.py", "--checkpoint", weights, "--num_heads", 2, "--out", out, "--count", 300,
               "--sample.method", "euler", "--sample.steps", 2, "--local_rank", rank, *args]
    environ = {**os.environ, "RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1",
               "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(map(str, command), cwd=ROOT, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_processes_of_the_script_give_the_images_of_one(weights, tmp_path):
    children = [sample(weights, tmp_path / "two", rank, 2, "--batch", 64) for rank in (0, 1)]
    children.append(sample(weights, tmp_path / "one", 0, 1, "--batch", 100))
    results = [child.communicate(timeout=300) for child in children]
    assert [child.returncode for child in children] == [0, 0, 0], results
    one, two = (np.load(tmp_path / name / "samples.npz") for name in ("one", "two"))
    assert one["arr_0"].shape == (300, 8, 8, 1) and len(np.unique(one["arr_0"])) > 50
    assert np.abs(one["arr_0"].astype(int) - two["arr_0"]).max() <= 1 and np.array_equal(one["arr_1"], two["arr_1"])
    summary = json.loads(results[0][0].splitlines()[-1])
    assert summary["count"] == 300 and summary["images_per_s_per_process"] > 0
    assert not results[1][0].strip() and not (tmp_path / "two/parts").exists()


def test_graph_needs_a_gpu(weights, tmp_path):
    child = sample(weights, tmp_path, 0, 1, "--graph", "true")
    assert "graph needs a CUDA device" in child.communicate(timeout=300)[1].splitlines()[-1] and child.returncode == 2
