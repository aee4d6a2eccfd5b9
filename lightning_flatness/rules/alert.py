"""An alert with its numbers, and the interface of what is done about it. Standard library only."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning_flatness.rules import explain


@dataclass(frozen=True)
class Violation:
    """A condition that holds in one validation, with the numbers that show it.

    Attributes:
        key: the monitored key.
        value: its value in this validation.
        reference: what the value was compared with: the reference's value or the limit; NaN if the value is not finite.
        condition: `"rise"`, `"above"`, `"below"`, `"shift_up"`, `"shift_down"` or `"nonfinite"`.
        level: the reference of a rise: `"settled"`, `"best"`, `"ema"` or `"previous"`.
        deviation: size of a shift in this validation, in units of the run's noise.
        onset_step: global step of the last validation before the change began; None if it was there from the start.
        before: the values of that validation by key: the monitored key and those that explain its changes; of the
            learning rate that of the validation before it, since what it does is seen later than it is set.
        after: the values of this validation by key.
    """

    key: str
    value: float
    reference: float
    condition: str
    level: str | None = None
    deviation: float | None = None
    onset_step: int | None = None
    before: Mapping[str, float] = field(default_factory=dict, hash=False)
    after: Mapping[str, float] = field(default_factory=dict, hash=False)

    @property
    def ratio(self) -> float | None:
        """The value divided by its value at the onset; None unless both are positive."""
        before = self.before.get(self.key, 0.0)
        return self.value / before if before > 0 and self.value > 0 else None

    @property
    def changes(self) -> dict[str, float]:
        """The change of the logarithm since the onset by key, for the keys that are positive in both validations."""
        both = {key: (before, self.after.get(key, 0.0)) for key, before in self.before.items()}
        return {key: math.log(now / before) for key, (before, now) in both.items() if before > 0 and now > 0}


@dataclass(frozen=True)
class Alert:
    """A rule has fired.

    Attributes:
        rule: the `Rule`, `AllOf` or `AnyOf` that fired.
        key: the key whose condition was violated; the first one if a joined rule has several.
        value: its value in this validation.
        reference: what the value was compared with: the reference's value or the limit.
        step: global step of this validation.
        epoch: epoch of this validation.
        reason: the explanation in English: which value changed from what to what, since when, and why.
        number: which alert of its rule this is; 1 for the first.
        violations: the conditions that hold, with all their numbers; one unless the rule is a joined one. Empty for an
            alert from a checkpoint of a version that did not store them.
        done: what was done about it, in a sentence: by the rule's action, or what an action that is not armed would
            have done; empty if the rule has no action.
        others: the alerts of other rules for the same event, those in this validation or the next; each with its own
            number and what was done about it.

    `print(alert)` explains it: what moved, since when, the usual causes, what to look at, what was done.
    """

    rule: Any
    key: str
    value: float
    reference: float
    step: int
    epoch: int
    reason: str
    number: int = 1
    violations: tuple[Violation, ...] = ()
    done: str = ""
    others: tuple[Alert, ...] = ()

    def __str__(self) -> str:
        """Return everything that the alert has to say, in lines."""
        return explain.description(self)

    @property
    def rule_name(self) -> str:
        """The name of the rule, or a short description of it if it has none."""
        return str(self.rule)

    @property
    def rule_names(self) -> tuple[str, ...]:
        """The names of all rules that fired for this event, this one first."""
        return self.rule_name, *(each.rule_name for each in self.others)

    @property
    def severity(self) -> explain.Severity:
        """`"info"`, `"warning"` or `"critical"`: `rules.explain.severity` says when."""
        return explain.severity(self.violations)

    @property
    def causes(self) -> str:
        """The usual causes of such a change; empty if nothing is known about it."""
        return explain.advice(self.rule_name, self.violations).causes

    @property
    def look_at(self) -> str:
        """What to look at next."""
        return explain.advice(self.rule_name, self.violations).look_at

    @property
    def ratio(self) -> float | None:
        """The value divided by its value at the onset; None if there is no onset or one of them is not positive."""
        return self.violations[0].ratio if self.violations else None

    @property
    def onset_step(self) -> int | None:
        """Global step of the last validation before the change began; None if it was there from the start."""
        return self.violations[0].onset_step if self.violations else None

    @property
    def changes(self) -> dict[str, float]:
        """The change of the logarithm since the onset by key: the monitored key, the five factors and the others.

        `learning_rate`: since the validation before the onset.
        """
        return self.violations[0].changes if self.violations else {}


class ActionError(RuntimeError):
    """An action has failed, perhaps half-way: the message says what was done. Its alert is recorded all the same."""


class Action(ABC):
    """What is done about an alert. To write one, subclass it and define `act`.

    Actions act only during `Trainer.fit`, and not in its sanity check. Every process must come to the same decision
    and carry it out.
    """

    def apply(self, alert: Alert, trainer: Any, pl_module: Any) -> str:
        """Carry out the action if the Trainer is training.

        Args:
            alert: the alert that caused it.
            trainer: the Trainer that runs the training.
            pl_module: the module that it trains.

        Returns:
            One sentence that says what was done.

        Raises:
            ValueError: if there is no Trainer to act on.
        """
        name = type(self).__name__
        if trainer is None:
            raise ValueError(
                f"`{name}` needs a Trainer to act on; got None. Give the rule to a `FlatnessMonitor` in a Trainer's "
                "callbacks, or leave its `action` out."
            )
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return f"{name} did nothing: the Trainer is not training."
        return self.act(alert, trainer, pl_module)

    @abstractmethod
    def act(self, alert: Alert, trainer: Any, pl_module: Any) -> str:
        """Act; called only during training. The arguments and the returned sentence are those of `apply`."""

    def resume(self, alert: Alert, trainer: Any) -> None:  # noqa: B027 (most actions have nothing to take up)
        """Take up what the action had begun when a checkpoint was written, as the training goes on from it.

        Args:
            alert: the alert of the earlier part of the training.
            trainer: the Trainer that goes on.
        """
