"""Which images are probed and shown, and with which noise; the classifier; components and grids."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from sra_fast.analysis.features import (
    check_times,
    choose_layers,
    data_of,
    noisy_features,
    split,
)
from sra_fast.analysis.linear_probe import (
    accuracy,
    best,
    chance,
    choose_pool,
    pixels,
    pool,
    probe_layers,
)
from sra_fast.analysis.pca_maps import colours, components, draw_maps
from sra_fast.config.schema import DataConfig
from sra_fast.data.digits import Digits
from sra_fast.data.facts import DataFacts
from sra_fast.models import DiT, SiT
from sra_fast.plots.figures import read_samples, save_samples

pytestmark = pytest.mark.usefixtures("rooms")

SIZES = dict(patch_size=2, hidden_size=32, depth=3, num_heads=2)


def digits_model(family=SiT):
    torch.manual_seed(0)
    model = family(input_size=8, in_channels=1, num_classes=10, **SIZES).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return model


def write_latents(root, count=60):
    """Moments whose mean shows the class, one of three."""
    folder = root / "vae-sd"
    rng = np.random.default_rng(0)
    labels = []
    folder.mkdir()
    for i in range(count):
        mean = rng.normal(size=(2, 4, 4)) + 2 * (i % 3)
        std = np.full((2, 4, 4), 0.1)
        moments = np.concatenate([mean, std])
        np.save(folder / f"{i:03d}.npy", moments.astype(np.float32))
        labels.append([f"{i:03d}.npy", i % 3])
    (folder / "dataset.json").write_text(json.dumps({"labels": labels}))
    return DataConfig(name="latents", path=str(root), latent_scale=0.5)


def rows_of(images) -> set:
    return {x.numpy().tobytes() for x in images.x0}


def test_held_out_digits_are_those_no_run_trains_on():
    parts = split(DataConfig(name="digits"), digits_model())
    train, held_out = (part.read(10**6, seed=0) for part in parts)
    assert rows_of(train) == {x.numpy().tobytes() for x in Digits().images}
    assert rows_of(held_out) == {x.numpy().tobytes() for x in Digits(held_out=True).images}
    assert len(train.labels) == 1437
    assert not torch.equal(train.noise[:360], held_out.noise)


def test_images_are_chosen_and_noised_by_the_seed():
    part = split(DataConfig(name="digits"), digits_model())[0]
    a, b, other = (part.read(20, seed, draws=2) for seed in (0, 0, 1))
    assert torch.equal(a.x0, b.x0)
    assert torch.equal(a.noise, b.noise)
    assert rows_of(a) != rows_of(other)
    assert not torch.equal(a.noise, other.noise)
    # the same images twice, each time with other noise
    assert torch.equal(a.x0[:20], a.x0[20:])
    assert torch.equal(a.labels[:20], a.labels[20:])
    assert len(rows_of(a)) == 20
    assert len({noise.numpy().tobytes() for noise in a.noise}) == 40
    data = Digits()
    found = {x.numpy().tobytes(): int(y) for x, y in zip(data.images, data.labels, strict=True)}
    assert [found[x.numpy().tobytes()] for x in a.x0] == a.labels.tolist()


def test_latents_are_split_and_scaled(tmp_path):
    model = SiT(input_size=4, in_channels=2, num_classes=3, **SIZES).eval()
    train, held_out = (part.read(10**6, 0) for part in split(write_latents(tmp_path), model))
    assert (len(train.labels), len(held_out.labels)) == (48, 12)
    assert not rows_of(train) & rows_of(held_out)
    for c in range(3):
        assert train.x0[train.labels == c].mean() == pytest.approx(0.5 * 2 * c, abs=0.1)


@torch.no_grad()
@pytest.mark.parametrize("family", [SiT, DiT])
def test_features_are_those_of_the_noisy_input_at_that_time(family):
    model = digits_model(family)
    images = split(DataConfig(name="digits"), model)[1].read(10, 0)
    x, features = noisy_features(
        model, "linear", images, images.labels, 0.3, [1, 3], lambda h: h.mean(1), batch=4
    )
    if family is SiT:
        expected = 0.7 * images.x0 + 0.3 * images.noise
        t = torch.full((10,), 0.3)
    else:
        alpha_bar = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)[300]
        expected = alpha_bar.sqrt() * images.x0 + (1 - alpha_bar).sqrt() * images.noise
        t = torch.full((10,), 300)
    torch.testing.assert_close(x, expected.float(), rtol=1e-5, atol=1e-6)
    for depth, found in zip((1, 3), features, strict=True):
        layer = model.features(x, t, images.labels, depth=depth)
        torch.testing.assert_close(found, layer.mean(1), rtol=1e-4, atol=1e-5)


def test_default_layers_and_what_is_refused():
    assert choose_layers(None, 6) == [1, 2, 3, 4, 5, 6]
    assert choose_layers([5, 2, 2], 6) == [2, 5]
    assert choose_layers(None, 28, most=7) == [1, 6, 10, 14, 19, 24, 28]
    assert choose_layers(None, 1, most=7) == [1]
    for wrong in ([0], [7]):
        with pytest.raises(ValueError, match=r"layers must lie in \[1, 6\]"):
            choose_layers(wrong, 6)
    with pytest.raises(ValueError, match="expected at least one of layers, got"):
        choose_layers([], 6)
    with pytest.raises(ValueError, match="expected at least one of times, got"):
        check_times([])
    for wrong in ([-0.1], [0.5, 1.01], [math.nan], [0.5, math.nan]):
        with pytest.raises(ValueError, match="times must lie"):
            check_times(wrong)


def test_pools():
    x = torch.arange(2 * 1 * 4 * 4.0).reshape(2, 1, 4, 4)
    # the pixels of every patch, as if they were features
    corners = [(i, j) for i in (0, 2) for j in (0, 2)]
    patches = [x[:, 0, i : i + 2, j : j + 2].flatten(1) for i, j in corners]
    tokens = torch.stack(patches, dim=1)
    assert torch.equal(pool(tokens, "mean"), tokens.mean(1))
    assert torch.equal(pool(tokens, "all"), tokens.flatten(1))
    assert torch.equal(pool(tokens, "patch"), tokens.reshape(8, 4))
    assert torch.equal(pixels(x, 2, "patch"), tokens.reshape(8, 4))
    assert torch.equal(pixels(x, 2, "mean"), x.flatten(1))
    assert torch.equal(pixels(x, 2, "all"), x.flatten(1))


def test_auto_keeps_the_positions_of_small_images():
    assert choose_pool("auto", 16, 64) == "all"
    assert choose_pool("auto", 64, 64) == "all"
    assert choose_pool("auto", 65, 64) == "mean"
    # SiT-XL/2 at 256 px
    assert choose_pool("auto", 256, 1152) == "mean"
    for how in ("mean", "patch", "all"):
        assert choose_pool(how, 256, 1152) == how


def test_chance_is_the_most_frequent_class():
    assert chance(torch.tensor([3, 0, 3, 1, 3])) == pytest.approx(0.6)
    assert chance(torch.tensor([0, 1, 2, 3])) == 0.25


def test_classifier():
    torch.manual_seed(0)
    labels = torch.arange(600) % 3
    x = torch.randn(600, 5) + torch.nn.functional.one_hot(labels, 5)

    def score_of(features, test_labels=labels[400:]):
        return accuracy(features[:400], labels[:400], features[400:], test_labels)

    score = score_of(x)
    assert 0.5 < score < 0.8
    # chance is a third
    assert score_of(x, labels[400:][torch.randperm(200)]) < 0.45
    # units and redundant features do not matter
    scaled = x * torch.tensor([1e3, 1, 1e-3, 5, 1]) + 7
    assert score_of(scaled) == pytest.approx(score, abs=0.01)
    assert score_of(torch.cat([x, x], dim=1)) == pytest.approx(score, abs=0.01)


def test_probe_of_latents(tmp_path):
    torch.manual_seed(0)
    model = DiT(input_size=4, in_channels=2, num_classes=3, **SIZES).eval()
    parts = split(write_latents(tmp_path), model)
    seen = []
    probed = probe_layers(
        model, "linear", parts, [0.0, 0.999], [1, 3], batch=7, progress=seen.append
    )
    rows = probed.rows
    assert [(row["time"], row["layer"]) for row in rows] == [
        (t, layer) for t in (0.0, 0.999) for layer in (0, 1, 3)
    ]
    clean = rows[:3]
    noise = rows[3:]
    assert min(row["accuracy"] for row in clean) > 0.9
    assert max(row["accuracy"] for row in noise) < 0.75
    assert seen == [clean, noise]
    assert best(rows) == max(clean[1:], key=lambda row: row["accuracy"])


def test_what_cannot_be_probed(tmp_path):
    model = SiT(input_size=8, in_channels=1, num_classes=10, class_dropout_prob=0.0, **SIZES).eval()
    with pytest.raises(ValueError, match="null class"):
        probe_layers(model, "linear", split(DataConfig(name="digits"), model), [0.5], [1])
    with pytest.raises(ValueError, match="the data has"):
        split(write_latents(tmp_path), model)


def facts_of(pixels: bool) -> DataFacts:
    shape = (3, 4, 4) if pixels else (2, 4, 4)
    return DataFacts("pixels" if pixels else "latents", shape, 3, pixels=pixels, scale=1.027)


def test_pixels_for_latents_and_the_other_way_round(tmp_path):
    """In words of what was given, and not of options that nobody named."""
    images = np.zeros((6, 4, 4, 3), np.uint8)
    np.savez(tmp_path / "images.npz", arr_0=images, arr_1=np.arange(6) % 3)
    of_latents = SiT(input_size=4, in_channels=2, num_classes=3, **SIZES).eval()
    facts = facts_of(pixels=False)
    path = str(tmp_path / "images.npz")
    for name in ("auto", "pixels"):
        data = data_of(DataConfig(name=name, path=path), facts)
        with pytest.raises(ValueError) as error:
            split(data, of_latents, facts)
        assert str(error.value) == f"the model was trained on latents, {path} holds pixels"
    of_pixels = SiT(input_size=4, in_channels=3, num_classes=3, **SIZES).eval()
    latents = write_latents(tmp_path)
    with pytest.raises(ValueError) as error:
        split(data_of(latents, facts_of(pixels=True)), of_pixels, facts_of(pixels=True))
    assert str(error.value) == f"the model was trained on pixels, {tmp_path} holds latents"


def test_one_image_cannot_be_split(tmp_path):
    model = SiT(input_size=4, in_channels=2, num_classes=3, **SIZES).eval()
    with pytest.raises(ValueError) as error:
        split(write_latents(tmp_path, count=1), model)
    expected = f"an analysis needs data of at least 2 images, {tmp_path} has 1"
    assert str(error.value) == expected


def test_components_are_ordered_and_keep_their_signs():
    torch.manual_seed(0)
    directions = torch.linalg.qr(torch.randn(60, 3, dtype=torch.float64)).Q
    truth = directions.view(2, 30, 3) * torch.tensor([80.0, 40.0, 20.0])
    basis = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64)).Q[:3]
    features = truth @ basis + 0.01 * torch.randn(2, 30, 16, dtype=torch.float64)
    found = components(features)
    correlation = np.corrcoef(found.T, truth.flatten(0, 1).T)[:3, 3:]
    assert np.abs(np.diag(correlation)).min() > 0.95, correlation
    flipped = found * [1, -1, -1]
    np.testing.assert_allclose(components(features, signs_of=flipped), flipped)
    with pytest.raises(ValueError, match="at least 3 patches, got 2"):
        components(features[:1, :2])


def test_colours_span_the_range():
    scores = np.stack([np.arange(64.0), -np.arange(64.0), np.zeros(64)], axis=1)
    rgb = colours(scores, 4)
    assert rgb.shape == (4, 4, 4, 3)
    assert rgb.dtype == np.uint8
    flat = rgb.reshape(64, 3).astype(int)
    assert flat[0, 0] == 0
    assert flat[-1, 0] == 255
    assert (np.diff(flat[:, 0]) >= 0).all()
    assert not flat[:, 2].any()
    assert (flat[:, 0] + flat[:, 1] == 255).all()


def test_maps_show_the_input_and_one_colour_per_patch():
    model = digits_model()
    images = split(DataConfig(name="digits"), model)[1].read(2, 0)
    maps = draw_maps(model, "linear", images, [0.5, 0.0], [1, 2, 3])
    assert maps.shape == (2, 2, 4, 8, 8, 3)
    clean = np.round((images.x0.permute(0, 2, 3, 1).numpy() + 1) * 127.5)
    assert np.abs(maps[:, 1, 0].astype(int) - clean).max() <= 1
    cells = maps[:, :, 1:].reshape(2, 2, 3, 4, 2, 4, 2, 3)
    assert (cells == cells[..., :1, :, :1, :]).all(), "constant in a patch"
    assert np.unique(maps[0, 0, 1].reshape(-1, 3), axis=0).shape[0] > 8


def test_samples_of_runs_lie_under_each_other(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(255, size=(2, 5, 4, 4, 1), dtype=np.uint8)
    for name, x, count in zip("ab", images, (5, 4), strict=True):
        np.savez(tmp_path / f"{name}.npz", arr_0=x[:count], arr_1=np.arange(count))
    paths = [str(tmp_path / f"{name}.npz") for name in "ab"]
    found = read_samples(paths, 9)
    assert np.array_equal(found, images[:, :4]), "as many as all have"
    save_samples(tmp_path / "grid.png", found, columns=3, scale=2)
    grid = np.asarray(Image.open(tmp_path / "grid.png"))[::2, ::2]
    for run in range(2):
        for i in range(4):
            # a block of two rows of 4 + 1 pixels, and a gap of 1
            top = i // 3 * (2 * 5 + 1) + 5 * run
            left = i % 3 * 5
            assert np.array_equal(grid[top : top + 4, left : left + 4], images[run, i, ..., 0])
    assert (grid[11:, 5:] == 255).all(), "nothing after the last"


def test_samples_that_do_not_belong_together(tmp_path):
    x = np.zeros((3, 4, 4, 1), np.uint8)
    np.savez(tmp_path / "a.npz", arr_0=x, arr_1=[0, 1, 2])
    np.savez(tmp_path / "labels.npz", arr_0=x, arr_1=[0, 2, 1])
    np.savez(tmp_path / "size.npz", arr_0=x[:, :2], arr_1=[0, 1, 2])
    np.savez(tmp_path / "names.npz", x=x)
    np.save(tmp_path / "array.npy", x)
    np.savez(tmp_path / "float.npz", arr_0=x.astype(np.float32), arr_1=[0, 1, 2])
    np.savez(tmp_path / "flat.npz", arr_0=x[..., 0], arr_1=[0, 1, 2])
    np.savez(tmp_path / "label.npz", arr_0=x, arr_1=0)
    (tmp_path / "broken.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:100])
    (tmp_path / "text.npz").write_text("no archive")
    for name in ("labels.npz", "size.npz"):
        with pytest.raises(ValueError, match="sizes and labels"):
            read_samples([str(tmp_path / "a.npz"), str(tmp_path / name)], 3)
    for name in (
        "names.npz",
        "array.npy",
        "broken.npz",
        "missing.npz",
        "float.npz",
        "flat.npz",
        "label.npz",
        "text.npz",
    ):
        with pytest.raises(ValueError, match="holds no samples") as error:
            read_samples([str(tmp_path / name)], 3)
        # numpy's advice
        assert "allow_pickle" not in str(error.value)
