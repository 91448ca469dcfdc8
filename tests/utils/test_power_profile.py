"""EDM2's power-function averages: the width, the shares of the steps, and sums of profiles."""

import math

import numpy as np
import pytest

from sra_fast.utils.power_profile import NARROWEST, WIDEST, Profile, exponent, fit, products


def width_of(gamma: float) -> float:
    """The standard deviation of tau^gamma on [0, 1]: that of a beta distribution (gamma + 1, 1)."""
    return math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)))


def shares(sigma_rel: float, updates: int) -> np.ndarray:
    """What the update rule gives each step's weights: products of (1 - 1 / t)^(gamma + 1)."""
    kept = np.zeros(updates)
    power = exponent(sigma_rel) + 1
    for t in range(1, updates + 1):
        decay = (1 - 1 / t) ** power
        kept[: t - 1] *= decay
        kept[t - 1] = 1 - decay
    return kept


def density(profile: Profile, times: np.ndarray) -> np.ndarray:
    gamma = exponent(profile.sigma_rel)
    relative = np.clip(times / profile.updates, 0, None)
    return np.where(relative <= 1, (gamma + 1) * relative**gamma / profile.updates, 0)


@pytest.mark.parametrize("sigma_rel, gamma", [(0.05, 16.97), (0.1, 6.94)])
def test_widths_of_the_paper(sigma_rel, gamma):
    assert exponent(sigma_rel) == pytest.approx(gamma, abs=5e-3)


@pytest.mark.parametrize("sigma_rel", [NARROWEST, 1e-3, 0.01, 0.05, 0.15, 0.25, WIDEST])
def test_the_exponent_has_the_width(sigma_rel):
    assert width_of(exponent(sigma_rel)) == pytest.approx(sigma_rel, rel=1e-6)


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, 1e-300, 9e-7, 0.29, math.nan, math.inf])
def test_other_widths_are_refused(sigma_rel):
    with pytest.raises(ValueError, match=r"expected a relative width in \[1e-06, 0.2887\]"):
        exponent(sigma_rel)


@pytest.mark.parametrize("sigma_rel", [0.05, 0.1, 0.2])
def test_the_shares_of_the_steps_are_the_profile(sigma_rel):
    """They sum to 1, none is of the initial weights, and their deviation is the width."""
    updates = 1000
    found = shares(sigma_rel, updates)
    assert found.sum() == pytest.approx(1, abs=1e-12)
    middles = np.arange(updates) + 0.5
    expected = density(Profile(sigma_rel, updates), middles)
    assert np.allclose(found, expected, rtol=1e-3, atol=1e-9)
    mean = (found * middles).sum()
    deviation = math.sqrt((found * (middles - mean) ** 2).sum())
    assert deviation / updates == pytest.approx(sigma_rel, rel=1e-3)


def test_products_are_the_integrals():
    held = [Profile(0.05, 300), Profile(0.1, 1000), Profile(0.25, 700)]
    times = (np.arange(400_000) + 0.5) / 400
    densities = np.stack([density(profile, times) for profile in held])
    assert np.allclose(products(held, held), densities @ densities.T / 400, rtol=1e-4)


def test_the_error_is_that_of_the_profile():
    held = [Profile(s, t) for s in (0.05, 0.1) for t in (400, 800)]
    wanted = Profile(0.07, 800)
    found = fit(held, wanted)
    assert sum(found.coefficients) == pytest.approx(1, abs=1e-9)
    times = (np.arange(400_000) + 0.5) / 500
    left = density(wanted, times) - sum(
        c * density(profile, times) for c, profile in zip(found.coefficients, held, strict=True)
    )
    norm = density(wanted, times)
    expected = math.sqrt((left**2).sum() / (norm**2).sum())
    assert found.error == pytest.approx(expected, rel=1e-3) and 0.02 < found.error < 0.1


def test_a_profile_that_is_held_is_itself():
    held = [Profile(s, t) for s in (0.05, 0.1) for t in range(100, 1001, 100)]
    for i in (9, 19):
        found = fit(held, held[i])
        assert np.allclose(found.coefficients, np.eye(20)[i], atol=1e-5)
        assert found.error < 1e-5


@pytest.mark.parametrize("snapshots, largest", [(4, 0.05), (16, 0.005), (64, 3e-4)])
def test_two_widths_make_those_between_them(snapshots, largest):
    """Small coefficients, so that what is rounded stays small. One width alone is much worse."""
    times = [1e5 * (i + 1) / snapshots for i in range(snapshots)]
    both = [Profile(s, t) for s in (0.05, 0.1) for t in times]
    for sigma_rel in (0.06, 0.075, 0.09):
        wanted = Profile(sigma_rel, 1e5)
        found = fit(both, wanted)
        assert found.error < largest
        assert np.linalg.norm(found.coefficients) < 2
        assert fit(both[:snapshots], wanted).error > 4 * found.error


@pytest.mark.parametrize("sigma_rel", [0.06, 0.08, 0.12])
def test_the_sum_is_the_average_of_any_trajectory(sigma_rel):
    """Weights that drift, wander and jitter, in fp64.

    The difference is at most the error times the norms of profile and trajectory (Cauchy-Schwarz),
    whatever the trajectory is; its mean does not count, because the coefficients sum to 1.
    """
    updates = 2000
    rng = np.random.default_rng(0)
    wander = np.cumsum(rng.normal(size=(updates, 50)), axis=0) / math.sqrt(updates)
    drift = np.linspace(0, 1, updates)[:, None] * rng.normal(size=50)
    weights = 3 + wander + drift + 0.3 * rng.normal(size=(updates, 50))
    average = lambda profile: (
        shares(profile.sigma_rel, int(profile.updates)) @ (weights[: int(profile.updates)])
    )
    held = [Profile(s, t) for s in (0.05, 0.1) for t in range(250, updates + 1, 250)]
    wanted = Profile(sigma_rel, updates)
    found = fit(held, wanted)
    ours = sum(c * average(profile) for c, profile in zip(found.coefficients, held, strict=True))
    direct = average(wanted)
    norm = math.sqrt(products([wanted], [wanted])[0, 0])
    spread = np.sqrt(((weights - weights.mean(0)) ** 2).sum(0))
    error = np.abs(ours - direct)
    assert (error <= 1.01 * found.error * norm * spread).all()
    # and far nearer than any that was stored
    nearest = min(np.abs(average(profile) - direct).mean() for profile in held)
    assert error.mean() < nearest / 5
