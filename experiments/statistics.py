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
        if not self.n or np.isnan(self.value):
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


def over_pairs(values: np.ndarray, first: np.ndarray, second: np.ndarray) -> Estimate:
    """Return the mean over pairs, with a bootstrap interval over what the pairs are made of.

    Pairs that share a network are not independent. So the networks are drawn with replacement, and a pair counts as
    often as the product of how often its two networks were drawn.

    Args:
        values: shape (pairs,).
        first: which network is one of the pair, shape (pairs,).
        second: which is the other one, shape (pairs,).
    """
    values, n = np.asarray(values, dtype=float), len(values)
    if n < FEWEST:
        return Estimate(float(values.mean()) if n else np.nan, np.nan, np.nan, n)
    members, places = np.unique(np.concatenate([first, second]), return_inverse=True)
    size = len(members)
    drawn = np.random.default_rng(0).multinomial(size, np.full(size, 1 / size), RESAMPLES)
    weights = drawn[:, places[:n]] * drawn[:, places[n:]]
    weights = weights[weights.any(1)]
    low, high = np.percentile(weights @ values / weights.sum(1), [50 - 50 * LEVEL, 50 + 50 * LEVEL])
    return Estimate(float(values.mean()), float(low), float(high), n)


def over_members(statistics: Callable[[np.ndarray], np.ndarray], n: int) -> list[Estimate]:
    """Return several numbers with their bootstrap intervals over the things that they are computed from.

    Args:
        statistics: returns the numbers for some of the things, given by their indices.
        n: how many things there are.
    """
    generator = np.random.default_rng(0)
    drawn = [statistics(generator.integers(n, size=n)) for _ in range(RESAMPLES)]
    low, high = np.percentile(drawn, [50 - 50 * LEVEL, 50 + 50 * LEVEL], axis=0)
    return [Estimate(*map(float, each), n) for each in zip(statistics(np.arange(n)), low, high, strict=True)]


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
