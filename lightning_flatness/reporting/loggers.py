"""Shows alerts in TensorBoard and Weights & Biases; the only file that knows their interfaces."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_flatness.rules.alert import Alert

_TITLE_LENGTH = 63  # W&B asks for less than 64 characters


class LoggerAlerts:
    """Shows alerts in the loggers of a Trainer.

    A logger is recognised by the methods of its `experiment`, so every TensorBoard and W&B logger is supported; others
    are ignored. Only the first process writes. A logger that fails causes one warning, and the training goes on.

    Example:
        >>> LoggerAlerts().show(trainer, alert, "Training stops.")  # doctest: +SKIP
    """

    def __init__(self) -> None:
        self._failed: set[str] = set()

    def show(self, trainer: Trainer, alert: Alert, action: str = "") -> None:
        """Show an alert in every logger that can: in W&B as an alert of the run, in TensorBoard as a text and a mark.

        In TensorBoard both are called `alert/<key>`; they appear at the step of the metrics logged in this validation,
        and the mark at the alert's value.

        Args:
            trainer: the Trainer whose loggers are used.
            alert: the alert.
            action: one sentence on what is done about it.
        """
        for logger in trainer.loggers if trainer.is_global_zero else ():
            name = type(logger).__name__
            try:
                _show(getattr(logger, "experiment", None), alert, f"{alert.reason} {action}".strip(), log_step(trainer))
            except Exception as error:
                if name not in self._failed:
                    self._failed.add(name)
                    rank_zero_warn(f"{name} could not show an alert: {error!r}.", category=UserWarning)


def log_step(trainer: Trainer) -> int:
    """Return the step at which Lightning writes what is logged now.

    During a validation `trainer.global_step` is one ahead of it, and under manual optimisation it counts the steps of
    every optimizer.
    """
    # A private attribute, as seen in Lightning 2.6.6.
    loop = getattr(trainer.fit_loop, "epoch_loop", None)
    return int(getattr(loop, "_batches_that_stepped", trainer.global_step))


def _show(experiment: Any, alert: Alert, text: str, step: int) -> None:
    if hasattr(experiment, "add_text") and hasattr(experiment, "add_scalar"):
        experiment.add_text(f"alert/{alert.key}", text, step)
        experiment.add_scalar(f"alert/{alert.key}", alert.value, step)
    elif hasattr(experiment, "alert") and hasattr(experiment, "define_metric"):
        # W&B drops an alert whose title it has seen within `wait_duration` seconds; 0 means a minute.
        title = f"{alert.key} at step {alert.step}"[:_TITLE_LENGTH]
        experiment.alert(title=title, text=text, level="WARN", wait_duration=1)
