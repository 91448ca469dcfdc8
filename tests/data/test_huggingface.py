"""Hugging Face data sets on disk give the images, labels and class names that went in."""

import pytest
import torch
from launch import call
from toy_data import write_images

from sra_fast.data.folders import ImageFolder
from sra_fast.data.huggingface import is_saved, load, open_huggingface
from sra_fast.data.images import Crop
from sra_fast.data.pixels import PackedPixels

datasets = pytest.importorskip("datasets", reason="needs Hugging Face's datasets")


def make(root, names=None, label="label"):
    """A data set of the toy images; ``names``: of the classes; ``label``: the column, or None."""
    images = root / "images"
    files = sorted(
        images.rglob("*.*") if images.exists() else map(images.joinpath, write_images(images))
    )
    columns = {"picture": [str(file) for file in files]}
    features = {"picture": datasets.Image()}
    if label:
        columns[label] = ["abc".index(file.parent.name) for file in files]
        features[label] = datasets.ClassLabel(names=names) if names else datasets.Value("int64")
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def open_saved(tmp_path, found, name="saved"):
    found.save_to_disk(tmp_path / name)
    assert is_saved(tmp_path / name)
    return open_huggingface(str(tmp_path / name), Crop(32), None, False, "stop")


def test_images_labels_and_names(tmp_path):
    data, held_out = open_saved(tmp_path, make(tmp_path, ["x", "y", "z"]))
    assert held_out is None
    folder = ImageFolder(tmp_path / "images", Crop(32))
    assert data.class_names == ["x", "y", "z"]
    assert torch.equal(data.labels, folder.labels)
    assert torch.equal(data.read([7, 2]).images, folder.read([7, 2]).images)


def test_a_saved_format_makes_no_difference(tmp_path):
    plain, _ = open_saved(tmp_path, make(tmp_path, ["x", "y", "z"]))
    saved = make(tmp_path, ["x", "y", "z"]).with_format("torch")
    data, _ = open_saved(tmp_path, saved, "torch")
    assert torch.equal(data.labels, plain.labels)
    assert torch.equal(data.read([5]).images, plain.read([5]).images)


def test_columns_that_are_not_read_are_named(tmp_path):
    data, _ = open_saved(tmp_path, make(tmp_path, label="fine_label"))
    assert data.notes == [
        "columns picture are read, not fine_label",
        "no labels: all images are of one class",
    ]


def test_splits(tmp_path):
    whole = make(tmp_path)
    parts = {"train": whole.select(range(8)), "test": whole.select([1, 5])}
    train, held_out = open_saved(tmp_path, datasets.DatasetDict(parts))
    assert (len(train), len(held_out)) == (8, 2)
    # the training images have classes 0 and 1 only
    assert train.num_classes == 2


def test_splits_share_the_classes(tmp_path):
    whole = make(tmp_path, ["x", "y", "z"])
    parts = {"train": whole.select([0, 4, 8]), "validation": whole.select([5]), "test": whole}
    train, held_out = open_saved(tmp_path, datasets.DatasetDict(parts))
    assert held_out.labels.tolist() == [1]
    assert train.num_classes == held_out.num_classes == 3
    assert train.notes == ["split validation is held out"]


def test_without_labels_all_are_of_one_class(tmp_path):
    data, _ = open_saved(tmp_path, make(tmp_path, label=None))
    assert data.num_classes == 1 and data.notes == ["no labels: all images are of one class"]


def test_wrong_data_sets_are_one_error(tmp_path):
    texts = datasets.Dataset.from_dict({"text": ["a"]})
    with pytest.raises(ValueError, match="has no images, only the columns text"):
        open_saved(tmp_path, texts)
    with pytest.raises(ValueError, match="nowhere is no data set that `datasets` can load"):
        load(str(tmp_path / "nowhere"))
    whole = make(tmp_path)
    unknown = {"train": whole.select(range(8)), "test": whole}
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 2\), 00000008 has 2"):
        open_saved(tmp_path, datasets.DatasetDict(unknown), "unknown")
    with pytest.raises(ValueError, match="has no split `train`, only test"):
        open_saved(tmp_path, datasets.DatasetDict({"test": whole}), "test_only")


def test_the_command_packs_it(tmp_path):
    make(tmp_path, ["x", "y", "z"]).save_to_disk(tmp_path / "saved")
    done = call(
        *("preprocess", "--source", tmp_path / "saved", "--out", tmp_path / "out"),
        *("--pixels", "true", "--resolution", 16, "--holdout", 0.25),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    data = PackedPixels(tmp_path / "out")
    assert data.class_names == ["x", "y", "z"] and len(data) == 9
