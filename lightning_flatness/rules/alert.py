"""An alert and what may be done about it. Standard library only."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Alert:
    """A rule has fired.

    Attributes:
        rule: the `Rule`, `AllOf` or `AnyOf` that fired.
        key: of the value that broke the rule; the first of them where several did.
        value: in this validation.
        reference: what it was compared with: the reference's value, or the limit.
        step: global step of this validation.
        epoch: of this validation.
        reason: why, in words: value, reference, ratio, since when, and what the change is made of.
    """

    rule: Any
    key: str
    value: float
    reference: float
    step: int
    epoch: int
    reason: str


class Action(ABC):
    """What is done about an alert. A subclass of your own defines `act`.

    Actions act only while `Trainer.fit` runs, and not in its sanity check. The decision to act must be the same
    on every process, and every process must carry it out.
    """

    def apply(self, alert: Alert, trainer: Any, pl_module: Any) -> str:
        """Carry out the action where a training can be acted upon.

        Args:
            alert: Why it is carried out.
            trainer: The Trainer that runs the training.
            pl_module: The module that it trains.

        Returns:
            One sentence that says what was done.

        Raises:
            ValueError: If there is no Trainer to act on.
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
        """Do it; called during training only. The arguments and the sentence returned are those of `apply`."""
