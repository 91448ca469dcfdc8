"""Photographs to shards, to training, to the published layout and back, with the commands that a user types."""

import json
import os
import shutil
import sys
import time
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from launch import call, deepspeed, error_of, launch
from test_scripts import TINY
from toy_data import photographs, tree, write_images, write_latents, write_vae

from sra_fast import preprocess
from sra_fast.data.folders import ImageFolder
from sra_fast.data.images import Crop
from sra_fast.data.latents import PackedLatents
from sra_fast.data.preprocess import Options, make_jobs
from sra_fast.data.vae import load_vae, make_encoder, vae_identity
from sra_fast.data.writer import run_job
from sra_fast.utils.stopping import LAUNCHER_REACTS

diffusers = pytest.mark.skipif(find_spec("diffusers") is None, reason="needs diffusers")


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Twelve images at 64 px in shards of 5, made by one process and by two."""
    root = tmp_path_factory.mktemp("packed")
    write_images(root / "images")
    write_vae(root / "vae")
    args = [
        *("--source", root / "images", "--vae", root / "vae", "--resolution", 64),
        *("--shard_size", 5, "--batch", 2, "--threads", 2),
    ]
    one = launch("preprocess", *args, "--out", root / "one")
    assert one.returncode == 0, one.stderr[-2000:]
    lines = one.stdout.splitlines()
    assert lines[0] == f"{root}/one: 12 images of 3 classes, moments 8 x 8 x 8"
    assert lines[1].startswith("cropped to a square: ")
    assert lines[2].startswith("latents: mean ")
    assert lines[3].startswith("times the VAE's scaling_factor 0.18215: standard deviation ")
    assert "12/12" in one.stderr
    assert "image/s" in one.stderr
    two = deepspeed("preprocess", *args, "--out", root / "two")
    assert (root / "two/index.json").exists(), two.stderr[-3000:]
    return root


@diffusers
def test_shards_are_the_vaes_moments_of_the_crops(packed):
    data = PackedLatents(packed / "one")
    images = ImageFolder(packed / "images", Crop(64))
    vae = load_vae(str(packed / "vae"))
    pixels, _ = images.__getitems__([5, 9])
    with torch.no_grad():
        posterior = vae.encode(pixels.float() / 127.5 - 1).latent_dist
    moments, labels = data.__getitems__([5, 9])
    assert moments.dtype == torch.float16
    assert labels.tolist() == [1, 2]
    assert torch.allclose(moments[:, :4].float(), posterior.mean, atol=2e-3, rtol=2e-3)
    assert torch.allclose(moments[:, 4:].float(), posterior.std, atol=2e-3, rtol=2e-3)
    index = json.loads((packed / "one/index.json").read_text())
    assert index["vae"] == vae_identity(vae)
    assert index["vae"]["scaling_factor"] == 0.18215
    assert index["resolution"] == 64
    assert len(index["shards"]) == 3


@diffusers
def test_one_process_and_two_write_the_same_files(packed):
    one = tree(packed / "one")
    assert len(one) == 9
    assert tree(packed / "two") == one


@diffusers
def test_training_reads_them(packed, tmp_path):
    args = [
        *TINY,
        *("--model.input_size", 8, "--model.in_channels", 4, "--model.num_classes", 3),
        *("--data.name", "latents", "--data.num_workers", 1, "--data.verify", "true"),
        *("--train.global_batch", 4, "--train.steps", 2, "--train.log_every", 1),
    ]
    data = ("--data.path", packed / "two")
    done = launch("train", *args, *data, "--train.out", tmp_path / "runs")
    assert done.returncode == 0, done.stderr[-2000:]
    lines = (tmp_path / "runs/000/stats.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["step"] for row in rows] == [1, 2]
    assert all(0 < row["loss"] < 10 for row in rows)

    shutil.copytree(packed / "two", tmp_path / "cut")
    (tmp_path / "cut/shards/00001.npy").write_bytes(b"")
    cut = ("--data.path", tmp_path / "cut")
    shapes = "takes latents (4, 16, 16) (in_channels, input_size), the data has (4, 8, 8)"
    for wrong, message in (
        ((*data, "--model.input_size", 16), shapes),
        ((*data, "--model.num_classes", 2), "labels must lie in [0, 2)"),
        (cut, "shards/00001.npy has 0 bytes"),
    ):
        done = call("train", *args, *wrong, "--train.out", tmp_path / "no")
        assert done.returncode == 2
        assert message in error_of(done)
    assert not (tmp_path / "no").exists()


@diffusers
def test_to_the_published_layout_and_back(packed, tmp_path):
    files = tmp_path / "files"
    done = call("preprocess", "--source", packed / "one", "--out", files, "--layout", "published")
    assert done.returncode == 0, done.stderr[-2000:]
    listed = json.loads((files / "vae-sd/dataset.json").read_text())["labels"]
    assert len(listed) == 12
    assert listed[11] == ["00000/img-mean-std-00000011.npy", 2]
    moments = np.load(files / "vae-sd" / listed[11][0])
    assert moments.dtype == np.float32
    assert moments.shape == (8, 8, 8)

    back = tmp_path / "back"
    done = call("preprocess", "--source", files, "--out", back, "--shard_size", 5)
    assert done.returncode == 0, done.stderr[-2000:]
    before = tree(packed / "one")
    after = tree(back)
    assert before.keys() == after.keys()
    same = [name for name in before if name.endswith(".npy")]
    assert all(before[name] == after[name] for name in same)
    # the index names another source, but tells the same of the latents
    index = json.loads(before["index.json"])
    index_after = json.loads(after["index.json"])
    for key in (
        "vae",
        "vae_path",
        "classes",
        "labels",
        "shards",
        "dtype",
        "num_classes",
        "num_images",
        "shape",
    ):
        assert index_after[key] == index[key]


@diffusers
def test_the_identity_is_that_of_the_encoder(tmp_path):
    """Decoders are fine-tuned and swapped without a change of the latents."""
    vae, other = (load_vae(str(write_vae(tmp_path / str(seed), seed))) for seed in (0, 1))
    identity = vae_identity(vae)
    assert vae_identity(other)["sha256"] != identity["sha256"]
    vae.decoder.conv_out.weight.data += 1
    assert vae_identity(vae) == identity
    vae.encoder.conv_in.weight.data[0, 0, 0, 0] += 1e-3
    assert vae_identity(vae) != identity


@diffusers
def test_precisions_of_the_encoder(tmp_path):
    vae = load_vae(str(write_vae(tmp_path / "vae")))
    crops = [np.array(photo.crop((0, 0, 64, 64))) for photo in photographs()]
    pixels = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2)

    def settings() -> tuple[bool, bool, bool]:
        cudnn = torch.backends.cudnn
        return torch.backends.cuda.matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic

    before = settings()
    inside = []
    vae.encoder.register_forward_pre_hook(lambda *_: inside.append(settings()))
    fp32, tf32, bf16 = (
        make_encoder(vae, precision, torch.device("cpu"))(pixels)
        for precision in ("fp32", "tf32", "bf16")
    )
    # TF32 in matrix products, TF32 in convolutions, deterministic convolutions
    assert inside == [(False, False, True), (True, True, True), (False, False, True)]
    assert settings() == before, "the process's own settings are restored"
    # a CPU has no TF32
    assert torch.equal(fp32, tf32)
    assert fp32.dtype == bf16.dtype == torch.float32
    error = (fp32 - bf16).norm() / fp32.norm()
    assert 0 < error < 0.03


@diffusers
def test_another_vae_does_not_resume(packed, tmp_path):
    shutil.copytree(packed / "one", tmp_path / "out")
    (tmp_path / "out/index.json").unlink()

    def job(vae):
        (only,) = make_jobs(
            Options(
                source=str(packed / "images"),
                out=str(tmp_path / "out"),
                vae=str(vae),
                resolution=64,
                shard_size=5,
                batch=2,
            )
        )
        return only

    message = "was begun with vae .*sha256.*, this run has .*choose another out"
    with pytest.raises(ValueError, match=message):
        run_job(job(write_vae(tmp_path / "other", seed=1)))
    assert run_job(job(packed / "vae"))
    assert tree(tmp_path / "out") == tree(packed / "one")


@diffusers
@pytest.mark.parametrize(
    "change, message",
    [
        ({"vae": None}, "images need either vae, .* or pixels true .*, got neither"),
        ({"vae": "{root}/images"}, "--vae .*images holds no AutoencoderKL"),
        ({"vae": "nobody/nothing"}, "--vae nobody/nothing holds no AutoencoderKL"),
        ({"vae": "grey"}, "must take images of 3 channels, this one takes 1"),
        ({"resolution": 60}, "resolution must be a multiple of 8 .*got 60"),
        ({"num_classes": 5}, "num_classes 5 was asked for, .* has 3 class folders"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"out": "{root}/images"}, "out must be another folder than source"),
        (
            {"out": "{root}/images/latents"},
            "out must not lie in the folder of the images, got .*images/latents in .*images",
        ),
        ({"source": "{root}/nowhere"}, "no folder or .zip of images"),
        ({"source": "{root}/one"}, "--vae is for images, .*one holds no images"),
    ],
)
def test_wrong_options_are_found_before_anything_is_written(packed, tmp_path, change, message):
    options = {
        "source": "{root}/images",
        "vae": "{root}/vae",
        "resolution": 64,
        "out": str(tmp_path / "out"),
        **change,
    }
    if options["vae"] == "grey":
        options["vae"] = str(write_vae(tmp_path / "grey", in_channels=1))
    for key, value in options.items():
        if isinstance(value, str):
            options[key] = value.format(root=packed)
    before = sorted(tree(packed))
    with pytest.raises(ValueError, match=message):
        make_jobs(Options(**options))
    assert not (tmp_path / "out").exists()
    assert sorted(tree(packed)) == before


@pytest.mark.parametrize("rank", [0, 3])
def test_an_error_of_any_process_is_said(tmp_path, monkeypatch, capsys, rank):
    """One process says it at once. The launcher ends the others, unless they were the first to find
    it: then they say it themselves.
    """
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    ranks = {"RANK": rank, "WORLD_SIZE": 4, "LOCAL_RANK": rank % 2}
    for name, value in {**ranks, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    args = ["--source", str(tmp_path / "nowhere"), "--out", "out", "--pixels", "true"]
    monkeypatch.setattr(sys, "argv", ["preprocess.py", *args])
    with pytest.raises(SystemExit) as stopped:
        preprocess.main()
    assert stopped.value.code == 2
    who = "error on rank 3" if rank else "error"
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"{who}: no folder or .zip of")
    assert waited == ([LAUNCHER_REACTS] if rank else [])


def test_names_that_are_no_text_are_printed(tmp_path):
    write_images(tmp_path / "images")
    file = os.fsencode(tmp_path) + b"/images/a/\xe9.png"
    with open(file, "wb") as f:
        f.write(b"no image")
    args = ["--source", tmp_path / "images", "--pixels", "true", "--resolution", 16]
    skipped = ("--out", tmp_path / "out", "--bad", "skip", "--holdout", 0.25)
    for options in (("--bad", "list"), skipped):
        # a process of its own: what stands for its output in this one takes everything
        done = launch("preprocess", *args, *options)
        assert "Traceback" not in done.stderr
        assert r"images/a/\udce9.png is no readable image: empty, or of" in done.stdout
    assert done.returncode == 0


def test_labels_outside_the_range_are_refused(tmp_path):
    write_latents(tmp_path / "files")
    options = {"source": str(tmp_path / "files"), "out": str(tmp_path / "out")}
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 2\), got 0 .. 2"):
        make_jobs(Options(**options, num_classes=2))
    assert run_job(*make_jobs(Options(**options, num_classes=1000)))
    assert PackedLatents(tmp_path / "out").num_classes == 1000


def test_a_broken_file_is_one_line_and_the_same_command_resumes(tmp_path):
    write_latents(tmp_path / "files")
    broken = tmp_path / "files/vae-sd/00001/img-mean-std-00000003.npy"
    broken.write_bytes(broken.read_bytes()[:100])
    args = ("--source", tmp_path / "files", "--out", tmp_path / "out", "--shard_size", 2)
    done = launch("preprocess", *args)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "error" in line]
    assert line.startswith("error: ")
    assert str(broken) in line
    assert not (tmp_path / "out/index.json").exists()

    np.save(broken, np.zeros((8, 4, 4), np.float32))
    done = call("preprocess", *args)
    assert done.returncode == 0, done.stderr
    assert len(PackedLatents(tmp_path / "out")) == 10
