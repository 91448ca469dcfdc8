import json
import re

import numpy as np
import pytest
import torch
from toy_data import write_latents

from sra_fast.config.schema import Config, DataConfig, ModelConfig, TrainConfig
from sra_fast.data.dataset import make_dataset
from sra_fast.data.digits import Digits
from sra_fast.data.facts import DataFacts
from sra_fast.data.latents import Latents
from sra_fast.data.loader import Batches
from sra_fast.data.order import ShuffledBatches
from sra_fast.data.training_data import TrainingData
from sra_fast.utils.registry import DATASETS

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


DATA_OPTIONS = {*DataConfig.__dataclass_fields__}


class Toy(TrainingData):
    """Thirty-two images of two classes; what a test changes of them is set on the class."""

    shape = (1, 8, 8)
    num_classes = 2
    in_memory = True
    labels = torch.arange(32) % 2
    images = torch.linspace(-1, 1, 32 * 64).view(32, 1, 8, 8)
    fingerprint = "0123"

    def __init__(self, data):
        self.given = data

    def __getitems__(self, indices):
        return self.images[indices], self.labels[indices]


@pytest.fixture
def toy():
    """A data set that somebody has added, as ``toy``, and a function that makes it."""

    def make(**changes):
        options = {name: changes.pop(name) for name in DATA_OPTIONS & {*changes}}
        cfg = Config(
            model=ModelConfig(name="SiT-S/2"),
            data=DataConfig(name="toy", **options),
            train=TrainConfig(global_batch=4),
        )
        DATASETS.register("toy")(type("Changed", (Toy,), changes))
        return make_dataset(cfg)

    yield make
    DATASETS.remove("toy")


def test_an_added_data_set_knows_its_name_and_place(toy, tmp_path, caplog):
    data = toy(path=str(tmp_path))
    facts = data.facts()
    assert (facts.name, facts.path) == ("toy", str(tmp_path))
    assert not caplog.records


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"flip": True}, "data.flip is not for the data set toy, which does not mirror its images"),
        ({"latent_scale": 7.0}, "data.latent_scale is for latents, the data are pixels; got 7.0"),
        (
            {"latent_shift": 7.0, "shape": (4, 8, 8)},
            "data.latent_shift is not for the data set toy, whose own is 0; got 7.0",
        ),
        (
            {"latent_statistics": True, "shape": (4, 8, 8)},
            "data.latent_statistics is for latents of a VAE, the data set toy has others; got True",
        ),
        ({"shape": (8, 8)}, r"data set toy must have a shape \(C, H, W\), got \(8, 8\)"),
        ({"labels": np.zeros(32)}, r"toy must be a tensor \[N\] of int64, got ndarray"),
        ({"labels": torch.zeros(32)}, r"of int64, got torch.float32 \[32\]"),
        (
            {"images": Toy.images.view(32, 8, 8)},
            r"32 images .* must have the shape \(32, 1, 8, 8\), got \(32, 8, 8\)",
        ),
        (
            {"images": torch.where(torch.arange(32).view(-1, 1, 1, 1) == 5, torch.nan, Toy.images)},
            "image 5 of the data set toy is not finite",
        ),
        (
            {"images": Toy.images[:20]},
            "toy has 32 labels, expected as many images: index 20 is out",
        ),
        ({"labels": Toy.labels * 3}, r"image 1 .* has the label 3, expected one in \[0, 2\)"),
        (
            {"images": Toy.images * 127.5 + 127.5},
            r"pixels of the data set toy lie in \[0, 255\], expected \[-1, 1\]: of bytes",
        ),
    ],
)
def test_data_that_are_not_what_they_say_are_refused(toy, changes, message):
    with pytest.raises(ValueError, match=message):
        toy(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # standardized, say: a run can be trained on them
        ({"images": Toy.images * 3}, r"lie in \[-3, 3\], expected \[-1, 1\]: pictures of samples"),
        ({"fingerprint": None}, "has no fingerprint: a resumed run cannot tell other images"),
    ],
)
def test_data_that_may_be_a_mistake_are_one_line(toy, caplog, changes, message):
    toy(**changes)
    (record,) = caplog.records
    assert re.search(message, record.getMessage())


def test_what_a_data_set_lacks_is_named(toy):
    class Nothing(TrainingData):
        shape = (1, 8, 8)

    with pytest.raises(ValueError, match="toy must have .* has no labels and no num_classes"):
        toy(__new__=lambda cls, data: Nothing())


def test_few_images_are_read_of_a_set_that_is_not_in_memory(toy):
    read = []

    def getitems(self, indices):
        read.extend(indices)
        return Toy.__getitems__(self, indices)

    toy(in_memory=False, __getitems__=getitems)
    assert len(read) == 8 and read[0] == 0 and read[-1] == 31


def test_a_file_that_is_not_there_is_one_line(toy):
    with pytest.raises(ValueError, match="the data set toy needs nowhere.npz, which is not there"):
        toy(path="nowhere.npz", __init__=lambda self, data: np.load(data.path))


def test_a_set_that_mirrors_or_scales_may_be_asked_to(toy):
    def init(self, data):
        self.flip = data.flip
        self.scale = data.latent_scale

    facts = lambda self: DataFacts("toy", (4, 8, 8), 2, scale=self.scale)
    latents = torch.randn(32, 4, 8, 8)
    changes = {"shape": (4, 8, 8), "images": latents, "facts": facts, "__init__": init}
    data = toy(flip=True, latent_scale=0.5, **changes)
    assert data.flip and data.facts().scale == 0.5


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
