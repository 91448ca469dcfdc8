"""Averages over a power of the training time, and any of them from a few others.

EDM2 (Karras et al., arXiv 2312.02696, Sec. 3 and its appendix): after ``t`` updates the average has
given the weights of time ``tau`` the share ``p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1)`` on
``[0, t]``. The average grows with the training, and forgets the initial weights. Its relative width
``sigma_rel`` is the standard deviation of ``p`` in units of ``t``.

Everything is linear in the weights. So the average of another width is a sum of stored averages, of
whatever widths and times, as far as its profile is that sum of their profiles.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# the width at gamma = 0, where all weights have equal shares; a wider one would favour the oldest
WIDEST = 12**-0.5
# the last of a million updates; a power of 1 / sigma_rel is a number as long as that is
NARROWEST = 1e-6
# the error from which on a sum of profiles does not pass for the wanted one
LARGEST_ERROR = 0.1
# added to the products of profiles whose own are 1: two that are nearly alike stay solvable
RIDGE = 1e-10


def exponent(sigma_rel: float) -> float:
    """``gamma`` of a relative width: the largest real root of ``t^3 + 7 t^2 + (16 - sigma^-2) t +
    (12 - sigma^-2)``.

    Args:
        sigma_rel: in ``[NARROWEST, WIDEST]``.

    Raises:
        ValueError: it is not.
    """
    check_width(sigma_rel)
    inverse = float(sigma_rel) ** -2
    roots = np.roots([1, 7, 16 - inverse, 12 - inverse])
    # the three are real, so that imaginary parts are rounding
    return max(0.0, float(roots.real.max()))


def check_width(sigma_rel: float) -> None:
    """ValueError unless a relative width is one that a power function with ``gamma >= 0`` has."""
    if not NARROWEST <= sigma_rel <= WIDEST:
        raise ValueError(
            f"expected a relative width in [{NARROWEST:g}, {WIDEST:.4f}] (EDM2 uses 0.05 and 0.1), "
            f"got {sigma_rel}"
        )


@dataclass(frozen=True)
class Profile:
    """The average of a relative width after a number of updates."""

    sigma_rel: float
    updates: float


@dataclass(frozen=True)
class Fit:
    """An average as a sum of others.

    Attributes:
        coefficients: of the others, in their order; their sum is 1.
        error: L2 norm of what the sum of profiles differs by from the wanted one, over the norm of
            the wanted one.
    """

    coefficients: list[float]
    error: float


def products(rows: Sequence[Profile], columns: Sequence[Profile]) -> np.ndarray:
    """Inner products of profiles, ``[rows, columns]`` fp64: the integral of ``p_a p_b``.

    With ``m`` the smaller and ``M`` the larger of both times it is ``(a + 1) (b + 1) / (a + b + 1)
    * (m / t_a)^a * (m / t_b)^b / M``.
    """
    gamma_a = np.array([exponent(p.sigma_rel) for p in rows])[:, None]
    gamma_b = np.array([exponent(p.sigma_rel) for p in columns])[None, :]
    t_a = np.array([p.updates for p in rows], dtype=np.float64)[:, None]
    t_b = np.array([p.updates for p in columns], dtype=np.float64)[None, :]
    smaller = np.minimum(t_a, t_b)
    scale = (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) / np.maximum(t_a, t_b)
    return scale * (smaller / t_a) ** gamma_a * (smaller / t_b) ** gamma_b


def fit(held: Sequence[Profile], wanted: Profile) -> Fit:
    """The sum of held profiles that is nearest to the wanted one (least squares, as in EDM2).

    Unlike in the paper the coefficients sum to 1. What the weights have in common at all times is
    then exact, whatever the error of the profile.

    Args:
        held: at least one; no two alike.
        wanted: at a time that is not after the last of the held ones.
    """
    gram = products(held, held)
    target = products(held, [wanted])[:, 0]
    # in units of each profile's norm, which differ by orders of magnitude
    unit = 1 / np.sqrt(np.diag(gram))
    count = len(held)
    # with a Lagrange multiplier for the sum
    system = np.zeros((count + 1, count + 1))
    system[:count, :count] = gram * unit[:, None] * unit + RIDGE * np.eye(count)
    # of the order of the other entries
    system[:count, count] = system[count, :count] = unit / unit.max()
    solution = np.linalg.solve(system, np.append(target * unit, 1 / unit.max()))
    coefficients = solution[:count] * unit
    norm = float(products([wanted], [wanted])[0, 0])
    left = norm - 2 * target @ coefficients + coefficients @ gram @ coefficients
    return Fit(coefficients.tolist(), math.sqrt(max(0.0, left) / norm))
