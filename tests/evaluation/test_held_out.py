"""The held-out loss: its value against plain PyTorch, repeatable bits, and what may be paired."""

import json
import math
from dataclasses import asdict, replace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from launch import call, error_of, free_port
from ranks import run_ranks
from toy_data import write_latents

from sra_fast.analysis import held_out_loss as held_out_command
from sra_fast.analysis.features import split
from sra_fast.analysis.intervals import bootstrap_interval, t_interval
from sra_fast.checkpoint.export import write_export
from sra_fast.config.schema import Config, DataConfig, ModelConfig
from sra_fast.data.digits import Digits
from sra_fast.data.latents import open_latents
from sra_fast.data.training_data import TrainingData
from sra_fast.diffusion.draws import draw_stratified
from sra_fast.evaluation.held_out import HeldOutImages, HeldOutLoss, has_held_out, held_out_loss
from sra_fast.models import DiT, SiT

SIZES = dict(patch_size=2, hidden_size=32, depth=2, num_heads=2)


def digits_model(family=SiT, seed=0):
    torch.manual_seed(seed)
    model = family(input_size=8, in_channels=1, num_classes=10, **SIZES).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def same(a: HeldOutLoss, b: HeldOutLoss) -> bool:
    arrays = [(getattr(a, n), getattr(b, n)) for n in ("losses", "times", "images")]
    return a.key == b.key and all(np.array_equal(x, y) for x, y in arrays)


@torch.no_grad()
@pytest.mark.parametrize("family, path", [(SiT, "linear"), (SiT, "cosine"), (DiT, "linear")])
def test_the_loss_by_hand_in_fp64(family, path):
    """Formulas of the papers, an image and a time at once, from the draws alone."""
    model = digits_model(family)
    images = HeldOutImages(Digits(), 7, bins=3, seed=5)
    found = held_out_loss(model, path, images, batch=4)
    assert found.losses.shape == found.times.shape == (7, 3)
    data = Digits(held_out=True)
    exact = model.double()
    for i, row in enumerate(found.images.tolist()):
        drawn = draw_stratified(5, [row], (1, 8, 8), 3, posterior=False)
        for j in range(3):
            u = drawn.uniform[0, j].double()
            assert j / 3 <= u <= (j + 1) / 3
            assert found.times[i, j] == pytest.approx(float(u), rel=1e-6)
            x0 = data.images[row][None].double()
            noise = drawn.noise[0, j][None].double()
            time = u
            if family is DiT:
                time = (u * 1000).long()
                betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
                alpha_bar = (1 - betas).cumprod(0)[time]
                x = alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise
                target = noise
            elif path == "linear":
                x = (1 - u) * x0 + u * noise
                target = noise - x0
            else:
                angle = math.pi / 2 * u
                x = angle.cos() * x0 + angle.sin() * noise
                target = math.pi / 2 * (angle.cos() * noise - angle.sin() * x0)
            prediction = exact(x, time[None], data.labels[row][None])[:, :1]
            expected = float((prediction - target).square().mean())
            assert found.losses[i, j] == pytest.approx(expected, rel=2e-4)
    per_image = found.losses.astype(np.float64).mean(1)
    assert np.allclose(found.per_image(), per_image, rtol=1e-12)
    assert found.mean() == pytest.approx(per_image.mean(), rel=1e-12)
    assert np.allclose(found.bins(), found.losses.mean(0), rtol=1e-6)


def test_an_image_is_the_same_whatever_is_measured_with_it():
    """More images continue the order; the bits do not depend on how many there are."""
    model = digits_model()
    many, few = (held_out_loss(model, "linear", HeldOutImages(Digits(), n)) for n in (150, 70))
    assert np.array_equal(many.losses[:70], few.losses)
    assert np.array_equal(many.images[:70], few.images)
    assert len({*many.images.tolist()}) == 150 and many.images.max() < 360
    # the order is no sorted one, and the whole share is there
    every = HeldOutImages(Digits())
    assert sorted(every.rows.tolist()) == [*range(360)] != every.rows.tolist()
    again = held_out_loss(model, "linear", HeldOutImages(Digits(), 70))
    assert same(few, again)
    other = held_out_loss(model, "linear", HeldOutImages(Digits(), 70, seed=1))
    assert not np.array_equal(other.times, few.times)


def test_measuring_leaves_random_numbers_and_settings_alone():
    model = digits_model()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    held_out_loss(model, "linear", HeldOutImages(Digits(), 5))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.is_grad_enabled() and not model.training


def test_two_processes_find_the_bits_of_one(tmp_path):
    """Also where the last process has no block."""
    source = """
    from sra_fast.data.digits import Digits
    from sra_fast.evaluation.held_out import HeldOutImages, held_out_loss
    from sra_fast.models import SiT

    def main(rank):
        torch.manual_seed(0)
        model = SiT(input_size=8, in_channels=1, num_classes=10, patch_size=2, hidden_size=32,
                    depth=2, num_heads=2).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        for count in (5, 50):
            images = HeldOutImages(Digits(), count)
            found = held_out_loss(model, "linear", images, batch=16, rank=rank, world=WORLD)
            found.save(f"{FOLDER}/{count}_{rank}.npz")
    """
    done = run_ranks(source, 2, tmp_path, free_port())
    assert done.returncode == 0, done.stderr[-3000:]
    model = digits_model()
    for count in (5, 50):
        alone = held_out_loss(model, "linear", HeldOutImages(Digits(), count), batch=16)
        for rank in range(2):
            assert same(alone, HeldOutLoss.load(tmp_path / f"{count}_{rank}.npz"))


def test_moments_are_sampled_once_an_image(tmp_path):
    """One sample of the posterior for all bins, a function of the image's number."""
    write_latents(tmp_path, count=10)
    data = open_latents(str(tmp_path), 0.5, 0.25)
    images = HeldOutImages(data, bins=2, trained=True)
    assert sorted(images.rows.tolist()) == [0, 5]
    block = images.block(0, 3)
    assert torch.equal(block.x0[2], block.x0[0]), "filled up with the first image"
    for i, row in enumerate(images.rows.tolist()):
        drawn = draw_stratified(0, [row], (4, 4, 4), 2, posterior=True)
        mean, std = torch.as_tensor(data.__getitems__([row])[0][0]).chunk(2)
        expected = (mean + std * drawn.posterior[0] - 0.25) * 0.5
        torch.testing.assert_close(block.x0[i], expected)
        assert torch.equal(block.noise[i], drawn.noise[0])


def test_no_held_out_share_is_no_held_out_loss(tmp_path):
    write_latents(tmp_path)
    data = open_latents(str(tmp_path))
    assert not has_held_out(data) and has_held_out(Digits())
    message = rf"images that no run trains on \(preprocess.py --holdout\), {tmp_path} has none"
    with pytest.raises(ValueError, match=message):
        HeldOutImages(data)


def test_only_equal_keys_are_paired(tmp_path):
    model = digits_model()
    images = HeldOutImages(Digits(), 20)
    one = held_out_loss(model, "linear", images, about={"weights": "ema"})
    two = held_out_loss(digits_model(seed=1), "linear", images)
    one.save(tmp_path / "one.npz")
    held = HeldOutLoss.load(tmp_path / "one.npz")
    assert same(held, one) and held.about == {"weights": "ema"}
    assert np.allclose(held.paired(two), one.per_image() - two.per_image(), rtol=1e-12)
    assert held.key == two.key
    others = {
        "seed 0 and 1": HeldOutImages(Digits(), 20, seed=1),
        "bins 10 and 5": HeldOutImages(Digits(), 20, bins=5),
        "images 20 and 19": HeldOutImages(Digits(), 19),
    }
    for message, different in others.items():
        with pytest.raises(ValueError, match=f"paired on the same images.*{message}"):
            one.paired(held_out_loss(model, "linear", different))
    with pytest.raises(ValueError, match="path linear and cosine"):
        one.paired(held_out_loss(model, "cosine", images))
    with pytest.raises(ValueError, match="process flow_matching and gaussian_diffusion"):
        one.paired(held_out_loss(digits_model(DiT), "linear", images))


class NoFingerprint(TrainingData):
    """Images that do not tell a fingerprint of their own."""

    name = "toy"
    shape = (1, 8, 8)
    num_classes = 10

    def __init__(self, offset=0.0, held_out=None):
        self.images = torch.arange(10.0)[:, None, None, None].expand(10, 1, 8, 8) / 10 + offset
        self.labels = torch.arange(10)
        self.held_out = held_out

    def __getitems__(self, indices):
        return self.images[indices], self.labels[indices]

    def held_out_split(self):
        return [(part, np.arange(10)) for part in (self, self.held_out)]


def test_images_without_a_fingerprint_are_told_apart():
    model = digits_model()
    keys = [
        held_out_loss(model, "linear", HeldOutImages(NoFingerprint(0, NoFingerprint(offset)))).key
        for offset in (0.0, 0.0, 0.5)
    ]
    assert keys[0] == keys[1] != keys[2]


def test_what_cannot_be_measured_is_one_line(tmp_path):
    model = digits_model()
    images = HeldOutImages(Digits(), 5)
    with pytest.raises(ValueError, match="needs a model in eval mode"):
        held_out_loss(digits_model().train(), "linear", images)
    with pytest.raises(ValueError, match="batch must be at least 1, got 0"):
        held_out_loss(model, "linear", images, batch=0)
    small = SiT(input_size=4, in_channels=1, num_classes=10, **SIZES).eval()
    with pytest.raises(ValueError, match=r"latents \(1, 4, 4\), the held-out images have"):
        held_out_loss(small, "linear", images)
    few = SiT(input_size=8, in_channels=1, num_classes=3, **SIZES).eval()
    with pytest.raises(ValueError, match="knows 3 classes, the held-out images have the label 9"):
        held_out_loss(few, "linear", HeldOutImages(Digits()))
    for arguments in ({"count": 0}, {"count": 1}, {"bins": 0}):
        with pytest.raises(ValueError, match="at least 2 images and 1 bin"):
            HeldOutImages(Digits(), **arguments)
    # before the weights are looked for
    with pytest.raises(ValueError, match="at least 2 images and 1 bin, got 1 and 10"):
        held_out_command.run(held_out_command.Options("nowhere", images=1))
    one = NoFingerprint(0, NoFingerprint(1))
    one.held_out_split = lambda: [(one, np.arange(9)), (one.held_out, np.arange(1))]
    with pytest.raises(ValueError, match="needs at least 2 images, toy holds out 1"):
        HeldOutImages(one)
    with torch.no_grad():
        model.final_layer.linear.bias.fill_(math.nan)
    found = held_out_loss(model, "linear", images)
    with pytest.raises(ValueError, match="of RUN is not finite for 5 of 5 images"):
        found.check_finite("RUN")

    found = held_out_loss(digits_model(), "linear", images)
    changed = replace(found, settings={**found.settings, "seed": 7})
    changed.save(tmp_path / "changed.npz")
    arrays = dict(np.load(tmp_path / "changed.npz"))
    np.savez(tmp_path / "changed.npz", **{**arrays, "key": found.key})
    with pytest.raises(ValueError, match="changed.npz holds no held-out losses: its arrays or"):
        HeldOutLoss.load(tmp_path / "changed.npz")


@pytest.mark.parametrize(
    "contents, came",
    [
        (b"no archive", "a file of another kind"),
        (b"", "a file of another kind"),
        (None, "none (No such file or directory)"),
        ({"x": 1, "losses": np.array([None])}, "one that holds x, losses"),
        (
            {
                **dict.fromkeys(("times", "images", "settings", "about", "key"), 1),
                "losses": np.array([None]),
            },
            "a damaged one",
        ),
    ],
)
def test_a_file_that_is_none_of_losses_is_named_in_words_of_our_own(tmp_path, contents, came):
    """NumPy would advise to load it unsafely."""
    path = tmp_path / "a.npz"
    if isinstance(contents, dict):
        np.savez(path, **contents)
    elif contents is not None:
        path.write_bytes(contents)
    with pytest.raises(ValueError) as error:
        HeldOutLoss.load(path)
    expected = "holds no held-out losses: expected an .npz that held_out.py --out wrote"
    assert str(error.value) == f"{path} {expected}, got {came}"


@pytest.mark.parametrize("images, narrow", [(2, True), (29, True), (30, False)])
def test_an_interval_of_few_images_says_that_it_is_too_narrow(images, narrow):
    report = {
        "held_out": 1.0,
        "interval": (0.5, 1.5),
        "bins": [1.0],
        "images": images,
        "weights": "ema",
        "step": 3,
        "against": "a.npz",
        "difference": 0.1,
        "difference_interval": (0.0, 0.2),
    }
    first, _, last = held_out_command.table(report).splitlines()
    for line in (first, last):
        assert line.endswith("; the interval is too narrow below 30 images") == narrow


def test_intervals_cover_the_mean():
    values = np.random.default_rng(0).normal(3, 2, 400)
    for low, high in (bootstrap_interval(values), t_interval(values)):
        # 1.96 standard errors each way
        assert (high - low) / 2 == pytest.approx(1.96 * 2 / 20, rel=0.15)
        assert low < values.mean() < high
    assert bootstrap_interval(values) == bootstrap_interval(values)


CLASSES = [f"class {label}" for label in range(10)]


@pytest.mark.parametrize("trained", [CLASSES, None, CLASSES[::-1], [*CLASSES[:-1], "another"]])
def test_data_of_other_classes_are_refused(tmp_path, monkeypatch, caplog, trained):
    """The model would be asked for another class than that of the image. Probes only warn."""
    plain = Digits().facts()
    monkeypatch.setattr(Digits, "facts", lambda self: replace(plain, class_names=CLASSES))
    cfg = Config(model=ModelConfig(name="SiT-S/2", class_dropout_prob=0.1, **SIZES))
    cfg.model.fill_in((1, 8, 8), 10)
    facts = replace(plain, class_names=trained)
    file = tmp_path / "w.safetensors"
    write_export(file, digits_model().state_dict(), asdict(cfg), 3, facts)
    options = held_out_command.Options(str(file), images=4, batch=4)
    if trained in (CLASSES, None):
        assert len(held_out_command.run(options)["bins"]) == 10
        return
    with pytest.raises(ValueError, match="^digits has other classes than the model was trained"):
        held_out_command.run(options)
    caplog.clear()
    split(DataConfig(name="digits"), digits_model(), facts)
    assert "not the data that the model was trained on: class_names" in caplog.text


@pytest.mark.parametrize(
    "classes, counted, refused", [(10, False, False), (1, False, True), (3, True, False)]
)
def test_data_of_another_number_of_classes_are_refused(
    tmp_path, monkeypatch, classes, counted, refused
):
    """Also without names; a number that is the largest label's says nothing."""
    cfg = Config(model=ModelConfig(name="SiT-S/2", class_dropout_prob=0.1, **SIZES))
    cfg.model.fill_in((1, 8, 8), 10)
    file = tmp_path / "w.safetensors"
    write_export(file, digits_model().state_dict(), asdict(cfg), 3, Digits().facts())
    plain = Digits.__init__

    def make(self, held_out=False, path=None):
        plain(self, held_out, path)
        self.labels = self.labels % classes
        self.num_classes = classes
        self.counted_classes = counted

    monkeypatch.setattr(Digits, "__init__", make)
    options = held_out_command.Options(str(file), images=4, batch=4)
    if not refused:
        assert len(held_out_command.run(options)["bins"]) == 10
        return
    message = f"digits has other classes .* expected 10 classes, got {classes}"
    with pytest.raises(ValueError, match=message):
        held_out_command.run(options)


def test_the_command_measures_writes_and_compares(tmp_path):
    """The digits' run of an export: value, interval, pairs, and bad input."""
    models = [digits_model(seed=seed) for seed in (0, 1)]
    cfg = Config(model=ModelConfig(name="SiT-S/2", class_dropout_prob=0.1, **SIZES))
    cfg.model.fill_in((1, 8, 8), 10)
    for i, model in enumerate(models):
        write_export(
            tmp_path / f"{i}.safetensors", model.state_dict(), asdict(cfg), 3, Digits().facts()
        )
    arguments = ("--images", 40, "--batch", 16)
    done = call(
        "held_out", "--checkpoint", "0.safetensors", "--out", "a.npz", *arguments, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    expected = [
        held_out_loss(model, "linear", HeldOutImages(Digits(), 40), batch=16) for model in models
    ]
    assert same(HeldOutLoss.load(tmp_path / "a.npz"), expected[0])
    assert f"held-out loss {expected[0].mean():.5f}" in done.stdout
    assert done.stdout.count("t 0.") == 10
    command = ("held_out", "--checkpoint", "1.safetensors", *arguments)
    done = call(*command, "--against", "a.npz", cwd=tmp_path)
    difference = expected[1].paired(expected[0])
    low, high = bootstrap_interval(difference)
    line = f"minus a.npz: {difference.mean():+.5f}  [{low:+.5f}, {high:+.5f}]"
    assert done.stdout.splitlines()[-1] == line
    failing = {
        ("--against", "b.npz"): "b.npz holds no held-out losses",
        ("--against", "a.npz", "--seed", "1"): "seed 1 and 0",
        ("--out", "absent/a.npz"): "out must be a file in a folder that exists",
        ("--against", "a.npz", "--out", "a.npz"): "out a.npz would replace against a.npz",
        ("--out", "1.safetensors"): "out 1.safetensors would replace checkpoint 1.safetensors",
        ("--batch", "0"): "batch must be at least 1",
    }
    for more, message in failing.items():
        assert message in error_of(call(*command, *more, cwd=tmp_path))
    # before anything is computed
    with patch("os.access", lambda *_: False):
        done = call(*command, "--out", "b.npz", cwd=tmp_path)
    assert done.returncode == 2
    assert error_of(done) == "error: out b.npz cannot be written: its folder is read-only"
    assert json.loads(str(np.load(tmp_path / "a.npz")["about"]))["step"] == 3
