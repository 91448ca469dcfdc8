"""Captions of folders, tars, JSON lists and Hugging Face columns come with the right images."""

import io
import json
import shutil
import tarfile

import numpy as np
import pytest
from toy_data import write_images

from sra_fast.data.arrays import open_array
from sra_fast.data.captions import lines_of
from sra_fast.data.folders import ImageFolder, open_folder
from sra_fast.data.images import Crop
from sra_fast.data.options import Options
from sra_fast.data.preprocess import open_images
from sra_fast.data.tars import TarSource


def captions_of(name: str) -> list[str]:
    """One to three captions of a toy image."""
    return [f"{name[0]} crop {name[2]} no {k}" for k in range(1 + int(name[2]) % 3)]


def write_captioned(root):
    """The toy images with a text file beside each; returns the names."""
    names = sorted(write_images(root))
    for name in names:
        file = (root / name).with_suffix(".txt")
        # white space and empty lines are nobody's captions
        file.write_text("\ufeff" + "\n\n".join(f" {text} " for text in captions_of(name)) + "\n")
    return names


def coco(names, folder="train2014/"):
    """COCO's annotations of images, in an order of their own."""
    images = [{"id": 100 + i, "file_name": folder + name} for i, name in enumerate(names)]
    annotations = [
        {"image_id": image["id"], "caption": f"{text}\n", "id": 0}
        for k in range(3)
        for image in reversed(images)
        for text in captions_of(image["file_name"].removeprefix(folder))[k : k + 1]
    ]
    return {"info": {}, "images": images[::-1], "annotations": annotations}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("captions")
    write_captioned(root / "images")
    return root


@pytest.fixture
def images(made, tmp_path):
    """A copy to change."""
    shutil.copytree(made / "images", tmp_path / "images")
    return tmp_path / "images"


def opened(path, where=("txt",), **options):
    source = ImageFolder(path, Crop(16), **options)
    source.open_captions([str(item) for item in where])
    return source


def test_a_text_file_beside_each_image(made):
    source = opened(made / "images")
    assert source.captions == [captions_of(name) for name in source.names]
    assert source.notes == []
    # they are no part of the images
    assert source.fingerprint == ImageFolder(made / "images", Crop(16)).fingerprint
    train, held_out = source.hold_out(0.25)
    for part in (train, held_out):
        assert part.captions == [captions_of(name) for name in part.names]


def test_a_zip_and_a_folder_of_train_and_val(made, tmp_path):
    shutil.make_archive(str(tmp_path / "images"), "zip", made, "images")
    train, _ = open_folder(tmp_path / "images.zip", Crop(16), None, False, "stop")
    train.open_captions(["txt"])
    assert train.captions == [captions_of(name) for name in train.names]
    for part in ("train", "val"):
        shutil.copytree(made / "images", tmp_path / "split" / part)
    train, held_out = open_folder(tmp_path / "split", Crop(16), None, False, "stop")
    held_out.open_captions(["txt"])
    assert held_out.captions == [captions_of(name) for name in held_out.names]


def test_json_lists_of_coco_and_plain_ones(made, images):
    names = [file for file in opened(images).names]
    list_file = images.parent / "captions.json"
    expected = [captions_of(name) for name in names]
    # COCO names files without our folders: the last part is enough where it is one image's
    flat = images.parent / "flat"
    flat.mkdir()
    for name in names:
        shutil.copy(images / name, flat / name.replace("/", "-"))
    listed = coco([name.replace("/", "-") for name in names])
    list_file.write_text(json.dumps(listed))
    source = opened(flat, [list_file])
    assert source.captions == expected
    assert source.notes == ["no class folders: all images are of one class"]
    # several files; a string is a list of one
    one = images.parent / "one.json"
    one.write_text(json.dumps({names[0]: "a text", "z/9.jpg": "nobody's"}))
    list_file.write_text(json.dumps({name: captions_of(name) for name in names[1:]}))
    source = opened(images, [one, list_file])
    assert source.captions == [["a text"], *expected[1:]]
    assert source.notes[-1] == (
        f"captions of 1 images that are not in {images} are left out, the first is z/9.jpg"
    )


def test_the_last_part_of_a_name_that_is_two_images_decides_nothing(images):
    list_file = images.parent / "captions.json"
    list_file.write_text(json.dumps({f"x/{i}.jpg": "whose?" for i in (0, 2)}))
    message = "images has no caption for 12 images, the first is a/0.jpg$"
    with pytest.raises(ValueError, match=message):
        opened(images, [list_file])


def test_a_caption_is_not_another_folders(images):
    # c/0.jpg is no image here, and dogs do not get its caption
    (images / "c/0.jpg").rename(images / "c/9.jpg")
    (images / "a/0.jpg").unlink()
    list_file = images.parent / "captions.json"
    names = [name for name in ImageFolder(images, Crop(16)).names if name != "b/0.jpg"]
    list_file.write_text(json.dumps(dict.fromkeys([*names, "c/0.jpg"], "x")))
    with pytest.raises(ValueError, match="has no caption for 1 images, the first is b/0.jpg$"):
        opened(images, [list_file])


@pytest.mark.parametrize("listed", ["b/0.jpg", "train/b/0.jpg", "x/0.jpg"])
def test_held_out_images_do_not_have_the_captions_of_others(made, tmp_path, listed):
    for part in ("train", "val"):
        (tmp_path / "images" / part / "b").mkdir(parents=True)
        shutil.copy(made / "images/b/0.jpg", tmp_path / "images" / part / "b")
    options = Options(str(tmp_path / "images"), captions=[str(tmp_path / "list.json")])
    options.resolution = 16
    (tmp_path / "list.json").write_text(json.dumps({listed: "of one of them"}))
    message = f"captions list {listed} once, which could be an image of .*/train and of .*/val: "
    with pytest.raises(ValueError, match=message):
        open_images(options)
    both = {f"{part}/b/0.jpg": part for part in ("train", "val")}
    (tmp_path / "list.json").write_text(json.dumps(both))
    assert [part.captions for part in open_images(options)] == [[["train"]], [["val"]]]


def write_member(archive, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def write_tar(root, images, how):
    names = sorted(file.relative_to(images).as_posix() for file in images.rglob("*.[jp]*g"))
    path = root / f"{how}.tar"
    with tarfile.open(path, "w") as archive:
        for name in names:
            key, _, suffix = name.replace("/", "").rpartition(".")
            archive.add(images / name, f"{key}.{suffix}")
            texts = captions_of(name)
            if how == "txt":
                write_member(archive, f"{key}.txt", "\n".join(texts).encode())
            else:
                # an entry may be there without a value
                held = {"caption": None} | {how: texts[0] if how == "text" else texts}
                write_member(archive, f"{key}.json", json.dumps(held).encode())
    return path, names


@pytest.mark.parametrize("how", ["txt", "caption", "captions", "text"])
def test_files_of_a_tars_samples(made, tmp_path, how):
    path, names = write_tar(tmp_path, made / "images", how)
    source = TarSource(str(path), Crop(16))
    source.open_captions(["txt"])
    expected = [captions_of(name) for name in names]
    assert source.captions == ([texts[:1] for texts in expected] if how == "text" else expected)
    assert source.notes == ["no labels (.cls or .json): all images are of one class"]
    _, held_out = source.hold_out(0.25)
    held_out.open_captions(["txt"])
    assert held_out.captions == [source.captions[source.names.index(n)] for n in held_out.names]


def test_a_column_of_a_hugging_face_data_set(made, tmp_path):
    datasets = pytest.importorskip("datasets", reason="needs Hugging Face's datasets")
    from sra_fast.data.huggingface import open_huggingface

    names = opened(made / "images").names
    columns = {
        "image": [str(made / "images" / name) for name in names],
        "title": [captions_of(name)[0] for name in names],
        "texts": [captions_of(name) for name in names],
    }
    kinds = {
        "image": datasets.Image(),
        "title": datasets.Value("string"),
        "texts": datasets.List(datasets.Value("string")),
    }
    found = datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))
    found.save_to_disk(tmp_path / "saved")
    source, _ = open_huggingface(str(tmp_path / "saved"), Crop(16), None, False, "stop")
    source.open_captions(["texts"])
    assert source.captions == columns["texts"]
    assert source.notes[-1] == "columns image, texts are read, not title"
    part = source.subset([5, 2])
    part.open_captions(["title"])
    assert part.captions == [[columns["title"][5]], [columns["title"][2]]]
    with pytest.raises(ValueError, match="must name a column of .*, one of .*; got label"):
        source.open_captions(["label"])


def test_captions_end_where_lines_end():
    # as files of prompts: other alphabets have line ends of their own
    content = "a \u2028 b\r\nc \x0c \x85 d\r\r e \n".encode()
    assert lines_of(content, "0.txt") == ["a \u2028 b", "c \x0c \x85 d", " e "]


def test_files_of_captions_without_an_image_are_said(images):
    (images / "a/9.txt").write_text("nobody's")
    (images / "mask.npy").write_text("")
    source = opened(images)
    assert source.notes == [
        "1 files are no images that Pillow opens: .npy (1)",
        "1 files of captions belong to no image, the first is a/9.txt",
    ]


def test_images_without_captions_are_counted(images):
    (images / "b/2.txt").unlink()
    (images / "c/1.txt").write_text(" \n\n")
    message = "images has no caption for 2 images, the first is b/2.jpg$"
    with pytest.raises(ValueError, match=message):
        opened(images)


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "captions must be txt, JSON files or a column .*, there is no file .*list.json$"),
        ("{", "list.json must hold COCO's captions .*: Expecting property name"),
        ([1], "list.json must hold COCO's captions .*an object was expected, got list"),
        (
            {"images": [], "annotations": [{"image_id": 1}]},
            "must hold COCO's .* of the image 1, which",
        ),
        (
            {
                "images": [{"id": 1, "file_name": "a/0.jpg"}, {"id": 2, "file_name": "a/0.jpg"}],
                "annotations": [],
            },
            "two images are named a/0.jpg",
        ),
        (
            {
                "images": [{"id": 1, "file_name": "a/0.jpg"}, {"id": 1, "file_name": "a/1.jpg"}],
                "annotations": [],
            },
            "two images have the id 1",
        ),
        ({"images": [{"id": 1, "file_name": None}], "annotations": []}, "must be a text, got None"),
        ('{"a/0.jpg": "lost", "a/0.jpg": "kept"}', "a/0.jpg is there twice"),
        ({"a/0.jpg": []}, "images has no caption for 12 images, the first is a/0.jpg$"),
        ("empty", "images has 2 empty captions, the first is of b/2.jpg$"),
        ("half", "a caption of b/2.jpg is no valid Unicode text$"),
        ("utf-16", "a caption of b/2.jpg is no valid Unicode text$"),
        ("number", r"expected a caption or a list of them for c/1.png, got '\[3\]'$"),
        ("zero", r"expected a caption or a list of them for c/1.png, got '0'$"),
    ],
)
def test_lists_that_cannot_be_are_one_line(made, tmp_path, content, message):
    file = tmp_path / "list.json"
    names = opened(made / "images").names
    if content == "empty":
        content = {name: ["x"] for name in names} | {"b/2.jpg": ["", "y", " "]}
    elif content == "half":
        content = {name: "x" for name in names} | {"b/2.jpg": "\ud83d"}
    elif content == "utf-16":
        content = {name: "x" for name in names} | {"b/2.jpg": "a\0 \0c\0a\0t\0"}
    elif content == "zero":
        content = {name: "x" for name in names} | {"c/1.png": 0}
    elif content == "number":
        content = {name: "x" for name in names} | {"c/1.png": [3]}
    if content is not None:
        file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=message) as caught:
        opened(made / "images", [file])
    assert "\n" not in str(caught.value)


def test_two_lists_of_one_image_are_refused(made, tmp_path):
    files = [tmp_path / name for name in ("one.json", "two.json")]
    for file in files:
        file.write_text(json.dumps({"a/0.jpg": "x"}))
    with pytest.raises(ValueError, match="two.json lists a/0.jpg, which another file"):
        opened(made / "images", files)


def test_text_that_cannot_be_read_is_one_line(images, tmp_path):
    (images / "b/2.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="images/b/2.txt must be UTF-8 text: "):
        opened(images)
    with tarfile.open(tmp_path / "bad.tar", "w") as archive:
        archive.add(images / "a/1.png", "late.png")
        write_member(archive, "late.cls", b"0")
        write_member(archive, "late.json", b"{")
    source = TarSource(str(tmp_path / "bad.tar"), Crop(16))
    with pytest.raises(ValueError, match="captions of bad.tar/late.png must be in a readable .js"):
        source.open_captions(["txt"])


def test_arrays_have_no_captions(tmp_path):
    np.savez(tmp_path / "x.npz", arr_0=np.zeros((2, 8, 8, 3), np.uint8))
    source = open_array(tmp_path / "x.npz", Crop(8))
    with pytest.raises(ValueError, match="captions are for image files, .*x.npz is an array"):
        source.open_captions(["txt"])
