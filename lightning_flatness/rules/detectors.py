"""Reference levels and change detection for a series of values: pure functions. Standard library only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from statistics import median, median_low

Observation = tuple[int, dict[str, float]]
"""The global step of a validation, and its finite values by key."""

WINDOW = 8
"""Number of validations in the trailing window whose median is the level that a value is compared with."""
MEMORY = 16
"""The noise is estimated from at most this many validations; the first estimate needs those of the window."""
_SETTLED = 0.5  # the medians of the two halves of a window may differ by this fraction of the first one
_DECAY = 0.9  # of the exponential moving average
_NOISE_FLOOR = 0.05  # in log; at the end of a decaying schedule nothing moves, and any change would look large
_DRIFT = 0.5  # in units of noise; only what exceeds it is accumulated
_LONGEST_STRIDE = 0.5  # of the threshold, so that no single validation can reach it


def has_settled(window: Sequence[Observation], key: str) -> bool:
    """Return whether the rapid change at the start of training is over.

    It is over when the window is full and the medians of its halves differ by at most half of the first one.
    """
    values = [observation[1][key] for observation in window]
    before, after = values[: WINDOW // 2], values[WINDOW // 2 :]
    return len(values) == WINDOW and abs(median(after) - median(before)) <= _SETTLED * abs(median(before))


def typical(window: Sequence[Observation], key: str) -> Observation:
    """Return the observation whose value is the (low) median of the window; a real one has a step and all its keys."""
    middle = median_low(values[key] for _, values in window)
    return next(observation for observation in reversed(window) if observation[1][key] == middle)


def averaged(average: Observation | None, now: Observation) -> Observation:
    """Return the exponential moving average (0.9) after one more observation; its step is that of the newest one.

    The mean is geometric where the values are positive. The average of a product is then the product of the averages of
    its factors.
    """
    before = now[1] if average is None else average[1]
    return now[0], {key: _mixed(before.get(key, value), value) for key, value in now[1].items()}


def noise(values: Sequence[float], floor: float) -> float:
    r"""Return a robust estimate of the standard deviation of a series around its trend.

    With \(d\) the differences between neighbours and \(\tilde d\) their median, which removes the trend, it is the
    two-thirds quantile of \(|d - \tilde d|\), divided by \(0.967 \sqrt 2\): its value for normal noise with standard
    deviation 1. Up to a third of the differences may be jumps.

    Args:
        values: at least two values, in order.
        floor: lower bound of the result.

    Example:
        >>> noise([1.0, 2.0, 3.0, 4.0], floor=0.1)
        0.1
    """
    steps = [after - before for before, after in pairwise(values)]
    trend = median(steps)
    spread = sorted(abs(step - trend) for step in steps)
    return max(floor, spread[round(2 / 3 * (len(spread) - 1))] / (0.967 * math.sqrt(2)))


def deviation(memory: Sequence[Observation], now: Observation, key: str, up: bool) -> float:
    """Return by how many units of noise a value deviates from the expected one.

    The expected value is the median of the window. A trend in the watched direction is extrapolated from the middle of
    the window to now, so steady growth is no deviation. All of this is computed on logarithms, or on the values
    themselves if one of them is not positive, which can happen to a margin.

    Args:
        memory: at least one window of observations, oldest first.
        now: the newest observation; not part of the memory.
        key: the monitored key.
        up: True counts deviations upwards as positive, False those downwards.
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
    r"""Return the cumulative sum (CUSUM) after one more deviation in the watched direction.

    \(S' = \max(0, S + z - 0.5)\) for a deviation \(z\). One deviation adds at most half of the threshold, so a single
    outlier cannot reach it. The sum stops at the threshold, so it falls as soon as the deviation ends.

    Source: Page, "Continuous inspection schemes", Biometrika 1954.
    """
    stride = min(deviation - _DRIFT, _LONGEST_STRIDE * threshold)
    return min(max(0.0, total + stride), threshold)


def _mixed(average: float, value: float) -> float:
    if average > 0 and value > 0:
        return math.exp(_DECAY * math.log(average) + (1 - _DECAY) * math.log(value))
    return _DECAY * average + (1 - _DECAY) * value
