"""Latents are decoded as they were made: nothing about a model is asked twice, and a contradiction is refused."""

import json
import logging
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from launch import call, error_of
from tiny_config import TINY
from toy_data import write_latents, write_vae

from sra_fast.analysis.features import data_of, split
from sra_fast.checkpoint.load_model import load_model
from sra_fast.checkpoint.manifest import read_manifest, write_manifest
from sra_fast.config.schema import DataConfig
from sra_fast.data.dataset import open_data
from sra_fast.data.facts import DataFacts
from sra_fast.data.normalization import Normalization
from sra_fast.data.vae import decode, load_vae, vae_identity
from sra_fast.sampling.decoder import choose_decoder
from sra_fast.sampling.run import class_numbers

SCALE, SHIFT = 1.5305, 0.0609


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two steps on latents of a VAE with a scale and a shift of its own."""
    root = tmp_path_factory.mktemp("trained")
    vae = write_vae(root / "vae", scaling_factor=SCALE, shift_factor=SHIFT)
    folder = write_latents(root / "latents", shape=(8, 8, 8))
    listed = json.loads((folder / "dataset.json").read_text())
    told = {
        "vae": vae_identity(load_vae(str(vae))),
        "vae_path": str(vae),
        "classes": ["ash", "birch", "elm"],
    }
    (folder / "dataset.json").write_text(json.dumps({**listed, **told}))
    sizes = "--model SiT-S/2 --model.hidden_size 32 --model.depth 4 --model.num_heads 2".split()
    steps = "--train.steps 2 --train.global_batch 4 --train.precision fp32".split()
    done = call(
        *("train", *sizes, *steps, "--data", root / "latents", "--data.num_workers", 0),
        *("--train.out", root / "runs"),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return root


def samples_of(trained, *args, out="samples") -> np.ndarray:
    fast = "--count 3 --sample.method euler --sample.steps 2".split()
    run = trained / "runs/000"
    done = call("sample", "--checkpoint", run, "--out", trained / out, *fast, *args)
    assert done.returncode == 0, done.stderr[-2000:]
    return np.load(trained / out / "samples.npz")["arr_0"]


def test_a_run_is_sampled_with_what_it_was_trained_with(trained):
    """The VAE, its scale and its shift come from the run; the pixels are those of the formula."""
    loaded = load_model(str(trained / "runs/000"))
    assert (loaded.facts.scale, loaded.facts.shift) == (SCALE, SHIFT)
    assert loaded.facts.class_names == ["ash", "birch", "elm"]
    assert loaded.model.num_classes == 3
    images = samples_of(trained)
    assert images.shape == (3, 64, 64, 3)
    given = samples_of(trained, "--vae", trained / "vae", "--latent_scale", SCALE, out="given")
    assert np.array_equal(images, given)

    latents = torch.randn(2, 4, 8, 8)
    vae = load_vae(str(trained / "vae"))
    with torch.no_grad():
        expected = vae.decode(latents / SCALE + SHIFT).sample
    normalization = Normalization(SCALE, SHIFT)
    assert torch.equal(decode(latents, vae, normalization, 2, torch.device("cpu")), expected)


@pytest.mark.parametrize("name", ["ema.safetensors", "checkpoints/step_00000002"])
def test_exports_and_checkpoints_know_it_too(trained, name):
    facts = load_model(str(trained / "runs/000" / name)).facts
    assert facts == load_model(str(trained / "runs/000")).facts
    assert facts.scale == SCALE


@pytest.mark.parametrize(
    "args, message",
    [
        ("--latent_scale 0.18215", "trained with latent_scale 1.5305, got 0.18215: leave it out"),
        ("--latent_shift 0", "trained with latent_shift 0.0609, got 0: leave it out"),
        ("--vae {root}/other", "scaling_factor 0.18215, that of the training data has 1.5305"),
        ("--vae {root}/wide", "is for latents of 8 channels, the model has 4"),
        ("--classes [oak]", "in [0, 3), or names such as ash, birch, elm, got 'oak'"),
        ("--classes [3]", "classes must lie in [0, 3), or names such as ash, birch, elm, got 3"),
    ],
)
def test_what_contradicts_the_run_is_refused(trained, args, message):
    if not (trained / "other").exists():
        write_vae(trained / "other", seed=1)
        write_vae(trained / "wide", latent_channels=8)
    run = trained / "runs/000"
    args = args.format(root=trained).split()
    done = call("sample", "--checkpoint", run, "--out", trained / "no", *args)
    assert done.returncode == 2
    assert message in error_of(done)
    assert not (trained / "no").exists()


def test_probes_take_the_runs_data(trained):
    """Path, scale and shift; other data with another scale are refused."""
    args = ["--checkpoint", trained / "runs/000", "--images", 10, "--times", "[0.5]"]
    done = call("probe", *args, "--out", trained / "probe")
    assert done.returncode == 0, done.stderr[-2000:]
    used = json.loads((trained / "probe/probe.json").read_text())["options"]["data"]
    assert used["path"] == str(trained / "latents")
    assert (used["latent_scale"], used["latent_shift"]) == (SCALE, SHIFT)
    done = call("probe", *args, "--data.latent_scale", 1, "--out", trained / "no")
    assert "trained with data.latent_scale 1.5305, got 1: leave it out" in error_of(done)


def test_a_vae_with_another_encoder_is_a_warning(trained, caplog):
    other = str(write_vae(trained / "similar", seed=2, scaling_factor=SCALE, shift_factor=SHIFT))
    facts = load_model(str(trained / "runs/000")).facts
    with caplog.at_level(logging.WARNING):
        choose_decoder(str(trained / "vae"), None, None, 4, facts)
        assert not caplog.records
        choose_decoder(other, None, None, 4, facts)
    assert "similar is not the one that made the training data" in caplog.text


def test_weights_that_tell_nothing_take_the_vaes_scale(trained):
    vae = str(trained / "vae")
    decoder = choose_decoder(vae, None, None, 4, None)
    assert decoder.normalization == Normalization(SCALE, SHIFT)
    decoder = choose_decoder(vae, 2.0, 0.5, 4, None)
    assert decoder.normalization == Normalization(2.0, 0.5)
    with pytest.raises(ValueError, match="latents of 4 channels: give --vae"):
        choose_decoder(None, None, None, 4, None)


def test_pixels_need_no_vae_whatever_their_channels():
    facts = DataFacts("pixels", (5, 8, 8), 2, pixels=True)
    assert choose_decoder(None, None, None, 5, facts).vae is None
    with pytest.raises(ValueError, match="vae is for latents, the model makes pixels; got x"):
        choose_decoder("x", None, None, 5, facts)
    with pytest.raises(ValueError, match="latent_scale is for latents"):
        choose_decoder(None, 0.5, None, 1, facts)


def test_a_vae_that_is_gone_is_asked_for():
    facts = DataFacts("latents", (4, 8, 8), 2, scale=1.0, vae_path="/nowhere/vae")
    with pytest.raises(ValueError, match="give --vae, .* decodes them .it was /nowhere/vae"):
        choose_decoder(None, None, None, 4, facts)


def test_classes_by_number_and_by_name():
    names = ["ash", "birch"]
    assert class_numbers(None, 2, names) == [0, 1]
    assert class_numbers(["birch", 0], 2, names) == [1, 0]
    assert class_numbers([1], 2, None) == [1]
    for asked in (["oak"], [2], [-1], []):
        with pytest.raises(ValueError, match="classes must"):
            class_numbers(asked, 2, names)


def test_other_data_than_the_runs_are_told(trained, tmp_path, caplog):
    loaded = load_model(str(trained / "runs/000"))
    data = data_of(DataConfig(), loaded.facts)
    split(data, loaded.model, loaded.facts)
    assert "not the data that the model was trained on" not in caplog.text
    shutil.copytree(trained / "latents", tmp_path / "latents")
    other = DataConfig(path=str(tmp_path / "latents"))
    split(data_of(other, loaded.facts), loaded.model, loaded.facts)
    assert "not the data that" not in caplog.text, "another place makes no difference"
    listed = tmp_path / "latents/vae-sd/dataset.json"
    listed.write_text(listed.read_text().replace("birch", "beech"))
    split(data_of(other, loaded.facts), loaded.model, loaded.facts)
    assert "not the data that the model was trained on: class_names" in caplog.text
    # latents of another VAE are no images to this model: a number made of them would mean nothing
    other_vae = replace(loaded.facts, vae={**loaded.facts.vae, "sha256": "0" * 64})
    with pytest.raises(
        ValueError, match="nothing that the model was trained to see: latents of an"
    ):
        split(data, loaded.model, other_vae)
    gone = replace(loaded.facts, path=str(tmp_path / "gone"))
    with pytest.raises(ValueError, match="trained on .*gone, which is gone: give --data PATH"):
        data_of(DataConfig(), gone)


def test_a_run_is_resumed_with_its_own_data(trained, tmp_path):
    shutil.copytree(trained / "runs/000", tmp_path / "000")
    shutil.copytree(trained / "latents", tmp_path / "latents")
    listed = tmp_path / "latents/vae-sd/dataset.json"
    listed.write_text(listed.read_text().replace("birch", "beech"))
    before = (tmp_path / "000/data.json").read_text()
    args = ["--config", tmp_path / "000/config.yaml", "--train.resume", tmp_path / "000"]
    done = call("train", *args, "--train.steps", 3, "--data", tmp_path / "latents")
    assert "on other data: class_names" in error_of(done)
    assert (tmp_path / "000/data.json").read_text() == before
    # moved data are the same data
    listed.write_text(listed.read_text().replace("beech", "birch"))
    done = call("train", *args, "--train.steps", 3, "--data", tmp_path / "latents")
    assert done.returncode == 0, done.stderr[-2000:]


def test_names_may_be_fewer_than_classes():
    facts = DataFacts("pixels", (3, 8, 8), 3, class_names=["ash"])
    assert [facts.name_of(label) for label in range(3)] == ["ash", "1", "2"]


def test_latents_that_are_all_equal_are_refused(tmp_path):
    folder = write_latents(tmp_path)
    for file in folder.rglob("*.npy"):
        np.save(file, np.zeros((8, 4, 4), np.float32))
    with pytest.raises(ValueError, match="all latents of .* are equal"):
        open_data(DataConfig(path=str(tmp_path)))


def test_a_run_of_an_older_version_has_its_scale_in_its_configuration(trained, tmp_path):
    run = tmp_path / "000"
    shutil.copytree(trained / "runs/000", run, ignore=shutil.ignore_patterns("ema.safetensors"))
    (run / "data.json").unlink()
    checkpoint = run / "checkpoints/step_00000002"
    write_manifest(checkpoint, replace(read_manifest(checkpoint), data=None))
    facts = load_model(str(run)).facts
    assert (facts.scale, facts.shift) == (SCALE, SHIFT)
    assert (facts.shape, facts.pixels) == ((4, 8, 8), False)


def test_the_digits_need_nothing(tmp_path):
    steps = ["--train.steps", 1, "--train.out", tmp_path / "runs", "--train.precision", "fp32"]
    done = call("train", *TINY, *steps)
    assert done.returncode == 0, done.stderr[-2000:]
    facts = load_model(str(tmp_path / "runs/000")).facts
    assert facts.pixels and facts.name == "digits"
