"""FID's distance, Inception score, precision and recall: against numpy, scipy, scikit-learn and
closed forms.
"""

import math

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from sklearn.neighbors import NearestNeighbors

from sra_fast.evaluation import scores
from sra_fast.evaluation.digits import evaluate_digits
from sra_fast.evaluation.scores import (
    Gaussian,
    InceptionScore,
    RunningGaussian,
    fit_gaussian,
    frechet_distance,
    precision_recall,
)

RNG = np.random.RandomState(0)


def correlated(count: int, dim: int) -> np.ndarray:
    return RNG.randn(count, dim) @ RNG.randn(dim, dim) + RNG.randn(dim)


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_a_gaussian_from_parts_is_numpys(offset):
    """Also far from the origin, where sums of squares lose every digit of the variance."""
    rows = correlated(101, 7) + offset
    running = RunningGaussian()
    for part in torch.from_numpy(rows).split([1, 40, 3, 57]):
        running.update(part)
    assert running.count == 101
    mean, cov = running.gaussian()
    np.testing.assert_allclose(mean, rows.mean(0), rtol=1e-13)
    np.testing.assert_allclose(cov, np.cov(rows.T), rtol=1e-8, atol=1e-8)


def test_statistics_are_double_for_any_dtype():
    rows = torch.tensor([[1.0, 0.0], [1.0 + 2**-7, 0.0]], dtype=torch.bfloat16)
    running = RunningGaussian()
    running.update(rows.repeat(500, 1))
    mean, cov = running.gaussian()
    # a mean that bfloat16 cannot hold
    assert mean[0] == 1 + 2**-8
    assert cov[0, 0] == pytest.approx(2**-16 * 1000 / 999, rel=1e-12)


def test_one_row_has_no_covariance():
    with pytest.raises(ValueError, match="at least 2 rows, got 1"):
        fit_gaussian(np.zeros((1, 3)))


def test_frechet_distance_is_scipys():
    a = correlated(400, 12)
    b = correlated(300, 12)
    cov_a = np.cov(a.T)
    cov_b = np.cov(b.T)
    cross = sqrtm(cov_a @ cov_b).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * cross)
    assert frechet_distance(fit_gaussian(a), fit_gaussian(b)) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(fit_gaussian(b), fit_gaussian(a)) == pytest.approx(expected, rel=1e-10)


def test_frechet_distance_of_known_gaussians():
    a = correlated(5000, 3)
    fit = fit_gaussian(a)
    assert frechet_distance(fit, fit) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(fit, fit_gaussian(a + [1.0, 2.0, 0.0])) == pytest.approx(5, rel=1e-9)
    tripled = Gaussian(fit.mean, 9 * fit.cov)
    # the sum of (3s - s)^2 over the standard deviations s
    expected = 4 * np.trace(fit.cov)
    assert frechet_distance(fit, tripled) == pytest.approx(expected, rel=1e-9)
    p, q = (Gaussian(np.zeros(3), np.diag(d)) for d in ([1.0, 4.0, 0.0], [9.0, 1.0, 25.0]))
    assert frechet_distance(p, q) == pytest.approx(4 + 1 + 25, rel=1e-9)


def test_frechet_distance_of_singular_covariances():
    """Fewer images than features: scipy's root of the product can be complex or fail there."""
    a = correlated(6, 40)
    assert frechet_distance(fit_gaussian(a), fit_gaussian(a)) == pytest.approx(0, abs=1e-8)
    assert frechet_distance(fit_gaussian(a), fit_gaussian(a + 2)) == pytest.approx(4 * 40, rel=1e-9)


@pytest.mark.parametrize("batch", [1, 4, 12])
def test_inception_score_per_split(batch):
    logits = RNG.randn(12, 6) * 3
    expected = []
    for part in (logits[:5], logits[5:10], logits[10:]):
        p = np.exp(part) / np.exp(part).sum(1, keepdims=True)
        expected.append(np.exp((p * np.log(p / p.mean(0))).sum(1).mean()))
    score = InceptionScore(split=5)
    for part in torch.from_numpy(logits).float().split(batch):
        score.update(part)
    assert score.compute() == pytest.approx(np.mean(expected), rel=1e-6)


def test_inception_score_of_known_predictions():
    # every class three times, with probabilities of exactly 0 and 1
    certain = 1e4 * torch.eye(7).repeat(3, 1)
    score = InceptionScore()
    score.update(certain)
    assert score.compute() == pytest.approx(7, rel=1e-9)
    score = InceptionScore()
    score.update(certain[:1].repeat(20, 1))
    assert score.compute() == pytest.approx(1, rel=1e-9)


@pytest.mark.parametrize("block, offset", [(scores.BLOCK, 0), (150, 0), (150, 1000)])
def test_precision_and_recall_are_scikit_learns(monkeypatch, block, offset):
    """At once, in blocks, and far from the origin, where |a|^2 - 2ab + |b|^2 in fp32 has no correct
    digit.
    """
    monkeypatch.setattr(scores, "BLOCK", block)
    rng = np.random.RandomState(1)
    real = (rng.randn(90, 5) + offset).astype(np.float32)
    fake = (rng.randn(70, 5) * 0.7 + 0.4 + offset).astype(np.float32)

    def share(points, centres):
        points = points.astype(np.float64)
        centres = centres.astype(np.float64)
        neighbours = NearestNeighbors(n_neighbors=4, algorithm="brute").fit(centres)
        # the nearest neighbour of a point is the point itself
        radii = neighbours.kneighbors(centres)[0][:, 3]
        distances = np.linalg.norm(points[:, None] - centres[None], axis=2)
        return (distances <= radii).any(1).mean()

    precision = share(fake, real)
    recall = share(real, fake)
    assert precision > recall + 0.1, "a test that confuses the two would not notice"
    found = precision_recall(torch.from_numpy(real), torch.from_numpy(fake))
    assert found == pytest.approx((precision, recall), abs=1e-9)


def test_precision_and_recall_of_known_sets():
    torch.manual_seed(0)
    cluster = torch.randn(200, 4)
    both = torch.cat([cluster, cluster + 100])
    assert precision_recall(cluster, cluster) == (1, 1)
    assert precision_recall(cluster, cluster + 100) == (0, 0)
    assert precision_recall(both, cluster) == (1, 0.5), "a dropped mode costs recall"
    assert precision_recall(cluster, both) == (0.5, 1), "a made-up one costs precision"
    with pytest.raises(ValueError, match="more than 3 images a side, got 200 and 3"):
        precision_recall(cluster, cluster[:3])


@pytest.mark.parametrize("sizes", [(40, 25), (25, 40), (30, 30)])
def test_precision_and_recall_by_their_definition(sizes):
    """Point by point: a ball has the radius of its own centre, whichever set is the larger one."""
    rng = np.random.RandomState(2)
    real = rng.randn(sizes[0], 3)
    # its balls are much smaller
    fake = rng.randn(sizes[1], 3) * 0.5 + 0.5

    def share(points, centres):
        inside = 0
        for point in points:
            for centre in centres:
                radius = sorted(math.dist(centre, other) for other in centres)[3]
                if math.dist(point, centre) <= radius:
                    inside += 1
                    break
        return inside / len(points)

    expected = (share(fake, real), share(real, fake))
    assert expected[0] > expected[1] + 0.2 and expected[1] > 0.1
    found = precision_recall(torch.from_numpy(real), torch.from_numpy(fake))
    assert found == pytest.approx(expected, abs=1e-12)


def test_digits_that_are_not_finite_are_one_line():
    images = torch.zeros(10, 1, 8, 8)
    images[3, 0, 2, 2] = torch.nan
    with pytest.raises(ValueError, match="generated digits must be finite, 1 of 10 are not"):
        evaluate_digits(images, torch.arange(10))
