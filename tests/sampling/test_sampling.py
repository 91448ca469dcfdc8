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
from toy_data import write_vae

from sra_fast.config.schema import SampleConfig
from sra_fast.models import SiT
from sra_fast.plots.report import to_uint8
from sra_fast.sampling import parts as sampling
from sra_fast.utils.files import write_atomic

ROOT = Path(__file__).parents[2]
COUNT = 11


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(sampling, "PART", 4)


def make(first, end):
    """Image i is filled with i."""
    return (
        np.arange(first, end, dtype=np.uint8)[:, None, None, None]
        .repeat(3, 1)
        .repeat(2, 2)
        .repeat(3, 3)
    )


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
        assert np.array_equal(held["arr_0"], make(0, COUNT)) and held["arr_1"].tolist() == list(
            range(COUNT)
        )
    assert np.array_equal(shown, make(0, 5)) and not parts.exists()
    assert [
        int(np.asarray(Image.open(tmp_path / f"{i:06d}.png"))[0, 0, 0]) for i in range(COUNT)
    ] == list(range(COUNT))


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


@pytest.mark.parametrize("event", range(4))
def test_killed_while_the_parts_are_deleted(tmp_path, event, monkeypatch):
    """What is left belongs to these samples: others do not take it for theirs, the same command ends with the same file."""
    parts, remove, left = tmp_path / "parts", os.unlink, [event]

    def dies(path, *args, **kwargs):
        if str(path).endswith((".npy", ".json")):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
        remove(path, *args, **kwargs)

    sampling.open_parts(parts, {"seed": 0})
    sampling.make_parts(make, COUNT, parts, 0, 1)
    monkeypatch.setattr(os, "unlink", dies)
    with pytest.raises(KeyboardInterrupt):
        join(parts, tmp_path / "samples.npz")
    monkeypatch.undo()
    monkeypatch.setattr(sampling, "PART", 4)
    assert (parts / "identity.json").exists()
    with pytest.raises(ValueError, match="unfinished samples with seed 0"):
        sampling.open_parts(parts, {"seed": 1})
    sampling.open_parts(parts, {"seed": 0})
    assert sampling.make_parts(make, COUNT, parts, 0, 1) == min(4 * event, COUNT)
    join(parts, tmp_path / "again.npz")
    assert np.array_equal(np.load(tmp_path / "again.npz")["arr_0"], make(0, COUNT))


def test_of_two_runs_that_start_together_one_has_the_folder(tmp_path, monkeypatch):
    first = sampling.write_first
    monkeypatch.setattr(
        sampling, "write_first", lambda path, value: (first(path, {"seed": 1}), first(path, value))
    )
    with pytest.raises(ValueError, match="unfinished samples with seed 1, this run has 0"):
        sampling.open_parts(tmp_path / "parts", {"seed": 0})


def test_pngs_of_a_larger_set_are_not_left_among_these(tmp_path):
    sampling.open_pngs(tmp_path / "png", 5)
    for name in ("000004.png", "000005.png", "grid.png"):
        (tmp_path / "png" / name).write_bytes(b"")
    sampling.open_pngs(tmp_path / "png", 6)
    with pytest.raises(ValueError, match="holds 1 images more than these 5"):
        sampling.open_pngs(tmp_path / "png", 5)


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
    command = [
        sys.executable,
        "sra_fast/sample.py",
        "--checkpoint",
        weights,
        "--num_heads",
        2,
        "--out",
        out,
        "--count",
        300,
        "--sample.method",
        "euler",
        "--sample.steps",
        2,
        "--local_rank",
        rank,
        *args,
    ]
    environ = {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": "0",
        "WORLD_SIZE": str(world),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    return subprocess.Popen(
        map(str, command),
        cwd=ROOT,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_processes_of_the_script_give_the_images_of_one(weights, tmp_path):
    children = [sample(weights, tmp_path / "two", rank, 2, "--batch", 64) for rank in (0, 1)]
    children.append(sample(weights, tmp_path / "one", 0, 1, "--batch", 100))
    results = [child.communicate(timeout=300) for child in children]
    assert [child.returncode for child in children] == [0, 0, 0], results
    one, two = (np.load(tmp_path / name / "samples.npz") for name in ("one", "two"))
    assert one["arr_0"].shape == (300, 8, 8, 1) and len(np.unique(one["arr_0"])) > 50
    assert np.abs(one["arr_0"].astype(int) - two["arr_0"]).max() <= 1 and np.array_equal(
        one["arr_1"], two["arr_1"]
    )
    summary = json.loads(results[0][0].splitlines()[-1])
    assert summary["count"] == 300 and summary["images_per_s_per_process"] > 0
    assert not results[1][0].strip() and not (tmp_path / "two/parts").exists()


def test_graph_needs_a_gpu(weights, tmp_path):
    child = sample(weights, tmp_path, 0, 1, "--graph", "true")
    assert (
        "graph needs a CUDA device" in child.communicate(timeout=300)[1].splitlines()[-1]
        and child.returncode == 2
    )


@pytest.fixture
def script():
    """sample.py as a module; imported, it must not touch the path as it does when it is launched."""
    path = list(sys.path)
    import sra_fast.sample as module

    sys.path[:] = path
    return module


def options(script, weights, out, **changed):
    given = {
        "checkpoint": str(weights),
        "num_heads": 2,
        "out": str(out),
        "count": 6,
        "sample": SampleConfig("euler", 2),
    }
    return script.Options(**{**given, **changed})


def test_what_the_images_depend_on_is_the_same_for_any_number_of_threads(script, weights, tmp_path):
    given = options(script, weights, tmp_path)
    model = script.prepare(given)[0]
    model.blocks[0].attn.qkv.weight = torch.nn.Parameter(
        torch.randn(600, 1000)
    )  # large enough for a sum by threads
    first, threads = script.identity(given, model), torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert script.identity(given, model) == first
    finally:
        torch.set_num_threads(threads)
    weight = model.blocks[0].attn.qkv.weight.data
    weight[[0, 1]] = weight[[1, 0]]
    assert script.identity(given, model)["weights"] != first["weights"], "the same sum"
    assert (
        script.identity(options(script, weights, tmp_path, batch=2, graph=True), model)["count"]
        == 6
    )


def test_pngs_asked_for_too_late_are_an_error(script, weights, tmp_path, monkeypatch):
    monkeypatch.setattr(script.os, "environ", {})
    monkeypatch.setattr(sampling, "join_parts", lambda *args: exit("killed"))
    with pytest.raises(SystemExit):
        script.run(options(script, weights, tmp_path))
    with pytest.raises(ValueError, match="unfinished samples with png False, this run has True"):
        script.run(options(script, weights, tmp_path, png=True))


def test_images_that_are_not_finite_are_an_error(script, weights, tmp_path, monkeypatch):
    monkeypatch.setattr(script.os, "environ", {})
    held = torch.load(weights)
    held["ema"]["final_layer.linear.bias"][0] = float("nan")
    torch.save(held, tmp_path / "nan.pt")
    with pytest.raises(ValueError, match="images 0 .. 3 are not finite"):
        script.run(options(script, tmp_path / "nan.pt", tmp_path / "out"))
    assert not [*tmp_path.glob("out/parts/*.npy")]


def test_a_vae_of_other_latents_is_an_error(script, weights, tmp_path):
    with pytest.raises(
        ValueError, match="--vae .*vae is for latents of 4 channels, the model has 1"
    ):
        script.prepare(
            options(script, weights, tmp_path / "out", vae=str(write_vae(tmp_path / "vae")))
        )


def test_an_image_depends_on_its_number_not_on_its_part(script, weights, tmp_path):
    given = options(script, weights, tmp_path, batch=2)
    make_images = script.make_images(
        given, *script.prepare(given), torch.device("cpu"), lambda finished: None
    )
    whole = make_images(0, 6)
    assert np.array_equal(np.concatenate([make_images(0, 4), make_images(4, 6)]), whole)
    assert len(np.unique(whole.reshape(6, -1), axis=0)) == 6, "each has noise of its own"


def test_rounding_and_the_references_truncation():
    images = torch.tensor([-2.0, -1.0, 0.9 / 127.5 - 1, 0.4 / 127.5 - 1, 1.0, 3.0]).view(1, 6, 1, 1)
    assert to_uint8(images).flatten().tolist() == [0, 0, 1, 0, 255, 255]
    assert to_uint8(images, "truncate").flatten().tolist() == [0, 0, 0, 0, 255, 255]
