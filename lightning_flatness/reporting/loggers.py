"""Shows in a Trainer's loggers what is more than a number: alerts, figures, distributions, what is measured."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer
from lightning.pytorch.core.saving import save_hparams_to_yaml
from lightning.pytorch.utilities import rank_zero_warn

from lightning_flatness.reporting.sinks import Sink, sink_of
from lightning_flatness.reporting.tables import Table
from lightning_flatness.rules.alert import Alert

if TYPE_CHECKING:
    import numpy as np

LAYER = "flatness/layer"
"""Hyperparameter that names the measured layer."""
ALERTS_FILE = "alerts.jsonl"
_ALERT_COLUMNS = ("step", "epoch", "rule", "what happened", "action")


class Loggers:
    """The loggers of a Trainer, as far as they can show more than numbers.

    A logger is recognised by the methods of its `experiment`, so TensorBoard, W&B and MLflow loggers of any class are
    supported. All others have the numbers, and the files in the log folder. Without a logger, alerts are the only thing
    that is written. Only the first process writes. A logger that fails causes one warning, and the training goes on.

    Args:
        suffix: how the monitor's keys end.

    Example:
        >>> Loggers().show(trainer, alert, "Training stops.")  # doctest: +SKIP
    """

    def __init__(self, suffix: str = "") -> None:
        self._suffix = suffix
        self._failed: set[str] = set()
        self._alerts: list[tuple[str, ...]] = []

    def start(self, trainer: Trainer, suffixes: Sequence[str] = ("",)) -> None:
        """Say how the values are to be summarised and laid out.

        Args:
            trainer: the Trainer, at the start of a training.
            suffixes: of all its monitors; a logger has one layout, which the first monitor writes.
        """
        self._alerts = []
        if self._suffix == suffixes[0]:
            self._each(trainer, "a layout", lambda sink: sink.lay_out(suffixes))

    def describe(self, trainer: Trainer, configuration: Mapping[str, str]) -> None:
        """Show what is measured and how, or why nothing is; without a logger the warning has said it."""
        step = log_step(trainer)
        self._each(trainer, "what is measured", lambda sink: sink.describe(self._suffix, configuration, step))
        if trainer.loggers and (refused := configuration.get("not measured")):
            self._append(trainer, {"event": "refused", "step": step, "reason": refused})

    def show(self, trainer: Trainer, alert: Alert, action: str = "") -> None:
        """Show an alert: in the table of all alerts of this run, and in `alerts.jsonl` in the log folder.

        W&B has it as an alert of the run, too.

        Args:
            trainer: the Trainer whose loggers are used.
            alert: the alert.
            action: one sentence on what is done about it.
        """
        row = (str(alert.step), str(alert.epoch), alert.rule_name, alert.reason, action)
        self._alerts.append(row)
        columns = zip(*self._alerts, strict=True)
        table = Table(dict(zip(_ALERT_COLUMNS, columns, strict=True)))
        text, step = f"{alert.reason} {action}".strip(), log_step(trainer)
        self._each(trainer, "an alert", lambda sink: sink.alert(self._suffix, alert, text, table, step))
        self._append(trainer, {"event": "alert", **_record(alert), "action": action})

    def distributions(self, trainer: Trainer, values: Mapping[str, np.ndarray], is_alert: bool) -> None:
        """Show distributions over the samples of a validation, and whether a rule fired in it.

        Args:
            trainer: the Trainer.
            values: the values of all samples by name, shape (n,).
            is_alert: whether a rule fired.
        """
        finite = {name: kept for name, each in values.items() if len(kept := each[abs(each) < math.inf])}
        step = log_step(trainer)
        self._each(trainer, "distributions", lambda sink: sink.distributions(self._suffix, finite, is_alert, step))

    def figure(self, trainer: Trainer, draw: Callable[[], np.ndarray], step: int) -> None:
        """Show the figure in every logger that takes one; if none does, save it as `dashboard.png` in the log folder.

        Without any logger nothing is drawn.

        Args:
            trainer: the Trainer.
            draw: returns the picture, shape (height, width, 3), 8 bits each; called once.
            step: of the last validation that it shows.
        """
        if not trainer.loggers or not trainer.is_global_zero:
            return
        with_figure = [each for each in map(sink_of, trainer.loggers) if each is not None and each.takes_figures]
        try:
            picture = draw()
        except Exception as error:
            self._warn("The dashboard", "be drawn", error)
            return
        self._each(trainer, "a figure", lambda sink: sink.figure(self._suffix, picture, step))
        if not with_figure and (folder := log_folder(trainer)) is not None:
            self._file(folder / f"dashboard{self._suffix.replace('/', '-')}.png", lambda path: _save(picture, path))

    def _each(self, trainer: Trainer, what: str, call: Callable[[Sink], None]) -> None:
        for logger in trainer.loggers if trainer.is_global_zero else ():
            try:
                if (sink := sink_of(logger)) is not None:
                    call(sink)
            except Exception as error:
                self._warn(type(logger).__name__, f"show {what}", error)

    def _append(self, trainer: Trainer, record: Mapping[str, Any]) -> None:
        if trainer.is_global_zero and (folder := log_folder(trainer)) is not None:
            line = json.dumps({"monitor": self._suffix.removeprefix("/"), **record})

            def append(path: Path) -> None:
                with path.open("a", encoding="utf-8") as file:
                    file.write(f"{line}\n")

            self._file(folder / ALERTS_FILE, append)

    def _file(self, path: Path, write: Callable[[Path], None]) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path)
        except Exception as error:
            self._warn(path.name, "be written", error)

    def _warn(self, name: str, what: str, error: Exception) -> None:
        if name not in self._failed:
            self._failed.add(name)
            rank_zero_warn(f"{name} could not {what}: {error!r}.", category=UserWarning)


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


def log_folder(trainer: Trainer) -> Path | None:
    """Return the folder of the first logger that has one, else the Trainer's own; None in a `fast_dev_run`.

    `trainer.log_dir` is not asked: all processes would have to do that together.
    """
    if getattr(trainer, "fast_dev_run", False) or getattr(trainer, "barebones", False):
        return None
    for logger in trainer.loggers:
        run = getattr(getattr(logger, "experiment", None), "dir", None)  # of W&B: the folder of this run
        for folder in (run, getattr(logger, "log_dir", None), getattr(logger, "save_dir", None)):
            if isinstance(folder, str) and "://" not in folder:
                return Path(folder)
    return Path(trainer.default_root_dir)


def _record(alert: Alert) -> dict[str, Any]:
    numbers = {"value": alert.value, "reference": alert.reference, "ratio": alert.ratio}
    return {
        "rule": alert.rule_name,
        "key": alert.key,
        "step": alert.step,
        "epoch": alert.epoch,
        "onset_step": alert.onset_step,
        **{name: number if number is None or math.isfinite(number) else None for name, number in numbers.items()},
        "reason": alert.reason,
        "severity": alert.severity,
        "causes": alert.causes,
        "look_at": alert.look_at,
        "others": list(alert.rule_names[1:]),
    }


def _save(picture: np.ndarray, path: Path) -> None:
    from matplotlib.image import imsave

    imsave(path, picture)
