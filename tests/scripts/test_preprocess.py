"""Photographs -> shards -> training -> the published layout and back, with the commands that a user types."""

import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from test_scripts import TINY, environment, free_port, script
from toy_data import photographs, tree, write_images, write_latents, write_vae

from sra_fast.data.images import ImageFolder
from sra_fast.data.latents import PackedLatents
from sra_fast.data.vae import load_vae, make_encoder, vae_identity
from sra_fast.data.writer import execute

ROOT = Path(__file__).parents[2]
diffusers = pytest.mark.skipif(find_spec("diffusers") is None, reason="needs diffusers")


@pytest.fixture(scope="module")
def preprocess():
    """The script as a module; imported, it must not touch the path as it does when it is launched."""
    path = list(sys.path)
    import sra_fast.preprocess as module

    sys.path[:] = path
    return module


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Twelve images at 64 px in shards of 5, made by one process and by two."""
    root = tmp_path_factory.mktemp("packed")
    write_images(root / "images")
    write_vae(root / "vae")
    args = [
        "--source",
        root / "images",
        "--vae",
        root / "vae",
        "--resolution",
        64,
        "--shard_size",
        5,
        "--batch",
        2,
        "--threads",
        2,
    ]
    one = script("preprocess", *args, "--out", root / "one")
    assert one.returncode == 0, one.stderr[-2000:]
    assert one.stdout.splitlines() == [f"{root}/one: 12 images of 3 classes"]
    assert "12/12" in one.stderr and "image/s" in one.stderr
    two = subprocess.run(
        [
            sys.executable,
            "-m",
            "deepspeed.launcher.runner",
            "--num_accelerators",
            "2",
            "--master_port",
            free_port(),
            "sra_fast/preprocess.py",
            *map(str, args),
            "--out",
            str(root / "two"),
        ],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (root / "two/index.json").exists(), two.stderr[-3000:]
    return root


@diffusers
def test_shards_are_the_vaes_moments_of_the_crops(packed):
    data, images = PackedLatents(packed / "one"), ImageFolder(packed / "images", 64)
    vae = load_vae(str(packed / "vae"))
    with torch.no_grad():
        posterior = vae.encode(images.__getitems__([5, 9])[0].float() / 127.5 - 1).latent_dist
    moments, labels = data.__getitems__([5, 9])
    assert moments.dtype == torch.float16 and labels.tolist() == [1, 2]
    assert torch.allclose(moments[:, :4].float(), posterior.mean, atol=2e-3, rtol=2e-3)
    assert torch.allclose(moments[:, 4:].float(), posterior.std, atol=2e-3, rtol=2e-3)
    index = json.loads((packed / "one/index.json").read_text())
    assert index["vae"] == vae_identity(vae) and index["vae"]["scaling_factor"] == 0.18215
    assert index["resolution"] == 64 and len(index["shards"]) == 3


@diffusers
def test_one_process_and_two_write_the_same_files(packed):
    one, two = tree(packed / "one"), tree(packed / "two")
    assert one == two and len(one) == 9


@diffusers
def test_training_reads_them(packed, tmp_path):
    args = [
        *TINY,
        "--model.input_size",
        8,
        "--model.in_channels",
        4,
        "--model.num_classes",
        3,
        "--data.name",
        "latents",
        "--data.num_workers",
        1,
        "--data.verify",
        "true",
        "--train.global_batch",
        4,
        "--train.steps",
        2,
        "--train.log_every",
        1,
    ]
    done = script("train", *args, "--data.path", packed / "two", "--train.out", tmp_path / "runs")
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [
        json.loads(line) for line in (tmp_path / "runs/000/stats.jsonl").read_text().splitlines()
    ]
    assert [row["step"] for row in rows] == [1, 2] and all(0 < row["loss"] < 10 for row in rows)
    done = script(
        "train",
        *args,
        "--data.path",
        packed / "two",
        "--train.out",
        tmp_path / "no",
        "--model.input_size",
        16,
    )
    assert (
        done.returncode == 2
        and "takes latents (4, 16, 16) (in_channels, input_size), the data has (4, 8, 8)"
        in done.stderr
    )
    done = script(
        "train",
        *args,
        "--data.path",
        packed / "two",
        "--train.out",
        tmp_path / "no",
        "--model.num_classes",
        2,
    )
    assert done.returncode == 2 and "labels must lie in [0, 2)" in done.stderr.splitlines()[-1]
    shutil.copytree(packed / "two", tmp_path / "cut")
    (tmp_path / "cut/shards/00001.npy").write_bytes(b"")
    done = script("train", *args, "--data.path", tmp_path / "cut", "--train.out", tmp_path / "no")
    assert done.returncode == 2 and "shards/00001.npy has 0 bytes" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr and not (tmp_path / "no").exists()


@diffusers
def test_to_the_published_layout_and_back(packed, tmp_path):
    done = script(
        "preprocess",
        "--source",
        packed / "one",
        "--out",
        tmp_path / "files",
        "--layout",
        "reference",
    )
    assert done.returncode == 0, done.stderr[-2000:]
    listed = json.loads((tmp_path / "files/vae-sd/dataset.json").read_text())["labels"]
    assert listed[11] == ["00000/img-mean-std-00000011.npy", 2] and len(listed) == 12
    moments = np.load(tmp_path / "files/vae-sd" / listed[11][0])
    assert moments.dtype == np.float32 and moments.shape == (8, 8, 8)
    done = script(
        "preprocess", "--source", tmp_path / "files", "--out", tmp_path / "back", "--shard_size", 5
    )
    assert done.returncode == 0, done.stderr[-2000:]
    a, b = tree(packed / "one"), tree(tmp_path / "back")
    assert sorted(a) == sorted(b) and all(
        a[name] == b[name] for name in a if name.endswith(".npy") or name.startswith("parts")
    )
    kept = ("vae", "labels", "shards", "dtype", "num_classes", "num_images", "shape")
    assert all(json.loads(a["index.json"])[key] == json.loads(b["index.json"])[key] for key in kept)


@diffusers
def test_identity_is_the_encoders(tmp_path):
    """Decoders are fine-tuned and swapped: the latents stay the same."""
    vae, other = (load_vae(str(write_vae(tmp_path / str(seed), seed))) for seed in (0, 1))
    identity = vae_identity(vae)
    assert vae_identity(other)["sha256"] != identity["sha256"]
    vae.decoder.conv_out.weight.data += 1
    assert vae_identity(vae) == identity
    vae.encoder.conv_in.weight.data[0, 0, 0, 0] += 1e-3
    assert vae_identity(vae) != identity


@diffusers
def test_bf16_encoding_is_close_and_another_precision(tmp_path):
    vae = load_vae(str(write_vae(tmp_path / "vae")))
    pixels = torch.stack(
        [torch.from_numpy(np.array(p.crop((0, 0, 64, 64)))).permute(2, 0, 1) for p in photographs()]
    )
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    choices, inside = [(cuda.matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic)], []
    vae.encoder.register_forward_pre_hook(
        lambda *_: inside.append((cuda.matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic))
    )
    fp32, tf32, bf16 = (
        make_encoder(vae, precision, torch.device("cpu"))(pixels)
        for precision in ("fp32", "tf32", "bf16")
    )
    assert inside == [(False, False, True), (True, True, True), (False, False, True)]
    assert choices == [(cuda.matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic)], (
        "the process's own come back"
    )
    assert torch.equal(fp32, tf32), "on a CPU"
    error = (fp32 - bf16).norm() / fp32.norm()
    assert fp32.dtype == bf16.dtype == torch.float32 and 0 < error < 0.03


@diffusers
def test_another_vae_does_not_go_on(packed, tmp_path, preprocess):
    shutil.copytree(packed / "one", tmp_path / "out")
    (tmp_path / "out/index.json").unlink()
    options = {
        "source": str(packed / "images"),
        "out": str(tmp_path / "out"),
        "resolution": 64,
        "shard_size": 5,
        "batch": 2,
    }
    other = preprocess.Options(vae=str(write_vae(tmp_path / "other", seed=1)), **options)
    with pytest.raises(
        ValueError, match="was begun with vae .*sha256.*, this run has .*choose another out"
    ):
        execute(preprocess.prepare(other))
    assert execute(preprocess.prepare(preprocess.Options(vae=str(packed / "vae"), **options)))
    assert tree(tmp_path / "out") == tree(packed / "one")


@diffusers
@pytest.mark.parametrize(
    "change, message",
    [
        ({"vae": None}, "images need --vae"),
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
        ({"source": "{root}/one"}, "--vae and --mirror are for images, .*one holds moments"),
    ],
)
def test_wrong_options_are_one_error_before_anything_is_written(
    packed, tmp_path, preprocess, change, message
):
    options = {
        "source": "{root}/images",
        "vae": "{root}/vae",
        "resolution": 64,
        "out": str(tmp_path / "out"),
        **change,
    }
    if options["vae"] == "grey":
        options["vae"] = str(write_vae(tmp_path / "grey", in_channels=1))
    options = {k: v.format(root=packed) if isinstance(v, str) else v for k, v in options.items()}
    before = sorted(tree(packed))
    with pytest.raises(ValueError, match=message):
        preprocess.prepare(preprocess.Options(**options))
    assert not (tmp_path / "out").exists() and sorted(tree(packed)) == before


def test_labels_outside_the_range_are_refused_without_a_vae(tmp_path, preprocess):
    write_latents(tmp_path / "files")
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 2\), got 0 .. 2"):
        preprocess.prepare(
            preprocess.Options(
                source=str(tmp_path / "files"), out=str(tmp_path / "out"), num_classes=2
            )
        )
    plan = preprocess.prepare(
        preprocess.Options(
            source=str(tmp_path / "files"), out=str(tmp_path / "out"), num_classes=1000
        )
    )
    assert execute(plan) and PackedLatents(tmp_path / "out").num_classes == 1000


def test_bad_input_is_one_line_and_exit_code_2(tmp_path):
    write_latents(tmp_path / "files")
    broken = tmp_path / "files/vae-sd/00001/img-mean-std-00000003.npy"
    broken.write_bytes(broken.read_bytes()[:100])
    done = script(
        "preprocess", "--source", tmp_path / "files", "--out", tmp_path / "out", "--shard_size", 2
    )
    errors = [line for line in done.stderr.splitlines() if "error" in line]
    assert (
        done.returncode == 2
        and len(errors) == 1
        and errors[0].startswith("error: ")
        and str(broken) in errors[0]
    )
    assert "Traceback" not in done.stderr and not (tmp_path / "out/index.json").exists()
    np.save(broken, np.zeros((8, 4, 4), np.float32))
    done = script(
        "preprocess", "--source", tmp_path / "files", "--out", tmp_path / "out", "--shard_size", 2
    )
    assert done.returncode == 0 and len(PackedLatents(tmp_path / "out")) == 10, (
        "mended, the same command goes on"
    )
