"""Scores of sets of features, defined as in the ADM suite: Fréchet distance, Inception score, precision and recall."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

NEIGHBOURS = 3  # of the ADM suite
BLOCK = 2**26  # distances held at once: 256 MB


class Gaussian(NamedTuple):
    """Mean ``[D]`` and covariance ``[D, D]`` (divided by N - 1), float64."""

    mean: np.ndarray
    cov: np.ndarray


class Moments:
    """Mean and covariance of rows that come in parts, in float64; memory ``D^2``, whatever the number of rows."""

    def __init__(self):
        self.count = 0

    def update(self, rows: Tensor) -> None:
        """Add rows ``[N, D]`` of any dtype; the sums stay on their device."""
        rows = rows.double()
        mean = rows.mean(0)
        if self.count == 0:
            self.mean, self.scatter = torch.zeros_like(mean), mean.new_zeros(len(mean), len(mean))
        total, delta = self.count + len(rows), mean - self.mean
        # Chan, Golub, LeVeque 1983: the scatter of both parts plus that between their means
        between = delta * (self.count * len(rows) / total) ** 0.5
        centred = torch.cat([rows - mean, between[None]])
        self.scatter.addmm_(centred.T, centred)
        self.mean += delta * (len(rows) / total)
        self.count = total

    def gaussian(self) -> Gaussian:
        """The Gaussian of all rows; ValueError for fewer than two."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 rows, got {self.count}")
        return Gaussian(self.mean.cpu().numpy(), (self.scatter / (self.count - 1)).cpu().numpy())


def fit_gaussian(rows: np.ndarray) -> Gaussian:
    """The Gaussian of rows ``[N, D]``."""
    moments = Moments()
    moments.update(torch.from_numpy(rows))
    return moments.gaussian()


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Squared Fréchet distance of two Gaussians of one dimension (arXiv 1706.08500, Eq. 6)."""
    values, vectors = np.linalg.eigh(a.cov)
    root = vectors * np.sqrt(values.clip(min=0))  # root root^T = cov_a
    # root^T cov_b root is symmetric and has the eigenvalues of cov_a cov_b: no complex square root, also when singular
    cross = np.sqrt(np.linalg.eigvalsh(root.T @ b.cov @ root).clip(min=0)).sum()
    return float(((a.mean - b.mean) ** 2).sum() + np.trace(a.cov) + np.trace(b.cov) - 2 * cross)


class InceptionScore:
    """exp(E KL(p(y|x) || p(y))) per split of consecutive images, averaged over splits (arXiv 1606.03498).

    Args:
        split: images of a split; the last one may be smaller and counts the same (the ADM suite: 5000).
    """

    def __init__(self, split: int = 5000):
        self.split, self.scores = split, []
        self._start()

    def _start(self) -> None:
        self.count, self.negentropy, self.marginal = 0, 0.0, 0.0

    def update(self, logits: Tensor) -> None:
        """Add logits ``[N, K]`` of any dtype, in the order of the images."""
        while len(logits):
            part, logits = logits.tensor_split([self.split - self.count])
            log_p = part.double().log_softmax(1)
            p = log_p.exp()
            self.marginal = self.marginal + p.sum(0)
            self.negentropy = self.negentropy + (p * log_p).sum()
            self.count += len(part)
            if self.count == self.split:
                self._finish()

    def _finish(self) -> None:
        marginal = self.marginal / self.count
        kl = self.negentropy / self.count - torch.special.xlogy(marginal, marginal).sum()
        self.scores.append(kl.exp().item())
        self._start()

    def compute(self) -> float:
        """The score of all images so far; ends the current split."""
        if self.count:
            self._finish()
        return sum(self.scores) / len(self.scores)


def _blocks(rows: Tensor, columns: int) -> tuple[Tensor, ...]:
    return rows.split(max(1, BLOCK // columns))


def _radii(points: Tensor, k: int) -> Tensor:
    # the smallest of a row is the point's distance to itself
    return torch.cat(
        [
            torch.cdist(part, points).kthvalue(k + 1, dim=1).values
            for part in _blocks(points, len(points))
        ]
    )


def _covered(points: Tensor, centres: Tensor, radii: Tensor) -> float:
    inside = [
        (torch.cdist(part, centres) <= radii).any(1) for part in _blocks(points, len(centres))
    ]
    return torch.cat(inside).double().mean().item()


def precision_recall(real: Tensor, fake: Tensor, k: int = NEIGHBOURS) -> tuple[float, float]:
    """Share of ``fake`` inside the manifold of ``real``, and of ``real`` inside that of ``fake`` (arXiv 1904.06991).

    A set's manifold is the union of balls around its points, each up to the k-th nearest other point. Distances are
    formed in blocks of at most 256 MB.

    Args:
        real: features ``[N, D]``, float32 or float64; ``fake``: ``[M, D]``, same dtype and device.
        k: which neighbour.

    Raises:
        ValueError: a set has no more than k points.
    """
    if min(len(real), len(fake)) <= k:
        raise ValueError(
            f"precision and recall need more than {k} images a side, got {len(real)} and {len(fake)}"
        )
    centre = real.mean(0)  # distances are the same, their rounding is smaller
    real, fake = real - centre, fake - centre
    return _covered(fake, real, _radii(real, k)), _covered(real, fake, _radii(fake, k))
