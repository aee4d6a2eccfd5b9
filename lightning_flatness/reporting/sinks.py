"""TensorBoard, W&B and MLflow: the only file that knows their interfaces."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning_flatness.keys import KEYS, RELATIVE, SCALE_FREE, logger_key
from lightning_flatness.reporting.tables import Table
from lightning_flatness.rules.alert import Alert

if TYPE_CHECKING:
    import numpy as np

_TITLE_LENGTH = 63  # W&B asks for less than 64 characters
_TAG_LENGTH = 4999  # of MLflow


class Sink:
    """A logger that shows nothing but numbers; the others replace what they can do better.

    Args:
        logger: the logger of Lightning.

    Attributes:
        takes_figures: whether it shows pictures.
    """

    takes_figures = False

    def __init__(self, logger: Any) -> None:
        self.logger, self.experiment = logger, logger.experiment

    def lay_out(self, suffixes: Sequence[str]) -> None:
        """Arrange the values of the monitors with these suffixes."""

    def describe(self, suffix: str, configuration: Mapping[str, str], step: int) -> None:
        """Show what a monitor measures."""

    def alert(self, suffix: str, alert: Alert, text: str, table: Table, step: int) -> None:
        """Show an alert, and the table of all alerts."""

    def distributions(self, suffix: str, values: Mapping[str, np.ndarray], is_alert: bool, step: int) -> None:
        """Show distributions over samples, and whether there was an alert."""

    def figure(self, suffix: str, picture: np.ndarray, step: int) -> None:
        """Show a picture, shape (height, width, 3)."""


class TensorBoardSink(Sink):
    """TensorBoard: texts, histograms, images and a layout of the custom scalars."""

    takes_figures = True

    def lay_out(self, suffixes: Sequence[str]) -> None:
        """Lay out the custom scalars: both kinds of flatness on one chart, and the margins as bands."""
        layout: dict[str, dict[str, list[Any]]] = {}
        for suffix in suffixes:
            curves = _names((RELATIVE, SCALE_FREE), suffix)
            charts = {f"relative and scale-free flatness{suffix}": ["Multiline", curves]}
            for name, lower, upper in (("quartiles", "q25", "q75"), ("5 to 95 %", "q05", "q95")):
                band = _names(("margin/q50", f"margin/{lower}", f"margin/{upper}"), suffix)
                charts[f"margins: median and {name}{suffix}"] = ["Margin", band]
            layout[f"FlatnessMonitor{suffix}"] = charts
        self.experiment.add_custom_scalars(layout)

    def describe(self, suffix: str, configuration: Mapping[str, str], step: int) -> None:
        """Show a text."""
        table = Table({"what": list(configuration), "value": list(configuration.values())})
        self.experiment.add_text(f"monitor/configuration{suffix}", table.markdown(), step)

    def alert(self, suffix: str, alert: Alert, text: str, table: Table, step: int) -> None:
        """Show the table as one text, and a mark at the alert's value, in a group behind the curves."""
        self.experiment.add_text(f"monitor/alerts{suffix}", table.markdown(), step)
        self.experiment.add_scalar(f"monitor/alerts/{alert.key}", alert.value, step)

    def distributions(self, suffix: str, values: Mapping[str, np.ndarray], is_alert: bool, step: int) -> None:
        """Show histograms."""
        for name, each in values.items():
            self.experiment.add_histogram(f"per_sample/{name}{suffix}", each, step)

    def figure(self, suffix: str, picture: np.ndarray, step: int) -> None:
        """Show an image."""
        self.experiment.add_image(f"monitor/dashboard{suffix}", picture, step, dataformats="HWC")


class WandbSink(Sink):
    """Weights & Biases: summaries, configuration, alerts of the run, a table of them, histograms and images."""

    takes_figures = True

    def lay_out(self, suffixes: Sequence[str]) -> None:
        """Keep the least, the greatest and the last value of each key in the summary."""
        # By name: a pattern would come after the `*` of Lightning's own logger.
        for name in (logger_key(f"{key}{suffix}") for suffix in suffixes for key in KEYS):
            self.experiment.define_metric(name, step_metric="trainer/global_step", summary="min,max,last")

    def describe(self, suffix: str, configuration: Mapping[str, str], step: int) -> None:
        """Add to the configuration of the run."""
        name = f"flatness_monitor{suffix}"
        self.experiment.config.update({name: dict(configuration)}, allow_val_change=True)

    def alert(self, suffix: str, alert: Alert, text: str, table: Table, step: int) -> None:
        """Raise an alert of the run, and log the table."""
        # W&B drops an alert whose title it has seen within `wait_duration` seconds; 0 means a minute.
        title = f"{alert.key} at step {alert.step}"[:_TITLE_LENGTH]
        self.experiment.alert(title=title, text=text, level="WARN", wait_duration=1)
        shown = _wandb().Table(columns=table.headings, data=[list(row) for row in table.rows])
        self.logger.log_metrics({f"monitor/alerts{suffix}": shown}, step)

    def distributions(self, suffix: str, values: Mapping[str, np.ndarray], is_alert: bool, step: int) -> None:
        """Log histograms and a number that is 1 where there was an alert."""
        histograms = {f"per_sample/{name}{suffix}": _wandb().Histogram(each) for name, each in values.items()}
        self.logger.log_metrics({f"flatness/alert{suffix}": int(is_alert), **histograms}, step)

    def figure(self, suffix: str, picture: np.ndarray, step: int) -> None:
        """Log an image."""
        self.logger.log_metrics({f"monitor/dashboard{suffix}": _wandb().Image(picture)}, step)


class MLflowSink(Sink):
    """MLflow: tags of the run, and the picture as one of its artifacts."""

    takes_figures = True

    def describe(self, suffix: str, configuration: Mapping[str, str], step: int) -> None:
        """Set a tag for each entry."""
        for name, value in configuration.items():
            self._tag(f"flatness_monitor{suffix}/{name.replace(' ', '_')}", value)

    def alert(self, suffix: str, alert: Alert, text: str, table: Table, step: int) -> None:
        """Set a tag for the alert."""
        self._tag(f"flatness_alert{suffix}/step_{alert.step}", f"{alert.rule_name}: {text}")

    def figure(self, suffix: str, picture: np.ndarray, step: int) -> None:
        """Replace the artifact."""
        self.experiment.log_image(self.logger.run_id, picture, f"dashboard{suffix.replace('/', '-')}.png")

    def _tag(self, name: str, value: str) -> None:
        self.experiment.set_tag(self.logger.run_id, name, value[:_TAG_LENGTH])


def sink_of(logger: Any) -> Sink | None:
    """Return what can be shown in a logger, by the methods of its experiment; None: numbers only."""
    experiment = getattr(logger, "experiment", None)
    for sink, methods in (
        (TensorBoardSink, ("add_text", "add_image", "add_histogram", "add_custom_scalars")),
        (WandbSink, ("alert", "define_metric")),
        (MLflowSink, ("set_tag", "log_image")),
    ):
        if all(hasattr(experiment, method) for method in methods):
            return sink(logger)
    return None


def _names(keys: Sequence[str], suffix: str) -> list[str]:
    return [logger_key(f"{key}{suffix}") for key in keys]


def _wandb() -> Any:
    return sys.modules["wandb"]
