from __future__ import annotations

import math

import pytest

from lightning_flatness import Alert, rules
from lightning_flatness.keys import FACTORS
from lightning_flatness.rules import Rule, RuleTracker, Violation

BEFORE = {**dict.fromkeys(FACTORS, 2.0), "flatness/relative": 32.0, "margin/mean": -4.0}
AFTER = {**BEFORE, "flatness/relative": 96.0, "flatness/confidence": 6.0, "margin/mean": 3.0}


def test_an_alert_carries_its_numbers() -> None:
    tracker = RuleTracker(Rule("flatness/relative", rise=1.0, reference="previous", name="mine"))
    tracker.observe(BEFORE, step=100)
    alert = tracker.observe(AFTER, step=200, epoch=3)
    assert (alert.rule_name, alert.number, alert.onset_step, alert.ratio) == ("mine", 1, 100, 3.0)
    assert alert.changes == pytest.approx(
        {
            "flatness/relative": math.log(3),
            **dict.fromkeys(FACTORS, 0.0),
            "flatness/confidence": math.log(3),
        }
    )
    assert sum(alert.changes[factor] for factor in FACTORS) == pytest.approx(alert.changes["flatness/relative"])
    (violation,) = alert.violations
    assert (violation.before["margin/mean"], violation.after["margin/mean"]) == (-4.0, 3.0)
    assert hash(alert) == hash(alert)


@pytest.mark.parametrize(
    ("before", "after", "fires"), [(-4.0, -1.0, True), (-4.0, -3.0, False), (-4.0, 2.0, True), (2.0, -4.0, False)]
)
def test_values_below_zero_rise_by_a_part_of_their_size_and_have_no_ratio(
    before: float, after: float, fires: bool
) -> None:
    """Curved heads and losses such as focal loss have negative traces."""
    tracker = RuleTracker(Rule("flatness/trace", rise=0.5, reference="previous"))
    tracker.observe({**BEFORE, "flatness/trace": before}, step=100)
    alert = tracker.observe({**BEFORE, "flatness/trace": after}, step=200)
    assert (alert is not None) == fires
    if alert is not None:
        assert alert.ratio is None
        assert "flatness/trace" not in alert.changes
        assert f"rose from {before:g} to {after:g}" in alert.reason
        assert "times" not in alert.reason


@pytest.mark.parametrize("reference", ["best", "ema", "previous", "settled"])
@pytest.mark.parametrize("condition", [{"rise": 0.5}, {"shift_up": 5.0}])
def test_rules_go_on_where_the_sign_changes(condition: dict[str, float], reference: str) -> None:
    options = {"reference": reference} if "rise" in condition else {}
    tracker = RuleTracker(Rule("flatness/trace", **condition, **options))
    values = [-2.0, -2.1, -1.9, -2.0, -2.05, -2.0, -1.95, -2.0, -2.02, -1.98, 0.0, 3.0, 9.0, 27.0]
    alerts = [tracker.observe({"flatness/trace": value}, step) for step, value in enumerate(values)]
    assert not any(alerts[:10])
    assert any(alerts[10:])


def test_the_numbers_of_a_joined_rule_are_those_of_its_first_violation() -> None:
    first = Violation("a", 6.0, 5.0, "above", onset_step=7, before={"a": 3.0}, after={"a": 6.0})
    second = Violation("b", 1.0, 2.0, "below", onset_step=9, before={"b": 8.0}, after={"b": 1.0})
    alert = Alert(rules.label_noise(), "a", 6.0, 5.0, 11, 1, "why", 2, (first, second))
    assert (alert.rule_name, alert.onset_step, alert.ratio) == ("label_noise", 7, 2.0)
    assert [violation.ratio for violation in alert.violations] == [2.0, 0.125]


def test_seven_fields_are_enough() -> None:
    alert = Alert("a rule", "a", 6.0, 5.0, 11, 1, "why")
    assert (alert.number, alert.violations) == (1, ())
    assert (alert.rule_name, alert.onset_step, alert.ratio, alert.changes) == ("a rule", None, None, {})
