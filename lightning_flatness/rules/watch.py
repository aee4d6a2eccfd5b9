"""What all rules share: patience, warm-up, cooldown, firing, and a state to resume from. Standard library only."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lightning_flatness.rules.alert import Action, Alert
from lightning_flatness.rules.detectors import Observation


class Breach(NamedTuple):
    """A condition that holds in one validation, and why."""

    key: str
    value: float
    reference: float
    change: str
    made_of: str = "."  # completes the sentence
    urgent: bool = False  # a value that is not finite waits for no patience


@dataclass
class State:
    """What a rule remembers, in plain Python types."""

    seen: int = 0  # validations observed
    streak: int = 0  # validations in a row in which the condition held
    quiet: int = 0  # validations of cooldown left
    fired: int = 0
    total: float = 0.0  # of the CUSUM
    window: list[Observation] = field(default_factory=list)
    reference: Observation | None = None


class Watch:
    """What single and joined rules share: patience, warm-up, cooldown, firing, state."""

    patience: int
    warmup: int
    cooldown: int
    action: Action | Sequence[Action] | None
    _state: State

    def observe(self, values: Mapping[str, float] | float, step: int, epoch: int = 0) -> Alert | None:
        """Look at the values of one validation; call it once in each, with fresh values only.

        Args:
            values: by key; those that the rule does not read explain the alert. A bare number is the value of a
                rule that reads one key. A validation without a value that the rule reads is not counted.
            step: global step of the validation.
            epoch: of the validation.

        Returns:
            The alert if the rule fires now.
        """
        if not isinstance(values, Mapping):
            (key,) = self.keys
            values = {key: values}
        if not self.sees(values):
            return None
        breach = self.holding(values, step)
        if self._state.quiet > 0:
            self._state.quiet -= 1
            self._state.streak = 0
            return None
        if breach is None:
            return None
        self._state.fired += 1
        self._state.quiet = self.cooldown
        self.restart()
        return Alert(self, breach.key, breach.value, breach.reference, step, epoch, breach.change + breach.made_of)

    @property
    def fired(self) -> int:
        """Number of alerts so far."""
        return self._state.fired

    def state_dict(self) -> dict[str, Any]:
        """Return what the rule remembers, in plain Python types."""
        return copy.deepcopy(vars(self._state))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state: the rule fires where the one that was saved would have fired."""
        vars(self._state).update(copy.deepcopy({name: state[name] for name in vars(self._state)}))

    def holding(self, values: Mapping[str, float], step: int) -> Breach | None:
        """Return the breach if the condition has held for as long as `patience` asks."""
        if not self.sees(values):
            return None
        state = self._state
        breach = self._judge(values, step, state.seen < self.warmup)
        state.seen += 1
        state.streak = state.streak + 1 if breach else 0
        return breach if breach and (breach.urgent or state.streak >= self.patience) else None

    def restart(self) -> None:
        """Start over after an alert."""
        self._state.streak = 0

    def sees(self, values: Mapping[str, float]) -> bool:
        """Return whether there is anything to judge among the values."""
        raise NotImplementedError

    def _judge(self, values: Mapping[str, float], step: int, warming_up: bool) -> Breach | None:
        raise NotImplementedError

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys that the rule reads."""
        raise NotImplementedError

    def check(self) -> None:
        """Refuse counts that are none, and an empty list of actions."""
        for name, least in (("patience", 1), ("warmup", 0), ("cooldown", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"`{name}` must be a whole number of validations, at least {least}; got {value!r}.")
        if isinstance(self.action, list | tuple) and not self.action:
            raise ValueError("`action` must be one action or a list of at least one; got an empty list.")
