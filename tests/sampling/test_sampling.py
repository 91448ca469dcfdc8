"""Samples in parts: any number of processes and any interruption give the same .npz."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from launch import ROOT, call, environment, error_of
from PIL import Image
from toy_data import write_vae

from sra_fast.config.schema import SampleConfig
from sra_fast.models import SiT
from sra_fast.plots.report import to_uint8
from sra_fast.sampling import parts as sampling
from sra_fast.sampling import run as script
from sra_fast.sampling.decoder import Decoder
from sra_fast.sampling.generate import choose_labels, labels_like
from sra_fast.utils.files import write_atomic

COUNT = 11


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(sampling, "PART", 4)


def make(first, end):
    """Image i is filled with i."""
    numbers = np.arange(first, end, dtype=np.uint8)
    return np.tile(numbers[:, None, None, None], (1, 3, 2, 3))


def join(folder, out):
    return sampling.join_parts(folder, COUNT, np.arange(COUNT), out, keep=5)


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_any_number_of_processes_gives_the_same_file(tmp_path, world):
    parts = tmp_path / "parts"
    sampling.open_parts(parts, {"seed": 0})
    made = [sampling.make_parts(make, COUNT, parts, rank, world, tmp_path) for rank in range(world)]
    assert sum(made) == COUNT
    # three parts of at most four images
    assert max(made) <= 4 * -(-3 // world)
    shown = join(parts, tmp_path / "samples.npz")
    with np.load(tmp_path / "samples.npz") as held:
        assert np.array_equal(held["arr_0"], make(0, COUNT))
        assert held["arr_1"].tolist() == list(range(COUNT))
    assert np.array_equal(shown, make(0, 5))
    assert not parts.exists()
    for i in range(COUNT):
        assert (np.asarray(Image.open(tmp_path / f"{i:06d}.png")) == i).all()


def test_finished_parts_are_kept(tmp_path):
    parts = tmp_path / "parts"
    calls = []

    def dies(first, end):
        calls.append(first)
        if first == 4:
            raise OSError(28, "No space left on device")
        return make(first, end)

    sampling.open_parts(parts, {"seed": 0})
    with pytest.raises(OSError, match="No space left"):
        sampling.make_parts(dies, COUNT, parts, 0, 1)
    # what a killed process leaves
    (parts / ".000001.npy.77.tmp").write_bytes(b"half")
    sampling.open_parts(parts, {"seed": 0})
    assert sampling.make_parts(make, COUNT, parts, 0, 1) == COUNT - 4
    assert calls == [0, 4]
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
    """What is left still says which samples it belongs to, and the same command ends with the same
    file.
    """
    parts = tmp_path / "parts"
    remove = os.unlink
    left = event

    def dies(path, *args, **kwargs):
        nonlocal left
        if str(path).endswith((".npy", ".json")):
            left -= 1
            if left < 0:
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


def test_of_two_runs_that_start_together_one_gets_the_folder(tmp_path, monkeypatch):
    write_first = sampling.write_first

    def write_second(path, value):
        write_first(path, {"seed": 1})
        write_first(path, value)

    monkeypatch.setattr(sampling, "write_first", write_second)
    with pytest.raises(ValueError, match="unfinished samples with seed 1, this run has 0"):
        sampling.open_parts(tmp_path / "parts", {"seed": 0})


def test_pngs_of_a_larger_set_are_an_error(tmp_path):
    sampling.open_pngs(tmp_path / "png", 5)
    for name in ("000004.png", "000005.png", "grid.png"):
        (tmp_path / "png" / name).write_bytes(b"")
    sampling.open_pngs(tmp_path / "png", 6)
    with pytest.raises(ValueError, match="holds 1 images that are not of these 5: delete it"):
        sampling.open_pngs(tmp_path / "png", 5)
    # new samples without PNGs would stand beside the old ones'
    with pytest.raises(ValueError, match="2 images that are not of these samples, which get none"):
        sampling.open_pngs(tmp_path / "png", 0)
    assert sampling.open_pngs(tmp_path / "other", 0) is None
    assert not (tmp_path / "other").exists()


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    model = SiT(8, 2, 1, 32, 2, 2, num_classes=10)
    for p in model.parameters():
        p.data.normal_(std=0.05)
    path = tmp_path_factory.mktemp("weights") / "model.pt"
    torch.save({"ema": model.state_dict()}, path)
    return path


def arguments(weights, out) -> list:
    """Arguments of sample.py: 300 images, which are two parts."""
    model = ["--checkpoint", weights, "--num_heads", 2, "--out", out, "--count", 300]
    return [*model, "--sample.method", "euler", "--sample.steps", 2]


def start(weights, out, rank, world, batch) -> subprocess.Popen:
    """sample.py as one process of several."""
    args = [*arguments(weights, out), "--local_rank", rank, "--batch", batch]
    return subprocess.Popen(
        [sys.executable, "sra_fast/sample.py", *map(str, args)],
        cwd=ROOT,
        env=environment(RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE=str(world)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_processes_of_the_script_give_the_images_of_one(weights, tmp_path):
    children = [
        start(weights, tmp_path / "two", rank=0, world=2, batch=64),
        start(weights, tmp_path / "two", rank=1, world=2, batch=64),
        start(weights, tmp_path / "one", rank=0, world=1, batch=100),
    ]
    results = [child.communicate(timeout=300) for child in children]
    assert [child.returncode for child in children] == [0, 0, 0], results
    one = np.load(tmp_path / "one/samples.npz")
    two = np.load(tmp_path / "two/samples.npz")
    assert one["arr_0"].shape == (300, 8, 8, 1)
    assert len(np.unique(one["arr_0"])) > 50
    # another batch size changes at most the rounding
    assert np.abs(one["arr_0"].astype(int) - two["arr_0"]).max() <= 1
    assert np.array_equal(one["arr_1"], two["arr_1"])
    # the first process prints the summary, the other nothing
    summary = json.loads(results[0][0].splitlines()[-1])
    assert summary["count"] == 300
    assert summary["images_per_s_per_process"] > 0
    assert not results[1][0].strip()
    assert not (tmp_path / "two/parts").exists()


def test_graph_needs_a_gpu(weights, tmp_path):
    done = call("sample", *arguments(weights, tmp_path), "--graph", "true")
    assert done.returncode == 2
    assert error_of(done) == "error: graph needs a CUDA device"


def options(weights, out, **changed) -> script.Options:
    given = {
        "checkpoint": str(weights),
        "num_heads": 2,
        "out": str(out),
        "count": 6,
        "sample": SampleConfig("euler", 2),
    }
    return script.Options(**{**given, **changed})


def test_the_identity_does_not_depend_on_the_number_of_threads(weights, tmp_path):
    given = options(weights, tmp_path)
    model = script.load_job(given).model
    # large enough that PyTorch would add it up with several threads
    model.blocks[0].attn.qkv.weight = torch.nn.Parameter(torch.randn(600, 1000))
    first = script.identity(given, model, Decoder(None))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert script.identity(given, model, Decoder(None)) == first
    finally:
        torch.set_num_threads(threads)
    # two rows swapped have the same sum, but are other weights
    weight = model.blocks[0].attn.qkv.weight.data
    weight[[0, 1]] = weight[[1, 0]]
    assert script.identity(given, model, Decoder(None))["weights"] != first["weights"]


def test_the_identity_leaves_out_how_images_are_made(weights, tmp_path):
    given = options(weights, tmp_path)
    model = script.load_job(given).model
    faster = options(weights, tmp_path / "elsewhere", batch=2, graph=True)
    assert script.identity(faster, model, Decoder(None)) == script.identity(
        given, model, Decoder(None)
    )
    fewer = options(weights, tmp_path, count=5)
    first = script.identity(given, model, Decoder(None))
    assert script.identity(fewer, model, Decoder(None)) != first
    assert script.identity(given, model, Decoder(None, 1.5)) != first


@pytest.fixture
def one_process(monkeypatch):
    """No process group, whatever other tests have set."""
    monkeypatch.setattr(script.os, "environ", {})


def test_pngs_asked_for_too_late_are_an_error(one_process, weights, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "join_parts", lambda *args: exit("killed"))
    with pytest.raises(SystemExit):
        script.run(script.load_job(options(weights, tmp_path)))
    late = script.load_job(options(weights, tmp_path, png=True))
    with pytest.raises(ValueError, match="unfinished samples with png False, this run has True"):
        script.run(late)


def test_images_that_are_not_finite_are_an_error(one_process, weights, tmp_path):
    held = torch.load(weights)
    # finite weights, whose product is not
    held["ema"]["final_layer.linear.weight"][0] = 3e38
    torch.save(held, tmp_path / "large.pt")
    job = script.load_job(options(tmp_path / "large.pt", tmp_path / "out"))
    with pytest.raises(ValueError, match="images 0 .. 3 are not finite"):
        script.run(job)
    assert not [*tmp_path.glob("out/parts/*.npy")]


def test_a_vae_of_other_latents_is_an_error(weights, tmp_path):
    given = options(weights, tmp_path / "out", vae=str(write_vae(tmp_path / "vae")))
    message = "--vae .*vae is for latents of 4 channels, the model has 1"
    with pytest.raises(ValueError, match=message):
        script.load_job(given)
    assert not (tmp_path / "out").exists()


def test_an_image_depends_on_its_number_not_on_its_part(weights, tmp_path):
    job = script.load_job(options(weights, tmp_path, batch=2))
    make_images = script.image_maker(job, progress=lambda finished: None)
    with torch.no_grad():
        whole = make_images(0, 6)
        pieces = [make_images(0, 4), make_images(4, 6)]
    assert np.array_equal(np.concatenate(pieces), whole)
    assert len(np.unique(whole.reshape(6, -1), axis=0)) == 6, "every image has other noise"


def test_rounding_and_the_published_truncation():
    images = torch.tensor([-2.0, -1.0, 0.9 / 127.5 - 1, 0.4 / 127.5 - 1, 1.0, 3.0]).view(1, 6, 1, 1)
    assert to_uint8(images).flatten().tolist() == [0, 0, 1, 0, 255, 255]
    assert to_uint8(images, "truncate").flatten().tolist() == [0, 0, 0, 0, 255, 255]


@pytest.mark.parametrize("count", [3, 10, 70, 73])
def test_labels_like_balanced_ones_take_turns(count):
    """In whatever order they are, the labels are those of a balanced choice."""
    data = torch.arange(10).repeat(7)[
        torch.randperm(70, generator=torch.Generator().manual_seed(0))
    ]
    assert torch.equal(labels_like(count, data), choose_labels(count, 10, "balanced", 0))


def test_labels_like_others_have_their_frequencies():
    # 6 : 3 : 1 of classes 0, 2 and 5; the largest remainder gets the seventh
    data = torch.tensor([0] * 6 + [2] * 3 + [5])
    assert labels_like(10, data).tolist() == [0, 2, 5, 0, 2, 0, 2, 0, 0, 0]
    assert labels_like(7, data).tolist() == [0, 2, 5, 0, 2, 0, 0]
    assert labels_like(1, data).tolist() == [0]
    many = torch.randint(1000, (5000,), generator=torch.Generator().manual_seed(1)) ** 2 // 1000
    found = labels_like(1234, many)
    exact = many.bincount() * 1234 / 5000
    assert len(found) == 1234 and (found.bincount(minlength=len(exact)) - exact).abs().max() < 1
