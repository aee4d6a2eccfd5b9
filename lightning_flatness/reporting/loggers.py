"""Shows alerts and the measured layers in loggers; the only file that knows their interfaces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.core.saving import save_hparams_to_yaml
from lightning.pytorch.utilities import rank_zero_warn

from lightning_flatness.rules.alert import Alert

LAYER = "flatness/layer"
"""Hyperparameter that names the measured layer."""
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


def log_layers(trainer: Trainer, layers: dict[str, str]) -> None:
    """Add the names of the measured layers to the hyperparameters of every logger; in TensorBoard, as texts too.

    Only the first process writes. A logger that fails causes one warning, and the training goes on.

    Args:
        trainer: the Trainer whose loggers are used.
        layers: names of layers by hyperparameter, such as `flatness/layer`.
    """
    for logger in trainer.loggers if trainer.is_global_zero and layers else ():
        try:
            if isinstance(getattr(logger, "NAME_HPARAMS_FILE", None), str):
                _log_to_tensorboard(logger, layers, log_step(trainer))
            else:
                logger.log_hyperparams(layers)
        except Exception as error:
            message = f"{type(logger).__name__} could not log which layer is measured: {error!r}."
            rank_zero_warn(message, category=UserWarning)


def _log_to_tensorboard(logger: Any, layers: dict[str, str], step: int) -> None:
    logger.log_hyperparams(layers, {})  # without a metric: it would write a value of `hp_metric`
    # Lightning writes this file when a training starts, and not again.
    save_hparams_to_yaml(str(Path(logger.log_dir, logger.NAME_HPARAMS_FILE)), logger.hparams)
    for name, layer in layers.items():
        logger.experiment.add_text(name, layer, step)


def log_step(trainer: Trainer) -> int:
    """Return the step at which Lightning writes what is logged now.

    During a validation `trainer.global_step` is one ahead of it, and under manual optimisation it counts the steps of
    every optimizer.
    """
    # A private attribute, as seen in Lightning 2.6.6.
    loop = getattr(trainer.fit_loop, "epoch_loop", None)
    return int(getattr(loop, "_batches_that_stepped", trainer.global_step))


def _show(experiment: Any, alert: Alert, text: str, step: int) -> None:
    if _is_tensorboard(experiment):
        experiment.add_text(f"alert/{alert.key}", text, step)
        experiment.add_scalar(f"alert/{alert.key}", alert.value, step)
    elif hasattr(experiment, "alert") and hasattr(experiment, "define_metric"):
        # W&B drops an alert whose title it has seen within `wait_duration` seconds; 0 means a minute.
        title = f"{alert.key} at step {alert.step}"[:_TITLE_LENGTH]
        experiment.alert(title=title, text=text, level="WARN", wait_duration=1)


def _is_tensorboard(experiment: Any) -> bool:
    return hasattr(experiment, "add_text") and hasattr(experiment, "add_scalar")
