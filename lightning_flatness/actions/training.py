"""What an alert can set off: stop the training, cut the learning rate, tell somebody."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_flatness.actions.learning_rate import cut_learning_rate, is_known, learning_rates, warn_if_lost
from lightning_flatness.rules.alert import Action, Alert


class StopTraining(Action):
    """Stops the training at the first point where Lightning may stop: `min_epochs` and `min_steps` are kept.

    After a validation in the middle of an epoch it stops there. A stop is never taken back.

    Attributes:
        reason: Why the training was stopped; None as long as it was not.

    Example:
        >>> StopTraining().reason is None
        True
    """

    def __init__(self) -> None:
        self.reason: str | None = None

    def __repr__(self) -> str:
        return "StopTraining()"

    def act(self, alert: Alert, trainer: Trainer, pl_module: LightningModule) -> str:
        """Ask the Trainer to stop."""
        trainer.should_stop = True
        self.reason = alert.reason
        limits = {"min_epochs": trainer.min_epochs, "min_steps": trainer.min_steps}
        kept = [f"{name}={limit}" for name, limit in limits.items() if limit]
        return f"Training stops, not before {' and '.join(kept)}." if kept else "Training stops."


class ReduceLR(Action):
    r"""Multiplies the learning rates of all optimizers by a factor, and their schedules from there on.

    With \(\eta_t\) the schedule as it would have gone on, every later learning rate is \(f \eta_t\), with every
    scheduler of torch, inside a `SequentialLR` or `ChainedScheduler` too, and after a resume. A scheduler of
    another make may bring the old level back; one warning says so. Cuts multiply, with each other and with those
    of a `ReduceLROnPlateau`: give the rule a `cooldown`.

    Args:
        factor: What the learning rates are multiplied by; between 0 and 1.
        min_lr: A cut ends here, in each parameter group: a learning rate that is there already is left alone.
            What the schedule does by itself later is not limited.
        scale_floors: Whether `eta_min` of the cosine schedulers and `min_lr` of `ReduceLROnPlateau` are cut too;
            False keeps them: a cosine then runs from \(f\) times its base down to its old floor.

    Raises:
        ValueError: If `factor` is not between 0 and 1, or `min_lr` is negative.

    Example:
        >>> ReduceLR(factor=0.5, min_lr=1e-6)
        ReduceLR(factor=0.5, min_lr=1e-06, scale_floors=True)
    """

    def __init__(self, factor: float = 0.1, min_lr: float = 0.0, scale_floors: bool = True) -> None:
        if not 0 < factor < 1:
            raise ValueError(f"`factor` must lie between 0 and 1, both excluded; got {factor}.")
        if not min_lr >= 0:
            raise ValueError(f"`min_lr` must be at least 0; got {min_lr}.")
        self.factor = factor
        self.min_lr = min_lr
        self.scale_floors = scale_floors

    def __repr__(self) -> str:
        return f"ReduceLR(factor={self.factor}, min_lr={self.min_lr}, scale_floors={self.scale_floors})"

    def act(self, alert: Alert, trainer: Trainer, pl_module: LightningModule) -> str:
        """Cut the learning rate of every parameter group of every optimizer."""
        changes = []
        for optimizer in trainer.optimizers:
            configured = [config.scheduler for config in trainer.lr_scheduler_configs]
            schedulers = [each for each in configured if getattr(each, "optimizer", None) is optimizer]
            before = learning_rates(optimizer)
            cut_learning_rate(optimizer, schedulers, self.factor, self.min_lr, self.scale_floors)
            if not schedulers or not all(map(is_known, schedulers)):
                warn_if_lost(optimizer, before)
            changes += [
                f"{old:.4g} -> {new:.4g}"
                for old, new in zip(before, learning_rates(optimizer), strict=True)
                if new < old
            ]
        if not changes:
            return f"Learning rate left as it is: it cannot be cut (min_lr={self.min_lr})."
        return f"Learning rate cut: {', '.join(dict.fromkeys(changes))}."


class Notify(Action):
    """Calls a function with the alert, on the first process only.

    An exception in the function is one warning; the training goes on.

    Args:
        function: Called with the `Alert`; in YAML its import path, as in `my_package.send_mail`.

    Example:
        >>> alerts = []
        >>> action = Notify(alerts.append)
    """

    def __init__(self, function: Callable[[Alert], object]) -> None:
        if not callable(function):
            raise ValueError(f"`function` must be callable with an alert; got {function!r}.")
        self.function = function
        self._failed = False

    def __repr__(self) -> str:
        return f"Notify({getattr(self.function, '__name__', self.function)})"

    def act(self, alert: Alert, trainer: Trainer, pl_module: LightningModule) -> str:
        """Call the function."""
        name = getattr(self.function, "__name__", type(self.function).__name__)
        if not trainer.is_global_zero:
            return f"Notified by the first process: {name}."
        try:
            self.function(alert)
        except Exception as error:
            if not self._failed:
                rank_zero_warn(f"Notify could not tell about an alert: {name} raised {error!r}.", category=UserWarning)
            self._failed = True
            return f"Not notified: {name} failed."
        return f"Notified: {name}."


def escalation(actions: Action | Sequence[Action] | None, number: int) -> Action | None:
    """Return the action for a rule's alert of this number, 1 for its first.

    The first alert sets off the first action of a list, the second the second, all further ones the last.

    Args:
        actions: One action, a list of them in the order of escalation, or None.
        number: Which alert of its rule it is.

    Example:
        >>> cut, stop = ReduceLR(), StopTraining()
        >>> [escalation([cut, stop], number) is stop for number in (1, 2, 3)]
        [False, True, True]
    """
    if actions is None or isinstance(actions, Action):
        return actions
    return actions[min(number, len(actions)) - 1] if actions else None
