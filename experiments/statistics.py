"""Intervals and texts that the tables share."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy import stats

RESAMPLES = 2000
LEVEL = 0.95
"""Of all intervals."""
FEWEST = 3
"""Observations below which there is no interval."""


class Estimate(NamedTuple):
    """A number with its interval, and how many observations it rests on."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        if not self.n:
            return "none"
        if np.isnan(self.low):
            return f"{self.value:.3f} (n = {self.n})"
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def bootstrapped(statistic: Callable[..., float], *series: np.ndarray) -> Estimate:
    """Return a statistic of paired series with its percentile bootstrap interval.

    Args:
        statistic: called with the series and `axis`.
        series: all of the same length.
    """
    n = len(series[0])
    if n < FEWEST:
        return Estimate(float(statistic(*series, axis=-1)) if n else np.nan, np.nan, np.nan, n)
    found = stats.bootstrap(
        series,
        statistic,
        paired=True,
        n_resamples=RESAMPLES,
        confidence_level=LEVEL,
        method="percentile",
        rng=0,
    ).confidence_interval
    return Estimate(float(statistic(*series, axis=-1)), float(found.low), float(found.high), n)


def mean(values: np.ndarray) -> Estimate:
    """Return the mean of a series with its bootstrap interval."""
    return bootstrapped(np.mean, np.asarray(values, dtype=float))


def pearson(x: np.ndarray, y: np.ndarray) -> Estimate:
    """Return Pearson's r with its bootstrap interval."""
    return bootstrapped(lambda a, b, axis: stats.pearsonr(a, b, axis=axis).statistic, x, y)


def spearman(x: np.ndarray, y: np.ndarray) -> Estimate:
    """Return Spearman's rank correlation with its bootstrap interval."""

    def statistic(a: np.ndarray, b: np.ndarray, axis: int) -> np.ndarray:
        return stats.pearsonr(stats.rankdata(a, axis=axis), stats.rankdata(b, axis=axis), axis=axis).statistic

    return bootstrapped(statistic, x, y)


def share(hits: int, n: int) -> Estimate:
    """Return a share with its exact (Clopper-Pearson) interval."""
    if not n:
        return Estimate(np.nan, np.nan, np.nan, 0)
    interval = stats.binomtest(int(hits), int(n)).proportion_ci(LEVEL)
    return Estimate(hits / n, interval.low, interval.high, n)
