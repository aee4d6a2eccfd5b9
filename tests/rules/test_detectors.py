from __future__ import annotations

import math
import random

import pytest

from lightning_flatness.rules import detectors
from lightning_flatness.rules.detectors import WINDOW


def window(*values: float) -> list[detectors.Observation]:
    return [(step, {"k": value}) for step, value in enumerate(values)]


@pytest.mark.parametrize(
    ("values", "settled"),
    [
        ([2.0] * WINDOW, True),
        ([2.0] * (WINDOW - 1), False),
        ([10.0**step for step in range(WINDOW)], False),
        ([100.0 / 2**step for step in range(WINDOW)], False),
        ([100.0, 30.0, 100.0, 250.0, 60.0, 110.0, 90.0, 130.0], True),  # noise of a factor of 2.5, but no growth
        ([-2.0] * WINDOW, True),
        ([0.0] * WINDOW, True),
    ],
)
def test_settled_means_that_the_growth_is_over(values: list[float], settled: bool) -> None:
    assert detectors.has_settled(window(*values), "k") is settled


@pytest.mark.parametrize("slope", [0.0, 0.5, -3.0])
def test_noise_is_that_around_the_trend_and_a_jump_does_not_count(slope: float) -> None:
    numbers = random.Random(0)
    values = [slope * step + numbers.gauss(0, 0.2) for step in range(4000)]
    assert detectors.noise(values, floor=0.0) == pytest.approx(0.2, rel=0.1)
    jumped = values[:2000] + [value + 50 for value in values[2000:]]
    assert detectors.noise(jumped, floor=0.0) == pytest.approx(0.2, rel=0.1)


@pytest.mark.parametrize("factor", [1e-6, 1.0, 1e6])
def test_a_deviation_does_not_depend_on_the_unit(factor: float) -> None:
    past = [10.0, 12.0, 9.0, 11.0, 10.0, 12.0, 9.5, 11.0]
    for now in (30.0, -4.0):
        found = detectors.deviation(window(*[factor * value for value in past]), (9, {"k": factor * now}), "k", up=True)
        assert found == pytest.approx(detectors.deviation(window(*past), (9, {"k": now}), "k", up=True))


@pytest.mark.parametrize(
    ("past", "now", "up", "expected"),
    [
        ([7.0] * WINDOW, 7.0 * math.exp(0.05), True, 1.0),  # where nothing moves five per cent are one unit
        ([7.0] * WINDOW, 7.0 * math.exp(0.05), False, -1.0),
        ([0.0] * WINDOW, 0.0, True, 0.0),
        ([2.0**step for step in range(WINDOW)], 2.0**WINDOW, True, 0.0),  # steady growth goes on
        ([2.0**step for step in range(WINDOW)], 2.0 ** (WINDOW - 1), False, -3.5 * math.log(2) / 0.05),
        ([-1.0 * step for step in range(WINDOW)], -1.0 * WINDOW, False, 0.0),
    ],
)
def test_a_deviation_is_from_what_was_to_be_expected(past: list[float], now: float, up: bool, expected: float) -> None:
    assert detectors.deviation(window(*past), (9, {"k": now}), "k", up) == pytest.approx(expected, abs=1e-9)


def test_a_sum_needs_two_deviations_however_large_and_falls_at_once() -> None:
    total = detectors.cumulated(0.0, 1e9, threshold=6.0)
    assert total < 6.0
    total = detectors.cumulated(total, 1e9, threshold=6.0)
    assert total == 6.0
    assert detectors.cumulated(total, 1e9, threshold=6.0) == 6.0
    assert detectors.cumulated(total, 0.0, threshold=6.0) == 5.5
    assert detectors.cumulated(0.0, -1e9, threshold=6.0) == 0.0


def test_the_moving_average_of_a_product_is_the_product_of_the_averages() -> None:
    numbers = random.Random(0)
    average = None
    for step in range(50):
        a, b = numbers.uniform(0.1, 9), numbers.uniform(0.1, 9)
        average = detectors.averaged(average, (step, {"a": a, "b": b, "ab": a * b}))
    step, values = average
    assert step == 49
    assert values["ab"] == pytest.approx(values["a"] * values["b"])
