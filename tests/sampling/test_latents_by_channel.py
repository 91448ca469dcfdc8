"""A run on latents that are normalized channel by channel, from the moments to the pictures: every
part of the engine has the same numbers.
"""

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from launch import call, error_of
from toy_data import write_vae
from toy_latents import MEAN, STD, pack, write_moments

from sra_fast.analysis.features import data_of, split
from sra_fast.checkpoint.huggingface import card
from sra_fast.checkpoint.load_model import load_model
from sra_fast.checkpoint.manifest import read_manifest, write_manifest
from sra_fast.config.schema import DataConfig
from sra_fast.data.facts import DataFacts, differences, other_inputs
from sra_fast.data.latents import open_latents
from sra_fast.data.normalization import Normalization
from sra_fast.data.vae import load_vae, vae_identity
from sra_fast.sampling import run as sampling
from sra_fast.sampling.decoder import choose_decoder
from sra_fast.training import monitor
from sra_fast.training.provenance import changes

CHANNELS = 4
SIZES = "--model SiT-S/2 --model.hidden_size 32 --model.depth 4 --model.num_heads 2".split()
FAST = "--train.global_batch 4 --train.precision fp32 --data.num_workers 0".split()
LOOKS = "--monitor.every 2 --monitor.count 4 --monitor.held_out 5 --sample.steps 2".split()
# the SRA 2 target measures its own statistics on the normalized latents
TARGET = ["--align", "vae_latent"]


def watched(module, used):
    """``decode`` of a module, which notes its latents and how it undoes their normalization."""
    decode = module.decode

    def noting(latents, vae, normalization, batch, device):
        images = decode(latents, vae, normalization, batch, device)
        used.append((latents, vae, normalization, images))
        return images

    return noting


def command(root, *args):
    data = ["--data", root / "data", "--data.latent_statistics", "true"]
    return ["train", *SIZES, *FAST, *LOOKS, *TARGET, *data, "--train.out", root / "runs", *args]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two steps that has looked at samples and at the held-out loss."""
    root = tmp_path_factory.mktemp("by_channel")
    vae = write_vae(root / "vae")
    told = {"vae": vae_identity(load_vae(str(vae))), "vae_path": str(vae)}
    sizes = {"side": 8, "channels": CHANNELS, **told}
    pack(write_moments(root / "files", **sizes), root / "data")
    # a share of other statistics
    others = write_moments(root / "others", count=6, seed=1, factor=2.0, **sizes)
    pack(others, root / "data/held_out")
    used = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(monitor, "decode", watched(monitor, used))
        done = call(*command(root, "--train.steps", 2))
    assert done.returncode == 0, done.stderr[-2000:]
    ((_, _, normalization, _),) = used
    return root, done.stderr, normalization


def numbers(root) -> tuple[list[float], list[float]]:
    """Scale and shift as they follow from the index of the packed data."""
    held = json.loads((root / "data/index.json").read_text())["channels"]
    return [1 / std for std in held["std"]], held["mean"]


def assert_are_the_numbers(root, scale, shift):
    expected_scale, expected_shift = numbers(root)
    assert scale == pytest.approx(expected_scale, rel=1e-6)
    assert shift == pytest.approx(expected_shift, rel=1e-5, abs=1e-5)


def test_a_run_keeps_its_numbers_everywhere(trained):
    root, said, of_monitor = trained
    run = root / "runs/000"
    facts = json.loads((run / "data.json").read_text())
    assert_are_the_numbers(root, facts["scale"], facts["shift"])
    assert len(facts["scale"]) == len(facts["shift"]) == CHANNELS
    assert (of_monitor.scale, of_monitor.shift) == (facts["scale"], facts["shift"])
    settings = yaml.safe_load((run / "config.yaml").read_text())
    data = settings["data"]
    assert (data["latent_scale"], data["latent_shift"]) == (facts["scale"], facts["shift"])
    assert data["latent_statistics"] is False
    manifest = read_manifest(run / "checkpoints/step_00000002")
    assert manifest.data["scale"] == facts["scale"]
    line = next(line for line in said.splitlines() if line.startswith("data "))
    assert re.search(r"scale \S+ to \S+, by channel, shift \S+ to \S+, by channel", line)
    # latents of the target are measured after the normalization
    assert settings["align"]["channel_mean"] == pytest.approx([0] * CHANNELS, abs=0.15)
    assert settings["align"]["channel_std"] == pytest.approx([1] * CHANNELS, abs=0.15)


@pytest.mark.parametrize("form", ["run", "ema", "checkpoint", "folder", "published"])
def test_weights_in_every_form_know_them(trained, tmp_path, form):
    root, _, used = trained
    run = root / "runs/000"
    paths = {
        "run": run,
        "ema": run / "ema.safetensors",
        "checkpoint": run / "checkpoints/step_00000002",
        "folder": tmp_path / "folder",
        "published": tmp_path / "w.pt",
    }
    path = paths[form]
    if form in ("folder", "published"):
        done = call("export", "--checkpoint", run, "--out", path)
        assert done.returncode == 0, done.stderr[-2000:]
    loaded = load_model(str(path))
    assert loaded.facts.normalization == used
    assert str(used.scale) in card(loaded, "name")


def test_samples_are_decoded_with_the_numbers(trained, monkeypatch):
    """The pictures are those of the formula in float64."""
    root, _, normalization = trained
    used = []
    monkeypatch.setattr(sampling, "decode", watched(sampling, used))
    fast = "--count 3 --sample.method euler --sample.steps 2".split()
    args = ["--checkpoint", root / "runs/000", "--out", root / "samples", *fast]
    done = call("sample", *args)
    assert done.returncode == 0, done.stderr[-2000:]
    ((latents, vae, found, images),) = used
    assert found == normalization
    scale, shift = (torch.tensor(values).double().view(-1, 1, 1) for values in numbers(root))
    z = latents.double() / scale + shift
    with torch.no_grad():
        expected = vae.double().decode(z).sample
    torch.testing.assert_close(images.double(), expected, rtol=1e-3, atol=1e-4)
    written = np.load(root / "samples/samples.npz")["arr_0"]
    assert written.shape == (3, 64, 64, 3) and written.std() > 0
    held = json.loads((root / "samples/samples.json").read_text())["identity"]
    assert (held["latent_scale"], held["latent_shift"]) == (found.scale, found.shift)
    # the same command has nothing to do, and says nothing of another scale
    done = call("sample", *args)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(used) == 1


@pytest.mark.parametrize("again", ["command", "configuration"])
def test_a_run_is_resumed_with_its_numbers(trained, tmp_path, again):
    root, _, normalization = trained
    shutil.copytree(root / "runs", tmp_path / "runs")
    run = tmp_path / "runs/000"
    more = ["--train.steps", 3, "--train.resume", "auto", "--train.out", tmp_path / "runs"]
    args = command(root, *more)
    if again == "configuration":
        args = ["train", "--config", run / "config.yaml", *more]
    done = call(*args)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "resumed after step 2" in done.stderr
    assert "data.latent" not in done.stderr
    facts = DataFacts.from_json(json.loads((run / "data.json").read_text()))
    assert facts.normalization == normalization
    assert load_model(str(run)).step == 3


def test_other_numbers_do_not_resume_it(trained, tmp_path):
    root, _, normalization = trained
    shutil.copytree(root / "runs", tmp_path / "runs")
    more = ["--train.steps", 3, "--train.resume", "auto", "--train.out", tmp_path / "runs"]
    base = ["train", *SIZES, *FAST, *LOOKS, *TARGET, "--data", root / "data", *more]
    scale = [*normalization.scale]
    scale[2] = 0.25
    done = call(*base, "--data.latent_scale", scale, "--data.latent_shift", normalization.shift)
    was = normalization.scale[2]
    assert f"on other data: scale 0.25 in channel 2 (from 0), it was {was}" in error_of(done)
    done = call(*base)
    assert re.search(r"other data: scale 0.18215, it was \S+ to \S+, by channel", error_of(done))
    done = call(*command(root, *more), "--data.latent_scale", 0.5)
    assert "expected no data.latent_scale, got 0.5" in error_of(done)
    done = call(*base, "--data.latent_scale", "[0.5, 0.5]")
    assert "data.latent_scale must be one number, or a list of 4" in error_of(done)


def test_an_analysis_has_them_too(trained):
    """Training and held-out images, the latter with the numbers of the former."""
    root, _, normalization = trained
    loaded = load_model(str(root / "runs/000"))
    parts = split(data_of(DataConfig(), loaded.facts), loaded.model, loaded.facts)
    scale, shift = (torch.tensor(values).double().view(-1, 1, 1) for values in numbers(root))
    for part, folder in zip(parts, ("data", "data/held_out"), strict=True):
        assert part.dataset.normalization == normalization
        x0 = part.read(100, seed=0).x0.double()
        moments, _ = open_latents(str(root / folder)).__getitems__(part.choose(100, 0).tolist())
        mean = moments[:, :CHANNELS].double()
        # up to the posterior's deviation, a tenth of the channel's
        assert (x0 / scale + shift - mean).abs().max() < torch.tensor(STD[:CHANNELS]).max() * 2
        torch.testing.assert_close(
            x0.mean((0, 2, 3)), ((mean - shift) * scale).mean((0, 2, 3)), rtol=0, atol=0.05
        )
    done = call("held_out", "--checkpoint", root / "runs/000")
    assert done.returncode == 0, done.stderr[-2000:]


def test_what_contradicts_the_run_is_one_line(trained):
    root, _, normalization = trained
    run = root / "runs/000"
    facts = load_model(str(run)).facts
    with pytest.raises(ValueError, match="of its own, got data.latent_statistics True: leave it"):
        data_of(DataConfig(latent_statistics=True), facts)
    other = [*normalization.scale]
    other[3] = 9.0
    with pytest.raises(ValueError, match=r"data.latent_scale .* in channel 3 .*, got 9.0: leave"):
        data_of(DataConfig(latent_scale=other), facts)
    data_of(DataConfig(latent_scale=normalization.scale), facts)
    args = ["--checkpoint", run, "--out", root / "no"]
    done = call("sample", *args, "--latent_scale", other)
    was = normalization.scale[3]
    assert f"trained with latent_scale {was} in channel 3 (from 0), got 9.0" in error_of(done)
    done = call("sample", *args, "--latent_shift", 0.5)
    assert re.search("with latent_shift .*, by channel, got 0.5: leave it out", error_of(done))
    assert not (root / "no").exists()


def test_foreign_weights_are_given_a_list(trained):
    root = trained[0]
    vae = str(root / "vae")
    scale = [1 / value for value in STD[:CHANNELS]]
    decoder = choose_decoder(vae, scale, MEAN[:CHANNELS], CHANNELS, None)
    assert decoder.normalization == Normalization(scale, MEAN[:CHANNELS])
    assert choose_decoder(vae, [0.5] * 4, None, 4, None).normalization == Normalization(0.5)
    with pytest.raises(ValueError, match="^latent_scale must be one number, or a list of 4"):
        choose_decoder(vae, [0.5] * 3, None, 4, None)
    with pytest.raises(ValueError, match="^latent_shift must be finite, got nan in channel 1"):
        choose_decoder(vae, None, [0.0, np.nan, 0.0, 0.0], 4, None)
    with pytest.raises(ValueError, match="^latent_scale must be positive and finite, got 0"):
        choose_decoder(vae, 0.0, None, 4, None)


def test_foreign_weights_take_the_statistics_of_the_vae(tmp_path):
    mean, std = MEAN[:CHANNELS], STD[:CHANNELS]
    config = {"latents_mean": mean, "latents_std": std, "scaling_factor": 0.5}
    vae = str(write_vae(tmp_path / "vae", **config))
    found = choose_decoder(vae, None, None, CHANNELS, None).normalization
    assert found == Normalization([0.5 / value for value in std], mean)
    # a VAE of other statistics is another VAE, unless the data were packed without them
    identity = vae_identity(load_vae(vae))
    facts = DataFacts("latents", (4, 8, 8), 3, scale=found.scale, shift=found.shift, vae=identity)
    assert choose_decoder(vae, None, None, CHANNELS, facts).normalization == found
    plain = str(write_vae(tmp_path / "plain", scaling_factor=0.5))
    with pytest.raises(ValueError, match="has latents_mean None, that of the training data has"):
        choose_decoder(plain, None, None, CHANNELS, facts)
    old = {name: identity[name] for name in ("sha256", "scaling_factor", "shift_factor")}
    before = replace(facts, scale=0.5, shift=0.0, vae=old)
    assert choose_decoder(vae, None, None, CHANNELS, before).normalization == Normalization(0.5)


def test_old_facts_stay_one_number():
    old = {"name": "latents", "shape": [4, 8, 8], "num_classes": 3, "scale": 0.18215, "shift": 0.1}
    facts = DataFacts.from_json(old)
    assert (facts.scale, facts.shift) == (0.18215, 0.1)
    held = facts.as_json()
    assert (held["scale"], held["shift"]) == (0.18215, 0.1)
    # from before there was a shift
    del old["shift"]
    assert DataFacts.from_json(old).normalization == Normalization(0.18215, 0.0)
    for name, value in (("scale", [0.5] * 3), ("shift", [0.5, np.inf, 0.0, 0.0]), ("scale", "x")):
        with pytest.raises(ValueError, match=f"the {name} of the data of a model must be"):
            DataFacts.from_json({**old, name: value})


def test_differences_name_the_channel():
    facts = DataFacts("latents", (4, 8, 8), 3, scale=[1.0, 2.0, 3.0, 4.0], shift=0.1)
    same = DataFacts.from_json(json.loads(json.dumps(facts.as_json())))
    assert differences(same, facts) == other_inputs(same, facts) == []
    other = replace(facts, scale=[1.0, 2.0, 3.5, 4.5], shift=[0.1, 0.2, 0.3, 0.4])
    expected = [
        "scale 3.5 in channel 2 (from 0), it was 3.0",
        "shift 0.1 to 0.4, by channel, it was 0.1",
    ]
    assert differences(other, facts) == other_inputs(other, facts) == expected


@pytest.mark.parametrize(
    ("name", "value"), [("scale", [1.0, 2.0]), ("shift", [np.nan] * 4), ("scale", ["a"] * 4)]
)
def test_a_manifest_with_other_channels_is_damaged(trained, tmp_path, name, value):
    checkpoint = tmp_path / "step_00000002"
    shutil.copytree(trained[0] / "runs/000/checkpoints/step_00000002", checkpoint)
    manifest = read_manifest(checkpoint)
    write_manifest(checkpoint, replace(manifest, data={**manifest.data, name: value}))
    with pytest.raises(ValueError, match=f"{name} of the data of a model must be"):
        read_manifest(checkpoint)


def test_a_checkpoint_of_an_older_version_is_not_said_to_have_changed(trained):
    """Its settings know nothing of `latent_statistics`."""
    checkpoint = trained[0] / "runs/000/checkpoints/step_00000002"
    settings = read_manifest(checkpoint).settings
    older = {**settings, "data": {**settings["data"]}}
    assert older["data"].pop("latent_statistics") is False
    assert changes(older, settings) == {}
    now = {**settings, "data": {**settings["data"], "latent_scale": 0.5}}
    was = settings["data"]["latent_scale"]
    assert changes(older, now) == {"data.latent_scale": (was, 0.5)}
