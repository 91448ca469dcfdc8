import json

import numpy as np
import pytest
import torch
from toy_data import write_latents

from sra_fast.config.schema import Config, DataConfig, ModelConfig, TrainConfig
from sra_fast.data.dataset import make_dataset
from sra_fast.data.digits import Digits
from sra_fast.data.latents import Latents
from sra_fast.data.loader import Batches
from sra_fast.data.order import ShuffledBatches

pytestmark = pytest.mark.usefixtures("rooms")


def config(path="", **model):
    model = {"name": "SiT-S/2", "input_size": 4, "num_classes": 3, **model}
    return Config(
        model=ModelConfig(**model),
        data=DataConfig(name="latents", path=str(path)),
        train=TrainConfig(global_batch=4),
    )


def test_digits_are_real_and_split():
    train = Digits()
    held_out = Digits(held_out=True)
    assert len(train) + len(held_out) == 1797 and len(held_out) == 360
    assert train.images.min() == -1 and train.images.max() == 1
    assert set(held_out.labels.tolist()) == set(range(10))
    images, labels = train.__getitems__([5, 3])
    assert torch.equal(images[1], train.images[3]) and labels[0] == train.labels[5]


@pytest.mark.parametrize("leading", [(), (1,)], ids=["CHW", "1CHW"])
def test_latents_of_the_published_layout(tmp_path, leading):
    folder = write_latents(tmp_path, leading=leading)
    data = make_dataset(config(tmp_path))
    assert data.shape == (4, 4, 4) and len(data) == 10 and data.num_classes == 3
    moments, labels = data.__getitems__([4, 0])
    names = sorted(n for n, _ in json.loads((folder / "dataset.json").read_text())["labels"])
    assert torch.equal(moments[1], torch.from_numpy(np.load(folder / names[0])).view(8, 4, 4))
    expected = dict(json.loads((folder / "dataset.json").read_text())["labels"])[names[4]]
    assert labels[0] == expected
    noise = torch.randn(2, 4, 4, 4)
    latents = data.to_latent(moments, noise)
    assert torch.allclose(latents, (moments[:, :4] + moments[:, 4:] * noise) * 0.18215)


def test_missing_or_broken_latents_are_one_clear_error(tmp_path):
    with pytest.raises(ValueError, match="data.path must hold a folder vae-sd"):
        make_dataset(config(tmp_path / "nowhere"))
    folder = write_latents(tmp_path)
    index = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps({"labels": index["labels"][1:]}))
    with pytest.raises(
        ValueError, match="no label for 1 files, the first is 00000/img-mean-std-00000000.npy"
    ):
        Latents(str(tmp_path))
    (folder / "dataset.json").write_text("{")
    with pytest.raises(ValueError, match="dataset.json must hold"):
        Latents(str(tmp_path))
    (folder / "dataset.json").write_text(json.dumps(index))
    broken = folder / index["labels"][4][0]
    broken.write_bytes(broken.read_bytes()[:200])
    data = Latents(str(tmp_path))
    with pytest.raises(ValueError, match=broken.name):
        data.__getitems__([data.files.index(index["labels"][4][0])])
    broken.write_bytes(b"no array")
    with pytest.raises(ValueError, match="is no readable .npy file: it holds no plain array$"):
        data.__getitems__([data.files.index(index["labels"][4][0])])
    np.save(broken, np.zeros((8, 2, 2), np.float32))
    with pytest.raises(ValueError, match=r"got \(8, 2, 2\)"):
        data.__getitems__([data.files.index(index["labels"][4][0])])


def test_data_must_fit_the_model_and_the_batch(tmp_path):
    write_latents(tmp_path)
    with pytest.raises(ValueError, match=r"latents \(4, 8, 8\).*the data has \(4, 4, 4\)"):
        make_dataset(config(tmp_path, input_size=8))
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 2\)"):
        make_dataset(config(tmp_path, num_classes=2))
    cfg = config(tmp_path)
    cfg.train.global_batch = 11
    with pytest.raises(ValueError, match="larger than the data set"):
        make_dataset(cfg)


def indices(world, accumulation, micro, step=0, steps=6, seed=0):
    """Global batches put together from every process."""
    streams = [
        list(ShuffledBatches(50, seed, micro, accumulation, r, world, step, steps))
        for r in range(world)
    ]
    batches = []
    for s in range(steps - step):
        parts = [
            streams[r][s * accumulation + m] for m in range(accumulation) for r in range(world)
        ]
        batches.append([i for part in parts for i in part])
    return batches


def test_order_does_not_depend_on_processes_or_micro_batches():
    base = indices(1, 1, 12)
    assert indices(2, 1, 6) == indices(1, 3, 4) == indices(3, 2, 2) == base
    assert indices(1, 1, 12, seed=1) != base
    assert indices(1, 1, 12, step=3) == base[3:], "a resumed run goes on where it stopped"


def test_every_epoch_is_a_new_permutation():
    first = indices(1, 1, 10, steps=5)
    second = indices(1, 1, 10, steps=10)[5:]
    for epoch in (first, second):
        assert sorted(i for batch in epoch for i in batch) == list(range(50))
    assert first != second


def test_loader_reads_ahead_in_order(tmp_path):
    write_latents(tmp_path)
    data = Latents(str(tmp_path))
    stream = ShuffledBatches(len(data), 0, 2, 1, 0, 1, 0, 7)
    expected = [data.__getitems__(i) for i in stream]
    loaded = list(Batches(data, stream, num_workers=2, cuda=False))
    assert len(loaded) == 7
    for (a, y), (b, z) in zip(loaded, expected, strict=True):
        assert torch.equal(a, b) and torch.equal(y, z)
