"""Latents normalized channel by channel: by the data's statistics, the VAE's, or given numbers."""

import json
import logging
import math

import pytest
import torch
from toy_data import write_latents, write_vae
from toy_latents import CHANNELS, MEAN, STD, pack, write_moments

from sra_fast.config.schema import DataConfig
from sra_fast.data.dataset import open_data
from sra_fast.data.latents import open_latents
from sra_fast.data.packed import Shards
from sra_fast.data.summary import summary
from sra_fast.data.vae import load_vae, vae_identity
from sra_fast.data.writer import Finished

pytestmark = pytest.mark.usefixtures("rooms")


@pytest.fixture(params=["published", "packed"])
def folder(request, tmp_path):
    """The same moments in both layouts."""
    write_moments(tmp_path / "files")
    if request.param == "published":
        return tmp_path / "files"
    pack(tmp_path / "files", tmp_path / "packed")
    return tmp_path / "packed"


def reference(path) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of z in every channel in float64, over all images and the posterior."""
    data = open_latents(str(path))
    moments = data.__getitems__(list(range(len(data))))[0].double()
    mean, std = moments.transpose(0, 1).flatten(1).chunk(2)
    middle = mean.mean(1)
    variance = (mean - middle[:, None]).square().mean(1) + std.square().mean(1)
    return middle, variance.sqrt()


def column(numbers) -> torch.Tensor:
    return torch.as_tensor(numbers, dtype=torch.float64).view(-1, 1, 1)


def test_every_channel_gets_mean_0_and_deviation_1(folder):
    cfg = DataConfig(path=str(folder), latent_statistics=True)
    data = open_data(cfg)
    mean, std = reference(folder)
    # the channels are as different as they were made
    torch.testing.assert_close(mean, torch.tensor(MEAN).double(), rtol=0.2, atol=1)
    torch.testing.assert_close(std, torch.tensor(STD).double(), rtol=0.2, atol=0)
    moments, _ = data.__getitems__([3, 0, 11])
    noise = torch.randn(3, CHANNELS, 4, 4)
    means, deviations = moments.double().chunk(2, dim=1)
    expected = (means + deviations * noise.double() - column(mean)) / column(std)
    latents = data.to_latent(moments, noise)
    assert latents.dtype == torch.float32
    torch.testing.assert_close(latents.double(), expected, rtol=1e-5, atol=1e-5)
    # and drawn from the posterior they have these statistics
    found = [torch.tensor(numbers) for numbers in data.channel_statistics()]
    assert found[0].abs().max() < 0.1 and (found[1] - 1).abs().max() < 0.1


def test_the_numbers_are_in_the_configuration_and_the_facts(folder, caplog):
    cfg = DataConfig(path=str(folder), latent_statistics=True)
    data = open_data(cfg)
    caplog.clear()
    facts = data.facts()
    assert (cfg.latent_scale, cfg.latent_shift) == (facts.scale, facts.shift)
    assert len(facts.scale) == len(facts.shift) == CHANNELS
    # they are said once: such a configuration opens the same latents again, without reading all
    assert not cfg.latent_statistics
    assert open_data(cfg).facts() == facts
    assert not caplog.records


def test_an_index_without_statistics_is_read_as_a_whole(tmp_path, caplog):
    write_moments(tmp_path / "files")
    pack(tmp_path / "files", tmp_path / "packed")
    stored = open_data(DataConfig(path=str(tmp_path / "packed"), latent_statistics=True))
    assert not caplog.records
    index = tmp_path / "packed/index.json"
    held = json.loads(index.read_text())
    del held["channels"]
    index.write_text(json.dumps(held))
    found = open_data(DataConfig(path=str(tmp_path / "packed"), latent_statistics=True))
    assert found.normalization == stored.normalization
    assert "all 24 images of" in caplog.text and "are read for the statistics" in caplog.text
    files = open_data(DataConfig(path=str(tmp_path / "files"), latent_statistics=True))
    assert files.normalization == stored.normalization


def test_statistics_of_an_index_are_not_computed_again(tmp_path, monkeypatch):
    """No shard is read for the scale of latents that were packed with them."""
    write_moments(tmp_path / "files")
    root = pack(tmp_path / "files", tmp_path / "packed")
    read = Shards.read
    asked = []

    def counted(shards, rows):
        asked.append(rows)
        return read(shards, rows)

    monkeypatch.setattr(Shards, "read", counted)
    index = root / "index.json"
    held = json.loads(index.read_text())
    scale = [1 / value for value in STD]
    given = dict(latent_scale=scale)
    data = open_data(DataConfig(path=str(root), **given))
    stored = held["channels"]["std"]
    expected = [factor * value for factor, value in zip(scale, stored, strict=True)]
    found = data.deviations()
    assert not asked
    assert found == expected
    # it is them, and not what the shards hold
    held["channels"]["std"] = [1.01 * value for value in stored]
    index.write_text(json.dumps(held))
    data = open_data(DataConfig(path=str(root), **given))
    assert data.deviations() == pytest.approx([1.01 * value for value in expected])
    assert not asked
    # an index of an older version has none: some images are read instead
    del held["channels"]
    index.write_text(json.dumps(held))
    data = open_data(DataConfig(path=str(root), **given))
    assert asked
    assert data.deviations() == pytest.approx(expected)


@pytest.mark.parametrize(
    "channels, message",
    [
        ({"mean": [0.0] * 6, "std": [1.0] * 5}, "expected std of 6 channels in .* got .1.0, 1.0"),
        ({"mean": [0.0] * 6}, "expected std of 6 channels in .*index.json, got None"),
        ({}, "expected mean of 6 channels in .*index.json, got None"),
        ([], "expected mean of 6 channels in .*index.json, got None"),
        ({"mean": "abcdef", "std": [1.0] * 6}, "expected mean of 6 channels .* got 'abcdef'"),
        (
            {"mean": [0.0] * 6, "std": [1.0, "a", 1.0, 1.0, 1.0, 1.0]},
            "std of the channels in .*index.json must be .* got 'a' in channel 1",
        ),
    ],
)
@pytest.mark.parametrize("statistics", [True, False])
def test_an_index_with_other_channels_is_refused(tmp_path, channels, message, statistics):
    write_moments(tmp_path / "files")
    pack(tmp_path / "files", tmp_path / "packed")
    index = tmp_path / "packed/index.json"
    held = json.loads(index.read_text())
    held["channels"] = channels
    index.write_text(json.dumps(held))
    with pytest.raises(ValueError, match=message):
        open_data(DataConfig(path=str(tmp_path / "packed"), latent_statistics=statistics))


@pytest.mark.parametrize("number", [0.0, 5.3])
def test_a_channel_of_one_number_is_one_error(folder, tmp_path, number):
    write_moments(tmp_path / "flat", flat=(2, number))
    path = tmp_path / "flat"
    if folder.name == "packed":
        path = pack(path, tmp_path / "flat packed")
    message = (
        rf"got \S+ in channel 2 \(from 0\) of the latents of {path}, whose mean is {number:g}$"
    )
    with pytest.raises(ValueError, match=message):
        open_data(DataConfig(path=str(path), latent_statistics=True))
    # who gives numbers may train on it
    open_data(DataConfig(path=str(path), latent_scale=0.5))


def test_the_held_out_share_has_the_numbers_of_the_training_share(tmp_path):
    write_moments(tmp_path / "files")
    root = pack(tmp_path / "files", tmp_path / "packed")
    # other statistics, and fewer images
    write_moments(tmp_path / "others", count=5, seed=1, factor=3.0)
    pack(tmp_path / "others", root / "held_out")
    train = open_data(DataConfig(path=str(root), latent_statistics=True))
    (_, _), (held_out, rows) = train.held_out_split()
    assert len(rows) == 5
    assert held_out.normalization == train.normalization
    own = open_data(DataConfig(path=str(root / "held_out"), latent_statistics=True))
    assert own.normalization != train.normalization
    moments, _ = held_out.__getitems__([1, 4])
    mean, std = reference(root)
    expected = (moments[:, :CHANNELS].double() - column(mean)) / column(std)
    found = held_out.to_latent(moments, torch.zeros(2, CHANNELS, 4, 4))
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_given_numbers_are_used(folder):
    scale = [1 / value for value in STD]
    cfg = DataConfig(path=str(folder), latent_scale=scale, latent_shift=MEAN)
    data = open_data(cfg)
    assert (cfg.latent_scale, cfg.latent_shift) == (scale, MEAN)
    moments, _ = data.__getitems__([7])
    noise = torch.randn(1, CHANNELS, 4, 4)
    means, deviations = moments.double().chunk(2, dim=1)
    expected = (means + deviations * noise.double() - column(MEAN)) * column(scale)
    torch.testing.assert_close(
        data.to_latent(moments, noise).double(), expected, rtol=1e-5, atol=1e-5
    )
    # equal numbers are one, also in what is written down
    cfg = DataConfig(path=str(folder), latent_scale=[0.5] * CHANNELS, latent_shift=[0.0] * CHANNELS)
    facts = open_data(cfg).facts()
    assert (facts.scale, facts.shift, cfg.latent_scale, cfg.latent_shift) == (0.5, 0.0, 0.5, 0.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latent_scale": [0.5] * 4}, "data.latent_scale must be .* list of 6, .* got a list of 4"),
        ({"latent_shift": [0.5] * 7}, "data.latent_shift must be .* list of 6, .* got a list of 7"),
        ({"latent_scale": -0.5}, "data.latent_scale must be positive and finite, got -0.5"),
        ({"latent_scale": [1.0] * 5 + [0.0]}, "data.latent_scale .* got 0.0 in channel 5"),
        (
            {"latent_shift": [math.nan] * 6},
            "data.latent_shift must be finite, got nan in channel 0",
        ),
        (
            {"latent_statistics": True, "latent_scale": 0.5},
            "latent_statistics takes scale and shift .* expected no data.latent_scale, got 0.5",
        ),
        (
            {"latent_statistics": True, "latent_shift": [0.0] * 6},
            "latent_statistics takes scale and shift .* expected no data.latent_shift, got",
        ),
    ],
)
def test_what_cannot_be_used_is_one_line(folder, options, message):
    with pytest.raises(ValueError, match=message) as refused:
        open_data(DataConfig(path=str(folder), **options))
    assert "\n" not in str(refused.value)


def test_a_channel_of_another_deviation_is_a_warning(folder, caplog):
    scale = [1 / value for value in STD]
    scale[4] *= 3
    with caplog.at_level(logging.WARNING):
        open_data(DataConfig(path=str(folder), latent_scale=scale))
    (record,) = caplog.records
    line = record.getMessage()
    assert line.startswith("1 of the 6 channels of the latents of")
    assert "in channel 4 (from 0); --data.latent_statistics true gives 1 in every channel" in line


def told(tmp_path, **config) -> dict:
    """What an index says of a VAE."""
    sizes = {"latent_channels": CHANNELS, **config}
    return vae_identity(load_vae(str(write_vae(tmp_path / "vae", **sizes))))


def test_a_vae_with_statistics_of_its_channels_is_followed(tmp_path, caplog):
    """As diffusers' SDXL pipeline decodes: latents * std / scaling_factor + mean."""
    vae = told(tmp_path, latents_mean=MEAN, latents_std=STD, scaling_factor=0.9)
    assert (vae["latents_mean"], vae["latents_std"]) == (MEAN, STD)
    write_moments(tmp_path / "files", vae=vae)
    root = pack(tmp_path / "files", tmp_path / "packed")
    for path in (tmp_path / "files", root):
        data = open_data(DataConfig(path=str(path)))
        moments, _ = data.__getitems__([2])
        latents = data.to_latent(moments, torch.zeros(1, CHANNELS, 4, 4)).double()
        back = latents * column(STD) / 0.9 + column(MEAN)
        expected = moments[:, :CHANNELS].double()
        torch.testing.assert_close(back, expected, rtol=1e-5, atol=1e-5)
    assert not caplog.records
    # other numbers are said, the VAE's are no longer those of the data
    open_data(DataConfig(path=str(root), latent_shift=0.0))
    assert "data.latent_shift is 0, the latents_mean of the VAE that made" in caplog.text


def tell(folder, vae: dict) -> None:
    """Write down which VAE made the moments."""
    file = folder / "index.json"
    if not file.exists():
        file = folder / "vae-sd/dataset.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "vae": vae}))


# one number for each channel, and no VAE's
OWN = [0.3, 0.4, 0.5, 0.6, 0.7, 0.8]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, None),
        ({"scale": 0.9, "shift": 0.1}, None),
        # equal numbers are one
        ({"scale": [0.9] * 6, "shift": [0.1] * 6}, None),
        ({"scale": OWN}, None),
        ({"shift": OWN}, None),
        ({"scale": OWN, "shift": OWN}, None),
        ({"scale": 0.5}, "data.latent_scale is 0.5, the scaling_factor of the VAE that made"),
        ({"scale": [0.5] * 6}, "data.latent_scale is 0.5, the scaling_factor of the VAE that made"),
        ({"shift": 0.5}, "data.latent_shift is 0.5, the shift_factor of the VAE that made"),
        # one of them is no finer than the VAE's
        (
            {"scale": OWN, "shift": 0.5},
            "data.latent_shift is 0.5, the shift_factor of the VAE that made",
        ),
    ],
)
def test_a_list_is_no_warning_where_the_vae_has_one_number(folder, given, said, caplog):
    """A single number that differs is one."""
    tell(folder, {"sha256": "", "scaling_factor": 0.9, "shift_factor": 0.1})
    open_latents(str(folder), **given)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == (said is not None)
    assert all(line.startswith(said) for line in lines)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"scale": [0.9 / value for value in STD], "shift": MEAN}, None),
        (
            {"scale": OWN},
            "data.latent_scale is 0.3 to 0.8, by channel, the latents_std of the VAE",
        ),
        (
            {"shift": OWN},
            "data.latent_shift is 0.3 to 0.8, by channel, the latents_mean of the VAE",
        ),
    ],
)
def test_a_list_is_compared_with_that_of_the_vae(folder, given, said, caplog):
    vae = {"sha256": "", "scaling_factor": 0.9, "latents_mean": MEAN, "latents_std": STD}
    tell(folder, vae)
    open_latents(str(folder), **given)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == (said is not None)
    assert all(line.startswith(said) for line in lines)


def test_what_was_packed_before_its_statistics_were_read_stays(tmp_path):
    vae = told(tmp_path, latents_mean=MEAN, latents_std=STD, scaling_factor=0.9, shift_factor=0.1)
    old = {name: vae[name] for name in ("sha256", "scaling_factor", "shift_factor")}
    write_moments(tmp_path / "files", vae=old)
    facts = open_data(DataConfig(path=str(tmp_path / "files"))).facts()
    assert (facts.scale, facts.shift) == (0.9, 0.1)


def test_a_vae_without_them_has_the_identity_that_it_had(tmp_path):
    assert set(told(tmp_path)) == {"sha256", "scaling_factor", "shift_factor"}
    # a pipeline uses both or none
    assert "latents_std" not in told(tmp_path, latents_std=STD)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            dict(latents_mean=MEAN, latents_std=STD[:4]),
            "expected latents_std in the VAE's config.json to be a list of 6 numbers, .* got",
        ),
        (
            dict(latents_mean=MEAN[1:], latents_std=STD),
            "expected latents_mean in the VAE's config.json to be a list of 6 numbers, .* got",
        ),
        (
            dict(latents_mean=MEAN, latents_std=1.5),
            "latents_std .* a list of 6 numbers, .* got 1.5",
        ),
        (
            dict(latents_mean=["a", *MEAN[1:]], latents_std=STD),
            "latents_mean in the VAE's config.json must be .* list of 6; got 'a' in channel 0",
        ),
        (
            dict(latents_mean=MEAN, latents_std=[*STD[:5], 0.0]),
            "latents_std in the VAE's config.json must be positive and finite, "
            "got 0.0 in channel 5",
        ),
    ],
)
def test_a_vae_with_wrong_statistics_is_one_line(tmp_path, config, message):
    with pytest.raises(ValueError, match=message):
        told(tmp_path, **config)


def test_the_summary_says_which_channels_a_vae_leaves_far_from_1(tmp_path):
    write_moments(tmp_path / "files")
    pack(tmp_path / "files", tmp_path / "packed")
    recipe = {"kind": "moments", "shape": [2 * CHANNELS, 4, 4], "num_classes": 3}
    statistics = {"mean": MEAN, "std": STD}

    class Job:
        source = None
        out = tmp_path

    class Report:
        def lines(self):
            return []

    def lines(factor):
        vae = {"scaling_factor": factor, "latents_mean": MEAN, "latents_std": STD}
        Job.recipe = {**recipe, "vae": vae}
        return summary(Job, Finished(24, statistics, Report()))

    assert lines(1.0)[-1].endswith("times its scaling_factor 1: standard deviations 1 to 1")
    assert lines(0.18215)[-1] == (
        "warning: a model expects about 1; train with --data.latent_statistics true"
    )


def test_moments_of_one_number_for_all_channels_are_as_before(tmp_path):
    """Bit for bit, in either layout."""
    write_latents(tmp_path / "files", count=9)
    root = pack(tmp_path / "files", tmp_path / "packed")
    noise = torch.randn(9, 4, 4, 4)
    for path in (tmp_path / "files", root):
        data = open_data(DataConfig(path=str(path), latent_scale=1.7, latent_shift=0.3))
        moments, _ = data.__getitems__(list(range(9)))
        mean, std = moments.float().chunk(2, dim=1)
        assert torch.equal(data.to_latent(moments, noise), (mean + std * noise - 0.3) * 1.7)
        held = json.loads(json.dumps(data.facts().as_json()))
        assert (held["scale"], held["shift"]) == (1.7, 0.3)
