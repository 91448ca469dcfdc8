"""Image folders: the crop against exact filters, labels from folders and lists, and what is
refused.
"""

import json
import os
import shutil
from zipfile import ZipFile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from toy_data import photographs, write_images

from sra_fast.data.images import ImageFolder, center_crop


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def halve(image: np.ndarray) -> np.ndarray:
    """A 2 x 2 box filter in 8 bits: means of two neighbours, rounded up, first along rows and then
    along columns.
    """
    image = (image[:, 0::2] + image[:, 1::2] + 1) // 2
    return (image[0::2] + image[1::2] + 1) // 2


def bicubic(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """PyTorch's antialiased filter along rows, then along columns, each rounded to 8 bits."""
    x = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].double()
    for size in ((x.shape[2], width), (height, width)):
        x = F.interpolate(x, size=size, mode="bicubic", antialias=True, align_corners=False)
        x = x.round().clamp(0, 255)
    return x[0].permute(1, 2, 0).numpy()


def test_crop_of_the_shorter_sides_size_is_a_slice():
    photo = photographs()[0]
    assert photo.size == (640, 427)
    # 213 columns are cut off: 106 on the left, 107 on the right
    assert np.array_equal(pixels(center_crop(photo, 427)), pixels(photo)[:, 106:533])
    upright = photo.transpose(Image.Transpose.TRANSPOSE)
    assert np.array_equal(pixels(center_crop(upright, 427)), pixels(upright)[106:533])


@pytest.mark.parametrize("size, times", [(212, 1), (106, 2), (53, 3)])
def test_halves_with_a_box_while_twice_the_size(size, times):
    """A power of two needs only box filters, so the result is known exactly."""
    photo = photographs()[1].crop((0, 0, 640, 424))
    expected = pixels(photo)
    for _ in range(times):
        expected = halve(expected)
    left = (expected.shape[1] - size) // 2
    assert np.array_equal(pixels(center_crop(photo, size)), expected[:, left : left + size])


@pytest.mark.parametrize("size, halvings", [(213, 0), (200, 1), (107, 1), (60, 2), (500, 0)])
def test_the_rest_is_bicubic(size, halvings):
    """Against PyTorch's bicubic filter, from just below twice the size up to enlargement."""
    photo = photographs()[2].crop((0, 0, 512, 424))
    expected = pixels(photo)
    for _ in range(halvings):
        expected = halve(expected)
    height, width, _ = expected.shape
    expected = bicubic(expected, size, round(width * size / height))
    left = (expected.shape[1] - size) // 2
    error = np.abs(pixels(center_crop(photo, size)) - expected[:, left : left + size])
    assert error.max() <= 1
    assert error.mean() < 0.01, "Pillow's weights are fixed-point numbers"


def test_class_folders_a_list_and_a_zip_are_the_same(tmp_path):
    names = write_images(tmp_path / "folders", per_class=3)
    (tmp_path / "folders/a/notes.txt").write_text("no image")
    data = ImageFolder(tmp_path / "folders", 64)
    assert data.names == sorted(names)
    assert data.labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    assert data.num_classes == 3
    batch, labels = data.__getitems__([7, 0])
    assert labels.tolist() == [2, 0]
    assert batch.dtype == torch.uint8
    assert batch.shape == (2, 3, 64, 64)
    with Image.open(tmp_path / "folders" / data.names[7]) as image:
        expected = np.asarray(center_crop(image.convert("RGB"), 64))
    assert np.array_equal(batch[0].permute(1, 2, 0).numpy(), expected)

    shutil.copytree(tmp_path / "folders", tmp_path / "listed")
    shutil.make_archive(tmp_path / "zipped", "zip", tmp_path / "folders")
    order = [[name, 2 - "abc".index(name[0])] for name in names]
    (tmp_path / "listed/dataset.json").write_text(json.dumps({"labels": order}))
    zipped = ImageFolder(tmp_path / "zipped.zip", 64)
    listed = ImageFolder(tmp_path / "listed", 64)
    assert zipped.fingerprint == data.fingerprint != listed.fingerprint
    assert torch.equal(zipped.__getitems__([7, 0])[0], batch)
    assert listed.labels.tolist() == (2 - data.labels).tolist()


def test_mirror_images_follow_their_images(tmp_path):
    write_images(tmp_path / "i", per_class=2)
    plain = ImageFolder(tmp_path / "i", 32)
    data = ImageFolder(tmp_path / "i", 32, mirror=True)
    assert len(data) == 2 * len(plain)
    assert torch.equal(data.labels, plain.labels.repeat_interleave(2))
    batch = plain.__getitems__([3, 4])[0]
    mirrored = data.__getitems__([7, 6, 9])[0]
    assert torch.equal(mirrored, torch.stack([batch[0].flip(-1), batch[0], batch[1].flip(-1)]))


def test_grey_palette_and_transparent_images_become_rgb(tmp_path):
    photo = photographs()[1].crop((300, 200, 364, 264))
    (tmp_path / "x").mkdir()
    for mode in ("L", "P", "RGBA", "CMYK"):
        photo.convert(mode).save(tmp_path / f"x/{mode}.tif")
    data = ImageFolder(tmp_path, 64)
    grey = data.__getitems__([data.names.index("x/L.tif")])[0][0]
    assert torch.equal(grey[0], grey[1])
    assert grey[0].float().std() > 10
    opaque = data.__getitems__([data.names.index("x/RGBA.tif")])[0][0]
    assert torch.equal(opaque.permute(1, 2, 0), torch.from_numpy(np.array(photo)))


def broken(tmp_path, name: str) -> dict:
    """An image folder with one thing wrong; the arguments of ``ImageFolder``."""
    root = tmp_path / "i"
    write_images(root, per_class=2)
    listed = {"labels": [[f"{c}/{n}", i] for i, c in enumerate("abc") for n in ("0.jpg", "1.png")]}
    if name == "no folder":
        return {"path": tmp_path / "nowhere"}
    if name == "no zip":
        return {"path": root / "a/0.jpg"}
    if name == "no images":
        shutil.rmtree(root) or root.mkdir()
    if name == "loose":
        shutil.copy(root / "a/0.jpg", root / "0.jpg")
    if name == "empty class":
        (root / "aa").mkdir()
    if name == "class count":
        return {"path": root, "num_classes": 4}
    if name == "twice":
        listed["labels"].append(["b/1.png", 2])
    if name == "one folder":
        shutil.move(root, tmp_path / "above/train")
        return {"path": tmp_path / "above"}
    if name == "loop":
        (root / "b/again").symlink_to("../../i")
    if name == "range":
        listed["labels"][3][1] = 3
    if name == "negative":
        listed["labels"][3][1] = -1
    if name == "no label":
        del listed["labels"][3]
    if name == "not whole":
        listed["labels"][3][1] = 1.0
    if name == "absent":
        listed["labels"].append(["c/9.png", 2])
    if name in ("range", "negative", "no label", "not whole", "absent", "twice", "no list"):
        (root / "dataset.json").write_text("[]" if name == "no list" else json.dumps(listed))
    return {"path": root, **({"num_classes": 3} if name == "range" else {})}


@pytest.mark.parametrize(
    "name, message",
    [
        ("no folder", "no folder or .zip of images at .*nowhere"),
        ("no zip", "neither a folder nor a readable .zip"),
        ("no images", "holds no images"),
        ("loose", "every image in a class folder: 0.jpg is in none"),
        ("empty class", "1 class folders without images, the first is aa"),
        ("class count", "num_classes 4 was asked for, .* has 3 class folders"),
        ("range", r"labels must lie in \[0, 3\), b/1.png has 3"),
        ("negative", r"labels must lie in \[0, 3\), b/1.png has -1"),
        ("no label", "the label of b/1.png, got None"),
        ("not whole", "the label of b/1.png, got 1.0"),
        ("absent", "lists 1 files that are not there: c/9.png"),
        ("no list", "dataset.json must hold"),
        ("twice", "dataset.json must hold .*a file is listed twice"),
        (
            "one folder",
            "holds one folder, train, with folders in it: the classes must be one level higher",
        ),
        ("loop", "i/b/again is a link to a folder above it, .*/i$"),
    ],
)
def test_wrong_folders_are_one_clear_error(tmp_path, name, message):
    with pytest.raises(ValueError, match=message):
        ImageFolder(**broken(tmp_path, name), size=32)


@pytest.mark.parametrize("kind", ["empty", "cut", "text"])
@pytest.mark.parametrize("zipped", [False, True], ids=["folder", "zip"])
def test_unreadable_images_are_named(tmp_path, kind, zipped):
    write_images(tmp_path / "i", per_class=2)
    file = tmp_path / "i/b/1.png"
    file.write_bytes({"empty": b"", "cut": file.read_bytes()[:-5000], "text": b"GIF? no."}[kind])
    path = tmp_path / "i"
    if zipped:
        with ZipFile(tmp_path / "i.zip", "w") as z:
            for f in sorted(path.rglob("*.*")):
                z.write(f, f.relative_to(path))
        path = tmp_path / "i.zip"
    data = ImageFolder(path, 32)
    data.__getitems__([0, 1, 2, 4, 5])
    with pytest.raises(ValueError, match="b/1.png is no readable image"):
        data.__getitems__([2, 3])


def test_files_of_file_managers_are_ignored(tmp_path):
    names = write_images(tmp_path / "i", per_class=2)
    # a folder whose name looks like an image's
    (tmp_path / "i/c").rename(tmp_path / "i/c.png")
    names = [name.replace("c/", "c.png/") for name in names]
    for name in (
        ".DS_Store",
        "a/._0.jpg",
        ".ipynb_checkpoints/0.jpg",
        "b/.cache/1.png",
        "__MACOSX/a/._0.jpg",
    ):
        (tmp_path / "i" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tmp_path / "i/a/0.jpg", tmp_path / "i" / name)
    shutil.make_archive(tmp_path / "z", "zip", tmp_path / "i")
    with ZipFile(tmp_path / "z.zip", "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.write(tmp_path / "i/a/0.jpg", "a/0.jpg")
    for path in (tmp_path / "i", tmp_path / "z.zip"):
        data = ImageFolder(path, 32)
        assert data.names == names
        assert data.labels.tolist() == [0, 0, 1, 1, 2, 2]
        assert len(data.__getitems__([*range(6)])[0]) == 6


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path, monkeypatch):
    write_images(tmp_path / "i", per_class=2)
    scandir = os.scandir

    def locked(path):
        if str(path).endswith("/b"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", locked)
    with pytest.raises(ValueError, match="i/b cannot be read: Permission denied"):
        ImageFolder(tmp_path / "i", 32)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_more_than_8_bits_are_refused(tmp_path, dtype):
    (tmp_path / "a").mkdir()
    Image.fromarray(np.linspace(0, 60000, 1600).reshape(40, 40).astype(dtype)).save(
        tmp_path / "a/0.tif"
    )
    with pytest.raises(
        ValueError,
        match="a/0.tif is no readable image: .*8 bits per channel were expected, its mode is [IF]",
    ):
        ImageFolder(tmp_path, 32).__getitems__([0])
