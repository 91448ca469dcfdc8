"""Samples against an FID reference: passes over the images, cached statistics, extractors, what may
be compared.
"""

import logging
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from sra_fast.data.digits import Digits
from sra_fast.evaluation import adm_suite as evaluation
from sra_fast.evaluation import npz
from sra_fast.evaluation.adm_suite import (
    COMPARABLE,
    Summary,
    comparability,
    score,
    summarize,
    summarize_reference,
    write_reference,
)
from sra_fast.evaluation.extractors import (
    Extractor,
    Features,
    inception_extractor,
    named_extractor,
)
from sra_fast.evaluation.npz import NpzImages
from sra_fast.evaluation.scores import fit_gaussian, frechet_distance, precision_recall
from sra_fast.plots.report import to_uint8

CPU = torch.device("cpu")
# instead of 2048 and 2023, whose eigenvalues take seconds
POOL = 48
SPATIAL = 40
NAMES = ("fid", "sfid", "inception_score", "precision", "recall")


class Classifier(nn.Module):
    """Digits, uint8 [N, 1, 8, 8] -> the hidden layer [N, 32] and logits [N, 10]."""

    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(64, 32)
        self.out = nn.Linear(32, 10)

    def forward(self, images: torch.Tensor):
        x = torch.relu(self.hidden(images.flatten(1).float() / 127.5 - 1))
        return x, self.out(x)


@pytest.fixture(scope="module")
def classifier():
    torch.manual_seed(0)
    model = Classifier()
    data = Digits()
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
    """Files of digits: the reference are training digits, the samples are held-out ones.

    The samples are clean, noisy, or lack the classes 5 to 9.
    """
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


def test_scores_show_what_is_wrong_with_samples(digits, classifier):
    reference = summarize_reference(digits["reference"], classifier, 64)
    good, noisy, dropped = (
        score(summarize(NpzImages(digits[name]), classifier, 64), reference, CPU)
        for name in ("clean", "noisy", "dropped")
    )
    assert list(good) == list(NAMES)
    assert good["sfid"] is None
    assert 5 * good["fid"] < noisy["fid"]
    assert 5 * good["fid"] < dropped["fid"]
    assert good["inception_score"] > 8
    assert good["inception_score"] > noisy["inception_score"] + 1
    # five classes are left
    assert dropped["inception_score"] == pytest.approx(5, abs=1)
    # noise costs precision, missing classes cost recall
    assert good["precision"] > 0.8
    assert noisy["precision"] < 0.5 * good["precision"]
    assert dropped["precision"] > 0.8
    assert good["recall"] > 0.8
    assert dropped["recall"] < 0.7 * good["recall"]


def test_a_summary_does_not_depend_on_the_batch_size(digits, classifier):
    images = torch.from_numpy(np.load(digits["clean"])["arr_0"]).permute(0, 3, 1, 2)
    with torch.no_grad():
        features, logits = classifier.compute(images)
    one, some, limited = (
        summarize(NpzImages(digits["clean"]), classifier, *args)
        for args in ((360,), (7,), (7, 100))
    )
    expected = fit_gaussian(features.numpy())
    p = logits.double().softmax(1)
    inception_score = (p * (p / p.mean(0)).log()).sum(1).mean().exp().item()
    for summary in (one, some, limited):
        assert summary.count == 360
        assert summary.spatial is None
        assert not summary.precomputed
        assert frechet_distance(summary.pool, expected) == pytest.approx(0, abs=1e-6)
        assert summary.inception_score == pytest.approx(inception_score, rel=1e-4)
    torch.testing.assert_close(some.features, features)
    torch.testing.assert_close(limited.features, features[:100])


class Counting:
    """Counts the images it is given, and notes whether convolutions may use TF32."""

    def __init__(self, extractor):
        self.inner = extractor.compute
        self.images = 0
        self.tf32 = set()

    def __call__(self, images):
        self.images += len(images)
        self.tf32.add(torch.backends.cudnn.allow_tf32)
        return self.inner(images)


def test_reference_is_read_once_until_it_changes(digits, classifier, tmp_path):
    counting = Counting(classifier)
    extractor = replace(classifier, compute=counting)
    tf32 = torch.backends.cudnn.allow_tf32

    def reference(extractor=extractor, **kwargs):
        """The summary, and how many images it took."""
        before = counting.images
        summary = summarize_reference(digits["reference"], extractor, 64, **kwargs)
        return summary, counting.images - before

    first, seen = reference(cache=False)
    assert seen == 1437
    assert not list(tmp_path.glob("*.stats.npz"))
    # the first call with a cache writes it, the second reads it
    assert reference()[1] == 1437
    again, seen = reference()
    assert seen == 0
    assert again.count == 1437
    assert torch.equal(again.features, first.features)
    assert np.array_equal(again.pool.mean, first.pool.mean)
    assert np.array_equal(again.pool.cov, first.pool.cov)
    # another extractor has its own cache; another `keep` replaces the earlier one
    assert reference(extractor=replace(extractor, name="another"))[1] == 1437
    assert reference(keep=10)[0].features.shape == (10, 32)
    assert len(list(tmp_path.glob("reference.npz.digits.*.stats.npz"))) == 1
    assert len(list(tmp_path.glob("reference.npz.another.*.stats.npz"))) == 1
    # a file with a new date is read again
    reference()
    stat = os.stat(digits["reference"])
    os.utime(digits["reference"], ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))
    assert reference()[1] == 1437
    assert counting.tf32 == {False}
    assert torch.backends.cudnn.allow_tf32 == tf32


def test_cache_that_cannot_be_used_is_a_warning(digits, classifier, tmp_path, monkeypatch, caplog):
    expected = summarize_reference(digits["reference"], classifier, 64)
    (kept,) = tmp_path.glob("*.stats.npz")
    kept.write_bytes(kept.read_bytes()[:1000])
    with caplog.at_level(logging.WARNING):
        found = summarize_reference(digits["reference"], classifier, 64)
    assert np.array_equal(found.pool.cov, expected.pool.cov)
    assert "is ignored" in caplog.text
    kept.unlink()

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(npz, "write_atomic", full)
    with caplog.at_level(logging.WARNING):
        found = summarize_reference(digits["reference"], classifier, 64)
    assert np.array_equal(found.pool.cov, expected.pool.cov)
    assert "not kept: no space left" in caplog.text
    assert not kept.exists()


@pytest.fixture(autouse=True)
def small_inception(monkeypatch):
    monkeypatch.setattr(evaluation, "POOL", POOL)
    monkeypatch.setattr(evaluation, "SPATIAL", SPATIAL)


def fake_inception(official=True) -> Extractor:
    """An extractor of random features that takes no time; its sizes are those of
    ``small_inception``.
    """
    project = torch.randn(64, POOL + SPATIAL + 10, generator=torch.Generator().manual_seed(0))

    def compute(images):
        return (images.flatten(1).float() / 255 @ project).split([POOL, SPATIAL, 10], 1)

    return Extractor("inception-fake", compute, CPU, inception=True, official=official)


def test_statistics_of_an_fid_reference_are_used(digits, classifier, tmp_path):
    path = str(tmp_path / "adm.npz")
    statistics = {
        "mu": np.ones(POOL),
        "sigma": 2 * np.eye(POOL),
        "mu_s": np.zeros(SPATIAL),
        "sigma_s": 3 * np.eye(SPATIAL),
    }
    np.savez(path, arr_0=np.load(digits["clean"])["arr_0"], **statistics)
    reference = summarize_reference(path, fake_inception(), 64)
    assert reference.precomputed
    assert reference.count == 360
    assert reference.features.shape == (360, POOL)
    assert np.array_equal(reference.pool.cov, statistics["sigma"])
    assert np.array_equal(reference.spatial.cov, statistics["sigma_s"])
    # the statistics are Inception's: another extractor needs the images
    other = summarize_reference(path, classifier, 64)
    assert not other.precomputed
    assert len(other.pool.mean) == 32

    # a file without images
    np.savez(path, **statistics)
    bare = summarize_reference(path, fake_inception(), 64)
    samples = Summary(50, bare.pool, bare.spatial, 7.0, torch.zeros(50, POOL))
    assert bare.count == 0
    assert score(samples, bare, CPU) == {
        "fid": pytest.approx(0, abs=1e-6),
        "sfid": pytest.approx(0, abs=1e-6),
        "inception_score": 7.0,
        "precision": None,
        "recall": None,
    }
    with pytest.raises(ValueError, match="adm.npz has no images, only statistics of 48 features"):
        summarize_reference(path, classifier, 64)
    np.savez(path, mu=np.ones(32), sigma=np.eye(32))
    with pytest.raises(ValueError, match="statistics of 48 Inception features expected, got 32"):
        summarize_reference(path, fake_inception(), 64)


def test_spatial_features_make_sfid(digits):
    extractor = fake_inception()

    def features(name):
        images = torch.from_numpy(np.load(digits[name])["arr_0"]).permute(0, 3, 1, 2)
        pool, spatial, _ = extractor.compute(images)
        return pool, spatial

    samples = summarize(NpzImages(digits["noisy"]), extractor, 64)
    reference = summarize(NpzImages(digits["clean"]), extractor, 64)
    scores = score(samples, reference, CPU)
    pool, spatial = features("noisy")
    reference_pool, reference_spatial = features("clean")
    for name, a, b in (
        ("fid", pool, reference_pool),
        ("sfid", spatial, reference_spatial),
    ):
        expected = frechet_distance(fit_gaussian(a.numpy()), fit_gaussian(b.numpy()))
        assert scores[name] == pytest.approx(expected, rel=1e-4)
    expected = precision_recall(reference_pool, pool)
    assert (scores["precision"], scores["recall"]) == expected


def test_what_may_be_compared():
    features = torch.zeros(50_000, 1)
    samples = Summary(50_000, features=features)
    shape = [256, 256, 3]
    reference = Summary(10_000, features=features[:10_000], precomputed=True, shape=shape)
    official = fake_inception()

    def verdicts(
        extractor=official, samples=samples, reference=reference, same_size=True, **scores
    ):
        scores = dict.fromkeys(NAMES, 1.0) | scores
        return comparability(scores, extractor, samples, reference, same_size)

    assert verdicts() == dict.fromkeys(NAMES, COMPARABLE)
    other_weights = verdicts(fake_inception(official=False))
    assert set(other_weights.values()) == {"not comparable: other Inception weights"}
    few = Summary(5000, features=features[:5000])
    both = verdicts(Extractor("mine", None, CPU), few)
    assert set(both.values()) == {"not comparable: other extractor; 5000 samples instead of 50000"}
    for change, reason in (
        (
            {"reference": replace(reference, precomputed=False)},
            "the reference file brings no statistics of its whole data set",
        ),
        (
            {"reference": replace(reference, written_here=True)},
            "the reference file was not written by the ADM suite",
        ),
        ({"same_size": False}, "samples and reference images differ in size"),
        (
            {"reference": replace(reference, shape=None)},
            "the reference file does not say which images its statistics are of",
        ),
    ):
        # the Inception score does not use the reference
        expected = dict.fromkeys(NAMES, f"not comparable: {reason}")
        expected["inception_score"] = COMPARABLE
        assert verdicts(**change) == expected
    limited = verdicts(samples=replace(samples, features=features[:10_000]))
    assert [name for name in NAMES if limited[name] != COMPARABLE] == ["precision", "recall"]
    assert limited["recall"] == "not comparable: not all images"
    lacking = verdicts(sfid=None, inception_score=None, precision=None, recall=None)
    assert lacking["fid"] == COMPARABLE
    assert "no spatial features" in lacking["sfid"]
    assert lacking["inception_score"] == "not computed: the extractor gives no logits"
    assert "holds no images" in lacking["precision"]
    assert "holds no images" in lacking["recall"]


def test_official_weights_are_known_by_their_hash(tmp_path, monkeypatch):
    from sra_fast.evaluation import extractors

    class Tiny(nn.Module):
        def forward(self, x):
            return x.flatten(1).float(), x.flatten(1).float(), x.flatten(1).float()

    monkeypatch.setattr(extractors, "load_inception", lambda path: Tiny())
    # other weights under the official name
    path = tmp_path / "weights-inception-2015-12-05-6726825d.pth"
    path.write_bytes(b"others under that name")
    extractor = inception_extractor(str(path), CPU)
    assert extractor.inception
    assert not extractor.official
    assert extractor.name != "inception-6726825d"
    assert isinstance(extractor(torch.zeros(2, 1, 8, 8, dtype=torch.uint8)), Features)

    # the same features while a run trains in TF32
    counting = Counting(replace(extractor, compute=Tiny()))
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
        replace(extractor, compute=counting)(torch.zeros(2, 1, 8, 8, dtype=torch.uint8))
    assert counting.tf32 == {False}
    monkeypatch.setattr(extractors, "_digest", lambda path: "6726825d")
    extractor = inception_extractor("any path", CPU)
    assert extractor.official
    assert extractor.name == "inception-6726825d"


def test_written_statistics_of_inception_have_the_spatial_ones(digits, tmp_path):
    extractor = fake_inception()
    summary = summarize_reference(digits["reference"], extractor, 64, cache=False)
    path = tmp_path / "mine.npz"
    write_reference(path, summary, extractor)
    found = summarize_reference(str(path), extractor, 64)
    assert found.precomputed and found.written_here
    assert found.count == 1437
    assert np.array_equal(found.pool.cov, summary.pool.cov)
    assert np.array_equal(found.spatial.mean, summary.spatial.mean)
    other = replace(extractor, name="inception-other")
    with pytest.raises(ValueError, match="of the extractor inception-fake, expected those of inc"):
        summarize_reference(str(path), other, 64)


def test_coarse_pixels_show_what_is_wrong_with_samples(digits):
    extractor = named_extractor("pixels", [8, 8, 1], CPU)
    reference = summarize_reference(digits["reference"], extractor, 64, cache=False)
    good, noisy, dropped = (
        frechet_distance(summarize(NpzImages(digits[name]), extractor, 64).pool, reference.pool)
        for name in ("clean", "noisy", "dropped")
    )
    assert 5 * good < noisy
    assert 2 * good < dropped


def test_any_damage_of_the_cache_is_a_warning(digits, classifier, tmp_path, caplog):
    """Of a file that opens: a flipped byte of an array, and of what says how it is stored."""
    expected = summarize_reference(digits["reference"], classifier, 64)
    (kept,) = tmp_path.glob("*.stats.npz")
    whole = kept.read_bytes()
    directory = whole.rindex(b"PK\x01\x02")
    places = {
        "in an array": whole.index(b"features.npy") + 1000,
        "the method of compression": directory + 10,
        "a password": directory + 8,
    }
    for what, place in places.items():
        damaged = bytearray(whole)
        damaged[place] ^= 1
        kept.write_bytes(damaged)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            found = summarize_reference(digits["reference"], classifier, 64)
        assert f"{kept} is ignored: " in caplog.text, what
        assert torch.equal(found.features, expected.features)
        assert kept.read_bytes() == whole, "made anew"
