"""Packed pixels as a reference, and the reference that samples belong to."""

import json
import re

import numpy as np
import pytest
import torch
from launch import call, error_of
from PIL import Image
from toy_data import write_images

from sra_fast.data.pixels import PackedPixels
from sra_fast.evaluation.folder import open_images
from sra_fast.evaluation.packed import PackedImages, made_of, reference_of
from sra_fast.plots.report import save_grid


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    root = tmp_path_factory.mktemp("packed")
    write_images(root / "images", per_class=8)
    done = call(
        *("preprocess", "--source", root / "images", "--out", root / "data", "--pixels", "true"),
        *("--resolution", 16, "--holdout", 0.5),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return root


def test_the_same_images_in_another_order(packed):
    images = open_images(str(packed / "data"))
    assert isinstance(images, PackedImages)
    assert (images.count, images.shape) == (12, [16, 16, 3])
    batches = list(images.batches(5))
    assert [len(batch) for batch in batches] == [5, 5, 2]
    found = np.concatenate(batches)
    data = PackedPixels(packed / "data")
    expected = data.read(list(range(12))).images.permute(0, 2, 3, 1).numpy()
    assert np.array_equal(found, expected[images.order])
    # not sorted by class, and the same each time
    assert sorted(images.order) != list(images.order)
    assert np.array_equal(
        np.concatenate(list(open_images(str(packed / "data")).batches(12))), found
    )


def sampled(root, facts: dict | None):
    """A folder of samples that says what they are samples of."""
    folder = root / "samples"
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    np.savez(folder / "samples.npz", arr_0=rng.integers(0, 256, (9, 16, 16, 3), dtype=np.uint8))
    (folder / "samples.json").write_text(json.dumps({"data": facts, "step": 3, "weights": "ema"}))
    return folder


def test_samples_are_compared_with_the_held_out_images_of_their_data(packed, tmp_path):
    facts = PackedPixels(packed / "data").facts().as_json()
    folder = sampled(tmp_path, facts)
    assert reference_of(str(folder)) == str(packed / "data/held_out")
    assert reference_of(str(folder / "samples.npz")) == str(packed / "data/held_out")
    done = call(
        "evaluate", "--samples", folder, "--features", "pixels", "--out", tmp_path / "s.json"
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "s.json").read_text())
    assert found["reference"]["path"] == str(packed / "data/held_out")
    assert (found["step"], found["weights"]) == (3, "ema")
    assert found["reference"]["images"] == 12
    again = call(
        *("evaluate", "--samples", folder, "--reference", packed / "data/held_out"),
        *("--features", "pixels", "--out", tmp_path / "again.json"),
    )
    assert again.returncode == 0, again.stderr[-2000:]
    assert json.loads((tmp_path / "again.json").read_text()) == found


@pytest.mark.parametrize(
    "change, message",
    [
        (None, "give --reference: it is not known what the samples' model was trained on"),
        ({"path": None, "name": "digits"}, "was trained on digits, which is no folder"),
        ({"pixels": False}, "trained on latents, which are no images"),
        ({"path": "/nowhere/data"}, "trained on /nowhere/data, which is gone"),
        ({"fingerprint": "0" * 64}, "other data than there are now at .*/data: other images"),
        ({"class_names": ["a", "c", "b"]}, "other data than there are now at .*: class_names"),
    ],
)
def test_a_reference_that_is_not_known_is_asked_for(packed, tmp_path, change, message):
    facts = PackedPixels(packed / "data").facts().as_json()
    folder = sampled(tmp_path, None if change is None else {**facts, **change})
    done = call(
        "evaluate", "--samples", folder, "--features", "pixels", "--out", tmp_path / "s.json"
    )
    assert re.search(message, error_of(done))
    with pytest.raises(ValueError, match="give --reference: what the samples are compared with"):
        reference_of(str(tmp_path))


def test_sample_says_what_it_sampled_and_names_the_classes(packed, tmp_path):
    sizes = "--model SiT-S/4 --model.hidden_size 32 --model.depth 4 --model.num_heads 2".split()
    done = call(
        *("train", *sizes, "--data", packed / "data", "--data.num_workers", 0, "--align", "none"),
        *("--train.steps", 1, "--train.global_batch", 4, "--train.precision", "fp32"),
        *("--train.out", tmp_path / "runs"),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    done = call(
        *("sample", "--checkpoint", tmp_path / "runs/000", "--out", tmp_path / "samples"),
        *("--count", 4, "--sample.method", "euler", "--sample.steps", 1, "--scale", 2),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    origin = json.loads((tmp_path / "samples/samples.json").read_text())
    assert origin["data"]["class_names"] == ["a", "b", "c"]
    assert origin["checkpoint"] == str(tmp_path / "runs/000")
    # the card of a model shows scores of its own weights only
    assert made_of(str(tmp_path / "samples")) == {"step": 1, "weights": "ema"}
    assert made_of(str(tmp_path / "samples/samples.npz")) == {"step": 1, "weights": "ema"}
    for unknown in ("elsewhere.npz", "samples/renamed.npz"):
        assert made_of(str(tmp_path / unknown)) == {"step": None, "weights": None}
    assert reference_of(str(tmp_path / "samples")) == str(packed / "data/held_out")
    with Image.open(tmp_path / "samples/samples.png") as picture:
        # four images of 32 x (32 + 12), each with a line of 2
        assert picture.size == (4 * 34, 46)
        captions = np.asarray(picture)[32:44]
    # four different lines of text, black on white
    parts = [captions[:, 34 * i : 34 * i + 32] for i in range(4)]
    assert all(part.min() < 128 for part in parts)
    assert not np.array_equal(parts[0], parts[1])
    # the classes take turns: the fourth image is of the first class again
    assert np.array_equal(parts[0], parts[3])


def test_pictures_of_many_channels(tmp_path):
    images = torch.arange(2 * 4 * 4 * 5, dtype=torch.uint8).view(2, 4, 4, 5).numpy()
    save_grid(tmp_path / "x.png", images, 2)
    picture = np.asarray(Image.open(tmp_path / "x.png"))
    assert np.array_equal(picture[:4, :4], images[0][..., :3])
    save_grid(tmp_path / "y.png", images[..., :2], 2)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "y.png"))[:4, 5:9], images[1][..., 0])
