"""Rules as pure configuration: what to watch, when to fire, what to do. What a rule remembers is in its `RuleTracker`.

Standard library only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from lightning_flatness.keys import RELATIVE
from lightning_flatness.rules.alert import Action

CONDITIONS = ("rise", "above", "below", "shift_up", "shift_down")
"""A rule has exactly one of these."""
_CHOICES = {"reference": ("settled", "best", "ema", "previous"), "on_nonfinite": ("alert", "ignore")}


@dataclass(frozen=True)
class Rule:
    """A condition on one monitored value, and what to do when it holds.

    Exactly one of `rise`, `above`, `below`, `shift_up` and `shift_down` must be given. The direction is part of the
    condition and never guessed from the name of the key. With `patience=1` and `warmup=0` the rule fires the first time
    that the condition holds.

    `shift_up` and `shift_down` detect lasting changes. They accumulate (CUSUM) the deviations of the logarithm of the
    value from its median over the last 8 validations, in units of the run's own noise; where a value is not
    positive, the values are used instead of their logarithms. Neither a steady trend nor a single outlier is a shift.
    Detection begins once 8 validations have been seen, and starts over after each alert.

    Args:
        monitor: the key to watch.
        rise: fires when the value exceeds the reference by more than this fraction of it; 0.5 means 50 % above it.
        above: fires when the value is above this limit.
        below: fires when the value is below this limit.
        shift_up: fires when the value has shifted up; the threshold is a sum of deviations in units of noise.
        shift_down: the same for a shift down.
        reference: what `rise` compares with. `"settled"`: the median of the last 8 values that did not violate the
            rule, available once the rapid change at the start of training is over; `"best"`: the lowest value so
            far; `"ema"`: an exponential moving average (0.9); `"previous"`: the previous value.
        patience: number of consecutive validations in which the condition must hold.
        warmup: number of validations at the start that are ignored entirely; they do not set the reference either.
        cooldown: number of validations after an alert in which the rule does not fire.
        action: what to do: an action, or a list of actions that escalates from alert to alert; None: only record the
            alert.
        on_nonfinite: `"alert"`: a NaN or infinite value fires at once, even during the warm-up; `"ignore"`: it is
            skipped.
        name: a name for the rule, used in reports; None: a description is made from the condition.

    Raises:
        ValueError: if not exactly one condition is given, or a value is invalid.

    Example:
        >>> rule = Rule("flatness/scale_free", rise=0.5, patience=3)
        >>> print(rule)
        flatness/scale_free rise 0.5
    """

    monitor: str = RELATIVE
    rise: float | None = None
    above: float | None = None
    below: float | None = None
    shift_up: float | None = None
    shift_down: float | None = None
    reference: Literal["settled", "best", "ema", "previous"] = "settled"
    patience: int = 1
    warmup: int = 0
    cooldown: int = 0
    action: Action | Sequence[Action] | None = None
    on_nonfinite: Literal["alert", "ignore"] = "alert"
    name: str | None = None

    def __post_init__(self) -> None:
        """Validate the arguments."""
        given = [name for name in CONDITIONS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"A rule must have exactly one of {', '.join(CONDITIONS)}; got {' and '.join(given) or 'none'}. "
                "Write one, such as `rise=0.5`."
            )
        signed = self.condition in ("above", "below")
        if not math.isfinite(self.limit) or (self.limit <= 0 and not signed):
            raise ValueError(f"`{self.condition}` must be {'finite' if signed else 'above 0'}; got {self.limit}.")
        for option, choices in _CHOICES.items():
            if getattr(self, option) not in choices:
                raise ValueError(f"`{option}` must be one of {', '.join(choices)}; got {getattr(self, option)!r}.")
        _check_options(self)

    def __str__(self) -> str:
        return self.name or f"{self.monitor} {self.condition} {self.limit:g}"

    @property
    def condition(self) -> str:
        """Name of the condition that the rule has."""
        return next(name for name in CONDITIONS if getattr(self, name) is not None)

    @property
    def limit(self) -> float:
        """The number given with the condition."""
        return getattr(self, self.condition)

    @property
    def keys(self) -> tuple[str, ...]:
        """The key that the rule reads."""
        return (self.monitor,)

    def applies_to(self, values: Mapping[str, float]) -> bool:
        """Return whether the values contain the monitored one, and it is not to be skipped."""
        value = values.get(self.monitor)
        return value is not None and (self.on_nonfinite == "alert" or math.isfinite(value))


@dataclass(frozen=True)
class JoinedRule:
    """Several conditions that share one action: `AllOf` or `AnyOf`.

    Each condition keeps its own patience and warm-up; those given here apply to the joined condition.
    """

    rules: Sequence[Rule]
    patience: int = 1
    warmup: int = 0
    cooldown: int = 0
    action: Action | Sequence[Action] | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        """Validate the arguments."""
        if len(self.rules) < 2:
            raise ValueError(f"`rules` must hold at least two rules to join; got {len(self.rules)}.")
        for rule in self.rules:
            if rule.action is not None or rule.cooldown:
                raise ValueError(
                    f"A joined rule must have neither `action` nor `cooldown`; the one on {rule.monitor} has. "
                    f"Give them to {type(self).__name__}."
                )
        object.__setattr__(self, "rules", tuple(self.rules))
        _check_options(self)

    def __str__(self) -> str:
        return self.name or f"{type(self).__name__}({', '.join(map(str, self.rules))})"

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys that the conditions read."""
        return tuple(dict.fromkeys(rule.monitor for rule in self.rules))

    def applies_to(self, values: Mapping[str, float]) -> bool:
        """Return whether at least one of the conditions can be checked."""
        return any(rule.applies_to(values) for rule in self.rules)


class AllOf(JoinedRule):
    """Fires when all of several conditions hold in the same validation.

    Args:
        rules: the conditions: rules without `action` and `cooldown`.
        patience: number of consecutive validations in which all of them must hold.
        warmup: number of validations at the start in which the joined rule does not fire.
        cooldown: number of validations after an alert in which it does not fire.
        action: what to do, as for `Rule`.
        name: a name for the rule, used in reports; None: a description is made from the conditions.

    Raises:
        ValueError: if fewer than two rules are given, or one of them has an action or a cooldown.

    Example:
        >>> print(AllOf([Rule("flatness/relative", above=100.0), Rule("margin/mean", below=1.0)]))
        AllOf(flatness/relative above 100, margin/mean below 1)
    """


class AnyOf(JoinedRule):
    """Fires when at least one of several conditions holds.

    The arguments are those of `AllOf`.

    Example:
        >>> print(AnyOf([Rule("flatness/relative", above=100.0), Rule("margin/mean", below=1.0)], name="trouble"))
        trouble
    """


AnyRule = Rule | JoinedRule
"""What can be tracked: a `Rule`, `AllOf` or `AnyOf`."""


def _check_options(rule: AnyRule) -> None:
    for name, least in (("patience", 1), ("warmup", 0), ("cooldown", 0)):
        value = getattr(rule, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"`{name}` must be a whole number of validations, at least {least}; got {value!r}.")
    if isinstance(rule.action, list | tuple) and not rule.action:
        raise ValueError("`action` must be one action or a list of at least one; got an empty list.")
