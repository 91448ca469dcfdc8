"""Samples in parts: any number of processes and any interruption give the same .npz."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from launch import ROOT, call, environment, error_of
from PIL import Image
from toy_data import write_vae

from sra_fast.config.schema import DiffusionConfig, SampleConfig
from sra_fast.data.normalization import Normalization
from sra_fast.data.vae import load_vae
from sra_fast.models import SiT
from sra_fast.plots.report import to_uint8
from sra_fast.sampling import parts as sampling
from sra_fast.sampling import run as script
from sra_fast.sampling.conditions import SampledLabels
from sra_fast.sampling.decoder import Decoder
from sra_fast.sampling.folder import SampleFolder
from sra_fast.sampling.generate import choose_labels, labels_like

COUNT = 11


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(sampling, "PART", 4)


def make(first, end):
    """Image i is filled with i."""
    numbers = np.arange(first, end, dtype=np.uint8)
    return np.tile(numbers[:, None, None, None], (1, 3, 2, 3))


def opened(path, **changed) -> SampleFolder:
    """A folder of eleven samples, ready for parts."""
    path.mkdir(exist_ok=True)
    folder = SampleFolder(path, {"seed": 0, **changed}, COUNT, with_pngs=False)
    assert folder.open()
    return folder


def join(folder):
    """What the first process does when its own parts are made."""
    (folder.path / "samples.json").write_text(json.dumps({"identity": folder.identity}))
    sampling.join_parts(folder.parts, COUNT, np.arange(COUNT), folder.npz, folder.finished)


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_any_number_of_processes_gives_the_same_file(tmp_path, world):
    folder = opened(tmp_path)
    parts = folder.parts
    made = [sampling.make_parts(make, COUNT, parts, rank, world, tmp_path) for rank in range(world)]
    assert sum(made) == COUNT
    # three parts of at most four images
    assert max(made) <= 4 * -(-3 // world)
    join(folder)
    with np.load(tmp_path / "samples.npz") as held:
        assert np.array_equal(held["arr_0"], make(0, COUNT))
        assert held["arr_1"].tolist() == list(range(COUNT))
    for count in (5, COUNT + 3):
        shown = sampling.first_images(tmp_path / "samples.npz", count)
        assert np.array_equal(shown, make(0, min(count, COUNT)))
    assert not parts.exists()
    for i in range(COUNT):
        assert (np.asarray(Image.open(tmp_path / f"{i:06d}.png")) == i).all()


def test_a_damaged_file_is_one_line(tmp_path):
    folder = opened(tmp_path)
    sampling.make_parts(make, COUNT, folder.parts, 0, 1)
    join(folder)
    whole = folder.npz.read_bytes()
    for damaged in (b"", whole[:100], whole[: len(whole) // 2]):
        folder.npz.write_bytes(damaged)
        with pytest.raises(ValueError, match="samples.npz is damaged: .*; delete it, and the same"):
            sampling.first_images(folder.npz, 5)


def test_finished_parts_are_kept(tmp_path):
    calls = []

    def dies(first, end):
        calls.append(first)
        if first == 4:
            raise OSError(28, "No space left on device")
        return make(first, end)

    folder = opened(tmp_path)
    with pytest.raises(OSError, match="No space left"):
        sampling.make_parts(dies, COUNT, folder.parts, 0, 1)
    # what a killed process leaves
    (folder.parts / ".000001.npy.77.tmp").write_bytes(b"half")
    folder = opened(tmp_path)
    assert sampling.make_parts(make, COUNT, folder.parts, 0, 1) == COUNT - 4
    assert calls == [0, 4]
    join(folder)
    assert np.array_equal(np.load(tmp_path / "samples.npz")["arr_0"], make(0, COUNT))


@pytest.mark.parametrize("event", range(5))
def test_killed_while_the_parts_are_deleted(tmp_path, event, monkeypatch):
    """What is left still says which samples it belongs to, and hinders nobody."""
    remove = os.unlink
    left = event

    def dies(path, *args, **kwargs):
        nonlocal left
        if str(path).endswith((".npy", ".json")):
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
        remove(path, *args, **kwargs)

    folder = opened(tmp_path)
    sampling.make_parts(make, COUNT, folder.parts, 0, 1)
    with monkeypatch.context() as patched:
        patched.setattr(os, "unlink", dies)
        if event < 4:
            with pytest.raises(KeyboardInterrupt):
                join(folder)
        else:
            # three parts and their identity
            join(folder)
    assert folder.left_over() == (event < 4)
    # a slow process of the same command makes nothing again, wherever it is
    assert not SampleFolder(tmp_path, folder.identity, COUNT, with_pngs=False).open()
    assert sampling.make_parts(make, COUNT, folder.parts, 0, 1, None, folder.finished) == 0
    join(folder)
    with pytest.raises(ValueError, match="samples.npz holds samples of None with seed 0, this run"):
        opened(tmp_path, seed=1)
    assert np.array_equal(np.load(folder.npz)["arr_0"], make(0, COUNT))


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
    job = script.load_job(options(weights, tmp_path))
    # large enough that PyTorch would add it up with several threads
    job.model.blocks[0].attn.qkv.weight = torch.nn.Parameter(torch.randn(600, 1000))
    first = script.identity(job)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert script.identity(job) == first
    finally:
        torch.set_num_threads(threads)
    # two rows swapped have the same sum, but are other weights
    weight = job.model.blocks[0].attn.qkv.weight.data
    weight[[0, 1]] = weight[[1, 0]]
    assert script.identity(job)["weights"] != first["weights"]


def test_the_identity_leaves_out_how_images_are_made(weights, tmp_path):
    job = script.load_job(options(weights, tmp_path))
    faster = options(weights, tmp_path / "elsewhere", batch=2, graph=True)
    first = script.identity(job)
    assert script.identity(replace(job, options=faster)) == first
    # what is known without being asked for
    assert script.identity(script.load_job(options(weights, tmp_path, num_heads=2))) == first
    assert script.identity(script.load_job(options(weights, tmp_path, count=5))) != first


def differing(first: dict, second: dict) -> set[str]:
    assert first.keys() == second.keys()
    return {key for key in first if first[key] != second[key]}


def test_the_identity_has_what_no_weight_shows(weights, tmp_path):
    """Heads, interpolant, classes' numbers and the decoder decide images, and may differ with the
    same weights.
    """
    job = script.load_job(options(weights, tmp_path))
    first = script.identity(job)
    four = script.load_job(options(weights, tmp_path, num_heads=4))
    assert differing(script.identity(four), first) == {"model"}
    assert script.identity(four)["model"]["num_heads"] == 4
    cosine = replace(job, diffusion=DiffusionConfig(path="cosine"))
    assert differing(script.identity(cosine), first) == {"path"}
    # samples of before there was a shift of times have none
    assert first["time_shift"] is None and "time_shift" not in first["sample"]
    shifted = script.identity(replace(job, diffusion=DiffusionConfig(time_shift=2.0)))
    assert shifted == {**first, "time_shift": 2.0}
    given = replace(job.options.sample, time_shift=2.0)
    assert script.identity(replace(job, options=replace(job.options, sample=given))) == shifted
    other = SampledLabels(job.conditions.numbers.flip(0))
    assert differing(script.identity(replace(job, conditions=other)), first) == {"numbers"}
    scaled = replace(job, decoder=Decoder(None, Normalization(1.5)))
    assert differing(script.identity(scaled), first) == {"latent_scale"}
    by_channel = replace(job, decoder=Decoder(None, Normalization([1.5], [0.5])))
    assert differing(script.identity(by_channel), first) == {"latent_scale", "latent_shift"}


def test_the_identity_has_the_whole_vae(weights, tmp_path):
    """The decoder's weights and settings, not only the encoder's, which made the data."""
    job = script.load_job(options(weights, tmp_path))
    vaes = [load_vae(str(write_vae(tmp_path / "vae"))) for _ in range(3)]
    vaes[1].decoder.conv_in.weight.data.add_(1)
    vaes[2].register_to_config(norm_num_groups=1)
    first, *others = (script.identity(replace(job, decoder=Decoder(vae))) for vae in vaes)
    assert [differing(other, first) for other in others] == [{"vae"}, {"vae"}]


def test_parts_of_other_heads_are_refused(one_process, weights, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "join_parts", lambda *args: exit("killed"))
    with pytest.raises(SystemExit):
        script.run(script.load_job(options(weights, tmp_path)))
    message = "unfinished samples with model.num_heads 2, this run has 4"
    with pytest.raises(ValueError, match=message):
        script.run(script.load_job(options(weights, tmp_path, num_heads=4)))


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


def test_the_rounding_is_that_of_the_settings(weights, tmp_path):
    """Truncation makes no value larger, and every second one smaller by 1."""
    images = []
    for rounding in ("round", "truncate"):
        cfg = SampleConfig("euler", 2, rounding=rounding)
        job = script.load_job(options(weights, tmp_path, sample=cfg))
        with torch.no_grad():
            images.append(script.image_maker(job, lambda finished: None)(0, 6).astype(int))
    less = images[0] - images[1]
    assert set(np.unique(less)) == {0, 1}
    assert 0.2 < less.mean() < 0.8


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
