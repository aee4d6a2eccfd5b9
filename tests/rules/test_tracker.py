from __future__ import annotations

import math
import random
import types

import pytest

from lightning_flatness.rules import AllOf, AnyOf, Rule, RuleTracker


def firings(tracker: RuleTracker, values: list[float]) -> list[int]:
    return [step for step, value in enumerate(values) if tracker.observe(value, step=step, epoch=0)]


@pytest.mark.parametrize(
    ("options", "values", "expected"),
    [
        ({}, [9], [0]),  # the first breach fires
        ({}, [9, 9, 1, 9], [0, 1, 3]),
        ({"patience": 3}, [9, 9, 1, 9, 9, 9, 9], [5]),
        ({"patience": 2}, [9, 9, 9, 9, 9], [1, 3]),
        ({"warmup": 2}, [9, 9, 9, 1], [2]),
        ({"warmup": 2, "patience": 2}, [9, 9, 9, 9], [3]),
        ({"cooldown": 2}, [9, 9, 9, 9, 1, 9], [0, 3]),
        ({"cooldown": 1, "patience": 2}, [9, 9, 9, 9, 9], [1, 4]),
        ({"patience": 3, "warmup": 9}, [1, math.nan, 1], [1]),  # what is not finite waits for nothing
        ({"cooldown": 1}, [math.inf, -math.inf, math.nan], [0, 2]),
        ({"on_nonfinite": "ignore"}, [math.nan, math.inf, 9], [2]),
        ({"on_nonfinite": "ignore", "patience": 2}, [9, math.nan, 9], [2]),
    ],
)
def test_patience_warmup_cooldown(options: dict, values: list[float], expected: list[int]) -> None:
    tracker = RuleTracker(Rule("k", above=5, **options))
    assert firings(tracker, values) == expected
    assert tracker.fired == len(expected)


def test_the_alert_says_what_when_and_why() -> None:
    rule = Rule("k", above=5)
    tracker = RuleTracker(rule)
    assert tracker.observe({"k": 4.0}, step=100, epoch=1) is None
    alert = tracker.observe({"k": 8.0}, step=200, epoch=2)
    assert (alert.rule, alert.key, alert.value, alert.reference, alert.step, alert.epoch) == (rule, "k", 8.0, 5, 200, 2)
    assert (alert.number, alert.onset_step, alert.ratio) == (1, 100, 2.0)
    assert alert.reason == "k rose from 4 to 8 since step 100 (above the limit of 5)."
    alert = tracker.observe({"k": math.nan}, step=300)
    assert alert.reason == "k is nan: not finite."
    assert (alert.number, alert.onset_step, alert.ratio) == (2, None, None)


def test_a_validation_without_the_value_does_not_count() -> None:
    tracker = RuleTracker(Rule("k", above=5, warmup=1, patience=2, cooldown=1))
    seen = [{"k": 9}, {"other": 9}, {"k": 9}, {}, {"k": 9}, {"other": 1}, {"k": 9}, {"k": 9}, {"k": 9}]
    assert [step for step, values in enumerate(seen) if tracker.observe(values, step=step)] == [4, 8]


RULES = [
    *(Rule("k", rise=0.4, reference=reference, patience=2) for reference in ("settled", "best", "ema", "previous")),
    Rule("k", shift_up=1.5, cooldown=2),
    Rule("k", shift_down=1.5),
    Rule("k", below=2.0, warmup=7, cooldown=1),
    AllOf([Rule("k", above=3.0), Rule("margin/mean", below=3.0, patience=2)], patience=2),
    AnyOf([Rule("k", shift_up=4.0), Rule("margin/mean", shift_down=4.0)], cooldown=5),
]


def plain(state: object) -> bool:
    if type(state) in (list, tuple, dict):
        return all(map(plain, state.items() if type(state) is dict else state))
    return type(state) in (bool, int, float, str, types.NoneType)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_rule_goes_on_from_its_state_as_if_nothing_had_happened(rule: Rule | AllOf | AnyOf) -> None:
    numbers = random.Random(1)
    steps = [{"k": numbers.lognormvariate(1, 0.6), "margin/mean": numbers.gauss(3, 2)} for _ in range(80)]
    whole = RuleTracker(rule)
    expected = [whole.observe(values, step=step) for step, values in enumerate(steps)]
    assert any(expected)
    for stop in range(0, 80, 7):
        first, second = RuleTracker(rule), RuleTracker(rule)
        found = [first.observe(values, step=step) for step, values in enumerate(steps[:stop])]
        state = first.state_dict()
        assert plain(state)
        second.load_state_dict(state)
        first.observe(steps[0], step=999)  # the state is a copy
        found += [second.observe(values, step=step) for step, values in enumerate(steps[stop:], start=stop)]
        assert found == expected
