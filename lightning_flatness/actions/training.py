"""What an alert can do: stop the training, cut the learning rate, call a function."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_flatness.actions.learning_rate import cut_learning_rate, is_known, learning_rates, warn_if_lost
from lightning_flatness.rules.alert import Action, Alert


class StopTraining(Action):
    """Stops the training as soon as Lightning permits: `min_epochs` and `min_steps` are respected.

    After a validation in the middle of an epoch, the training stops there. A stop is never revoked.

    Attributes:
        reason: why the training was stopped; None as long as it was not.

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
    r"""Multiplies the learning rates of all optimizers, and the rest of their schedules, by a factor.

    If \(\eta_t\) is the schedule without the cut, every later learning rate is \(f \eta_t\). This holds for every
    scheduler of torch, also inside a `SequentialLR` or `ChainedScheduler`, and after a resume. Other schedulers may
    restore the old level; one warning then says so. Cuts multiply with each other and with those of a
    `ReduceLROnPlateau`, so give the rule a `cooldown`.

    Args:
        factor: what the learning rates are multiplied by; between 0 and 1.
        min_lr: no cut goes below it, in each parameter group; a learning rate that is already there or lower is left
            alone. Later values of the schedule are not limited.
        scale_floors: whether `eta_min` of the cosine schedulers and `min_lr` of `ReduceLROnPlateau` are cut too;
            False keeps them: a cosine then runs from \(f\) times its base down to its old floor.

    Raises:
        ValueError: if `factor` is not between 0 and 1, or `min_lr` is negative.

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
                f"from {old:.4g} to {new:.4g}"
                for old, new in zip(before, learning_rates(optimizer), strict=True)
                if new < old
            ]
        if not changes:
            return f"Learning rate left as it is: it cannot be cut (min_lr={self.min_lr})."
        return f"Learning rate cut {' and '.join(dict.fromkeys(changes))}."


class Notify(Action):
    """Calls a function with the alert, on the first process only.

    If the function raises, one warning says so, and the training goes on.

    Args:
        function: called with the `Alert`; in YAML its import path, such as `my_package.send_mail`.

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
                rank_zero_warn(f"Notify could not report an alert: {name} raised {error!r}.", category=UserWarning)
            self._failed = True
            return f"Not notified: {name} failed."
        return f"Notified: {name}."


def escalation(actions: Action | Sequence[Action] | None, number: int) -> Action | None:
    """Return the action for one alert of a rule.

    From a list, the first alert gets the first action, the second alert the second, and every further alert the last.

    Args:
        actions: one action, a list of them in the order of escalation, or None.
        number: which alert of its rule it is; 1 for the first.

    Example:
        >>> cut, stop = ReduceLR(), StopTraining()
        >>> [escalation([cut, stop], number) is stop for number in (1, 2, 3)]
        [False, True, True]
    """
    if actions is None or isinstance(actions, Action):
        return actions
    return actions[min(number, len(actions)) - 1] if actions else None
