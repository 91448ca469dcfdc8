"""Features of a vision model beside a data set: what is stored is what the model says of the same
images, and it comes with the batches of these images only.
"""

import json
import re
import shutil
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from document_classes import COMMANDS
from launch import ROOT, call, error_of
from toy_data import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    tree,
    write_images,
    write_latents,
    write_vae,
    write_vision_model,
)

from sra_fast.analysis.features import split
from sra_fast.config.cli import parse_train
from sra_fast.config.schema import DataConfig
from sra_fast.data.dataset import open_data
from sra_fast.data.digits import Digits
from sra_fast.data.facts import DataFacts, differences
from sra_fast.data.loader import Batches
from sra_fast.data.order import ShuffledBatches
from sra_fast.data.pixels import PackedPixels
from sra_fast.data.preprocess import Options, make_jobs
from sra_fast.data.vision import features_shape, load_vision_model, make_extractor
from sra_fast.data.writer import run_jobs
from sra_fast.models import create_model
from sra_fast.utils.registry import TARGETS

pytestmark = [
    pytest.mark.usefixtures("rooms"),
    pytest.mark.skipif(find_spec("transformers") is None, reason="needs transformers"),
]
CPU = torch.device("cpu")


def preprocess(*args) -> str:
    done = call("preprocess", *args, "--threads", 1, "--batch", 2)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Twelve images, three of them held out, at 16 px; their features in fp32 on a grid of 4."""
    root = tmp_path_factory.mktemp("features")
    write_images(root / "images")
    write_vision_model(root / "dino", num_hidden_layers=1)
    write_vision_model(root / "other", seed=1, num_hidden_layers=1)
    said = preprocess(
        *("--source", root / "images", "--out", root / "data", "--pixels", "true"),
        *("--resolution", 16, "--holdout", 0.25, "--mirror", "true", "--shard_size", 5),
        *("--features", root / "dino", "--features_grid", 4, "--features_dtype", "float32"),
    )
    assert "data/held_out/features/dino: 3 images of 3 classes, features 16 x 32" in said
    assert "features of Dinov2Model: deviations" in said
    return root


@pytest.fixture
def data(made, tmp_path):
    """A copy to change."""
    shutil.copytree(made / "data", tmp_path / "data")
    return tmp_path / "data"


def seen_by(model, pixels: torch.Tensor, side: int, **options) -> torch.Tensor:
    """All tokens of uint8 images, computed step by step."""
    images = pixels.expand(-1, 3, -1, -1).float() / 255
    if images.shape[-1] != side:
        images = F.interpolate(images, (side, side), mode="bicubic", antialias=True)
    mean = torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1)
    std = torch.tensor(IMAGENET_STD).view(1, 3, 1, 1)
    with torch.no_grad():
        return model((images - mean) / std, **options).last_hidden_state


def opened(path, name="dino", **options):
    return open_data(DataConfig(path=str(path), features=name, **options))


def test_they_are_the_models_own_output_on_the_same_pixels(made):
    import transformers

    model = transformers.Dinov2Model.from_pretrained(made / "dino").eval()
    train = opened(made / "data")
    held_out = train.held_out_split()[1][0]
    assert (len(train), len(held_out)) == (18, 3)
    for part in (train, held_out):
        numbers = [*reversed(range(len(part)))]
        batch = part.__getitems__(numbers)
        pixels, (labels,), features = part.split(batch)
        assert batch[-1] is features and features.dtype == torch.float32
        assert torch.equal(labels, part.labels[numbers])
        # side 16: the images as they are, after one class token
        assert torch.allclose(features, seen_by(model, pixels, 16)[:, 1:], atol=1e-6, rtol=1e-5)
    assert (train.features.name, train.features.tokens, train.features.width) == ("dino", 16, 32)
    index = json.loads((made / "data/features/dino/index.json").read_text())
    assert index["model"] == load_vision_model(str(made / "dino")).identity
    assert index["model"]["class"] == "Dinov2Model"
    assert index["features_path"] == str(made / "dino")
    assert index["data_sha256"] == train.fingerprint
    assert (index["mean"], index["std"], index["side"]) == (IMAGENET_MEAN, IMAGENET_STD, 16)
    everything = train.features.read([*range(18)]).double()
    assert index["channels"]["mean"] == pytest.approx(everything.mean((0, 1)).tolist(), abs=1e-7)
    expected = everything.std((0, 1), correction=0).tolist()
    assert index["channels"]["std"] == pytest.approx(expected)


@pytest.mark.parametrize(
    "name, others, options",
    [
        ("Dinov2", 1, {}),
        ("Dinov2WithRegisters", 4, {"num_register_tokens": 3}),
        ("DINOv3ViT", 3, {"num_register_tokens": 2}),
        ("ViT", 1, {}),
        ("DeiT", 2, {}),
        ("CLIP", 1, {}),
        ("CLIPVision", 1, {}),
        ("Siglip", 0, {}),
    ],
)
def test_models_of_every_kind(tmp_path, name, others, options):
    """Patches come last; tables of positions are interpolated as the model itself does it."""
    vision = load_vision_model(str(write_vision_model(tmp_path / "model", name, **options)))
    extract = make_extractor(vision, 6, "fp32", CPU)
    pixels = torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8)
    found = extract(pixels)
    assert features_shape(vision, extract, 6, 3, 40) == tuple(found.shape[1:]) == (36, 32)
    asked = {} if name.lower().startswith("dino") else {"interpolate_pos_encoding": True}
    tokens = seen_by(vision.model, pixels, 24, **asked)
    assert tokens.shape[1] == 36 + others
    # the order of the sums is the CPU's choice
    assert torch.allclose(found, tokens[:, others:], atol=1e-5, rtol=1e-5)
    grey = pixels[:, :1]
    assert torch.equal(extract(grey), extract(grey.repeat(1, 3, 1, 1)))
    rough = make_extractor(vision, 6, "bf16", CPU)(pixels)
    assert rough.dtype == torch.float32
    assert 0 < (rough - found).norm() / found.norm() < 0.05


def test_the_data_are_the_same_with_and_without_features(made, tmp_path):
    preprocess(
        *("--source", made / "images", "--out", tmp_path / "plain", "--pixels", "true"),
        *("--resolution", 16, "--holdout", 0.25, "--mirror", "true", "--shard_size", 5),
    )
    with_features = tree(made / "data")
    kept = {name: held for name, held in with_features.items() if "features/" not in name}
    assert tree(tmp_path / "plain") == kept
    assert opened(tmp_path / "plain", None).fingerprint == opened(made / "data").fingerprint


def test_they_can_be_added_from_the_images_and_from_the_pixels(made, data):
    """The images are read as the data's were, without being told."""
    same = ("--features_grid", 4, "--features_dtype", "float32", "--shard_size", 5)
    shutil.rmtree(data / "features")
    shutil.rmtree(data / "held_out/features")
    of_images = ("--source", made / "images", "--out", data, "--features", made / "dino")
    preprocess(*of_images, *same)
    assert tree(data) == tree(made / "data")
    # without a source of images, and with another name, grid and dtype
    preprocess("--source", data, "--features", made / "dino", "--features_name", "px", *same)
    first = tree(data / "features/dino")
    second = tree(data / "features/px")
    assert first.keys() == second.keys()
    assert all(first[name] == second[name] for name in first if name.endswith(".npy"))
    preprocess("--source", data, "--out", data, "--features", made / "other")
    other = opened(data, "other").features
    # half the side of the pixels
    assert (other.tokens, other.width, other.dtype) == (64, 32, torch.float16)
    assert torch.equal(opened(data, "px").features.read([3]), opened(data).features.read([3]))


def options_for(made, out, **changes) -> Options:
    options = {
        "source": str(made / "images"),
        "out": str(out),
        "pixels": True,
        "resolution": 16,
        "holdout": 0.25,
        "mirror": True,
        "shard_size": 5,
        "batch": 2,
        "threads": 1,
        "features": str(made / "dino"),
        "features_grid": 4,
        "features_dtype": "float32",
        **changes,
    }
    return Options(**options)


def test_two_processes_make_what_one_makes(made, tmp_path, monkeypatch):
    finished = {}
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        jobs = make_jobs(options_for(made, tmp_path / "two"))
        finished[rank] = [bool(done) for _, done in run_jobs(jobs)]
    assert finished == {1: [False] * 4, 0: [True] * 4}
    assert tree(tmp_path / "two") == tree(made / "data")


def test_interrupted_they_resume_bit_for_bit(made, tmp_path):
    class Interrupted(Exception):
        pass

    out = tmp_path / "out"
    jobs = make_jobs(options_for(made, out))
    features = jobs[-1]
    extract = features.encode
    calls = []

    def interrupted(pixels):
        calls.append(pixels)
        if len(calls) == 5:
            raise Interrupted
        return extract(pixels)

    features.encode = interrupted
    with pytest.raises(Interrupted):
        list(run_jobs(jobs))
    # the data are complete, and can be trained on
    assert len(PackedPixels(out)) == 18
    with pytest.raises(ValueError, match="the preprocessing of .*features/dino is not finished"):
        opened(out)
    first = (out / "features/dino/shards/00000.npy").stat().st_ino
    list(run_jobs(make_jobs(options_for(made, out))))
    assert (out / "features/dino/shards/00000.npy").stat().st_ino == first
    assert tree(out) == tree(made / "data")
    # another model does not resume
    with pytest.raises(ValueError, match="features/dino was begun with model .*this run has"):
        changed = options_for(made, out, features=str(made / "other"), features_name="dino")
        list(run_jobs(make_jobs(changed)))


def test_images_that_were_skipped_have_no_features(made, tmp_path):
    """And one that can be read by now has no row that its features could belong to."""
    shutil.copytree(made / "images", tmp_path / "images")
    bad = tmp_path / "images/b/2.jpg"
    whole = bad.read_bytes()
    bad.write_bytes(whole[:300])
    out = tmp_path / "out"
    args = ("--source", tmp_path / "images", "--out", out, "--features", made / "dino")
    preprocess(*args, "--pixels", "true", "--resolution", 16, "--bad", "skip")
    train = opened(out)
    pixels, (labels,), features = train.split(train.__getitems__([5, 6, 10]))
    assert labels.tolist() == [1, 1, 2]
    vision = load_vision_model(str(made / "dino"))
    expected = make_extractor(vision, 8, "fp32", CPU)(pixels)
    assert torch.allclose(features.float(), expected, atol=2e-3, rtol=2e-3)
    preprocess(*args, "--features_name", "again")
    assert opened(out, "again").features.fingerprint == train.features.fingerprint
    bad.write_bytes(whole)
    done = call("preprocess", *args, "--features_name", "late")
    assert "out holds 11 images, features were made of 12" in error_of(done)
    with pytest.raises(ValueError, match="features/late is not finished"):
        opened(out, "late")
    # as many images of each class, and others
    (tmp_path / "images/b/1.png").write_bytes(whole[:300])
    done = call("preprocess", *args, "--features_name", "others")
    assert "out was made without other images than features: have images" in error_of(done)


def test_beside_latents_the_grid_is_that_of_patches_of_two(made, tmp_path):
    vae = write_vae(tmp_path / "vae")
    out = tmp_path / "latents"
    args = ("--source", made / "images", "--out", out)
    preprocess(*args, "--vae", vae, "--resolution", 64, "--features", made / "dino")
    train = opened(out)
    assert train.shape == (4, 8, 8)
    assert (train.features.tokens, train.features.width) == (16, 32)
    # the features are those of the crops, not of what the VAE makes of them
    preprocess(
        *("--source", made / "images", "--out", tmp_path / "pixels", "--pixels", "true"),
        *("--resolution", 64),
    )
    pixels = PackedPixels(tmp_path / "pixels").read([7, 2]).images
    vision = load_vision_model(str(made / "dino"))
    expected = make_extractor(vision, 4, "fp32", CPU)(pixels)
    moments, (labels,), features = train.split(train.__getitems__([7, 2]))
    assert moments.shape == (2, 8, 8, 8) and labels.tolist() == [1, 0]
    assert features.dtype == torch.float16
    assert torch.allclose(features.float(), expected, atol=2e-3, rtol=2e-3)
    preprocess(*args, "--features", made / "other")
    assert opened(out, "other").features.tokens == 16


def test_digits_with_features_from_an_array_to_batches(tmp_path):
    """scikit-learn's digits, packed, with the features of a small ViT, read by a loader process."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = (digits.images[:40, :, :, None] * 15.9375).astype(np.uint8)
    np.savez(tmp_path / "digits.npz", arr_0=images, arr_1=digits.target[:40])
    vit = write_vision_model(tmp_path / "vit", "ViT", num_hidden_layers=1)
    preprocess(
        *("--source", tmp_path / "digits.npz", "--out", tmp_path / "digits", "--pixels", "true"),
        *("--features", vit, "--shard_size", 16),
    )
    data = opened(tmp_path / "digits", "vit", verify=True)
    # half of 8 pixels: patches of 2, which the ViT sees at 16 pixels
    assert (data.features.tokens, data.features.width) == (16, 32)
    model = load_vision_model(str(vit)).model
    stream = ShuffledBatches(40, 0, 8, 1, 0, 1, 0, 3)
    expected = [stream.numbers(step, 0) for step in range(3)]
    with Batches(data, ShuffledBatches(40, 0, 8, 1, 0, 1, 0, 3), 1, False) as batches:
        for numbers in expected:
            pixels, (labels,), features = data.split(next(batches))
            assert np.array_equal(pixels[:, 0], images[numbers, :, :, 0])
            assert labels.tolist() == digits.target[numbers].tolist()
            tokens = seen_by(model, pixels, 16, interpolate_pos_encoding=True)[:, 1:]
            assert torch.allclose(features.float(), tokens, atol=2e-3, rtol=2e-3)
    # added later, from the array
    preprocess(
        *("--source", tmp_path / "digits.npz", "--out", tmp_path / "digits", "--shard_size", 16),
        *("--features", vit, "--features_name", "again"),
    )
    again = opened(tmp_path / "digits", "again")
    assert again.features.fingerprint == data.features.fingerprint


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """The training digits, packed, with the features of a small ViT."""
    root = tmp_path_factory.mktemp("digits")
    vit = write_vision_model(root / "vit", "ViT", num_hidden_layers=1)
    pack_digits(root, Digits())
    preprocess("--source", root / "packed", "--features", vit, "--batch", 64)
    return root


def pack_digits(folder, digits, order=slice(None)):
    images = ((digits.images[order] + 1) * 127.5).round().byte().permute(0, 2, 3, 1)
    np.savez(folder / "digits.npz", arr_0=images, arr_1=digits.labels[order])
    args = ("--source", folder / "digits.npz", "--out", folder / "packed", "--pixels", "true")
    preprocess(*args, "--batch", 64)


def with_features(path, name="vit"):
    return open_data(DataConfig(name="digits", path=str(path), features=name))


def test_the_digits_in_memory_come_with_the_features_of_packed_ones(packed):
    data = with_features(packed / "packed")
    plain = open_data(DataConfig(name="digits"))
    numbers = [1436, 5, 0]
    images, (labels,), features = data.split(data.__getitems__(numbers))
    assert torch.equal(images, plain.images[numbers])
    assert torch.equal(labels, plain.labels[numbers])
    model = load_vision_model(str(packed / "vit")).model
    pixels = ((images + 1) * 127.5).round().byte()
    # the ViT has patches of 4, and sees 16 x 16 pixels
    tokens = seen_by(model, pixels, 16, interpolate_pos_encoding=True)[:, 1:]
    assert torch.allclose(features.float(), tokens, atol=2e-3, rtol=2e-3)
    # the held-out digits have none, which no analysis reads
    held_out, rows = data.held_out_split()[1]
    assert held_out.split(held_out.__getitems__(rows[:2].tolist()))[2] is None


def test_digits_with_other_features_are_other_data(packed, tmp_path):
    facts = with_features(packed / "packed").facts()
    plain = open_data(DataConfig(name="digits")).facts()
    assert plain.features is None and facts.features["model"]["class"] == "ViTModel"
    assert facts.fingerprint == plain.fingerprint
    assert differences(plain, facts) == differences(facts, plain) == []
    other = write_vision_model(tmp_path / "other", "ViT", seed=1, num_hidden_layers=1)
    shutil.copytree(packed / "packed", tmp_path / "packed")
    preprocess("--source", tmp_path / "packed", "--features", other, "--batch", 64)
    found = with_features(tmp_path / "packed", "other").facts()
    assert differences(found, facts) == ["other features (other, it had vit)"]


def test_features_of_other_digits_are_refused(packed, tmp_path):
    with pytest.raises(ValueError, match="data.features dino: .*packed has none of this name, but"):
        with_features(packed / "packed", "dino")
    with pytest.raises(ValueError, match="no packed data set at .*nowhere"):
        with_features(tmp_path / "nowhere")
    # without features a path means nothing
    with pytest.raises(ValueError, match="data.path is not for the digits"):
        with_features(packed / "packed", None)
    pack_digits(tmp_path, Digits(held_out=True))
    message = "packed must hold the 1437 training digits, it has 360 images"
    with pytest.raises(ValueError, match=message):
        with_features(tmp_path / "packed")
    shutil.rmtree(tmp_path / "packed")
    pack_digits(tmp_path, Digits(), order=torch.arange(1436, -1, -1))
    with pytest.raises(ValueError, match="the training digits in their order, it has other labels"):
        with_features(tmp_path / "packed")


def test_the_identity_is_that_of_weights_and_configuration(made, tmp_path):
    copy = shutil.copytree(made / "dino", tmp_path / "copy")
    identity = load_vision_model(str(made / "dino")).identity
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "transformers_version": "0"}))
    assert load_vision_model(str(copy)).identity == identity
    assert load_vision_model(str(made / "other")).identity["sha256"] != identity["sha256"]
    (copy / "config.json").write_text(json.dumps({**config, "layer_norm_eps": 1e-3}))
    assert load_vision_model(str(copy)).identity["sha256"] != identity["sha256"]


def test_a_classifiers_folder_has_no_pooler_and_is_the_same_model_every_time(tmp_path):
    """The pooler is drawn at random when it is loaded, and comes after the features."""
    import transformers

    write_vision_model(tmp_path / "vit", "ViT")
    config = transformers.ViTConfig.from_pretrained(tmp_path / "vit")
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    one, two = (load_vision_model(str(tmp_path / "vit")).identity for _ in range(2))
    assert one == two
    assert one["class"] == "ViTModel"


def test_an_analysis_reads_them_and_needs_none(made):
    """Every consumer of batches takes them apart alike."""
    model = create_model("SiT-S/4", input_size=16, in_channels=3, num_classes=3)
    parts = {}
    for name in ("dino", None):
        config = DataConfig(path=str(made / "data"), features=name)
        parts[name] = [part.read(3, seed=0) for part in split(config, model)]
    for one, two in zip(parts["dino"], parts[None], strict=True):
        assert torch.equal(one.x0, two.x0) and torch.equal(one.labels, two.labels)


def damage(folder, change):
    """Change a set of features."""
    if change == "cut":
        path = folder / "shards/00001.npy"
        path.write_bytes(path.read_bytes()[:-8])
    elif change == "gone":
        (folder / "shards/00001.npy").unlink()
    elif change == "altered":
        path = folder / "shards/00001.npy"
        held = bytearray(path.read_bytes())
        held[-1] ^= 1
        path.write_bytes(held)
    elif change == "no index":
        (folder / "index.json").write_text("{}")
    else:
        index = json.loads((folder / "index.json").read_text())
        (folder / "index.json").write_text(json.dumps({**index, **change}))


@pytest.mark.parametrize(
    "change, message",
    [
        ("cut", r"features/dino: shards/00001.npy has \d+ bytes instead of"),
        ("gone", "features/dino: shards/00001.npy is missing"),
        ("no index", "index.json is no index of a packed data set"),
        ({"data_sha256": "0"}, "features/dino holds features of other images than .*data: make"),
        ({"kind": "pixels"}, "features/dino holds pixels, features were expected"),
        ({"num_images": 17}, "hold 18 images, not 17"),
    ],
)
def test_damaged_features_are_named_before_training(data, change, message):
    damage(data / "features/dino", change)
    with pytest.raises(ValueError, match=message):
        opened(data)


def test_altered_features_are_named_when_they_are_verified(data):
    damage(data / "features/dino", "altered")
    train = opened(data, verify=True)
    train.__getitems__([0, 4])
    with pytest.raises(ValueError, match="features/dino/shards/00001.npy was altered"):
        train.__getitems__([0, 9])
    opened(data).__getitems__([0, 9])


def test_features_that_cannot_come_with_the_data_are_refused(data, tmp_path):
    with pytest.raises(ValueError, match="dinov2: .*data has none of this name, but dino "):
        opened(data, "dinov2")
    shutil.rmtree(data / "features")
    with pytest.raises(ValueError, match="has none of this name, but no features at all"):
        opened(data)
    for name in ("../dino", ".", "a/b", ""):
        with pytest.raises(ValueError, match="data.features must be the name of a folder"):
            opened(data, name)
    with pytest.raises(ValueError, match="data.flip would mirror images and not their features"):
        opened(data, flip=True)
    write_latents(tmp_path / "files")
    with pytest.raises(ValueError, match="data.features is for packed data .*got dino"):
        opened(tmp_path / "files")
    with pytest.raises(ValueError, match="dino of the digits needs data.path, .* got nothing"):
        open_data(DataConfig(name="digits", features="dino"))


def test_other_features_are_other_data(made, data):
    """As far as both are known: a run without features may get some."""
    facts = opened(data).facts()
    assert facts.features["model"]["class"] == "Dinov2Model"
    assert DataFacts.from_json(json.loads(json.dumps(facts.as_json()))) == facts
    without = opened(data, None).facts()
    assert differences(without, facts) == differences(facts, without) == []
    preprocess("--source", data, "--features", made / "other", "--features_grid", 4)
    other = opened(data, "other").facts()
    assert differences(other, facts) == ["other features (other, it had dino)"]


def test_a_run_does_not_resume_with_other_features(made, data, tmp_path):
    preprocess("--source", data, "--features", made / "other", "--features_grid", 4)
    sizes = "--model SiT-S/4 --model.hidden_size 32 --model.depth 4 --model.num_heads 2".split()
    target = "--align cached_features --align.head_width 16".split()
    args = (
        *("train", *sizes, "--data", data, "--data.num_workers", 0, "--train.precision", "fp32"),
        *target,
        *("--train.global_batch", 4, "--train.out", tmp_path / "runs"),
    )
    done = call(*args, "--train.steps", 1, "--data.features", "dino")
    assert done.returncode == 0, done.stderr[-2000:]
    again = (*args, "--train.steps", 2, "--train.resume", "auto")
    done = call(*again, "--data.features", "other")
    assert done.returncode == 2
    assert "on other data: other features (other, it had dino)" in error_of(done)
    # without a target they are of no use, and without alignment they are not read
    unused = [word for word in again if word not in target]
    done = call(*unused, "--data.features", "dino")
    assert done.returncode == 2
    message = "is for align.target cached_features, which this run does not have"
    assert error_of(done).endswith(f"{message}: add --align cached_features")
    # the same ones under another name are no other features
    shutil.copytree(data / "features/dino", data / "features/copy")
    done = call(*again, "--data.features", "copy")
    assert done.returncode == 0, done.stderr[-2000:]


def test_commands_of_the_documents_have_a_target_for_their_features(monkeypatch):
    """A run without one is refused, which their parsers alone do not notice."""
    monkeypatch.chdir(ROOT)
    shown = [command.words() for command in COMMANDS if "--data.features" in command.text]
    assert len(shown) >= 2
    for words in shown:
        first = next(i for i, word in enumerate(words) if word.endswith(("train", "train.py")))
        cfg, _ = parse_train(words[first + 1 :])
        kinds = [TARGETS[align.target] for align in cfg.alignments.values()]
        assert any(kind.needs_external for kind in kinds), words


@pytest.mark.parametrize(
    "args, message",
    [
        ("--features {root}/nowhere", "there is no config.json in .*nowhere"),
        ("--features {tmp}/bare", "preprocessor_config.json must hold image_mean and image_std"),
        ("--features {tmp}/mean", "must hold image_mean and image_std of three channels.*got"),
        ("--features {tmp}/broken", "broken holds no readable model: "),
        ("--features {tmp}/config", "config holds no readable model: "),
        ("--features {tmp}/lacking", "lacks 1 weights of its Dinov2Model, the first is layernorm"),
        ("--features {tmp}/grey", "must take images of 3 channels, it takes 1"),
        (
            "--features {tmp}/swin",
            "images of 32 x 32 pixels: a token for each of 8 x 8 patches was expected, got",
        ),
        ("--features {tmp}/resnet", "must hold a vision model of square patches, ResNetModel has"),
        ("--features {root}/dino --features_grid 0", "features_grid must be at least 1, got 0"),
        ("--features {root}/dino --features_name a/b", "features_name must be the name of a"),
        ("--features {root}/dino --layout published", "packed beside packed data, got layout pub"),
        ("--features {root}/dino --out {tmp}", "lie beside them, in .*data, got out"),
        ("--features {root}/dino --mirror true", "--mirror is for images, .* holds packed pixels"),
        ("--features_grid 4 --out {tmp}/new", "--features_grid is for features, .* was given with"),
        ("--features {root}/dino --features_dtype float32", "dino was begun with"),
        (
            "--source {root}/images --out {tmp}/new --features {root}/dino",
            "features need vae or pixels true, or an out that is finished packed data.*none in .*new",
        ),
        (
            "--source {root}/images --out {data} --features {root}/dino --resolution 32",
            "data was made with resolution 16, got 32: leave --resolution out",
        ),
        (
            "--source {tmp}/fewer --out {data} --features {root}/dino",
            r"held_out.* holds 3 images|data holds 18 images, .*fewer has 16",
        ),
        (
            "--source {tmp}/renamed --out {data} --features {root}/dino",
            "was made of other images than those of .*renamed",
        ),
        (
            "--source {tmp}/rgba.npz --out {tmp}/new --pixels true --features {root}/dino",
            "--features needs images of 1 or 3 channels, got 4",
        ),
        (
            "--source {tmp}/odd.npz --out {tmp}/new --pixels true --features {root}/dino",
            "a side of 9, half of which is no number of patches: give features_grid",
        ),
        (
            "--source {tmp}/moments --out {tmp}/new --features {root}/dino",
            "--features is for images, .*moments holds no images",
        ),
    ],
)
def test_what_cannot_be_is_one_line(made, bad, args, message):
    """Nothing is written before everything has been looked at."""
    words = args.format(root=made, tmp=bad, data=made / "data").split()
    if "--source" not in words:
        words += ["--source", str(made / "data")]
    before = tree(made / "data")
    done = call("preprocess", *words)
    assert done.returncode == 2
    line = error_of(done)
    assert line.startswith("error: ")
    assert re.search(message, line), line
    assert tree(made / "data") == before
    assert not (bad / "new").exists()


@pytest.fixture(scope="module")
def bad(made, tmp_path_factory):
    """Models and images that cannot be used."""
    import transformers
    from safetensors.torch import load_file, save_file

    root = tmp_path_factory.mktemp("bad")
    names = ("bare", "mean", "broken", "config", "lacking")
    for name in names:
        shutil.copytree(made / "dino", root / name)
    preprocessor = "preprocessor_config.json"
    (root / "bare" / preprocessor).unlink()
    (root / "mean" / preprocessor).write_text('{"image_mean": [0.5], "image_std": [0.5]}')
    (root / "broken/model.safetensors").write_bytes(b"no weights")
    (root / "config/config.json").write_text('{"model_type": "unheard-of"}')
    weights = load_file(root / "lacking/model.safetensors")
    del weights["layernorm.bias"]
    save_file(weights, root / "lacking/model.safetensors", metadata={"format": "pt"})
    write_vision_model(root / "grey", num_channels=1)
    swin = {"embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2}
    config = transformers.SwinConfig(**swin, patch_size=4, image_size=32)
    transformers.SwinModel(config).save_pretrained(root / "swin")
    config = transformers.ResNetConfig(hidden_sizes=[8, 8], depths=[1, 1], embedding_size=8)
    transformers.ResNetModel(config).save_pretrained(root / "resnet")
    for name in ("swin", "resnet"):
        shutil.copy(made / "dino" / preprocessor, root / name)
    shutil.copytree(made / "images", root / "fewer")
    (root / "fewer/b/2.jpg").unlink()
    shutil.copytree(made / "images", root / "renamed")
    (root / "renamed/b/2.jpg").rename(root / "renamed/b/20.jpg")
    np.savez(root / "rgba.npz", arr_0=np.zeros((2, 8, 8, 4), np.uint8))
    np.savez(root / "odd.npz", arr_0=np.zeros((2, 9, 9, 3), np.uint8))
    write_latents(root / "moments")
    return root


def test_a_model_of_one_size_is_refused(made):
    vision = load_vision_model(str(made / "dino"))

    def refuse(pixel_values):
        raise ValueError("Input image size (24*24) doesn't match model (16*16).\nMore")

    vision.model.forward = refuse
    extract = make_extractor(vision, 6, "fp32", CPU)
    message = r"no use for images of 24 x 24 pixels: Input image size .*16\*16\).$"
    with pytest.raises(ValueError, match=message):
        features_shape(vision, extract, 6, 3, 40)


def test_without_transformers_there_is_one_line(made, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    done = call("preprocess", "--source", made / "data", "--features", made / "dino")
    assert "--features needs transformers: pip install 'sra-fast[features]'" in error_of(done)
