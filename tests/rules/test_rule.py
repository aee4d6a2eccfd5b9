from __future__ import annotations

import math
from dataclasses import FrozenInstanceError, replace

import pytest

from lightning_flatness.rules import AllOf, AnyOf, Rule, RuleTracker

HIGH, LOW = Rule("k", above=5.0), Rule("margin/mean", below=2.0)


def firings(rule: Rule | AllOf | AnyOf, curves: list[dict[str, float]]) -> list[int]:
    tracker = RuleTracker(rule)
    return [step for step, values in enumerate(curves) if tracker.observe(values, step=step)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, r"exactly one of rise, above, below, shift_up, shift_down; got none"),
        ({"rise": 0.5, "above": 1.0}, r"exactly one of .*; got rise and above"),
        ({"rise": 0.0}, r"`rise` must be above 0; got 0.0"),
        ({"shift_up": -1.0}, r"`shift_up` must be above 0; got -1.0"),
        ({"rise": math.nan}, r"`rise` must be above 0; got nan"),
        ({"below": math.inf}, r"`below` must be finite; got inf"),
        (
            {"rise": 0.5, "reference": "median"},
            r"`reference` must be one of settled, best, ema, previous; got 'median'",
        ),
        ({"rise": 0.5, "on_nonfinite": "stop"}, r"`on_nonfinite` must be one of alert, ignore; got 'stop'"),
    ],
)
def test_a_rule_that_makes_no_sense_is_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rule("k", **arguments)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([HIGH], r"at least two rules to join; got 1"),
        ([HIGH, replace(LOW, action="stop")], r"neither `action` nor `cooldown`; the one on margin/mean has.*AllOf"),
        ([replace(HIGH, cooldown=2), LOW], r"neither `action` nor `cooldown`; the one on k has"),
    ],
)
def test_a_joined_rule_has_one_action(members: list[Rule], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AllOf(members)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patience": 0}, r"`patience` must be a whole number of validations, at least 1; got 0"),
        ({"patience": -2}, r"`patience`.*got -2"),
        ({"warmup": -1}, r"`warmup`.*at least 0; got -1"),
        ({"cooldown": 1.5}, r"`cooldown`.*got 1.5"),
        ({"action": []}, r"`action`.*got an empty list"),
    ],
)
def test_bad_counts_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rule("k", above=1.0, **options)
    with pytest.raises(ValueError, match=message):
        AllOf([Rule("k", above=1.0), Rule("l", above=1.0)], **options)


def test_a_rule_is_its_configuration() -> None:
    seen = Rule("k", above=5.0)
    tracker = RuleTracker(seen)
    assert tracker.observe(9.0, step=0).rule is seen
    assert seen == HIGH
    assert RuleTracker(seen).fired == 0
    with pytest.raises(FrozenInstanceError):
        seen.above = 7.0
    joined = AllOf([HIGH, LOW])
    assert joined == AllOf((HIGH, LOW)) != AnyOf([HIGH, LOW])
    assert joined.keys == ("k", "margin/mean")


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (AllOf([HIGH, LOW]), [2, 3, 5]),
        (AnyOf([HIGH, LOW]), [1, 2, 3, 4, 5]),
        (AllOf([HIGH, LOW], patience=2), [3]),
        (AnyOf([HIGH, LOW], patience=2, cooldown=1), [2, 5]),
        (AllOf([HIGH, replace(LOW, patience=2)]), [3, 5]),
        (AnyOf([replace(HIGH, warmup=3), LOW], warmup=2), [2, 3, 4, 5]),
    ],
)
def test_joined_conditions(rule: AllOf | AnyOf, expected: list[int]) -> None:
    pairs = [(1, 9), (9, 9), (9, 1), (9, 1), (1, 1), (9, 1)]
    assert firings(rule, [{"k": float(k), "margin/mean": float(m)} for k, m in pairs]) == expected


def test_a_joined_alert_gives_every_reason_and_not_finite_is_one() -> None:
    alert = RuleTracker(AllOf([HIGH, LOW])).observe({"k": 6.0, "margin/mean": 1.0}, step=3, epoch=1)
    assert alert.reason == (
        "k is 6, above the limit of 5 from the start, and margin/mean is 1, below the limit of 2 from the start."
    )
    assert [(each.key, each.value, each.reference) for each in alert.violations] == [("k", 6, 5), ("margin/mean", 1, 2)]
    alert = RuleTracker(AllOf([HIGH, LOW], patience=9)).observe({"k": math.nan, "margin/mean": 9.0}, step=3)
    assert (alert.key, alert.reason) == ("k", "k is nan: not finite.")


def test_a_rule_without_a_name_is_described() -> None:
    assert str(Rule("flatness/trace", rise=0.5)) == "flatness/trace rise 0.5"
    assert str(AnyOf([HIGH, LOW])) == "AnyOf(k above 5, margin/mean below 2)"
    assert str(replace(HIGH, name="mine")) == str(AllOf([HIGH, LOW], name="mine")) == "mine"
