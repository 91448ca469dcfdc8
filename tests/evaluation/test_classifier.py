"""Feature networks: what they learn, their scores, and a cache that is not taken for another's."""

import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from sra_fast.data.digits import Digits
from sra_fast.data.training_data import TrainingData
from sra_fast.evaluation.classifier import (
    ConvNet,
    FeatureNetwork,
    Recipe,
    feature_network,
    read_images,
    sample_scores,
)
from sra_fast.evaluation.scores import fit_gaussian, frechet_distance
from sra_fast.utils.outputs import save_tensors

QUICK = Recipe(width=8, features=16, epochs=(3, 3))


@dataclass
class Toy(TrainingData):
    """Images whose class is their brightness."""

    classes: int = 2
    fingerprint: str | None = "a" * 64
    name: str = "toy"

    def __post_init__(self):
        self.shape = (1, 6, 6)
        self.num_classes = 3
        self.labels = torch.arange(60) % self.classes
        self.images = self.labels[:, None, None, None].float().expand(60, 1, 6, 6).contiguous()
        self.images = self.images + 0.1 * torch.randn(
            self.images.shape, generator=torch.Generator().manual_seed(0)
        )

    def __getitems__(self, indices):
        return self.images[indices], self.labels[indices]


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The digits' network, and its cache."""
    cache = tmp_path_factory.mktemp("cache")
    return feature_network(Digits(), cache), cache


def test_it_tells_digits_apart_and_is_read_back(digits):
    network, cache = digits
    assert network.accuracy > 0.95
    (file,) = cache.iterdir()
    fingerprint = Digits().fingerprint
    assert file.name.startswith(f"{fingerprint[:16]}-conv128-")
    with safe_open(file, "pt") as held:
        metadata = {name: json.loads(text) for name, text in held.metadata().items()}
    assert metadata["data"] == fingerprint and metadata["accuracy"] == network.accuracy
    assert metadata["versions"]["torch"] == torch.__version__
    changed = file.stat().st_mtime_ns
    again = feature_network(Digits(), cache)
    assert file.stat().st_mtime_ns == changed
    held_out = Digits(held_out=True)
    features, logits = network(held_out.images)
    assert features.shape == (360, 128) and logits.shape == (360, 10)
    assert torch.equal(again(held_out.images)[0], features)
    # an accuracy of its own making
    right = (logits.argmax(1) == held_out.labels).float().mean()
    assert again.accuracy == pytest.approx(float(right))


def test_scores_are_those_of_its_features(digits):
    network, _ = digits
    held_out = Digits(held_out=True)
    real = Digits()
    noisy = (real.images + 0.7 * torch.randn(real.images.shape)).clamp(-1, 1)
    scores = [
        sample_scores(
            network, images[:400], real.labels[:400], held_out.images, real.images[400:800]
        )
        for images in (real.images, noisy)
    ]
    good, bad = scores
    assert good["frechet"] == pytest.approx(good["frechet_floor"], rel=0.5)
    assert bad["frechet"] > 3 * good["frechet"] and bad["frechet_floor"] == good["frechet_floor"]
    assert good["label_accuracy"] > 0.97 > bad["label_accuracy"]
    assert good["classifier_accuracy"] == network.accuracy
    # by hand in fp64: ReLU features of the network, Gaussians, the trace of a matrix root
    with torch.no_grad():
        a, b = (network.network(x)[0].double().numpy() for x in (noisy[:400], held_out.images))
    means = a.mean(0) - b.mean(0)
    covariances = [np.cov(x, rowvar=False) for x in (a, b)]
    roots = np.sqrt(np.linalg.eigvals(covariances[0] @ covariances[1]).real.clip(0)).sum()
    expected = means @ means + np.trace(covariances[0] + covariances[1]) - 2 * roots
    assert bad["frechet"] == pytest.approx(expected, rel=1e-4)
    assert bad["frechet"] == frechet_distance(*(fit_gaussian(x.astype(np.float32)) for x in (a, b)))
    noisy[3, 0, 2, 2] = torch.nan
    with pytest.raises(ValueError, match="samples must be finite, 1 of 400 are not"):
        sample_scores(network, noisy[:400], real.labels[:400], held_out.images, real.images)
    sets = dict(samples=real.images[:400], held_out=held_out.images, real=real.images)
    for name, what in dict(samples="samples", held_out="held-out", real="training").items():
        message = f"in 128 features needs at least 129 {what}.*, got 128"
        with pytest.raises(ValueError, match=message):
            few = {**sets, name: sets[name][:128]}
            sample_scores(network, **few, labels=real.labels[: len(few["samples"])])


def test_training_is_repeatable_and_leaves_random_numbers_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = feature_network(Toy(), recipe=QUICK)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    two = feature_network(Toy(), recipe=QUICK)
    states = [network.network.state_dict() for network in (one, two)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not any(parameter.requires_grad for parameter in one.network.parameters())


def test_a_cache_of_other_data_or_damaged_is_one_line(tmp_path):
    feature_network(Toy(), tmp_path, recipe=QUICK)
    (file,) = tmp_path.iterdir()
    # other data have another file
    feature_network(Toy(fingerprint="b" * 64), tmp_path, recipe=QUICK)
    feature_network(Toy(), tmp_path, recipe=Recipe(width=8, features=16, epochs=(2, 2)))
    assert len([*tmp_path.iterdir()]) == 3
    (other,) = tmp_path.glob("bbbb*")
    whole = file.read_bytes()
    file.write_bytes(other.read_bytes())
    with pytest.raises(ValueError, match=f"{file} is the feature network of other data"):
        feature_network(Toy(), tmp_path, recipe=QUICK)
    file.write_bytes(whole[:-20])
    with pytest.raises(ValueError, match=f"{file} is no feature network: .*; remove it"):
        feature_network(Toy(), tmp_path, recipe=QUICK)
    file.write_bytes(whole[:-4] + b"\x01\x02\x03\x04")
    with pytest.raises(ValueError, match=f"{file} is damaged: its weights were changed; remove"):
        feature_network(Toy(), tmp_path, recipe=QUICK)
    save_file(load_file(other), file)
    with pytest.raises(ValueError, match=f"{file} is no feature network"):
        feature_network(Toy(), tmp_path, recipe=QUICK)


def test_data_without_a_fingerprint_are_told_apart(tmp_path):
    for classes in (2, 2, 3):
        feature_network(Toy(classes=classes, fingerprint=None), tmp_path, recipe=QUICK)
    assert len([*tmp_path.iterdir()]) == 2


def test_one_class_gives_no_features():
    with pytest.raises(ValueError, match="images of at least two, got only class 0"):
        feature_network(Toy(classes=1), recipe=QUICK)


@pytest.mark.parametrize("shape", [(1, 2, 2), (4, 32, 32), (3, 9, 9), (1, 28, 28)])
def test_the_size_follows_from_the_data(shape):
    network = ConvNet(shape, 5, Recipe()).eval()
    features, logits = network(torch.randn(2, *shape))
    assert features.shape == (2, 128) and logits.shape == (2, 5) and features.min() >= 0


def test_images_are_chosen_by_the_seed():
    data = Toy(classes=3)
    rows = np.arange(10, 50)
    images, labels = read_images(data, rows, 20, 0)
    again, _ = read_images(data, rows, 20, 0)
    other, _ = read_images(data, rows, 20, 1)
    assert torch.equal(images, again) and not torch.equal(images, other)
    found = [int((data.images == image).flatten(1).all(1).nonzero()) for image in images]
    assert len({*found}) == 20 and min(found) >= 10 and max(found) < 50
    assert labels.tolist() == data.labels[found].tolist()


def test_a_network_runs_in_parts(digits):
    network, _ = digits
    images = Digits().images[:300]
    whole, _ = network(images)
    alone = FeatureNetwork(network.network, 0.0, torch.device("cpu"))(images[256:])[0]
    torch.testing.assert_close(whole[256:], alone, rtol=1e-5, atol=1e-6)
    labels = Digits().labels[:300]
    assert network.accuracy_of(images, labels) > 0.99


def test_a_full_disk_is_an_error_of_the_system(tmp_path, monkeypatch):
    def full(*_, **__):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("sra_fast.utils.outputs.save_file", full)
    with pytest.raises(OSError) as error:
        save_tensors(tmp_path / "w.safetensors", {"a": torch.zeros(3)})
    assert (error.value.errno, error.value.filename) == (28, str(tmp_path / "w.safetensors"))
    assert not list(tmp_path.iterdir())
