"""Images as training data: what is stored is what is read, scaled and mirrored on the device."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from launch import call, error_of
from toy_data import photographs, tree, write_images, write_latents

from sra_fast.config.cli import parse_train
from sra_fast.config.schema import DataConfig
from sra_fast.data.arrays import open_array
from sra_fast.data.dataset import kind_of, open_data
from sra_fast.data.images import Crop, center_crop
from sra_fast.data.pixels import PackedPixels, PixelArray
from sra_fast.diffusion.draws import draw
from sra_fast.training.plan import make_run_plan


def pack(root, *args, out="packed"):
    done = call(
        *("preprocess", "--source", root / "images", "--out", root / out, "--pixels", "true"),
        *("--resolution", 16, "--threads", 1, *args),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture
def images(tmp_path):
    write_images(tmp_path / "images")
    return tmp_path


def write_array(path, shape, labels=True, seed=0):
    rng = np.random.default_rng(seed)
    arrays = {"arr_0": rng.integers(0, 256, shape, dtype=np.uint8)}
    if labels:
        arrays["arr_1"] = np.arange(shape[0]) % 3
    np.savez(path, **arrays)
    return arrays


def test_packed_images_are_the_crops(images):
    text = pack(images, "--shard_size", 5)
    data = open_data(DataConfig(path=str(images / "packed")))
    assert isinstance(data, PackedPixels)
    assert (data.shape, data.num_classes, data.class_names) == ((3, 16, 16), 3, ["a", "b", "c"])
    # image 5 is b/1.png: see write_images
    photo = photographs()[1].crop((40, 20, 240, 171))
    expected = torch.from_numpy(np.array(center_crop(photo, 16))).permute(2, 0, 1)
    pixels, labels = data.__getitems__([11, 5])
    assert torch.equal(pixels[1], expected)
    assert labels.tolist() == [2, 1]
    assert torch.equal(data.to_latent(pixels, None), pixels.float() / 127.5 - 1)
    assert data.locate(11) == "image 11 (shards/00002.npy, row 1)"
    assert np.array_equal(np.load(images / "packed/shards/00002.npy")[1], pixels[0])
    index = json.loads((images / "packed/index.json").read_text())
    everything = data.read(list(range(12))).images.double()
    assert index["channels"]["mean"] == pytest.approx(everything.mean((0, 2, 3)).tolist())
    assert index["channels"]["std"] == pytest.approx(
        everything.std((0, 2, 3), correction=0).tolist()
    )
    assert text.splitlines()[0].endswith("packed: 12 images of 3 classes, pixels 3 x 16 x 16")
    assert "pixels 0 to 255: mean" in text


@pytest.mark.parametrize("channels", [1, 4])
def test_channels_of_packed_images(images, channels):
    pack(images, "--channels", channels)
    data = PackedPixels(images / "packed")
    assert data.shape == (channels, 16, 16)
    if channels == 4:
        assert (data.read([3]).images[0, 3] == 255).all()


def test_the_same_images_packed_elsewhere_are_the_same_data(images):
    pack(images, "--shard_size", 5)
    pack(images, "--shard_size", 5, "--threads", 2, out="again")
    index = images / "again/index.json"
    # the index also says where a VAE was
    index.write_text(json.dumps({**json.loads(index.read_text()), "vae_path": "elsewhere"}))
    first = PackedPixels(images / "packed")
    assert PackedPixels(images / "again").fingerprint == first.fingerprint
    pack(images, "--mirror", "true", out="mirrored")
    assert PackedPixels(images / "mirrored").fingerprint != first.fingerprint


def test_the_resolution_need_not_be_given(images):
    args = ["--pixels", "true", "--threads", 1, "--out"]
    done = call("preprocess", "--source", images / "images", *args, images / "packed")
    assert done.returncode == 0, done.stderr[-2000:]
    assert PackedPixels(images / "packed").shape == (3, 64, 64)
    write_array(images / "x.npz", (9, 8, 8, 5))
    done = call("preprocess", "--source", images / "x.npz", *args, images / "array")
    assert done.returncode == 0, done.stderr[-2000:]
    assert PackedPixels(images / "array").shape == (5, 8, 8)


def test_a_share_is_held_out(images):
    text = pack(images, "--holdout", 0.25, "--mirror", "true")
    data = PackedPixels(images / "packed")
    (train, train_rows), (held_out, held_out_rows) = data.held_out_split()
    assert train is data and len(train_rows) == len(data) == 18
    assert held_out.labels.tolist() == [0, 1, 2] and len(held_out_rows) == 3
    assert held_out.class_names == data.class_names
    shown = {pixels.numpy().tobytes() for pixels in data.read(list(range(18))).images}
    assert not any(p.numpy().tobytes() in shown for p in held_out.read([0, 1, 2]).images)
    assert "held_out: 3 images of 3 classes" in text


def test_held_out_images_of_another_command_are_not_kept(images):
    """They would be trained on, and still count as held out."""
    pack(images, "--holdout", 0.25)
    shutil.rmtree(images / "packed/shards")
    for name in ("index.json", "preprocess.json"):
        (images / "packed" / name).unlink()
    done = call(
        *("preprocess", "--source", images / "images", "--out", images / "packed"),
        *("--pixels", "true", "--resolution", 16),
    )
    assert "held_out was made by another command: delete it" in error_of(done)


def test_a_holdout_asked_for_later_leaves_nothing(images):
    """A held-out set that is a part of the training set would pass for a held-out one."""
    pack(images)
    done = call(
        *("preprocess", "--source", images / "images", "--out", images / "packed"),
        *("--pixels", "true", "--resolution", 16, "--holdout", 0.25),
    )
    message = "was begun with holdout 0.0, this run has 0.25: delete it or choose another out"
    assert message in error_of(done)
    assert len(PackedPixels(images / "packed").held_out_split()[0][1]) < 12


def test_unfinished_and_absent_data_are_told_apart(images):
    pack(images, "--holdout", 0.25)
    given = DataConfig(name="pixels", path=str(images / "packed"))
    (images / "packed/index.json").rename(images / "kept")
    for name in ("auto", "pixels", "latents"):
        given.name = name
        with pytest.raises(ValueError, match="packed is not finished: run the same command"):
            open_data(given)
    # killed while it wrote the held-out images
    (images / "kept").rename(images / "packed/index.json")
    (images / "packed/held_out/index.json").unlink()
    with pytest.raises(ValueError, match="packed is not finished"):
        open_data(DataConfig(path=str(images / "packed")))
    with pytest.raises(ValueError, match="no packed data set at .*nowhere"):
        open_data(DataConfig(name="pixels", path=str(images / "nowhere")))


def test_bad_images_are_skipped_listed_or_stop_the_command(images):
    bad = images / "images/b/2.jpg"
    bad.write_bytes(bad.read_bytes()[:300])
    args = ["--source", images / "images", "--pixels", "true", "--resolution", 16]
    done = call("preprocess", *args, "--out", images / "stopped")
    assert "b/2.jpg is no readable image" in error_of(done)
    done = call("preprocess", *args, "--bad", "list")
    assert done.returncode == 2
    lines = done.stdout.splitlines()
    assert "b/2.jpg" in lines[0] and lines[1:] == ["1 images cannot be read"]

    # shards of 4: the bad image is the third of the second
    text = pack(images, "--bad", "skip", "--shard_size", 4, out="skipped")
    assert "11 images of 3 classes" in text and "1 images skipped, the first is" in text
    data = PackedPixels(images / "skipped", verify=True)
    assert data.shards.rows == [4, 3, 4]
    assert data.labels.tolist() == [0] * 4 + [1] * 3 + [2] * 4
    bad.unlink()
    pack(images, out="without")
    everything = list(range(11))
    expected = PackedPixels(images / "without").read(everything).images
    assert torch.equal(data.read(everything).images, expected)


def test_an_array_is_read_as_it_is(tmp_path):
    arrays = write_array(tmp_path / "x.npz", (9, 8, 8, 5))
    data = open_data(DataConfig(path=str(tmp_path / "x.npz")))
    assert isinstance(data, PixelArray)
    assert (data.shape, data.num_classes) == ((5, 8, 8), 3)
    assert data.locate(7) == "image 7"
    pixels, labels = data.__getitems__([7, 2])
    assert np.array_equal(pixels.permute(0, 2, 3, 1).numpy(), arrays["arr_0"][[7, 2]])
    assert labels.tolist() == [1, 2]
    one_class = tmp_path / "one.npz"
    write_array(one_class, (4, 8, 8, 1), labels=False)
    assert PixelArray(one_class).num_classes == 1
    other = PixelArray(tmp_path / "x.npz").fingerprint
    write_array(tmp_path / "x.npz", (9, 8, 8, 5), seed=1)
    assert PixelArray(tmp_path / "x.npz").fingerprint != other


def test_options_for_files_are_refused_for_arrays_and_moments(tmp_path):
    write_array(tmp_path / "x.npz", (9, 8, 8, 3))
    write_latents(tmp_path / "moments")
    for source, option, value in (
        (tmp_path / "x.npz", "channels", 1),
        (tmp_path / "x.npz", "bad", "skip"),
        (tmp_path / "moments", "resolution", 64),
        (tmp_path / "moments", "background", "red"),
    ):
        args = ["--pixels", "true"] if source.suffix == ".npz" else []
        done = call(
            *("preprocess", "--source", source, "--out", tmp_path / "out", *args),
            *(f"--{option}", value),
        )
        assert f"--{option} is for image" in error_of(done)
    # one channel is no image for a VAE
    write_array(tmp_path / "x.npz", (9, 8, 8, 1))
    done = call(
        "preprocess", "--source", tmp_path / "x.npz", "--out", tmp_path / "out", "--vae", "x"
    )
    assert "a VAE takes images of 3 channels, got 1" in error_of(done)


def test_images_that_are_no_squares_are_refused(tmp_path):
    write_array(tmp_path / "x.npz", (9, 8, 12, 3))
    cfg = parse_train(["--model", "SiT-S/2", "--data", str(tmp_path / "x.npz")])[0]
    with pytest.raises(ValueError, match="images must be square, the data's are 8 x 12"):
        make_run_plan(cfg)


def test_the_digits_have_no_options():
    for change, message in (
        ({"flip": True}, "data.flip is not for the data set digits, which does not mirror"),
        ({"path": "x"}, "data.path is not for the digits, got x"),
        ({"latent_scale": 2.0}, "data.latent_scale is for latents, the data are pixels; got 2.0"),
        ({"latent_shift": [2.0]}, r"data.latent_shift is for latents, .* pixels; got \[2.0\]"),
        ({"latent_statistics": True}, "data.latent_statistics is for .* digits has pixels; got Tr"),
    ):
        with pytest.raises(ValueError, match=message):
            open_data(DataConfig(name="digits", **change))


def test_an_array_is_a_source(tmp_path):
    arrays = write_array(tmp_path / "x.npz", (9, 8, 8, 5))
    (tmp_path / "images").symlink_to(tmp_path / "x.npz")
    source = open_array(tmp_path / "x.npz", Crop(8))
    assert np.array_equal(source.read([4]).images[0].permute(1, 2, 0), arrays["arr_0"][4])
    with pytest.raises(ValueError, match="8 x 8 and 5 channels: with resolution 4 they must be"):
        open_array(tmp_path / "x.npz", Crop(4))
    arrays = write_array(tmp_path / "y.npz", (3, 8, 12, 3))
    cropped = open_array(tmp_path / "y.npz", Crop(8)).read([1])
    assert np.array_equal(cropped.images[0].permute(1, 2, 0), arrays["arr_0"][1][:, 2:10])
    assert cropped.report.cut == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"x": np.zeros(3)}, "must hold arr_0, uint8 .* got nothing"),
        ({"arr_0": np.zeros((2, 8, 8, 3))}, r"got float64 \[2, 8, 8, 3\]"),
        ({"arr_0": np.zeros((2, 8, 8), np.uint8)}, r"got uint8 \[2, 8, 8\]"),
        (
            {"arr_0": np.zeros((2, 8, 8, 3), np.uint8), "arr_1": np.zeros(3, int)},
            r"must hold arr_1, 2 labels from 0 on, got int64 \[3\]",
        ),
        (
            {"arr_0": np.zeros((2, 8, 8, 3), np.uint8), "arr_1": np.zeros(2)},
            r"got float64 \[2\]",
        ),
    ],
)
def test_wrong_arrays_are_one_error(tmp_path, arrays, message):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        PixelArray(tmp_path / "x.npz")
    for contents, reason in ((b"PK no", ""), (b"no archive", "it holds no plain array$")):
        (tmp_path / "x.npz").write_bytes(contents)
        with pytest.raises(ValueError, match=f"x.npz is no readable .npz file: {reason}"):
            PixelArray(tmp_path / "x.npz")


def test_flips_are_of_the_seed_and_change_no_other_number():
    args = (0, 3, 32, (64, 1, 4, 4), "cpu")
    plain = draw(*args, drop_prob=0.1, posterior=False)
    flipped = draw(*args, drop_prob=0.1, posterior=False, flip=True)
    for name in ("noise", "uniform", "gap", "drop"):
        assert torch.equal(getattr(plain, name), getattr(flipped, name))
    assert 16 < flipped.flip.sum() < 48
    # a part of the batch draws the same
    part = draw(0, 3, 40, (8, 1, 4, 4), "cpu", drop_prob=0.1, posterior=False, flip=True)
    assert torch.equal(part.flip, flipped.flip[8:16])
    x0 = torch.rand(64, 1, 4, 4)
    mirrored = flipped.mirror(x0)
    assert torch.equal(mirrored[flipped.flip], x0[flipped.flip].flip(3))
    assert torch.equal(mirrored[~flipped.flip], x0[~flipped.flip])
    assert plain.mirror(x0) is x0


def test_the_model_takes_its_sizes_from_the_data(images):
    pack(images, "--channels", 1)
    args = ["--model", "SiT-S/2", "--data", str(images / "packed"), "--train.global_batch", "4"]
    cfg = make_run_plan(parse_train(args)[0]).plan.cfg
    model = cfg.model
    assert (model.in_channels, model.input_size, model.num_classes) == (1, 16, 3)
    assert (cfg.align.student_layer, cfg.align.teacher_layer) == (3, 9)
    assert cfg.data.name == "pixels" and cfg.data.latent_scale is None
    for wrong, message in (
        (("--model.input_size", "8"), r"takes latents \(1, 8, 8\) .* has \(1, 16, 16\)"),
        (("--data.latent_scale", "1"), "data.latent_scale is for latents, the data are pixels"),
        (("--data.latent_scale", "[1]"), "data.latent_scale is for latents, the data are pixels"),
        (("--data.latent_statistics", "true"), "latent_statistics is for .* pixels has pixels"),
        (("--model.patch_size", "3"), "input_size must be a multiple of patch_size 3, got 16"),
    ):
        with pytest.raises(ValueError, match=message):
            make_run_plan(parse_train([*args, *wrong])[0])


def test_training_on_pixels_with_flips_samples_without_a_vae(images):
    pack(images)
    sizes = "--model SiT-S/4 --model.hidden_size 32 --model.depth 4 --model.num_heads 2".split()
    done = call(
        *("train", *sizes, "--data", images / "packed", "--data.flip", "true"),
        *("--data.num_workers", 0, "--train.steps", 2, "--train.global_batch", 4),
        *("--train.precision", "fp32", "--train.out", images / "runs"),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    done = call(
        *("sample", "--checkpoint", images / "runs/000", "--out", images / "samples"),
        *("--count", 3, "--classes", "[c, a]", "--sample.method", "euler", "--sample.steps", 2),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    with np.load(images / "samples/samples.npz") as samples:
        assert samples["arr_0"].shape == (3, 16, 16, 3)
        assert samples["arr_1"].tolist() == [2, 0, 2]


@pytest.mark.parametrize(
    "name, message",
    [
        ("images", "holds images; prepare them first: sra-fast preprocess --source .*images"),
        ("zip", "holds images; prepare them first"),
        ("nothing", "must name the training data .*--data PATH.*got nothing"),
        ("tars", "holds images; prepare them first"),
        ("nowhere", "must hold a folder vae-sd .* or index.json"),
    ],
)
def test_what_is_no_training_data_is_told_how_to_become_it(images, name, message):
    path = {"images": images / "images", "zip": images / "z.zip", "nowhere": images / "nowhere"}
    if name == "zip":
        shutil.make_archive(images / "z", "zip", images / "images")
    if name == "tars":
        path["tars"] = images / "tars"
        path["tars"].mkdir()
        shutil.make_archive(images / "tars/0", "tar", images / "images")
    given = None if name == "nothing" else str(path[name])
    with pytest.raises(ValueError, match=message):
        open_data(DataConfig(path=given))


def test_kinds_are_not_mixed_up(images):
    pack(images)
    assert kind_of(str(images / "packed")) == "pixels"
    with pytest.raises(ValueError, match="packed holds pixels, moments were expected"):
        open_data(DataConfig(name="latents", path=str(images / "packed")))
    done = call(
        *("preprocess", "--source", images / "packed", "--out", images / "other"),
        *("--layout", "published"),
    )
    assert "holds packed pixels, which have one layout only" in error_of(done)


@pytest.mark.parametrize(
    "args, message",
    [
        ("", "images need either vae, .* or pixels true .*, got neither"),
        ("--pixels true --vae x", "got both"),
        ("--pixels true --layout published", "pixels are packed"),
        ("--pixels true --channels 2", r"channels must be one of \[1, 3, 4\], got 2"),
        ("--pixels true --holdout 1", r"holdout must lie in \[0, 1\), got 1"),
        ("--pixels true --background blurple", "background must be a colour, .* got blurple"),
        ("--pixels true --num_classes 5", "num_classes 5 was asked for"),
        ("--vae x --channels 1", "a VAE takes images of 3 channels, got 1"),
    ],
)
def test_options_that_do_not_fit_are_one_error(images, args, message):
    done = call(
        *("preprocess", "--source", images / "images", "--out", images / "out"), *args.split()
    )
    assert done.returncode == 2
    assert re.search(message, error_of(done))
    assert not (images / "out").exists()


def test_a_restart_with_other_options_is_refused(images):
    pack(images)
    before = tree(images / "packed")
    (images / "packed/index.json").unlink()
    done = call(
        *("preprocess", "--source", images / "images", "--out", images / "packed"),
        *("--pixels", "true", "--resolution", 16, "--orientation", "true"),
    )
    assert "was begun with orientation False, this run has True" in error_of(done)
    pack(images)
    assert tree(images / "packed") == before
