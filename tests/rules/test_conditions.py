from __future__ import annotations

import math
import random

import pytest

from lightning_flatness.rules import Rule, RuleTracker

GROWTH = [0.2, 2.0, 20.0, 90.0, 200.0, 400.0, 500.0, 560.0, 590.0, 600.0]  # as every healthy training begins


def firings(rule: Rule, values: list[float]) -> list[int]:
    tracker = RuleTracker(rule)
    return [step for step, value in enumerate(values) if tracker.observe(value, step=step)]


def noisy(level: float, sigma: float, count: int, seed: int = 0) -> list[float]:
    numbers = random.Random(seed)
    return [level * math.exp(numbers.gauss(0, sigma)) for _ in range(count)]


@pytest.mark.parametrize(
    ("reference", "values", "expected"),
    [
        ("previous", [2, 2.9, 2.9, 5], [3]),
        ("best", [4, 2, 2.9, 3.1, 1, 1.6], [3, 5]),
        ("ema", [2.0] * 5 + [3.1], [5]),
        ("ema", [2.0] * 5 + [2.9], []),
        ("settled", [*GROWTH, *[600] * 8], []),
        ("settled", [*[600] * 8, 899, 901, 1e6, 600], [9, 10]),
        ("settled", [*[600] * 8, *[1000] * 20], list(range(8, 28))),  # a breach does not move the level that it broke
        ("settled", [*[600] * 8, *[600 * 1.05**step for step in range(30)]], []),  # slow growth is followed
        ("settled", [*[600] * 8, *[300] * 8, 500], [16]),  # but a lower level counts
        ("previous", [-2, -1.1, 1], [2]),  # of a margin: half its size up
        ("best", [0, 0, 1e-9], [2]),
    ],
)
def test_rise(reference: str, values: list[float], expected: list[int]) -> None:
    assert firings(Rule("k", rise=0.5, reference=reference), values) == expected


def test_settled_comes_after_the_growth_and_names_a_real_validation() -> None:
    tracker = RuleTracker(Rule("k", rise=0.5))
    values = [*GROWTH, 610.0, 592.0, 605.0, 601.0, 1500.0]
    (alert,) = [alert for step, value in enumerate(values) if (alert := tracker.observe(value, step=10 * step))]
    assert (alert.value, alert.step) == (1500.0, 140)
    assert alert.reference in values
    assert alert.onset_step == 130  # the last one at the old level
    assert f"{1500 / alert.reference:.1f} times the settled level" in alert.reason


@pytest.mark.parametrize(
    ("condition", "values", "expected"),
    [("above", [5, 5.1, 4], [1]), ("below", [5, 4.9, 6, -1], [1, 3]), ("above", [-math.inf], [0])],
)
def test_limits(condition: str, values: list[float], expected: list[int]) -> None:
    assert firings(Rule("k", **{condition: 5.0}), values) == expected


@pytest.mark.parametrize("direction", ["shift_up", "shift_down"])
@pytest.mark.parametrize("sigma", [0.0, 0.02, 0.3])
def test_a_shift_is_found_within_three_validations_whatever_the_noise(direction: str, sigma: float) -> None:
    factor = math.exp(max(0.5, 6 * sigma))
    after = 500 * factor if direction == "shift_up" else 500 / factor
    runs = [[*GROWTH, *noisy(500, sigma, 20, seed), *noisy(after, sigma, 3, seed + 100)] for seed in range(100)]
    assert sum(firings(Rule("k", **{direction: 8.0}), values)[-1:] >= [30] for values in runs) >= 90


@pytest.mark.parametrize("sigma", [0.0, 0.02, 0.3])
def test_noise_and_single_outliers_are_no_shift(sigma: float) -> None:
    alarms = 0
    for seed in range(100):
        values = [*GROWTH, *noisy(500, sigma, 30, seed)]
        values[25] *= 100
        alarms += bool(firings(Rule("k", shift_down=8.0), values))
    assert alarms <= 5


def test_a_margin_that_turns_negative_is_a_shift_down() -> None:
    rule = Rule("margin/mean", shift_down=8.0)
    assert firings(rule, [*noisy(6.0, 0.05, 12), -1.3, -0.5, 0.4]) == [13]


def test_after_an_alert_a_shift_is_looked_for_from_the_new_level() -> None:
    rule = Rule("k", shift_up=8.0)
    found = firings(rule, [*noisy(10, 0.03, 12), *noisy(20, 0.03, 20, seed=1), *noisy(40, 0.03, 12, seed=2)])
    assert found == [13, 33]


ONSETS: dict[str, tuple[Rule, list[float], int]] = {
    "shift": (Rule("k", shift_up=8.0), [*[10.0] * 12, 20, 20], 11),
    "slow shift": (Rule("k", shift_up=8.0), [*[10.0] * 12, 10.9, 11.8, 12.8], 11),
    "shift down": (Rule("k", shift_down=8.0), [*[10.0] * 12, 5, 5], 11),
    "an outlier before": (Rule("k", shift_up=8.0), [*[10.0] * 9, 99.0, *[10.0] * 9, 20, 20], 18),
    "rise": (Rule("k", rise=0.5), [*[10.0] * 8, 11, 10, 20], 9),
    "slow rise": (Rule("k", rise=0.5, reference="best"), [10.0, 10, 11, 12, 13, 14, 15, 16], 3),
    "patience": (Rule("k", rise=0.5, patience=3), [*[10.0] * 9, 20, 16, 20], 8),
    "previous": (Rule("k", rise=0.5, reference="previous"), [10.0, 11, 12, 20], 2),
    "average": (Rule("k", rise=0.5, reference="ema"), [10.0, 10, 11, 30], 2),
    "above": (Rule("k", above=15.0), [10.0, 9, 12, 14, 16], 1),
    "below": (Rule("k", below=5.0), [10.0, 9, 11, 7, 6, 4], 2),
    "above, patience": (Rule("k", above=15.0, patience=3), [10.0, 9, 16, 15.5, 16], 1),
}


@pytest.mark.parametrize(("rule", "values", "onset"), ONSETS.values(), ids=ONSETS)
def test_the_onset_is_the_last_validation_before_the_change(rule: Rule, values: list[float], onset: int) -> None:
    tracker = RuleTracker(rule)
    alerts = [alert for step, value in enumerate(values) if (alert := tracker.observe(value, step=step))]
    assert alerts[0].step == len(values) - 1
    assert alerts[0].onset_step == onset
    assert alerts[0].violations[0].before == {"k": values[onset]}


@pytest.mark.parametrize("sigma", [0.02, 0.1, 0.3])
def test_the_onset_of_a_shift_is_the_true_change_point(sigma: float) -> None:
    found = []
    for seed in range(100):
        tracker = RuleTracker(Rule("k", shift_up=8.0))
        values = [*noisy(10, sigma, 20, seed), *noisy(10 * math.exp(max(0.5, 6 * sigma)), sigma, 4, seed + 100)]
        alerts = [alert for step, value in enumerate(values) if (alert := tracker.observe(value, step=step))]
        found += [alert.onset_step for alert in alerts if alert.step > 19]
    assert len(found) >= 90
    assert sum(onset == 19 for onset in found) >= 0.6 * len(found)
    assert sum(abs(onset - 19) <= 1 for onset in found) >= 0.7 * len(found)
