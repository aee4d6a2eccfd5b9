"""Rules: when a monitored value calls for action. Standard library only; the acting is in `actions`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from lightning_flatness.rules import conditions
from lightning_flatness.rules.alert import Action
from lightning_flatness.rules.explain import context_keys
from lightning_flatness.rules.watch import Breach, State, Watch

_CONDITIONS = ("rise", "above", "below", "shift_up", "shift_down")


@dataclass(frozen=True)
class Rule(Watch):
    """A condition on one monitored value, and what to do when it holds.

    Exactly one of `rise`, `above`, `below`, `shift_up` and `shift_down` is given. Directions are given, never
    guessed from a key's name. With `patience=1` and `warmup=0` the first breach fires.

    `shift_up` and `shift_down` look for a lasting change: a cumulative sum (CUSUM) of how far the log of the value (the
    value itself where it is not positive) is from its median in a trailing window of 8 validations, in units of the
    run's own noise. A steady trend is no shift, and no single validation is one. They begin when the window is full,
    and anew after each alert.

    The rule remembers what it saw: give each monitor its own rule objects (`dataclasses.replace(rule)` copies the
    rule without its memory).

    Args:
        monitor: key of the value.
        rise: fires above the reference by more than this fraction of it; 0.5: more than half as much again.
        above: fires above this value.
        below: fires below this value.
        shift_up: fires when the value has shifted up by this many standard deviations of its noise, cumulated.
        shift_down: the same, downwards.
        reference: of `rise`. `"settled"`: the median of the last 8 values that were no breach, once the growth at the
            start of every training is over; `"best"`: the lowest so far; `"ema"`: an exponential moving average (0.9);
            `"previous"`: the value before.
        patience: validations in a row in which the condition must hold.
        warmup: validations at the start that are left out altogether, of the reference too.
        cooldown: validations after an alert in which the rule does not fire.
        action: what to do: one action of `actions`, or a list that escalates from alert to alert; None: nothing but
            to record the alert.
        on_nonfinite: `"alert"`: a NaN or infinite value fires at once, in the warm-up too; `"ignore"`: it is passed
            over.

    Raises:
        ValueError: if there is not exactly one condition, or a value is not what it must be.

    Example:
        >>> rule = Rule("flatness/relative", rise=0.5, reference="previous")
        >>> rule.observe({"flatness/relative": 2.0}, step=100)
        >>> rule.observe({"flatness/relative": 4.6}, step=200).reason
        'flatness/relative rose x 2.3 since step 100 (2 -> 4.6, against the value before).'
    """

    monitor: str = "flatness/relative"
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
    _state: State = field(default_factory=State, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Check what was given, in one sentence where it is wrong."""
        given = [name for name in _CONDITIONS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"A rule must have exactly one of {', '.join(_CONDITIONS)}; got {' and '.join(given) or 'none'}."
            )
        (name,) = given
        limit = getattr(self, name)
        if not math.isfinite(limit) or (limit <= 0 and name not in ("above", "below")):
            raise ValueError(f"`{name}` must be {'finite' if name in ('above', 'below') else 'above 0'}; got {limit}.")
        for option, choices in (("reference", tuple(conditions.REFERENCES)), ("on_nonfinite", ("alert", "ignore"))):
            if getattr(self, option) not in choices:
                raise ValueError(f"`{option}` must be one of {', '.join(choices)}; got {getattr(self, option)!r}.")
        self.check()

    @property
    def keys(self) -> tuple[str, ...]:
        """The key that the rule reads."""
        return (self.monitor,)

    def sees(self, values: Mapping[str, float]) -> bool:
        """Return whether the value is there, and is not one to pass over."""
        value = values.get(self.monitor)
        return value is not None and (self.on_nonfinite == "alert" or math.isfinite(value))

    def restart(self) -> None:
        """Start over after an alert: a shift begins with a new window."""
        super().restart()
        if self._condition in ("shift_up", "shift_down"):
            self._state.total = 0.0
            self._state.window.clear()

    def _judge(self, values: Mapping[str, float], step: int, warming_up: bool) -> Breach | None:
        value = float(values[self.monitor])
        if not math.isfinite(value):
            return Breach(self.monitor, value, math.nan, f"{self.monitor} is {value}: not finite", urgent=True)
        if warming_up:
            return None
        known = {key: float(values[key]) for key in (self.monitor, *context_keys(self.monitor)) if key in values}
        now = (step, {key: number for key, number in known.items() if math.isfinite(number)})
        limit = getattr(self, self._condition)
        if self._condition == "rise":
            return conditions.risen(self._state, now, self.monitor, limit, self.reference)
        if self._condition in ("above", "below"):
            return conditions.past_limit(self._state, now, self.monitor, limit, above=self._condition == "above")
        return conditions.shifted(self._state, now, self.monitor, limit, up=self._condition == "shift_up")

    @property
    def _condition(self) -> str:
        return next(name for name in _CONDITIONS if getattr(self, name) is not None)
