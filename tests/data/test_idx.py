"""MNIST's files as a source: training and held-out images, and what a damaged file says."""

import gzip

import numpy as np
import pytest
from toy_data import idx, write_idx

from sra_fast.config.schema import DataConfig
from sra_fast.data.dataset import open_data
from sra_fast.data.idx import open_idx, read_idx
from sra_fast.data.images import Crop
from sra_fast.data.preprocess import Options, make_jobs
from sra_fast.data.writer import run_jobs


def test_from_the_files_to_a_data_set(tmp_path):
    images, labels = write_idx(tmp_path / "raw", "train", 12)
    unseen, _ = write_idx(tmp_path / "raw", "t10k", 5, seed=1, packed=False)
    options = Options(source=str(tmp_path / "raw"), out=str(tmp_path / "out"), pixels=True)
    list(run_jobs(make_jobs(options)))
    data = open_data(DataConfig(path=str(tmp_path / "out")))
    # the resolution and the number of channels are those of the files
    assert data.shape == (1, 6, 6)
    assert data.num_classes == 3
    pixels, read_labels = data.__getitems__(list(range(12)))
    assert np.array_equal(pixels[:, 0], images)
    assert np.array_equal(read_labels, labels)
    (_, rows), (held_out, held_out_rows) = data.held_out_split()
    assert len(rows) == 12
    assert len(held_out_rows) == 5
    assert np.array_equal(held_out.__getitems__([0, 4])[0][:, 0], unseen[[0, 4]])


def test_another_size_is_resized(tmp_path):
    write_idx(tmp_path, "train", 4, side=8)
    train, held_out = open_idx(tmp_path, Crop(4))
    assert held_out is None
    assert train.read([0, 3]).images.shape == (2, 1, 4, 4)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda c: c[:-1], r"must hold \[4, 6, 6\] bytes, 144, it has 143"),
        (
            lambda c: b"\x00\x00\x0d\x03" + c[4:],
            r"begins with \[0, 0, 8, 3\], it begins with \[0, 0, 13, 3\]",
        ),
        *(
            (
                lambda c, size=size: c[:size],
                f"whose header has 16 bytes, it has {size} bytes in all",
            )
            for size in (0, 3, 15)
        ),
        # 2^64 bytes, and none of an impossible shape
        (
            lambda c: c[:4] + np.array([2**31, 2**31, 4], ">u4").tobytes(),
            r"must hold \[2147483648, 2147483648, 4\] bytes, 18446744073709551616, it has 0",
        ),
        (
            lambda c: c[:4] + np.array([0, 2**32 - 1, 2**32 - 1], ">u4").tobytes(),
            r"holds nothing: its dimensions are \[0, 4294967295, 4294967295\]",
        ),
    ],
)
def test_a_damaged_file_is_one_line(tmp_path, damage, message):
    write_idx(tmp_path, "train", 4, packed=False)
    file = tmp_path / "train-images-idx3-ubyte"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=message):
        open_idx(tmp_path, Crop(6))


def test_files_that_do_not_belong_together(tmp_path):
    write_idx(tmp_path, "train", 4)
    labels = tmp_path / "train-labels-idx1-ubyte.gz"
    labels.write_bytes(gzip.compress(idx(np.zeros(3, np.uint8))))
    with pytest.raises(
        ValueError, match="a label for each image, got 4 training images of 6 x 6 and 3"
    ):
        open_idx(tmp_path, Crop(6))
    labels.unlink()
    with pytest.raises(ValueError, match="has train-images-idx3-ubyte.gz and no train-labels-idx1"):
        open_idx(tmp_path, Crop(6))
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(b"no gzip")
    with pytest.raises(ValueError, match="cannot be read"):
        read_idx(tmp_path / "train-images-idx3-ubyte.gz", 3)


def test_held_out_images_alone_are_no_data_set(tmp_path):
    write_idx(tmp_path, "t10k", 4)
    with pytest.raises(ValueError, match="only held-out images"):
        open_idx(tmp_path, Crop(6))


def test_options_of_image_files_are_refused(tmp_path):
    write_idx(tmp_path / "raw", "train", 4)
    source = str(tmp_path / "raw")
    options = Options(source=source, out=str(tmp_path / "out"), pixels=True, channels=1)
    with pytest.raises(ValueError, match="--channels is for image files, .* holds arrays"):
        make_jobs(options)
