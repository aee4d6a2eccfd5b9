"""A rule at work: what it remembers from validation to validation, and when it fires. Standard library only."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lightning_flatness.rules.alert import Alert, Violation
from lightning_flatness.rules.conditions import condition_of
from lightning_flatness.rules.explain import reason
from lightning_flatness.rules.rule import AllOf, AnyRule, JoinedRule

_COUNTERS = ("seen", "streak", "quiet", "fired")


class RuleTracker:
    """Shows one rule the values of every validation; remembers what the rule needs, and returns its alerts.

    Attributes:
        rule: the rule, which stays unchanged.
        seen: number of validations in which the rule was checked.
        streak: number of consecutive validations in which its condition has held.
        quiet: number of validations of cooldown that are left.
        fired: number of alerts so far.

    Example:
        >>> from lightning_flatness.rules import Rule
        >>> tracker = RuleTracker(Rule("flatness/relative", rise=0.5, reference="previous"))
        >>> tracker.observe({"flatness/relative": 2.0}, step=100)
        >>> tracker.observe({"flatness/relative": 4.6}, step=200).reason
        'Sharper: flatness/relative rose from 2 to 4.6 since step 100 (2.3 times the previous value).'
    """

    def __init__(self, rule: AnyRule) -> None:
        self.rule = rule
        self.seen = self.streak = self.quiet = self.fired = 0
        self._condition = _Joined(rule) if isinstance(rule, JoinedRule) else condition_of(rule)

    def observe(self, values: Mapping[str, float] | float, step: int, epoch: int = 0) -> Alert | None:
        """Return an alert if the rule fires; call it once per validation, with that validation's values only.

        Args:
            values: by key; keys that the rule does not read help to explain the alert, `learning_rate` among them. A
                bare number is the value of a rule that reads one key. A validation without a value that the rule reads
                does not count.
            step: global step of the validation.
            epoch: epoch of the validation.
        """
        if not isinstance(values, Mapping):
            (key,) = self.rule.keys
            values = {key: values}
        if not self.rule.applies_to(values):
            return None
        violations = self.check(values, step)
        if self.quiet > 0:
            self.quiet -= 1
            self.streak = 0
            return None
        if not violations:
            return None
        self.fired += 1
        self.quiet = self.rule.cooldown
        self.restart()
        key, value, reference = violations[0].key, violations[0].value, violations[0].reference
        return Alert(self.rule, key, value, reference, step, epoch, reason(violations), self.fired, violations)

    def check(self, values: Mapping[str, float], step: int) -> tuple[Violation, ...]:
        """Return the violations if the condition has held for as long as `patience` requires; cooldown aside."""
        if not self.rule.applies_to(values):
            return ()
        violations = self._condition.check(values, step, warming_up=self.seen < self.rule.warmup)
        self.seen += 1
        self.streak = self.streak + 1 if violations else 0
        return violations if self.streak >= self.rule.patience or _is_urgent(violations) else ()

    def restart(self) -> None:
        """Start over after an alert."""
        self.streak = 0
        self._condition.restart()

    def state_dict(self) -> dict[str, Any]:
        """Return what is remembered, in plain Python types."""
        return {**{name: getattr(self, name) for name in _COUNTERS}, **self._condition.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state: the rule then fires when the saved one would have fired."""
        vars(self).update({name: state[name] for name in _COUNTERS})
        self._condition.load_state_dict(state)


class _Joined:
    """The condition of a joined rule: a tracker for each of its conditions."""

    def __init__(self, rule: JoinedRule) -> None:
        self._needed = len(rule.rules) if isinstance(rule, AllOf) else 1
        self._members = [RuleTracker(each) for each in rule.rules]

    def check(self, values: Mapping[str, float], step: int, warming_up: bool) -> tuple[Violation, ...]:
        violations = tuple(each for member in self._members for each in member.check(values, step))
        holds = len(violations) >= self._needed and not warming_up
        return violations if holds or _is_urgent(violations) else ()

    def restart(self) -> None:
        for member in self._members:
            member.restart()

    def state_dict(self) -> dict[str, Any]:
        return {"rules": [member.state_dict() for member in self._members]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for member, saved in zip(self._members, state["rules"], strict=True):
            member.load_state_dict(saved)


def _is_urgent(violations: tuple[Violation, ...]) -> bool:
    """Return whether a value is not finite: that needs neither patience nor a second condition."""
    return not all(math.isfinite(violation.value) for violation in violations)
