"""Packed latents: reading gives what was packed, and a damaged file is named."""

import json
import logging
import pickle
import re
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from toy_data import write_latents

from sra_fast.config.schema import Config, DataConfig, ModelConfig, TrainConfig
from sra_fast.data.dataset import make_dataset
from sra_fast.data.latents import Latents, PackedLatents, open_latents
from sra_fast.data.loader import Batches
from sra_fast.data.order import ShuffledBatches
from sra_fast.data.writer import PackingJob, run_job

pytestmark = pytest.mark.usefixtures("rooms")


def pack(root, dtype="float16", shard_size=7, count=23, vae=None) -> tuple[Latents, PackedLatents]:
    """The same moments in both layouts; by default in shards of 7, 7, 7 and 2 images."""
    write_latents(root / "files", count)
    source = Latents(root / "files")
    recipe = {
        "version": 2,
        "layout": "packed",
        "source_sha256": source.fingerprint,
        "num_images": count,
        "num_classes": 3,
        "shape": [*source.moments_shape],
        "vae": vae,
        "shard_size": shard_size,
        "dtype": dtype,
    }
    encode = lambda moments: moments
    assert run_job(PackingJob(source, encode, recipe, root / "packed", batch=4, threads=2))
    return source, PackedLatents(root / "packed")


def config(path, **data):
    return Config(
        model=ModelConfig(name="SiT-S/2", input_size=4, num_classes=3),
        train=TrainConfig(global_batch=4),
        data=DataConfig(name="latents", path=str(path), **data),
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_reading_gives_what_was_packed(tmp_path, dtype):
    source, data = pack(tmp_path, dtype)
    assert len(data) == 23
    assert data.shape == (4, 4, 4)
    assert data.num_classes == 3
    assert data.labels.dtype == torch.int64
    assert torch.equal(data.labels, source.labels)
    # out of order, at the ends of shards, one image twice
    indices = [22, 0, 6, 7, 20, 21, 13, 0]
    moments, labels = data.__getitems__(indices)
    expected, expected_labels = source.__getitems__(indices)
    assert moments.dtype == getattr(torch, dtype)
    assert torch.equal(moments, expected.to(moments.dtype))
    assert torch.equal(labels, expected_labels)
    noise = torch.randn(8, 4, 4, 4)
    mean, std = moments.float().chunk(2, dim=1)
    assert torch.equal(data.to_latent(moments, noise), (mean + std * noise) * 0.18215)


def test_an_image_is_found_by_its_number(tmp_path):
    files, packed = pack(tmp_path)
    assert files.locate(3) == "image 3 (00000/img-mean-std-00000006.npy)"
    assert np.array_equal(
        np.load(files.root / "00000/img-mean-std-00000006.npy"), files.__getitems__([3])[0][0]
    )
    # shards of 7, 7, 7 and 2
    assert packed.locate(0) == "image 0 (shards/00000.npy, row 0)"
    assert packed.locate(7) == "image 7 (shards/00001.npy, row 0)"
    assert packed.locate(22) == "image 22 (shards/00003.npy, row 1)"
    shard = np.load(packed.root / "shards/00003.npy")
    assert np.array_equal(shard[1], packed.__getitems__([22])[0][0])


def test_every_fifth_image_is_held_out(tmp_path):
    for data in pack(tmp_path):
        (train, train_rows), (held_out, held_out_rows) = data.held_out_split()
        assert train is held_out is data
        assert held_out_rows.tolist() == [0, 5, 10, 15, 20]
        assert sorted([*train_rows, *held_out_rows]) == list(range(23))


def test_files_are_what_numpy_reads(tmp_path):
    """Shards are plain C-order .npy files; bf16 is stored as its bits."""
    source, _ = pack(tmp_path, "bfloat16")
    shard = np.load(tmp_path / "packed/shards/00003.npy", mmap_mode="r")
    assert shard.shape == (2, 8, 4, 4)
    assert shard.dtype == np.uint16
    assert shard.flags.c_contiguous
    bits = torch.from_numpy(shard.copy()).view(torch.bfloat16)
    assert torch.equal(bits, source.__getitems__([21, 22])[0].bfloat16())


def test_the_layout_is_detected(tmp_path):
    pack(tmp_path)
    assert isinstance(make_dataset(config(tmp_path / "files")), Latents)
    assert isinstance(make_dataset(config(tmp_path / "packed")), PackedLatents)
    (tmp_path / "packed/index.json").unlink()
    with pytest.raises(ValueError, match="the preprocessing of .*packed is not finished"):
        make_dataset(config(tmp_path / "packed"))


def test_a_scale_other_than_the_vaes_is_a_warning(tmp_path, caplog):
    pack(tmp_path, vae={"sha256": "", "scaling_factor": 0.13025})
    with caplog.at_level(logging.WARNING):
        open_latents(tmp_path / "packed", 0.13025)
        assert not caplog.records
        open_latents(tmp_path / "packed", 0.18215)
    assert "latent_scale is 0.18215, the scaling_factor of the VAE" in caplog.text
    assert "0.13025" in caplog.text


def test_loader_processes_read_the_same(tmp_path):
    data = pack(tmp_path)[1]
    stream = ShuffledBatches(len(data), 0, 5, 1, 0, 1, 0, 9)
    expected = [data.__getitems__(i) for i in stream]
    for workers in (0, 2):
        loaded = list(Batches(PackedLatents(tmp_path / "packed"), stream, workers, cuda=False))
        assert len(loaded) == 9
        for batch, expected_batch in zip(loaded, expected, strict=True):
            assert all(map(torch.equal, batch, expected_batch))


def test_a_loader_process_is_not_sent_the_shards(tmp_path):
    data = pack(tmp_path, shard_size=20)[1]
    data.__getitems__([0, 22])
    state = data.__getstate__()
    sent = pickle.dumps({key: value for key, value in state.items() if not torch.is_tensor(value)})
    shard_bytes = 20 * 8 * 16 * 2
    assert len(sent) < 4000 < shard_bytes
    copy = PackedLatents.__new__(PackedLatents)
    copy.__dict__.update(state)
    assert torch.equal(copy.__getitems__([22, 3])[0], data.__getitems__([22, 3])[0])


def test_a_listed_file_that_is_missing_is_named(tmp_path):
    folder = write_latents(tmp_path, 6)
    (folder / "00001/img-mean-std-00000003.npy").unlink()
    with pytest.raises(
        ValueError,
        match="lists 1 files that are not there, the first is 00001/img-mean-std-00000003.npy",
    ):
        Latents(tmp_path)


def damage(root, kind):
    """Break one thing in a folder of packed latents."""
    shard = root / "shards/00001.npy"
    if kind == "missing":
        shard.unlink()
    if kind == "cut":
        shard.write_bytes(shard.read_bytes()[:-1])
    if kind in ("no labels", "labels"):
        labels = root / "labels.npy"
        content = labels.read_bytes()
        labels.unlink()
        if kind == "labels":
            labels.write_bytes(content[:-1] + b"\1")
    if kind == "all":
        for file in (root / "shards").iterdir():
            file.unlink()
    index = json.loads((root / "index.json").read_text())
    if kind == "version":
        index["version"] = 3
    if kind == "count":
        index["num_images"] = 30
    if kind == "classes":
        index["num_classes"] = 2
    (root / "index.json").write_text("{" if kind == "json" else json.dumps(index))


@pytest.mark.parametrize(
    "kind, message",
    [
        (
            "missing",
            "00001.npy is missing. Run the command that made the folder again to repair it",
        ),
        ("cut", "shards/00001.npy has 1919 bytes instead of 1920"),
        (
            "all",
            "shards/00000.npy is missing; shards/00001.npy is missing; shards/00002.npy is missing and 1 more",
        ),
        ("no labels", "labels.npy is missing"),
        ("labels", "labels.npy was altered"),
        ("json", "index.json is no index of a packed data set"),
        ("version", "version 1 or 2 was expected, got 3"),
        ("count", "its 4 shards hold 23 images, not 30"),
        ("classes", "labels.npy must hold 23 labels in [0, 2)"),
    ],
)
def test_damage_is_one_error_at_the_start(tmp_path, kind, message):
    pack(tmp_path)
    damage(tmp_path / "packed", kind)
    with pytest.raises(ValueError, match=re.escape(message)):
        make_dataset(config(tmp_path / "packed"))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_altered_shard_is_named_when_it_is_first_read(tmp_path, workers):
    pack(tmp_path)
    shard = tmp_path / "packed/shards/00002.npy"
    content = bytearray(shard.read_bytes())
    # one bit of one image
    content[-5] ^= 1
    shard.write_bytes(content)
    # without data.verify nobody notices
    make_dataset(config(tmp_path / "packed")).__getitems__([20])
    data = make_dataset(config(tmp_path / "packed", verify=True))
    batches = [[0, 7], [21], [2, 15]]
    loader = iter(
        torch.utils.data.DataLoader(
            data,
            batch_sampler=batches,
            num_workers=workers,
            collate_fn=lambda batch: batch,
            # as the loader of the loop: from Python 3.14 on another start is the default
            multiprocessing_context="fork" if workers else None,
        )
    )
    next(loader)
    next(loader)
    with pytest.raises(
        ValueError, match=re.escape(f"{shard} was altered or cannot be read: its SHA-256")
    ):
        next(loader)
    assert data.shards.unchecked.tolist() == [False, False, True, False], (
        "a shard is checked once, also by a loader process"
    )


def test_a_shard_that_is_lost_or_replaced_later_is_named(tmp_path):
    data = pack(tmp_path)[1]
    np.save(tmp_path / "packed/shards/00000.npy", np.zeros((7, 8, 4, 5), np.float16))
    with pytest.raises(
        ValueError, match=r"00000.npy must hold \(7, 8, 4, 4\) .* got \(7, 8, 4, 5\)"
    ):
        data.__getitems__([0])
    shard = tmp_path / "packed/shards/00001.npy"
    shard.write_bytes(b"no array")
    with pytest.raises(
        ValueError, match="00001.npy was altered .*: it holds no plain array. Run the command"
    ):
        data.__getitems__([8])
    shard.unlink()
    with pytest.raises(ValueError, match="00001.npy was altered or cannot be read: .*No such file"):
        data.__getitems__([8])


@pytest.mark.parametrize("packed", [False, True])
def test_headers_are_parsed_by_one_thread_at_a_time(tmp_path, monkeypatch, packed):
    """Two at once may raise a SystemError in CPython 3.11.7, though rarely."""
    data = pack(tmp_path)[packed]
    load = np.load
    inside = []
    threads_at_once = []

    def watched(*args, **kw):
        inside.append(1)
        threads_at_once.append(len(inside))
        time.sleep(0.002)
        inside.pop()
        return load(*args, **kw)

    monkeypatch.setattr(np, "load", watched)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: data.__getitems__([i]), range(len(data))))
    assert max(threads_at_once) == 1
    if packed:
        # two threads may open the same shard
        assert len(threads_at_once) >= len(data.shards.entries)
    else:
        assert len(threads_at_once) == len(data)
