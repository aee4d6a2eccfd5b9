"""Reference levels and change detection for a monitored value: standard library only, no state of their own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from statistics import median, median_low

Observation = tuple[int, dict[str, float]]
"""The step of a validation and the values by key that were finite in it."""

WINDOW = 8
"""Validations in the trailing window whose median is the level that a value is compared with."""
MEMORY = 16
"""Validations from which the noise is estimated; it begins with those of the window."""
_SETTLED = 0.5  # a window has settled when its second half is not further than this from its first half
_DECAY = 0.9  # of the exponential moving average
_NOISE_FLOOR = 0.05  # in log: at the end of a decaying schedule nothing moves, and anything would be a change
_DRIFT = 0.5  # in units of noise: what each validation must exceed to count
_LONGEST_STRIDE = 0.5  # of the threshold: no single validation reaches it


def has_settled(window: Sequence[Observation], key: str) -> bool:
    """Return whether the growth that starts every training is over.

    It is when the window is full and the medians of its halves differ by at most half of the first one.
    """
    values = [observation[1][key] for observation in window]
    before, after = values[: WINDOW // 2], values[WINDOW // 2 :]
    return len(values) == WINDOW and abs(median(after) - median(before)) <= _SETTLED * abs(median(before))


def typical(window: Sequence[Observation], key: str) -> Observation:
    """Return the observation whose value is the (low) median of the window: a real one, so that it has a step."""
    middle = median_low(values[key] for _, values in window)
    return next(observation for observation in reversed(window) if observation[1][key] == middle)


def averaged(average: Observation | None, now: Observation) -> Observation:
    """Return the exponential moving average (0.9) after one more observation, with the step of the newest.

    Geometric where values are positive: the average of a product is then the product of its factors' averages.
    """
    before = now[1] if average is None else average[1]
    return now[0], {key: _mixed(before.get(key, value), value) for key, value in now[1].items()}


def noise(values: Sequence[float], floor: float) -> float:
    """Return the standard deviation of a series around its trend, robustly.

    From the differences `d` between neighbours, whose median takes the trend out: the two-thirds quantile of
    `|d - median d|` over `0.967 sqrt(2)`, which is what it is for normal noise of standard deviation 1. A third of the
    differences may be jumps.

    Args:
        values: at least two, in order.
        floor: the least that is returned.

    Example:
        >>> noise([1.0, 2.0, 3.0, 4.0], floor=0.1)
        0.1
    """
    steps = [after - before for before, after in pairwise(values)]
    trend = median(steps)
    spread = sorted(abs(step - trend) for step in steps)
    return max(floor, spread[round(2 / 3 * (len(spread) - 1))] / (0.967 * math.sqrt(2)))


def deviation(memory: Sequence[Observation], now: Observation, key: str, up: bool) -> float:
    """Return how far a value is above (or below) where the memory leads one to expect it, in units of its noise.

    Expected is the median of the window. Where the run has a trend in the watched direction, it is carried on from the
    middle of the window to now: steady growth is no deviation. In logs, or in the values themselves if one of them
    is not positive, as a margin can be.

    Args:
        memory: at least a window of observations, oldest first.
        now: the newest observation, not in the memory.
        key: of the value.
        up: whether a deviation upwards is positive; False: downwards.
    """
    values = [observation[1][key] for observation in (*memory, now)]
    if logarithmic := min(values) > 0:
        values = [math.log(value) for value in values]
    *past, present = values if up else [-value for value in values]
    trend = max(0.0, median(after - before for before, after in pairwise(past)))
    expected = median(past[-WINDOW:]) + trend * (WINDOW + 1) / 2
    floor = _NOISE_FLOOR if logarithmic else _NOISE_FLOOR * max(map(abs, past))
    return (present - expected) / max(noise(past, floor), 1e-12)


def cumulated(total: float, deviation: float, threshold: float) -> float:
    """Return the cumulative sum (CUSUM) after one more deviation in the watched direction.

    `S' = max(0, S + z - 0.5)`; a deviation `z` counts at most half of the threshold, so that a single outlier
    does not reach it, and the sum stops at the threshold, so that it falls as soon as the deviation ends.

    Source: Page, "Continuous inspection schemes", Biometrika 1954.
    """
    stride = min(deviation - _DRIFT, _LONGEST_STRIDE * threshold)
    return min(max(0.0, total + stride), threshold)


def _mixed(average: float, value: float) -> float:
    if average > 0 and value > 0:
        return math.exp(_DECAY * math.log(average) + (1 - _DECAY) * math.log(value))
    return _DECAY * average + (1 - _DECAY) * value
