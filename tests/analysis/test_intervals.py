"""Intervals hold the mean as often as they say, and numbers of seeds are the smallest that are
enough.
"""

import math

import numpy as np
import pytest
from scipy import integrate, stats

from sra_fast.analysis.intervals import (
    bootstrap_interval,
    paired,
    power_of,
    seeds_needed,
    t_interval,
)

# t of 97.5 % by degrees of freedom, from printed tables
QUANTILES = {1: 12.706, 2: 4.303, 4: 2.776, 9: 2.262, 30: 2.042}


@pytest.mark.parametrize("freedom, quantile", QUANTILES.items())
def test_t_interval_has_the_printed_quantiles(freedom, quantile):
    values = np.random.default_rng(freedom).normal(3, 2, freedom + 1)
    low, high = t_interval(values)
    assert (low + high) / 2 == pytest.approx(values.mean())
    error = stats.sem(values)
    assert (high - low) / 2 == pytest.approx(quantile * error, rel=2e-4)
    wide = t_interval(values, level=0.99)
    assert wide[0] < low < high < wide[1]


def coverage(interval, draw, mean, trials=1000):
    held = 0
    for trial in range(trials):
        low, high = interval(draw(np.random.default_rng([1, trial])))
        held += low <= mean <= high
    return held / trials


def test_t_interval_of_three_seeds_holds_the_mean_19_times_of_20():
    # three standard errors of a share of 1000 trials are 2 points; the draws are seeded
    found = coverage(t_interval, lambda rng: rng.normal(0.3, 2.0, 3), mean=0.3)
    assert found == pytest.approx(0.95, abs=0.02)


def test_bootstrap_interval_of_skewed_losses_holds_the_mean_19_times_of_20():
    found = coverage(bootstrap_interval, lambda rng: rng.exponential(1.0, 300), 1.0, trials=400)
    assert found == pytest.approx(0.95, abs=0.033)


def test_bootstrap_interval_is_that_of_the_resampled_means():
    values = np.random.default_rng(0).normal(size=1000)
    low, high = bootstrap_interval(values)
    assert bootstrap_interval(values) == (low, high) != bootstrap_interval(values, seed=1)
    # for many values it is that of the normal distribution
    half = 1.96 * stats.sem(values)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.005)
    assert bootstrap_interval([2.0, 2.0, 2.0]) == (2.0, 2.0)


def naive_power(count, effect, deviation):
    """The integral over the sample's deviation of the chance that its mean is far enough from 0."""
    freedom = count - 1
    bound = stats.t.ppf(0.975, freedom)
    error = deviation / math.sqrt(count)

    def chance(ratio):
        far = bound * ratio * error
        found = stats.norm.sf((far - effect) / error) + stats.norm.cdf((-far - effect) / error)
        # ratio * sqrt(freedom) is chi-distributed
        return found * stats.chi.pdf(ratio * math.sqrt(freedom), freedom) * math.sqrt(freedom)

    return integrate.quad(chance, 0, 10, points=[0.5, 1, 2], limit=200)[0]


@pytest.mark.parametrize("deviation", [0.002, 0.005, 0.01, 0.03, 0.05, 0.1])
def test_seeds_needed_is_the_smallest_number_that_is_enough(deviation):
    # two values of this deviation
    differences = [0.0, deviation * math.sqrt(2)]
    found = seeds_needed(differences, of=-1.0)
    first = next(n for n in range(2, 400) if naive_power(n, 0.05, deviation) >= 0.8)
    assert found == first
    power = naive_power(found, 0.05, deviation)
    assert power_of(found, 0.05, deviation) == pytest.approx(power, abs=1e-4)
    if deviation > 0.01:
        bound = stats.t.ppf(0.975, found - 1)
        shift = 0.05 / deviation * math.sqrt(found)
        known = stats.nct.sf(bound, found - 1, shift) + stats.nct.cdf(-bound, found - 1, shift)
        assert power == pytest.approx(known, abs=1e-6)


def test_seeds_needed_at_the_ends():
    assert seeds_needed([0.1, 0.1], of=1.0) == 2
    assert seeds_needed([0.0, 1e-9], of=1.0) == 2
    assert seeds_needed([0.0, 100.0], of=1.0) is None


def test_pairs():
    assert paired([3.0, 5.0], [1.0, 1.0]).tolist() == [2.0, 4.0]
    with pytest.raises(ValueError, match=r"expected pairs, got the shapes \(2,\) and \(1,\)"):
        paired([1.0, 2.0], [1.0])


@pytest.mark.parametrize("interval", [t_interval, bootstrap_interval])
def test_bad_values(interval):
    with pytest.raises(ValueError, match=r"at least 2 values in a row, got the shape \(1,\)"):
        interval([1.0])
    with pytest.raises(ValueError, match="finite values, got 1 of 3 that are not"):
        interval([1.0, math.nan, 2.0])
    with pytest.raises(ValueError, match="level between 0 and 1, got 95"):
        interval([1.0, 2.0], level=95)
    with pytest.raises(ValueError, match="part of a finite mean that is not 0, got 0.05 of 0.0"):
        seeds_needed([1.0, 2.0], of=0.0)
