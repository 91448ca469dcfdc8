"""Image folders: the crop against exact filters, labels from folders and lists, and what is
refused.
"""

import hashlib
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

from sra_fast.data.batch import Report
from sra_fast.data.folders import ImageFolder, open_folder
from sra_fast.data.images import Crop, center_crop


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
    data = ImageFolder(tmp_path / "folders", Crop(64))
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
    zipped = ImageFolder(tmp_path / "zipped.zip", Crop(64))
    listed = ImageFolder(tmp_path / "listed", Crop(64))
    assert zipped.fingerprint == data.fingerprint != listed.fingerprint
    assert torch.equal(zipped.__getitems__([7, 0])[0], batch)
    assert listed.labels.tolist() == (2 - data.labels).tolist()


def test_mirror_images_follow_their_images(tmp_path):
    write_images(tmp_path / "i", per_class=2)
    plain = ImageFolder(tmp_path / "i", Crop(32))
    data = ImageFolder(tmp_path / "i", Crop(32), mirror=True)
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
    data = ImageFolder(tmp_path, Crop(64))
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
        ("no images", "holds no images that Pillow opens"),
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
        ("loop", "i/b/again is a link to a folder above it, .*/i$"),
    ],
)
def test_wrong_folders_are_one_clear_error(tmp_path, name, message):
    with pytest.raises(ValueError, match=message):
        ImageFolder(**broken(tmp_path, name), crop=Crop(32))


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
    data = ImageFolder(path, Crop(32))
    data.__getitems__([0, 1, 2, 4, 5])
    # in words, without the names of Python's errors
    with pytest.raises(ValueError, match=r"b/1.png is no readable image: [^()]+( \(\d.*\))?$"):
        data.__getitems__([2, 3])


def test_what_is_wrong_with_a_list_is_said_in_words(tmp_path):
    write_images(tmp_path, per_class=2)
    for content, words in (
        ("{}", "'labels' is missing"),
        ("{", "Expecting property name"),
        ('{"labels": [["a/0.jpg", 1], ["a/0.jpg", 1]]}', "a file is listed twice"),
    ):
        (tmp_path / "dataset.json").write_text(content)
        with pytest.raises(ValueError, match=rf'must hold {{"labels": .*}}: {words}'):
            ImageFolder(tmp_path, Crop(32))


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
        data = ImageFolder(path, Crop(32))
        assert data.names == names
        assert data.labels.tolist() == [0, 0, 1, 1, 2, 2]
        assert len(data.__getitems__([*range(6)])[0]) == 6


def test_names_that_are_no_text_are_names(tmp_path):
    """A file system takes any bytes, for a file and for a class."""
    names = write_images(tmp_path / "i", per_class=4)
    os.rename(tmp_path / "i/b", os.fsencode(tmp_path) + b"/i/\xe9")
    for name in ("a/0.jpg", "a/2.jpg"):
        file = os.fsencode(tmp_path / "i" / name)
        os.rename(file, file.replace(b".jpg", b"\xff.jpg"))
    train, held_out = ImageFolder(tmp_path / "i", Crop(32)).hold_out(0.5)
    assert train.class_names == ["a", "c", os.fsdecode(b"\xe9")]
    found = sorted(train.names + held_out.names)
    assert len(found) == len(names) == 12
    assert os.fsdecode(b"a/0\xff.jpg") in found
    assert len(held_out) == 6
    assert len(held_out.__getitems__([*range(6)])[0]) == 6
    assert len(train.fingerprint) == 64
    # a name of text is held out as ever: by the hash of its UTF-8
    texts = [number for number, name in enumerate(train.names) if name.isascii()]
    expected = [hashlib.blake2b(train.names[number].encode()).digest() for number in texts]
    assert [train._hash(number) for number in texts] == expected


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path, monkeypatch):
    write_images(tmp_path / "i", per_class=2)
    scandir = os.scandir

    def locked(path):
        if str(path).endswith("/b"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", locked)
    with pytest.raises(ValueError, match="i/b cannot be read: Permission denied"):
        ImageFolder(tmp_path / "i", Crop(32))


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_more_than_8_bits_are_refused(tmp_path, dtype):
    (tmp_path / "a").mkdir()
    Image.fromarray(np.linspace(0, 60000, 1600).reshape(40, 40).astype(dtype)).save(
        tmp_path / "a/0.tif"
    )
    with pytest.raises(
        ValueError,
        match="a/0.tif is no readable image: 8 bits per channel were expected, its mode is [IF]",
    ):
        ImageFolder(tmp_path, Crop(32)).__getitems__([0])


def crop_of(image: Image.Image, path, **crop) -> tuple[np.ndarray, Report]:
    """An image, saved and read again."""
    image.save(path)
    return Crop(**{"size": 32, **crop}).decode(path.read_bytes(), str(path))


def photo(size: int = 32) -> Image.Image:
    return photographs()[1].crop((300, 200, 300 + size, 200 + size))


@pytest.mark.parametrize("mode, suffix", [("RGBA", ".png"), ("LA", ".png"), ("P", ".gif")])
def test_transparent_pixels_show_the_background(tmp_path, mode, suffix):
    image = photo().convert("RGBA")
    image.paste((0, 0, 0, 0), (0, 0, 16, 32))
    if mode == "P":
        # one colour of the palette is transparent
        image = image.convert("RGB").quantize(16)
        image.info["transparency"] = image.getpixel((0, 0))
    elif mode == "LA":
        image = image.convert("LA")
    pixels, report = crop_of(image, tmp_path / f"x{suffix}")
    assert report.counts["composited"] == 1
    assert (pixels[:, :16] == 255).all()
    assert pixels[:, 16:].std() > 10
    red, _ = crop_of(image, tmp_path / f"x{suffix}", background="#ff0000")
    assert (red[:, :16] == (255, 0, 0)).all()


def test_half_transparent_pixels_are_blended(tmp_path):
    image = Image.new("RGBA", (32, 32), (100, 0, 200, 51))
    pixels, _ = crop_of(image, tmp_path / "x.png")
    # a fifth of the colour, four fifths of white
    assert np.abs(pixels.astype(int) - (224, 204, 244)).max() <= 1
    kept, report = crop_of(image, tmp_path / "x.png", channels=4)
    assert (kept == (100, 0, 200, 51)).all()
    assert not report.counts["composited"]


def test_an_opaque_alpha_channel_is_not_counted(tmp_path):
    pixels, report = crop_of(photo().convert("RGBA"), tmp_path / "x.png")
    assert not report.counts["composited"]
    assert np.array_equal(pixels, np.asarray(photo()))


@pytest.mark.parametrize(
    "tag, transpose",
    [
        (3, Image.Transpose.ROTATE_180),
        (6, Image.Transpose.ROTATE_270),
        (8, Image.Transpose.ROTATE_90),
        (2, Image.Transpose.FLIP_LEFT_RIGHT),
    ],
)
def test_orientation_is_an_option(tmp_path, tag, transpose):
    exif = Image.Exif()
    exif[0x0112] = tag
    path = tmp_path / "x.png"
    photo().save(path, exif=exif)
    ignored, report = Crop(32).decode(path.read_bytes(), "x")
    assert np.array_equal(ignored, np.asarray(photo()))
    assert report.counts["orientation_ignored"] == 1
    rotated, report = Crop(32, orientation=True).decode(path.read_bytes(), "x")
    assert np.array_equal(rotated, np.asarray(photo().transpose(transpose)))
    assert report.counts["rotated"] == 1


def test_what_is_cut_off_and_enlarged_is_counted(tmp_path):
    wide = photographs()[1].crop((0, 0, 100, 40))
    pixels, report = crop_of(wide, tmp_path / "x.png")
    assert pixels.shape == (32, 32, 3)
    assert report.cut == report.most_cut == pytest.approx(0.6)
    assert not report.counts["enlarged"]
    _, small = crop_of(wide, tmp_path / "x.png", size=64)
    assert small.counts["enlarged"] == 1
    report.add(small)
    report.add(crop_of(photo(), tmp_path / "y.png")[1])
    assert report.lines()[:2] == [
        "cropped to a square: 40% of an image's area on average, at most 60%",
        "1 images smaller than the resolution, enlarged",
    ]
    assert Report.from_json(json.loads(json.dumps(report.as_json()))) == report


@pytest.mark.parametrize("channels, mode", [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_channels(tmp_path, channels, mode):
    pixels, _ = crop_of(photo(), tmp_path / "x.png", channels=channels)
    expected = np.asarray(photo().convert(mode)).reshape(32, 32, channels)
    assert np.array_equal(pixels, expected)


@pytest.mark.parametrize("suffix", [".gif", ".avif", ".jp2", ".tga", ".jfif", ".ico"])
def test_every_format_that_pillow_opens_is_read(tmp_path, suffix):
    (tmp_path / "a").mkdir()
    try:
        photo().save(tmp_path / f"a/0{suffix}", format="JPEG" if suffix == ".jfif" else None)
    except (KeyError, OSError) as error:
        pytest.skip(f"this Pillow does not write {suffix}: {error}")
    data = ImageFolder(tmp_path, Crop(32))
    pixels = data.__getitems__([0])[0][0].permute(1, 2, 0).numpy().astype(int)
    assert np.abs(pixels - np.asarray(photo()).astype(int)).mean() < 12
    assert data.notes == []


def test_files_that_are_no_images_are_named(tmp_path):
    write_images(tmp_path, per_class=1)
    for name in ("a/notes.txt", "b/mask.npy", "b/other.txt"):
        (tmp_path / name).write_text("")
    data = ImageFolder(tmp_path, Crop(32))
    assert data.notes == ["3 files are no images that Pillow opens: .txt (2), .npy (1)"]


def test_an_animation_is_its_first_frame(tmp_path):
    frames = [photo(), photo().transpose(Image.Transpose.ROTATE_90)]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    first, _ = crop_of(photo(), tmp_path / "y.gif")
    pixels, report = Crop(32).decode((tmp_path / "x.gif").read_bytes(), "x")
    assert np.array_equal(pixels, first)
    assert report.counts["animated"] == 1


def test_images_without_folders_are_of_one_class(tmp_path):
    write_images(tmp_path / "i", per_class=2)
    for name in ("a/0.jpg", "a/1.png"):
        shutil.copy(tmp_path / "i" / name, tmp_path / name.replace("/", ""))
    shutil.rmtree(tmp_path / "i")
    data = ImageFolder(tmp_path, Crop(32))
    assert (data.num_classes, data.class_names) == (1, None)
    assert data.labels.tolist() == [0, 0]
    assert data.notes == ["no class folders: all images are of one class"]


@pytest.mark.parametrize("zipped", [False, True], ids=["folder", "zip"])
def test_a_list_one_folder_down_counts(tmp_path, zipped):
    """A .zip of a folder has one level too much; its labels were those of the folders."""
    names = write_images(tmp_path / "up/i", per_class=2)
    labels = [[name, 2 - "abc".index(name[0])] for name in names]
    listed = {"labels": labels, "classes": ["z", "y", "x"]}
    (tmp_path / "up/i/dataset.json").write_text(json.dumps(listed))
    path = tmp_path / "up"
    if zipped:
        path = shutil.make_archive(tmp_path / "z", "zip", tmp_path / "up")
    data = ImageFolder(path, Crop(32))
    assert data.names == sorted(names)
    assert data.labels.tolist() == [2, 2, 1, 1, 0, 0]
    assert data.class_names == ["z", "y", "x"]
    expected = ImageFolder(tmp_path / "up/i", Crop(32)).__getitems__([3, 0])[0]
    assert torch.equal(data.__getitems__([3, 0])[0], expected)


def test_a_list_somewhere_else_is_refused(tmp_path):
    write_images(tmp_path, per_class=1)
    (tmp_path / "a/dataset.json").write_text('{"labels": [["0.jpg", 0]]}')
    with pytest.raises(ValueError, match="dataset.json at the top, found a/dataset.json and b"):
        ImageFolder(tmp_path, Crop(32))


def test_labels_of_a_list_begin_at_zero(tmp_path):
    names = write_images(tmp_path, per_class=1)
    labels = [[name, 1 + "abc".index(name[0])] for name in names]
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": labels}))
    with pytest.raises(ValueError, match=r"numbered from 0, .* has 1 .. 3; .*num_classes 4"):
        ImageFolder(tmp_path, Crop(32))
    assert ImageFolder(tmp_path, Crop(32), num_classes=4).labels.tolist() == [1, 2, 3]


@pytest.mark.parametrize("names", [("train", "val"), ("Train", "Validation"), ("train", "test")])
def test_train_and_val_folders(tmp_path, names):
    for name in names:
        write_images(tmp_path / name, per_class=3 if name == names[0] else 1)
    # a class that val lacks
    shutil.rmtree(tmp_path / names[1] / "a")
    train, held_out = open_folder(tmp_path, Crop(32), None, True, "stop")
    assert train.class_names == held_out.class_names == ["a", "b", "c"]
    assert len(train) == 18 and held_out.labels.tolist() == [1, 2]
    assert train.notes == [f"{names[1]}/ is held out"]
    (tmp_path / names[1] / "b").rename(tmp_path / names[1] / "d")
    with pytest.raises(ValueError, match=f"{names[1]} has a class that training images lack: d"):
        open_folder(tmp_path, Crop(32), None, False, "stop")


def test_held_out_images_without_classes_are_refused(tmp_path):
    """ImageNet's own validation folder is flat: every label would be 0."""
    write_images(tmp_path / "train", per_class=2)
    write_images(tmp_path / "i", per_class=1)
    shutil.move(tmp_path / "i/a", tmp_path / "val")
    shutil.rmtree(tmp_path / "i")
    with pytest.raises(ValueError, match="val has no class folders, the training images have 3"):
        open_folder(tmp_path, Crop(32), None, False, "stop")


def test_other_folders_beside_train_and_val_are_no_classes(tmp_path):
    for name in ("train", "val", "extra"):
        write_images(tmp_path / name, per_class=1)
    train, held_out = open_folder(tmp_path, Crop(32), None, False, "stop")
    assert len(train) == len(held_out) == 3
    assert train.notes == ["val/ is held out, extra/ is not read"]
    # without held-out images `train` is a class like others
    shutil.rmtree(tmp_path / "val")
    assert open_folder(tmp_path, Crop(32), None, False, "stop")[0].class_names == ["extra", "train"]


@pytest.mark.parametrize("zipped", [False, True], ids=["folder", "zip"])
@pytest.mark.parametrize("split", [False, True], ids=["classes", "train and val"])
def test_everything_one_folder_down_is_the_same(tmp_path, zipped, split):
    root = tmp_path / "up/mine/again"
    for name in ("train", "val") if split else ("",):
        write_images(root / name, per_class=2)
    path = tmp_path / "up"
    if zipped:
        path = shutil.make_archive(tmp_path / "z", "zip", path)
    train, held_out = open_folder(path, Crop(32), None, False, "stop")
    assert train.class_names == ["a", "b", "c"]
    assert train.notes[0] == "only mine/again/ holds images"
    assert (held_out is not None) == split
    expected = ImageFolder(root / ("train" if split else ""), Crop(32))
    assert torch.equal(train.read([3, 0]).images, expected.read([3, 0]).images)
    # the user says that it is one class
    if not split:
        assert open_folder(path, Crop(32), 1, False, "stop")[0].class_names == ["mine"]


def test_folders_that_are_numbers_are_in_their_order(tmp_path):
    write_images(tmp_path, per_class=1)
    for old, new in {"a": "2", "b": "10", "c": "1"}.items():
        (tmp_path / old).rename(tmp_path / new)
    assert ImageFolder(tmp_path, Crop(32)).class_names == ["1", "2", "10"]


@pytest.mark.parametrize("names", [{"0": "x"}, "abc", [1, 2, 3], ["x", "x", "y"], []])
def test_names_of_a_list_must_be_names(tmp_path, names):
    files = write_images(tmp_path, per_class=1)
    labels = [[name, "abc".index(name[0])] for name in files]
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": labels, "classes": names}))
    with pytest.raises(ValueError, match='"classes" must be a list of different names'):
        ImageFolder(tmp_path, Crop(32))


def test_a_named_class_may_have_no_image(tmp_path):
    files = write_images(tmp_path, per_class=1)
    labels = [[name, "abc".index(name[0])] for name in files]
    listed = {"labels": labels, "classes": ["x", "y", "z", "none"]}
    (tmp_path / "dataset.json").write_text(json.dumps(listed))
    assert ImageFolder(tmp_path, Crop(32)).num_classes == 4


def test_a_share_of_every_class_is_held_out(tmp_path):
    write_images(tmp_path, per_class=8)
    data = ImageFolder(tmp_path, Crop(32), mirror=True)
    train, held_out = data.hold_out(0.25)
    assert len(train.names) == 18 and len(held_out.names) == 6
    assert sorted([*train.names, *held_out.names]) == data.names
    assert torch.bincount(held_out.labels[::2]).tolist() == [2, 2, 2]
    row = data.names.index(held_out.names[3])
    assert torch.equal(held_out.read([6]).images, data.read([2 * row]).images)
    # the names decide: another image changes nothing for those that are there
    (tmp_path / "a/new.png").write_bytes((tmp_path / "a/1.png").read_bytes())
    again = ImageFolder(tmp_path, Crop(32)).hold_out(0.25)[1]
    assert set(again.names) - {"a/new.png"} <= set(held_out.names)
    assert len(data.hold_out(0.001)[1].names) == 3, "at least one of every class"
    for name in ("a/" + f.name for f in list((tmp_path / "a").iterdir())[1:]):
        (tmp_path / name).unlink()
    with pytest.raises(ValueError, match="holdout needs 2 images of every class, class 0"):
        ImageFolder(tmp_path, Crop(32)).hold_out(0.5)


def test_bad_images_are_skipped_and_counted(tmp_path):
    names = write_images(tmp_path, per_class=2)
    (tmp_path / names[3]).write_bytes(b"")
    data = ImageFolder(tmp_path, Crop(32), bad="skip", mirror=True)
    batch = data.read([4, 5, 6, 7, 8])
    assert (batch.numbers, batch.asked) == ([4, 5, 8], 5)
    assert len(batch.images) == 3
    assert batch.report.counts["images"] == 2, "an image and its mirror image count once"
    assert len(batch.report.skipped) == 1 and names[3] in batch.report.skipped[0]
    assert len(data.read([6, 7]).images) == 0
