"""The conditions of a rule with what each one remembers between validations. Standard library only."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lightning_flatness.keys import LEARNING_RATE
from lightning_flatness.rules import detectors
from lightning_flatness.rules.alert import Violation
from lightning_flatness.rules.detectors import Observation
from lightning_flatness.rules.explain import context_keys
from lightning_flatness.rules.rule import Rule


def condition_of(rule: Rule) -> Condition:
    """Return the condition that a rule asks for, with an empty memory."""
    if rule.condition == "rise":
        return ExceedsReference(rule)
    return PastLimit(rule) if rule.condition in ("above", "below") else Shift(rule)


@dataclass
class Condition(ABC):
    """The condition of one rule. Every field but the rule is memory, in plain Python types.

    What a learning rate does is seen later than it is set: in the last validation before a change it may have risen
    already. So an observation has the rate of the validation before.
    """

    rule: Rule
    rate: float | None = field(default=None, kw_only=True)  # in the last validation

    def check(self, values: Mapping[str, float], step: int, warming_up: bool) -> tuple[Violation, ...]:
        """Return the violation if the condition holds in one more validation.

        Args:
            values: the values of the validation by key, the monitored one among them.
            step: its global step.
            warming_up: whether a finite value is to be ignored.
        """
        key = self.rule.monitor
        value = float(values[key])
        if not math.isfinite(value):
            return (Violation(key, value, math.nan, "nonfinite"),)
        if warming_up:
            return ()
        known = {each: float(values[each]) for each in (key, *context_keys(key)) if each in values}
        now = {each: number for each, number in known.items() if math.isfinite(number)}
        violation = self._next((step, now if key == LEARNING_RATE else self._with_earlier_rate(now)))
        if violation is None:
            return ()
        return (replace(violation, after=now),)

    def restart(self) -> None:  # noqa: B027 - most conditions have nothing to forget
        """Start over after an alert."""

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of the memory."""
        return copy.deepcopy({name: value for name, value in vars(self).items() if name != "rule"})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved memory; entries of other conditions are ignored."""
        # A checkpoint of an earlier version may lack an entry.
        known = {name: state[name] for name in vars(self) if name != "rule" and name in state}
        vars(self).update(copy.deepcopy(known))

    def _with_earlier_rate(self, now: dict[str, float]) -> dict[str, float]:
        """Put the learning rate of the validation before in the place of this one's, and remember this one's."""
        earlier, self.rate = self.rate, now.get(LEARNING_RATE)
        others = {key: value for key, value in now.items() if key != LEARNING_RATE}
        return others if earlier is None else {**others, LEARNING_RATE: earlier}

    @abstractmethod
    def _next(self, now: Observation) -> Violation | None:
        """Judge the next observation and remember it."""

    def _violation(self, onset: Observation, now: Observation, **numbers: Any) -> Violation:
        (onset_step, before), (_, after), key = onset, now, self.rule.monitor
        numbers = {"reference": before[key], "onset_step": onset_step, "before": before, **numbers}
        return Violation(key, after[key], condition=self.rule.condition, **numbers)


@dataclass
class ExceedsReference(Condition):
    """The value exceeds the reference by more than a fraction of it.

    The change began after the last validation that had at most half of that rise.
    """

    reference: Observation | None = None
    window: list[Observation] = field(default_factory=list)  # of the settled level
    onset: Observation | None = None

    def _next(self, now: Observation) -> Violation | None:
        base, key, kind = self.reference, self.rule.monitor, self.rule.reference
        violation = None
        rise, allowed = (
            (0.0, 0.0) if base is None else (now[1][key] - base[1][key], self.rule.limit * abs(base[1][key]))
        )
        if base is not None and rise > allowed:
            violation = self._violation(self.onset or base, now, reference=base[1][key], level=kind)
        if rise <= allowed / 2:
            self.onset = now
        if kind == "best":
            self.reference = min(base or now, now, key=lambda observation: observation[1][key])
        elif kind == "ema":
            self.reference = detectors.averaged(base, now)
        elif kind == "previous":
            self.reference = now
        elif violation is None:  # a violation does not move the level that it violates
            self.window = [*self.window, now][-detectors.WINDOW :]
            if base is not None or detectors.has_settled(self.window, key):
                self.reference = detectors.typical(self.window, key)
        return violation


@dataclass
class PastLimit(Condition):
    """The value is above or below a limit.

    The change began after the last validation that did not move towards the limit.
    """

    reference: Observation | None = None  # the last one within the limit
    onset: Observation | None = None

    def _next(self, now: Observation) -> Violation | None:
        key, limit, condition = self.rule.monitor, self.rule.limit, self.rule.condition
        value, last = now[1][key], self.reference
        up = 1 if condition == "above" else -1
        if up * (value - limit) <= 0:
            if self.onset is None or last is None or up * (value - last[1][key]) <= 0:
                self.onset = now
            self.reference = now
            return None
        onset = self.onset or last
        if onset is None:
            return Violation(key, value, limit, condition)
        return self._violation(onset, now, reference=limit)


@dataclass
class Shift(Condition):
    """The cumulative sum of the deviations from the expected value reaches the threshold.

    The change began after the last validation at which the sum was zero (Page 1954).
    """

    total: float = 0.0
    window: list[Observation] = field(default_factory=list)
    onset: Observation | None = None

    def restart(self) -> None:
        """Wait for a full window at the new level."""
        self.total = 0.0
        self.window = []

    def _next(self, now: Observation) -> Violation | None:
        key, threshold, violation = self.rule.monitor, self.rule.limit, None
        if len(self.window) >= detectors.WINDOW:
            deviation = detectors.deviation(self.window, now, key, up=self.rule.condition == "shift_up")
            self.total = detectors.cumulated(self.total, deviation, threshold)
            if self.total >= threshold:
                onset = self.onset or detectors.typical(self.window[-detectors.WINDOW :], key)
                violation = self._violation(onset, now, deviation=deviation)
        if self.total == 0:
            self.onset = now
        self.window = [*self.window, now][-detectors.MEMORY :]
        return violation
