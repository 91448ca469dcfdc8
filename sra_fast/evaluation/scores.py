"""Scores of sets of features, defined as in the ADM suite: Fréchet distance, Inception score, precision and recall."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# which nearest neighbour gives a ball's radius (ADM suite)
NEIGHBOURS = 3
# pairwise distances held at once: 256 MB in fp32
BLOCK = 2**26


class Gaussian(NamedTuple):
    """Mean ``[D]`` and covariance ``[D, D]`` (divided by N - 1), float64."""

    mean: np.ndarray
    cov: np.ndarray


class RunningGaussian:
    """Mean and covariance of rows that arrive in parts, in float64. Memory is D^2, whatever the number of rows."""

    def __init__(self):
        self.count = 0

    def update(self, rows: Tensor) -> None:
        """Add rows ``[N, D]`` of any dtype. The sums stay on their device."""
        # in float64, also on a GPU: covariances are differences of large numbers
        rows = rows.double()
        mean = rows.mean(0)
        if self.count == 0:
            self.mean = torch.zeros_like(mean)
            self.scatter = mean.new_zeros(len(mean), len(mean))
        total = self.count + len(rows)
        delta = mean - self.mean
        # Chan, Golub, LeVeque 1983: the scatter of both parts plus the scatter between their means
        between = delta * (self.count * len(rows) / total) ** 0.5
        centred = torch.cat([rows - mean, between[None]])
        self.scatter.addmm_(centred.T, centred)
        self.mean += delta * (len(rows) / total)
        self.count = total

    def gaussian(self) -> Gaussian:
        """The Gaussian of all rows so far.

        Raises:
            ValueError: fewer than two rows.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 rows, got {self.count}")
        cov = self.scatter / (self.count - 1)
        return Gaussian(self.mean.cpu().numpy(), cov.cpu().numpy())


def fit_gaussian(rows: np.ndarray) -> Gaussian:
    """The Gaussian of rows ``[N, D]``; ValueError for fewer than two."""
    running = RunningGaussian()
    running.update(torch.from_numpy(rows))
    return running.gaussian()


def _root(cov: np.ndarray) -> np.ndarray:
    """``r`` with ``r r^T = cov``."""
    values, vectors = np.linalg.eigh(cov)
    return vectors * np.sqrt(values.clip(min=0))


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Squared Fréchet distance of two Gaussians of one dimension (arXiv 1706.08500, Eq. 6)."""
    # with roots r of both covariances, the squares of the singular values of r_a^T r_b are the
    # eigenvalues of cov_a cov_b. No square root is taken of eigenvalues that are zero but for
    # rounding, as there are where images are fewer than features
    cross = np.linalg.svd(_root(a.cov).T @ _root(b.cov), compute_uv=False).sum()
    shift = ((a.mean - b.mean) ** 2).sum()
    return float(shift + np.trace(a.cov) + np.trace(b.cov) - 2 * cross)


class InceptionScore:
    """exp(E KL(p(y|x) || p(y))) per split of consecutive images, averaged over the splits (arXiv 1606.03498).

    Args:
        split: images per split (ADM suite: 5000). The last split may be smaller and counts the
            same.
    """

    def __init__(self, split: int = 5000):
        self.split = split
        self.scores = []
        self._start()

    def _start(self) -> None:
        self.count = 0
        self.negentropy = 0.0
        self.marginal = 0.0

    def update(self, logits: Tensor) -> None:
        """Add logits ``[N, K]`` of any dtype, in the order of the images."""
        while len(logits):
            # up to the end of the current split
            part, logits = logits.tensor_split([self.split - self.count])
            # sums for KL(p || q) = sum p log p - sum p log q; q, the mean of p, is not known yet
            log_p = part.double().log_softmax(1)
            p = log_p.exp()
            self.marginal = self.marginal + p.sum(0)
            self.negentropy = self.negentropy + (p * log_p).sum()
            self.count += len(part)
            if self.count == self.split:
                self._finish()

    def _finish(self) -> None:
        """Append the score of the current split: KL = sum p log p - sum q log q, with q the mean of p."""
        # xlogy: a class that no image has counts as zero
        marginal = self.marginal / self.count
        kl = self.negentropy / self.count - torch.special.xlogy(marginal, marginal).sum()
        self.scores.append(kl.exp().item())
        self._start()

    def compute(self) -> float:
        """The score of all images so far. It ends the current split."""
        if self.count:
            self._finish()
        return sum(self.scores) / len(self.scores)


def _blocks(rows: Tensor, columns: int) -> tuple[Tensor, ...]:
    """``rows`` in pieces whose distances to ``columns`` points fit in ``BLOCK``."""
    return rows.split(max(1, BLOCK // columns))


def _radii(points: Tensor, k: int) -> Tensor:
    """Distance of every point to its k-th nearest other point."""
    radii = []
    for part in _blocks(points, len(points)):
        # k + 1: the smallest distance of a row is that of the point to itself
        radii.append(torch.cdist(part, points).kthvalue(k + 1, dim=1).values)
    return torch.cat(radii)


def _covered(points: Tensor, centres: Tensor, radii: Tensor) -> float:
    """Share of ``points`` that lie in at least one of the balls."""
    # block by block: the whole matrix of 50 000 x 50 000 distances is 10 GB
    inside = [
        (torch.cdist(part, centres) <= radii).any(1) for part in _blocks(points, len(centres))
    ]
    return torch.cat(inside).double().mean().item()


def precision_recall(real: Tensor, fake: Tensor, k: int = NEIGHBOURS) -> tuple[float, float]:
    """Share of ``fake`` in the manifold of ``real``, and of ``real`` in the manifold of ``fake`` (arXiv 1904.06991).

    A set's manifold is the union of balls around its points. A ball's radius is the distance to the
    k-th nearest other point. Distances are computed in blocks of at most 256 MB.

    Args:
        real: features ``[N, D]``, float32 or float64.
        fake: features ``[M, D]``, same dtype and device.
        k: which neighbour.

    Raises:
        ValueError: a set has no more than k points.
    """
    if min(len(real), len(fake)) <= k:
        raise ValueError(
            f"precision and recall need more than {k} images a side, got {len(real)} and {len(fake)}"
        )
    # a shift leaves the distances as they are and makes their rounding error smaller
    centre = real.mean(0)
    real = real - centre
    fake = fake - centre
    precision = _covered(fake, real, _radii(real, k))
    recall = _covered(real, fake, _radii(fake, k))
    return precision, recall
