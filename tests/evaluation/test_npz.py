"""Streams of images from .npz files, statistics, and what is refused."""

import io
import struct
import tracemalloc
import zipfile
from dataclasses import replace

import numpy as np
import pytest

from sra_fast.evaluation.npz import (
    NpzImages,
    read_statistics,
    save_arrays,
    statistics_arrays,
)

IMAGES = np.random.RandomState(0).randint(0, 256, (23, 5, 4, 3), np.uint8)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("size", [1, 8, 23, 64])
def test_batches_are_the_array(tmp_path, save, size):
    save(tmp_path / "x.npz", arr_1=np.arange(23), arr_0=IMAGES)
    images = NpzImages(str(tmp_path / "x.npz"))
    assert (images.count, images.shape) == (23, [5, 4, 3])
    batches = list(images.batches(size))
    assert [len(b) for b in batches] == [min(size, 23 - i) for i in range(0, 23, size)]
    assert all(batch.flags.writeable for batch in batches)
    assert np.array_equal(np.concatenate(batches), IMAGES)
    # a second pass
    assert np.array_equal(np.concatenate(list(images.batches(size))), IMAGES)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_memory_does_not_grow_with_the_file(tmp_path, save):
    # 12 MB
    save(tmp_path / "x.npz", np.repeat(IMAGES[:1], 200_000, axis=0))
    images = NpzImages(str(tmp_path / "x.npz"))
    tracemalloc.start()
    total = sum(len(batch) for batch in images.batches(100))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == 200_000
    assert peak < 1e6, f"{peak / 1e6:.1f} MB"


def npz(path, array=None, data=None):
    """Write an .npz whose arr_0 is ``array``, or these bytes; returns the bytes."""
    if data is None:
        buffer = io.BytesIO()
        np.lib.format.write_array(buffer, array)
        data = buffer.getvalue()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", data)
    return data


@pytest.mark.parametrize(
    "array, message",
    [
        (
            IMAGES.astype(np.float32),
            r"must be uint8 \[N, H, W, 1 or 3\], it is float32 \[23, 5, 4, 3\]",
        ),
        (IMAGES[0], r"it is uint8 \[5, 4, 3\]"),
        (IMAGES[..., :2], r"it is uint8 \[23, 5, 4, 2\]"),
        (IMAGES[:0], r"it is uint8 \[0, 5, 4, 3\]"),
        (np.asfortranarray(IMAGES), "in Fortran order"),
        (np.array([{}]), "it is object"),
    ],
)
def test_other_arrays_are_refused(tmp_path, array, message):
    npz(tmp_path / "x.npz", array)
    with pytest.raises(ValueError, match=message):
        NpzImages(str(tmp_path / "x.npz"))


def test_damage_is_one_error(tmp_path):
    path = tmp_path / "x.npz"
    with pytest.raises(ValueError, match="there is no .*, expected an .npz file or a folder"):
        NpzImages(str(path))
    path.write_bytes(b"PK, but nothing else")
    with pytest.raises(ValueError, match="no readable .npz file"):
        NpzImages(str(path))
    np.savez(path, images=IMAGES)
    with pytest.raises(ValueError, match=r"holds no images \(arr_0\), only \['images'\]"):
        NpzImages(str(path))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0", b"no .npy")
    with pytest.raises(ValueError, match="holds no images"):
        NpzImages(str(path))
    npz(path, data=b"no numpy header at all")
    with pytest.raises(ValueError, match="arr_0 is no plain array"):
        NpzImages(str(path))
    data = npz(path, IMAGES)
    npz(path, data=data[:-1])
    with pytest.raises(ValueError, match="ends before its 23 images"):
        list(NpzImages(str(path)).batches(10))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_wrong_checksum_is_noticed(tmp_path, save):
    path = tmp_path / "x.npz"
    save(path, IMAGES)
    with zipfile.ZipFile(path) as archive:
        checksum = struct.pack("<I", archive.getinfo("arr_0.npy").CRC)
    path.write_bytes(path.read_bytes().replace(checksum, b"\1\2\3\4"))
    for size in (8, 23, 64):
        with pytest.raises(ValueError, match="no readable .npz file: Bad CRC-32"):
            list(NpzImages(str(path)).batches(size))


def test_statistics(tmp_path):
    path = str(tmp_path / "x.npz")
    np.savez(path, IMAGES, mu=np.arange(3, dtype=np.float32), sigma=np.eye(3, dtype=np.float32))
    held = read_statistics(path)
    assert held.pool.mean.dtype == held.pool.cov.dtype == np.float64
    assert held.pool.mean.tolist() == [0, 1, 2]
    assert (held.spatial, held.extractor, held.count) == (None, None, 0)
    np.savez(path, mu=np.zeros(3), sigma=np.eye(3), mu_s=np.ones(2), sigma_s=2 * np.eye(2))
    held = read_statistics(path)
    assert held.spatial.cov.tolist() == [[2, 0], [0, 2]]
    # written and read again
    save_arrays(tmp_path / "y.npz", statistics_arrays(replace(held, extractor="x", count=7)))
    again = read_statistics(str(tmp_path / "y.npz"))
    assert (again.extractor, again.count) == ("x", 7)
    assert np.array_equal(again.spatial.cov, held.spatial.cov)
    assert np.array_equal(again.pool.mean, held.pool.mean)
    np.savez(path, IMAGES)
    assert read_statistics(path) is None
    np.savez(path, mu=np.zeros(3), sigma=np.eye(4))
    with pytest.raises(
        ValueError, match=r"mu and sigma must be \[D\] and \[D, D\], they are \[3\] and \[4, 4\]"
    ):
        read_statistics(path)


@pytest.mark.parametrize(
    "mu, message",
    [
        ([0, np.nan], "finite"),
        ([0, 1j], "real numbers"),
        (["a", "b"], "real numbers"),
        (np.array([None, 1]), "real numbers: it holds no plain array$"),
    ],
)
def test_statistics_must_be_finite_numbers(tmp_path, mu, message):
    np.savez(tmp_path / "x.npz", mu=mu, sigma=np.eye(2))
    with pytest.raises(ValueError, match=f"x.npz: mu and sigma must be {message}"):
        read_statistics(str(tmp_path / "x.npz"))


@pytest.mark.parametrize("name", ["extractor", "count", "shape"])
def test_what_is_said_of_statistics_must_be_readable(tmp_path, name):
    more = {name: np.array([None, 1])}
    np.savez(tmp_path / "x.npz", mu=np.zeros(2), sigma=np.eye(2), **more)
    with pytest.raises(
        ValueError, match="x.npz: extractor, count and shape must be .* no plain ar"
    ):
        read_statistics(str(tmp_path / "x.npz"))
