"""Samples against a reference, end to end in one process: passes, cached statistics, extractors, what may be compared."""

import logging
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from sra_fast.data.digits import Digits
from sra_fast.evaluation import adm_suite as evaluation
from sra_fast.evaluation.adm_suite import (
    COMPARABLE,
    Summary,
    comparability,
    score,
    summarize,
    summarize_reference,
)
from sra_fast.evaluation.extractors import Extractor, Features, inception_extractor, named_extractor
from sra_fast.evaluation.npz import NpzImages
from sra_fast.evaluation.scores import fit_gaussian, frechet_distance, precision_recall
from sra_fast.plots.report import to_uint8

CPU = torch.device("cpu")
POOL, SPATIAL = 48, 40  # instead of 2048 and 2023, whose eigenvalues take seconds
NAMES = ("fid", "sfid", "inception_score", "precision", "recall")


class Classifier(nn.Module):
    """Digits, uint8 [N, 1, 8, 8] -> the hidden layer [N, 32] and logits [N, 10]."""

    def __init__(self):
        super().__init__()
        self.hidden, self.out = nn.Linear(64, 32), nn.Linear(32, 10)

    def forward(self, images: torch.Tensor):
        x = torch.relu(self.hidden(images.flatten(1).float() / 127.5 - 1))
        return x, self.out(x)


@pytest.fixture(scope="module")
def classifier():
    torch.manual_seed(0)
    model, data = Classifier(), Digits()
    images = torch.from_numpy(to_uint8(data.images)).permute(0, 3, 1, 2)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(100):
        loss = nn.functional.cross_entropy(model(images)[1], data.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return Extractor("digits", model.eval(), CPU)


@pytest.fixture
def digits(tmp_path):
    """Paths of real training digits and, as samples, held-out ones: clean, noisy, and without the classes 5 to 9."""
    held_out = Digits(held_out=True)
    noise = torch.randn(held_out.images.shape, generator=torch.Generator().manual_seed(0))
    sets = {
        "reference": Digits().images,
        "clean": held_out.images,
        "noisy": held_out.images + 0.7 * noise,
        "dropped": held_out.images[held_out.labels < 5],
    }
    for name, images in sets.items():
        np.savez(tmp_path / f"{name}.npz", to_uint8(images))
    return {name: str(tmp_path / f"{name}.npz") for name in sets}


def test_scores_of_digits_say_what_is_wrong_with_them(digits, classifier):
    reference = summarize_reference(digits["reference"], classifier, 64)
    good, noisy, dropped = (
        score(summarize(NpzImages(digits[name]), classifier, 64), reference, CPU)
        for name in ("clean", "noisy", "dropped")
    )
    assert list(good) == list(NAMES) and good["sfid"] is None
    assert 5 * good["fid"] < noisy["fid"] and 5 * good["fid"] < dropped["fid"]
    assert good["inception_score"] > 8 and good["inception_score"] > noisy["inception_score"] + 1
    assert dropped["inception_score"] == pytest.approx(5, abs=1), "five classes are left"
    assert good["precision"] > 0.8 and noisy["precision"] < 0.5 * good["precision"]
    assert (
        good["recall"] > 0.8
        and dropped["recall"] < 0.7 * good["recall"]
        and dropped["precision"] > 0.8
    )


def test_a_summary_is_the_whole_set_at_once(digits, classifier):
    images = torch.from_numpy(np.load(digits["clean"])["arr_0"]).permute(0, 3, 1, 2)
    with torch.no_grad():
        features, logits = classifier.compute(images)
    one, some, limited = (
        summarize(NpzImages(digits["clean"]), classifier, *args)
        for args in ((360,), (7,), (7, 100))
    )
    for summary in (one, some, limited):
        assert summary.count == 360 and summary.spatial is None and not summary.precomputed
        assert frechet_distance(summary.pool, fit_gaussian(features.numpy())) == pytest.approx(
            0, abs=1e-6
        )
        p = logits.double().softmax(1)
        assert summary.inception_score == pytest.approx(
            (p * (p / p.mean(0)).log()).sum(1).mean().exp().item(), rel=1e-4
        )
    torch.testing.assert_close(some.features, features)
    torch.testing.assert_close(limited.features, features[:100])


class Counting:
    """Counts the images it is given."""

    def __init__(self, extractor):
        self.inner, self.images, self.tf32 = extractor.compute, 0, set()

    def __call__(self, images):
        self.images += len(images)
        self.tf32.add(torch.backends.cudnn.allow_tf32)
        return self.inner(images)


def test_reference_is_read_once_until_it_changes(digits, classifier, tmp_path):
    counting = Counting(classifier)
    extractor, tf32 = replace(classifier, compute=counting), torch.backends.cudnn.allow_tf32

    def reference(**kwargs):
        before = counting.images
        summary = summarize_reference(
            digits["reference"], kwargs.pop("extractor", extractor), 64, **kwargs
        )
        return summary, counting.images - before

    first, seen = reference(cache=False)
    assert seen == 1437 and not list(tmp_path.glob("*.stats.npz"))
    assert reference()[1] == 1437
    again, seen = reference()
    assert seen == 0 and again.count == 1437 and torch.equal(again.features, first.features)
    assert np.array_equal(again.pool.mean, first.pool.mean) and np.array_equal(
        again.pool.cov, first.pool.cov
    )
    assert reference(extractor=replace(extractor, name="another"))[1] == 1437
    assert reference(keep=10)[0].features.shape == (10, 32)
    assert len(list(tmp_path.glob("reference.npz.digits.*.stats.npz"))) == 1, (
        "and not one for every earlier state"
    )
    assert len(list(tmp_path.glob("reference.npz.another.*.stats.npz"))) == 1
    reference()
    stat = os.stat(digits["reference"])
    os.utime(digits["reference"], ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))
    assert reference()[1] == 1437, "touched"
    assert counting.tf32 == {False} and torch.backends.cudnn.allow_tf32 == tf32


def test_cache_that_cannot_be_used_is_a_warning(digits, classifier, tmp_path, monkeypatch, caplog):
    expected = summarize_reference(digits["reference"], classifier, 64)
    (kept,) = tmp_path.glob("*.stats.npz")
    kept.write_bytes(kept.read_bytes()[:1000])
    with caplog.at_level(logging.WARNING):
        assert np.array_equal(
            summarize_reference(digits["reference"], classifier, 64).pool.cov, expected.pool.cov
        )
    assert "is ignored" in caplog.text
    kept.unlink()

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(evaluation, "write_atomic", full)
    with caplog.at_level(logging.WARNING):
        assert np.array_equal(
            summarize_reference(digits["reference"], classifier, 64).pool.cov, expected.pool.cov
        )
    assert "not kept: no space left" in caplog.text and not kept.exists()


@pytest.fixture(autouse=True)
def small_inception(monkeypatch):
    monkeypatch.setattr(evaluation, "POOL", POOL)
    monkeypatch.setattr(evaluation, "SPATIAL", SPATIAL)


def fake_inception(official=True) -> Extractor:
    """Quick features of Inception's sizes."""
    project = torch.randn(64, POOL + SPATIAL + 10, generator=torch.Generator().manual_seed(0))

    def compute(images):
        return (images.flatten(1).float() / 255 @ project).split([POOL, SPATIAL, 10], 1)

    return Extractor("inception-fake", compute, CPU, inception=True, official=official)


def test_statistics_of_a_reference_batch_are_used(digits, classifier, tmp_path):
    path = str(tmp_path / "adm.npz")
    statistics = {
        "mu": np.ones(POOL),
        "sigma": 2 * np.eye(POOL),
        "mu_s": np.zeros(SPATIAL),
        "sigma_s": 3 * np.eye(SPATIAL),
    }
    np.savez(path, arr_0=np.load(digits["clean"])["arr_0"], **statistics)
    reference = summarize_reference(path, fake_inception(), 64)
    assert (
        reference.precomputed and reference.count == 360 and reference.features.shape == (360, POOL)
    )
    assert np.array_equal(reference.pool.cov, statistics["sigma"]) and np.array_equal(
        reference.spatial.cov, statistics["sigma_s"]
    )
    other = summarize_reference(path, classifier, 64)
    assert not other.precomputed and len(other.pool.mean) == 32, (
        "they are Inception's, not this extractor's"
    )

    np.savez(path, **statistics)  # without images
    bare = summarize_reference(path, fake_inception(), 64)
    samples = Summary(50, bare.pool, bare.spatial, 7.0, torch.zeros(50, POOL))
    assert bare.count == 0 and score(samples, bare, CPU) == {
        "fid": pytest.approx(0, abs=1e-6),
        "sfid": pytest.approx(0, abs=1e-6),
        "inception_score": 7.0,
        "precision": None,
        "recall": None,
    }
    with pytest.raises(ValueError, match=r"adm.npz holds no images \(arr_0\)"):
        summarize_reference(path, classifier, 64)
    np.savez(path, mu=np.ones(32), sigma=np.eye(32))
    with pytest.raises(ValueError, match="statistics of 48 Inception features expected, got 32"):
        summarize_reference(path, fake_inception(), 64)


def test_spatial_features_make_sfid(digits):
    extractor = fake_inception()
    samples, reference = (
        summarize(NpzImages(digits[name]), extractor, 64) for name in ("noisy", "clean")
    )
    images = [
        torch.from_numpy(np.load(digits[name])["arr_0"]).permute(0, 3, 1, 2)
        for name in ("noisy", "clean")
    ]
    pools, spatials, _ = zip(*(extractor.compute(x) for x in images), strict=True)
    scores = score(samples, reference, CPU)
    assert scores["fid"] == pytest.approx(
        frechet_distance(*(fit_gaussian(x.numpy()) for x in pools)), rel=1e-4
    )
    assert scores["sfid"] == pytest.approx(
        frechet_distance(*(fit_gaussian(x.numpy()) for x in spatials)), rel=1e-4
    )
    assert (scores["precision"], scores["recall"]) == precision_recall(pools[1], pools[0])


def test_what_may_be_compared():
    features = torch.zeros(50_000, 1)
    samples, reference = (
        Summary(50_000, features=features),
        Summary(10_000, features=features[:10_000], precomputed=True),
    )

    official = fake_inception()

    def verdicts(
        extractor=official, samples=samples, reference=reference, same_size=True, **scores
    ):
        return comparability(
            dict.fromkeys(NAMES, 1.0) | scores, extractor, samples, reference, same_size
        )

    assert verdicts() == dict.fromkeys(NAMES, COMPARABLE)
    assert set(verdicts(fake_inception(official=False)).values()) == {
        "not comparable: other Inception weights"
    }
    few = Summary(5000, features=features[:5000])
    both = verdicts(Extractor("mine", None, CPU), few)
    assert set(both.values()) == {"not comparable: other extractor; 5000 samples instead of 50000"}
    for change, reason in (
        (
            {"reference": replace(reference, precomputed=False)},
            "the reference file brings no statistics of its whole data set",
        ),
        ({"same_size": False}, "samples and reference images differ in size"),
    ):
        assert verdicts(**change) == dict.fromkeys(NAMES, f"not comparable: {reason}") | {
            "inception_score": COMPARABLE
        }
    limited = verdicts(samples=replace(samples, features=features[:10_000]))
    assert [name for name in NAMES if limited[name] != COMPARABLE] == ["precision", "recall"]
    assert limited["recall"] == "not comparable: not all images"
    lacking = verdicts(sfid=None, inception_score=None, precision=None, recall=None)
    assert (
        lacking["fid"] == COMPARABLE
        and lacking["inception_score"] == "not computed: the extractor gives no logits"
    )
    assert (
        "no spatial features" in lacking["sfid"]
        and "holds no images" in lacking["precision"] + lacking["recall"]
    )


def test_extractors_by_name(classifier, tmp_path, monkeypatch):
    images = torch.arange(128, dtype=torch.uint8).view(2, 1, 8, 8)
    torch.jit.trace(classifier.compute, images).save(str(tmp_path / "net.pt"))
    from_file = named_extractor(str(tmp_path / "net.pt"), [8, 8, 1], CPU)
    torch.testing.assert_close(from_file(images).logits, classifier(images).logits)
    assert from_file.name.startswith("net-") and not from_file.official and not from_file.inception

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    (tmp_path / "my_pixels.py").write_text(
        "import torch\nWEIGHT = 1.0\n"
        "def features(x):\n    return WEIGHT * x.flatten(1).float()\n"
        "def broken(x):\n    return x.float()\n"
        "def infinite(x):\n    return x.flatten(1) / 0.0\n"
        "network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(0.9))\n"
    )
    mine = named_extractor("my_pixels:features", [8, 8, 1], CPU)
    assert mine(images).pool.tolist() == images.flatten(1).tolist() and mine(images)[1:] == (
        None,
        None,
    )
    assert (
        mine.name.startswith("my_pixels.features-")
        and named_extractor("my_pixels:features", [8, 8, 1], CPU).name == mine.name
    )
    import my_pixels

    my_pixels.WEIGHT = 1.1
    assert named_extractor("my_pixels:features", [8, 8, 1], CPU).name != mine.name, (
        "other weights in the same code"
    )
    module = named_extractor("my_pixels:network", [8, 8, 1], CPU)
    assert torch.equal(module.compute(images), images.flatten(1)), "in eval mode"

    (tmp_path / "text.pt").write_text("no TorchScript")
    for spec, shape, message in (
        (
            "my_pixels:broken",
            [8, 8, 1],
            r"my_pixels.broken must give \[1, D\] or .* it gave \[1, 1, 8, 8\]",
        ),
        ("my_pixels:infinite", [8, 8, 1], "not finite"),
        ("my_pixels:absent", [8, 8, 1], "cannot be imported: .*absent"),
        ("no_such_module:f", [8, 8, 1], "cannot be imported: No module named"),
        ("nowhere.pt", [8, 8, 1], "must be a TorchScript file or module:function, got nowhere.pt"),
        (str(tmp_path / "text.pt"), [8, 8, 1], "text.pt is no TorchScript file"),
        (str(tmp_path / "net.pt"), [16, 16, 3], r"net-\w+ failed on uint8 \[1, 3, 16, 16\]"),
    ):
        with pytest.raises(ValueError, match=message):
            named_extractor(spec, shape, CPU)


def test_official_weights_are_known_by_their_hash(tmp_path, monkeypatch):
    from sra_fast.evaluation import extractors

    class Tiny(nn.Module):
        def forward(self, x):
            return x.flatten(1).float(), x.flatten(1).float(), x.flatten(1).float()

    monkeypatch.setattr(extractors, "load_inception", lambda path: Tiny())
    (tmp_path / "weights-inception-2015-12-05-6726825d.pth").write_bytes(b"others under that name")
    extractor = inception_extractor(
        str(tmp_path / "weights-inception-2015-12-05-6726825d.pth"), CPU
    )
    assert extractor.inception and not extractor.official and extractor.name != "inception-6726825d"
    assert isinstance(extractor(torch.zeros(2, 1, 8, 8, dtype=torch.uint8)), Features)
    choices = []
    seen = replace(
        extractor, compute=lambda x: choices.append(torch.backends.cudnn.allow_tf32) or Tiny()(x)
    )
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
        seen(torch.zeros(2, 1, 8, 8, dtype=torch.uint8))
    assert choices == [False], "the same features while a run trains in TF32"
    monkeypatch.setattr(extractors, "_digest", lambda path: "6726825d")
    extractor = inception_extractor("any path", CPU)
    assert extractor.official and extractor.name == "inception-6726825d"
