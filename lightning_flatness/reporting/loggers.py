"""What TensorBoard and Weights & Biases can show besides numbers; the only file that knows them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_flatness.rules.alert import Alert

_TITLE_LENGTH = 63  # W&B asks for less than 64 characters


class Sinks:
    """A Trainer's loggers, each given what it can show.

    A logger is known by what its `experiment` can do, so TensorBoard and W&B loggers of any make are served, and
    others are left alone. Only the first process writes. A logger that fails is one warning; the training goes on.

    Example:
        >>> Sinks().alert(trainer, alert, "Training stops.")  # doctest: +SKIP
    """

    def __init__(self) -> None:
        self._failed: set[str] = set()

    def alert(self, trainer: Trainer, alert: Alert, done: str = "") -> None:
        """Show an alert: on W&B as an alert of the run, in TensorBoard as a text and as a mark at the value.

        In TensorBoard both are called `alert/<key>` and stand at the step of the validation's logged metrics.

        Args:
            trainer: The Trainer whose loggers are to show it.
            alert: The alert.
            done: One sentence on what was done about it.
        """
        text = f"{alert.reason} {done}".strip()
        tag, step = f"alert/{alert.key}", log_step(trainer)

        def show(experiment: Any) -> None:
            if hasattr(experiment, "add_text") and hasattr(experiment, "add_scalar"):
                experiment.add_text(tag, text, step)
                experiment.add_scalar(tag, alert.value, step)
            elif hasattr(experiment, "alert") and hasattr(experiment, "define_metric"):
                # W&B drops an alert whose title it has seen within `wait_duration` seconds; 0 means a minute.
                title = f"{alert.key} at step {alert.step}"[:_TITLE_LENGTH]
                experiment.alert(title=title, text=text, level="WARN", wait_duration=1)

        self._each_experiment(trainer, show)

    def _each_experiment(self, trainer: Trainer, show: Callable[[Any], None]) -> None:
        if not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            name = type(logger).__name__
            try:
                show(getattr(logger, "experiment", None))
            except Exception as error:
                if name not in self._failed:
                    self._failed.add(name)
                    rank_zero_warn(f"{name} could not show an alert: {error!r}.", category=UserWarning)


def log_step(trainer: Trainer) -> int:
    """Return the step at which Lightning writes what is logged now.

    `trainer.global_step` is ahead of it by one in a validation, and counts each optimizer under manual optimisation.
    """
    loop = getattr(trainer.fit_loop, "epoch_loop", None)
    return int(getattr(loop, "_batches_that_stepped", trainer.global_step))
