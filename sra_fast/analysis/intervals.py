"""Confidence intervals of a mean."""

import numpy as np

RESAMPLES = 2000


def bootstrap_interval(
    values: np.ndarray, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of ``values [N]`` (Efron 1979); N at least 1."""
    values = np.asarray(values, np.float64)
    generator = np.random.default_rng(seed)
    # one resample at a time: all of them would be N x 2000 numbers
    means = [
        values[generator.integers(len(values), size=len(values))].mean() for _ in range(RESAMPLES)
    ]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def t_interval(values: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Student's t interval of the mean of ``values [N]``; N at least 2."""
    from scipy.stats import t

    values = np.asarray(values, np.float64)
    error = values.std(ddof=1) / len(values) ** 0.5
    half = float(t.ppf((1 + level) / 2, len(values) - 1)) * error
    return float(values.mean() - half), float(values.mean() + half)
