"""WebDataset tars give the images and labels of the folders that they were made from."""

import io
import json
import shutil
import tarfile

import pytest
import torch
from toy_data import write_images

from sra_fast.data.folders import ImageFolder
from sra_fast.data.images import Crop
from sra_fast.data.tars import TarSource, expand, holds_tars


def write_tars(root, label="cls", tars=2, mode="w", **changed):
    """The toy images in tars of six, with labels; returns the folder of the images.

    ``changed``: other content of some label files, by the key of the sample.
    """
    images = root / "images"
    names = sorted(write_images(images))
    (root / "tars").mkdir()
    per_tar = len(names) // tars
    for number in range(tars):
        with tarfile.open(root / f"tars/x-{number:03d}.tar", mode) as archive:
            for i, name in enumerate(names[number * per_tar : (number + 1) * per_tar]):
                key = f"d/{number}{i}"
                value = "abc".index(name[0])
                text = {"cls": str(value), "json": json.dumps({"label": value}), "none": None}[
                    label
                ]
                text = changed.get(f"_{number}{i}", text)
                archive.add(images / name, f"{key}.{name.rpartition('.')[2]}")
                if text is not None:
                    member = tarfile.TarInfo(f"{key}.{label}")
                    member.size = len(text)
                    archive.addfile(member, io.BytesIO(text.encode()))
    return images


@pytest.mark.parametrize("label", ["cls", "json"])
@pytest.mark.parametrize("pattern", ["tars", "tars/x-{000..001}.tar"])
def test_the_same_images_as_the_folder(tmp_path, label, pattern):
    folder = ImageFolder(write_tars(tmp_path, label), Crop(32))
    data = TarSource(str(tmp_path / pattern), Crop(32))
    assert torch.equal(data.labels, folder.labels)
    rows = [11, 0, 6, 3]
    assert torch.equal(data.read(rows).images, folder.read(rows).images)
    assert data.names[7] == "x-001.tar/d/11" + folder.names[7][-4:]
    train, held_out = data.hold_out(0.25)
    row = data.names.index(held_out.names[1])
    assert torch.equal(held_out.read([1]).images, data.read([row]).images)
    assert len(train.names) + len(held_out.names) == 12


def test_without_labels_all_are_of_one_class(tmp_path):
    write_tars(tmp_path, "none", tars=1)
    data = TarSource(str(tmp_path / "tars"), Crop(32))
    assert data.num_classes == 1 and data.notes[0].startswith("no labels")


def test_a_tar_for_every_class_is_not_one_class(tmp_path):
    write_tars(tmp_path, "none")
    with pytest.raises(ValueError, match="no labels .*: if a tar is a class, unpack each"):
        TarSource(str(tmp_path / "tars"), Crop(32))
    assert TarSource(str(tmp_path / "tars"), Crop(32), num_classes=1).num_classes == 1


def test_what_is_left_out_is_said(tmp_path):
    images = write_tars(tmp_path, tars=1)
    with tarfile.open(tmp_path / "tars/x-000.tar", "a") as archive:
        for name in ("img.v2.0.png", "9.heic", "9.txt"):
            archive.add(images / "a/1.png", name)
    data = TarSource(str(tmp_path / "tars"), Crop(32))
    assert len(data) == 12
    assert data.notes == [
        "x-000.tar: 1 images are left out, WebDataset's names have one dot: img.v2.0.png",
        "x-000.tar: 2 files are no images that Pillow opens: .heic (1), .txt (1)",
    ]


def test_a_tar_among_images_hides_none_of_them(tmp_path):
    write_images(tmp_path, per_class=1)
    assert not holds_tars(tmp_path)
    shutil.make_archive(tmp_path / "backup", "tar", tmp_path / "a")
    with pytest.raises(ValueError, match="holds images and 1 tars, the first is backup.tar"):
        holds_tars(tmp_path)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"_03": "cat"}, "x-000.tar: the label of d/03 must be a whole number, got 'cat'"),
        ({"_03": None}, "no label .* for 1 images, the first is x-000.tar/d/03"),
        ({"_03": "-1"}, r"labels must lie in \[0, 3\), x-000.tar/d/03.png has -1"),
    ],
)
def test_labels_that_are_none_are_named(tmp_path, changed, message):
    write_tars(tmp_path, **changed)
    with pytest.raises(ValueError, match=message):
        TarSource(str(tmp_path / "tars"), Crop(32))


def test_wrong_files_are_named(tmp_path):
    write_tars(tmp_path, tars=1, mode="w:gz")
    with pytest.raises(ValueError, match="x-000.tar is no readable, uncompressed .tar"):
        TarSource(str(tmp_path / "tars"), Crop(32))
    with pytest.raises(ValueError, match="no .tar of images at .*x-001.tar"):
        TarSource(str(tmp_path / "tars/x-{000..001}.tar"), Crop(32))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no .tar of images at .*empty"):
        TarSource(str(tmp_path / "empty"), Crop(32))
    with tarfile.open(tmp_path / "empty/0.tar", "w"):
        pass
    with pytest.raises(ValueError, match="holds no images that Pillow opens"):
        TarSource(str(tmp_path / "empty"), Crop(32))


def test_a_range_keeps_its_zeros(tmp_path):
    for number in (8, 9, 10):
        (tmp_path / f"a-{number:02d}.tar").touch()
    files = expand(str(tmp_path / "a-{08..10}.tar"))
    assert [file.name for file in files] == ["a-08.tar", "a-09.tar", "a-10.tar"]


def test_a_tar_that_was_cut_short_is_named(tmp_path):
    write_tars(tmp_path, tars=1)
    data = TarSource(str(tmp_path / "tars"), Crop(32))
    tar = tmp_path / "tars/x-000.tar"
    with open(tar, "r+b") as f:
        f.truncate(data._places[-1][1] + 10)
    with pytest.raises(ValueError, match="x-000.tar ends before its last file does"):
        data.read([11])
