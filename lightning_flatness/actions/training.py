"""What an alert can do: stop the training, cut the learning rate, call a function."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer

from lightning_flatness.actions.learning_rate import cut_learning_rate, learning_rates, stand_ins
from lightning_flatness.actions.lost_cuts import schedulers_of, warn_if_lost
from lightning_flatness.actions.stopping import may_stop, stop_when_permitted
from lightning_flatness.rules.alert import Action, ActionError, Alert


class StopTraining(Action):
    """Stops the training as soon as Lightning permits: `min_epochs` and `min_steps` are respected.

    After a validation in the middle of an epoch, the training stops there. A stop is never revoked. If it has to wait,
    `trainer.should_stop` is raised only when Lightning permits the stop, also after a resume.

    Args:
        armed: False only says what it would have done: to see a rule at work before it may act.

    Attributes:
        reason: why the training was stopped; None as long as it was not.

    Example:
        >>> StopTraining().reason is None
        True
        >>> StopTraining(armed=False)
        StopTraining(armed=False)
    """

    def __init__(self, armed: bool = True) -> None:
        self.armed = armed
        self.reason: str | None = None

    def __repr__(self) -> str:
        return f"StopTraining({'' if self.armed else 'armed=False'})"

    def act(self, alert: Alert, trainer: Trainer, pl_module: LightningModule) -> str:
        """Ask the Trainer to stop, now or as soon as it may."""
        limits = {"min_epochs": trainer.min_epochs, "min_steps": trainer.min_steps}
        kept = [f"{name}={limit}" for name, limit in limits.items() if limit]
        limited = f", not before {' and '.join(kept)}" if kept else ""
        if not self.armed:
            return f"Would have stopped here{limited} (not armed)."
        stop_when_permitted(trainer)
        self.reason = alert.reason
        return f"Training stops{limited}."

    def resume(self, alert: Alert, trainer: Trainer) -> None:
        """Wait on for `min_epochs` and `min_steps`. Beyond them nothing happens: somebody wants to go on."""
        if self.armed and not may_stop(trainer):
            stop_when_permitted(trainer)
            self.reason = alert.reason


class ReduceLR(Action):
    r"""Multiplies the learning rates of all optimizers, and the rest of their schedules, by a factor.

    If \(\eta_t\) is the schedule without the cut, every later learning rate is \(f \eta_t\). This holds for every
    scheduler of torch, also inside a `SequentialLR` or `ChainedScheduler`, and after a resume. Other schedulers, those
    that take over later (as that of `StochasticWeightAveraging` does) and learning rates set by hand may undo a cut;
    one warning then says so. An optimizer without a learning rate (None) is left as it is. Cuts multiply with each
    other and with those of a `ReduceLROnPlateau`, so give the rule a `cooldown`.

    Args:
        factor: what the learning rates are multiplied by; between 0 and 1.
        min_lr: no cut goes below it, in each parameter group; a learning rate that is already there or lower is left
            alone. Later values of the schedule are not limited.
        scale_floors: whether `eta_min` of the cosine schedulers and `min_lr` of `ReduceLROnPlateau` are cut too;
            False keeps them: a cosine then runs from \(f\) times its base down to its old floor.
        armed: False only says what it would have done: to see a rule at work before it may act.

    Raises:
        ValueError: if `factor` is not between 0 and 1, or `min_lr` is negative.

    Example:
        >>> ReduceLR(factor=0.5, min_lr=1e-6)
        ReduceLR(factor=0.5, min_lr=1e-06, scale_floors=True)
    """

    def __init__(self, factor: float = 0.1, min_lr: float = 0.0, scale_floors: bool = True, armed: bool = True) -> None:
        if not 0 < factor < 1:
            raise ValueError(f"`factor` must lie between 0 and 1, both excluded; got {factor}.")
        if not min_lr >= 0:
            raise ValueError(f"`min_lr` must be at least 0; got {min_lr}.")
        self.factor = factor
        self.min_lr = min_lr
        self.scale_floors = scale_floors
        self.armed = armed

    def __repr__(self) -> str:
        unarmed = "" if self.armed else ", armed=False"
        return f"ReduceLR(factor={self.factor}, min_lr={self.min_lr}, scale_floors={self.scale_floors}{unarmed})"

    def act(self, alert: Alert, trainer: Trainer, pl_module: LightningModule) -> str:
        """Cut the learning rate of every parameter group of every optimizer."""
        changes: list[str] = []
        left: list[str] = []
        failed: list[tuple[str, Exception]] = []
        for number, optimizer in enumerate(trainer.optimizers):
            name = f"optimizer {number} ({type(optimizer).__name__})"
            before = learning_rates(optimizer)
            if all(rate is None for rate in before):
                left.append(name)
                continue
            schedulers, target = schedulers_of(trainer, optimizer), optimizer
            try:
                if not self.armed:
                    target, schedulers = stand_ins(optimizer, schedulers)
                cut_learning_rate(target, schedulers, self.factor, self.min_lr, self.scale_floors)
                if self.armed:
                    self._watch(trainer, optimizer, before)
            except Exception as error:  # the others are cut all the same
                failed.append((name, error))
            changes += [
                f"from {old:.4g} to {new:.4g}"
                for old, new in zip(before, learning_rates(target), strict=True)
                if old is not None and new is not None and new < old
            ]
        said = self._said(changes, left)
        if failed:
            errors = "; ".join(f"{name} was not cut, or in part: {error!r}" for name, error in failed)
            raise ActionError(f"{self!r} failed: {errors}. {said}") from failed[0][1]
        return said

    def resume(self, alert: Alert, trainer: Trainer) -> None:
        """Go on to watch whether the cut is overridden."""
        for optimizer in trainer.optimizers if self.armed else ():
            rates = learning_rates(optimizer)
            before = [None if rate is None else rate / self.factor for rate in rates]
            self._watch(trainer, optimizer, before, resumed=True)

    def _watch(
        self, trainer: Trainer, optimizer: Optimizer, before: Sequence[float | None], resumed: bool = False
    ) -> None:
        warn_if_lost(optimizer, before, lambda: schedulers_of(trainer, optimizer), resumed)

    def _said(self, changes: Sequence[str], left: Sequence[str]) -> str:
        """Return a sentence on what was cut, and one on the optimizers that were left as they are."""
        cuts = " and ".join(dict.fromkeys(changes))
        said = f"Learning rate cut {cuts}." if self.armed else f"Would have cut the learning rate {cuts} (not armed)."
        if not changes:
            said = f"Learning rate left as it is: it cannot be cut (min_lr={self.min_lr})."
        return f"{said} Without a learning rate to cut: {', '.join(left)}." if left else said


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


def action_text(alert: Alert) -> str:
    """Return in two words what an alert did to the training: "lr / 10", "stopped"; empty: nothing.

    Args:
        alert: the alert.
    """
    action = escalation(alert.rule.action, alert.number)
    would = "" if getattr(action, "armed", True) else "would be "
    if isinstance(action, ReduceLR):
        return f"{would}lr / {1 / action.factor:.3g}"
    return f"{would}stopped" if isinstance(action, StopTraining) else ""
