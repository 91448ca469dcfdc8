"""Images in folders: the same numbers as from an .npz, and what is refused."""

import logging
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from sra_fast.evaluation.folder import FolderImages, open_images
from sra_fast.evaluation.npz import NpzImages

IMAGES = np.random.RandomState(0).randint(0, 256, (11, 6, 5, 3), np.uint8)


def write(folder, images=IMAGES, suffix=".png", names=None, **options):
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        name = names[i] if names else f"{i:03d}{suffix}"
        Image.fromarray(image.squeeze()).save(folder / name, **options)
    return str(folder)


def all_images(images) -> np.ndarray:
    return np.concatenate(list(images.batches(4)))


@pytest.mark.parametrize("size", [1, 4, 11, 64])
def test_batches_are_the_files_in_order(tmp_path, size):
    images = open_images(write(tmp_path / "x"))
    assert isinstance(images, FolderImages)
    assert (images.count, images.shape) == (11, [6, 5, 3])
    batches = list(images.batches(size))
    assert [len(b) for b in batches] == [min(size, 11 - i) for i in range(0, 11, size)]
    assert all(batch.flags.writeable for batch in batches)
    assert np.array_equal(np.concatenate(batches), IMAGES)


def test_grey_images_stay_grey_unless_one_has_colours(tmp_path):
    grey = write(tmp_path / "grey", IMAGES[..., :1])
    images = open_images(grey)
    assert images.shape == [6, 5, 1]
    assert np.array_equal(all_images(images), IMAGES[..., :1])
    write(tmp_path / "grey", IMAGES[:1], names=["100.png"])
    images = open_images(grey)
    assert images.shape == [6, 5, 3]
    expected = np.concatenate([IMAGES[..., :1].repeat(3, -1), IMAGES[:1]])
    assert np.array_equal(all_images(images), expected)


def test_jpeg_and_palettes_are_decoded(tmp_path):
    flat = np.full((2, 16, 16, 3), (200, 40, 90), np.uint8)
    folder = write(tmp_path / "x", flat, suffix=".JPG", quality=95)
    Image.fromarray(flat[0]).quantize(4).save(tmp_path / "x/2.png")
    pixels = all_images(open_images(folder)).astype(int)
    assert pixels.shape == (3, 16, 16, 3)
    assert np.abs(pixels - flat[0]).max() <= 3


def test_class_folders_come_in_a_fixed_random_order(tmp_path):
    for label in range(3):
        values = np.full((20, 4, 4, 3), label, np.uint8)
        write(tmp_path / f"x/{label}", values)
    first = all_images(open_images(str(tmp_path / "x")))[:, 0, 0, 0]
    assert np.array_equal(first, all_images(open_images(str(tmp_path / "x")))[:, 0, 0, 0])
    assert sorted(first) == sorted([0, 1, 2] * 20)
    # the first images are of every class
    assert {*first[:15]} == {0, 1, 2}


def test_links_are_followed_and_hidden_folders_are_not(tmp_path):
    write(tmp_path / "x/a", IMAGES[:4])
    write(tmp_path / "elsewhere", IMAGES[4:])
    (tmp_path / "x/b").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    write(tmp_path / "x/.cache", IMAGES[:3])
    write(tmp_path / "x/a", IMAGES[:1], names=[".hidden.png"])
    images = open_images(str(tmp_path / "x"))
    assert images.count == 11
    found = {image.tobytes() for image in all_images(images)}
    assert found == {image.tobytes() for image in IMAGES}


def test_a_folder_with_samples_npz_is_that_file(tmp_path):
    """What ``sample.py`` leaves: the grid beside it is no sample."""
    folder = write(tmp_path / "samples", IMAGES[:1].repeat(4, 1), names=["samples.png"])
    np.savez(tmp_path / "samples/samples.npz", arr_0=IMAGES, arr_1=np.arange(11))
    images = open_images(folder)
    assert isinstance(images, NpzImages)
    assert images.count == 11
    assert np.array_equal(all_images(images), IMAGES)


def test_files_that_are_left_out_are_counted(tmp_path, caplog):
    folder = write(tmp_path / "x")
    (tmp_path / "x/a.webp").write_bytes(b"")
    (tmp_path / "x/notes.txt").write_text("")
    with caplog.at_level(logging.WARNING):
        assert open_images(folder).count == 11
    assert "2 files are left out" in caplog.text
    assert "a.webp" in caplog.text


def with_alpha(folder):
    Image.fromarray(IMAGES[0]).convert("RGBA").save(folder / "x.png")


def with_16_bits(folder):
    Image.fromarray(np.zeros((6, 5), np.uint16)).save(folder / "x.png")


def with_16_bits_of_colour(folder):
    """Pillow reads such files as ones of 8 bits, and writes none."""
    header = struct.pack(">IIBBBBB", 5, 6, 16, 2, 0, 0, 0)
    rows = b"".join(b"\0" + bytes(5 * 3 * 2) for _ in range(6))
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    chunks = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in parts
    ]
    (folder / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    with Image.open(folder / "x.png") as image:
        assert image.mode == "RGB"


def with_an_animation(folder):
    frames = [Image.fromarray(image) for image in IMAGES[:2]]
    frames[0].save(folder / "x.png", save_all=True, append_images=frames[1:])


def with_another_size(folder):
    Image.fromarray(IMAGES[0].repeat(2, 0)).save(folder / "x.png")


def with_a_transparent_colour(folder):
    Image.fromarray(IMAGES[0]).save(folder / "x.png", transparency=(0, 0, 0))


def with_text(folder):
    (folder / "x.png").write_text("no image")


def with_a_grid(folder):
    Image.fromarray(IMAGES[0]).save(folder / "step_00000100.png")


@pytest.mark.parametrize(
    "spoil, message",
    [
        (with_alpha, "x.png has transparency, expected opaque images"),
        (with_a_transparent_colour, "x.png has transparency"),
        (with_16_bits, "x.png must have 8 bits a channel, grey or colour; its mode is I;16"),
        (with_16_bits_of_colour, "x.png must have 8 bits a channel, it has 16"),
        (with_an_animation, "x.png is animated, expected single images"),
        (with_another_size, r"must have one size: .*000.png is 5 x 6, .*x.png is 5 x 12"),
        (with_text, "x.png is no readable image"),
        (with_a_grid, "step_00000100.png is a grid of samples from training"),
    ],
)
def test_what_cannot_be_scored_is_named(tmp_path, spoil, message):
    folder = write(tmp_path / "x")
    spoil(tmp_path / "x")
    with pytest.raises(ValueError, match=message):
        open_images(folder)


def test_an_empty_folder_and_damaged_pixels(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no images: expected .png, .jpg, .jpeg or sa"):
        open_images(str(tmp_path / "empty"))
    large = np.random.RandomState(0).randint(0, 256, (4, 64, 64, 3), np.uint8)
    folder = write(tmp_path / "x", large)
    file = tmp_path / "x/001.png"
    # the header is whole
    file.write_bytes(file.read_bytes()[:-4000])
    images = open_images(folder)
    with pytest.raises(ValueError, match="001.png is no readable image"):
        all_images(images)


def test_the_state_follows_the_files(tmp_path):
    folder = write(tmp_path / "x")
    state = open_images(folder).state()
    assert open_images(folder).state() == state
    file = tmp_path / "x/003.png"
    stat = file.stat()
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))
    changed = open_images(folder).state()
    assert changed != state
    file.unlink()
    assert open_images(folder).state() not in (state, changed)
