"""What a monitor shows of a training besides the numbers: when which picture, text or table goes where."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_flatness.reporting.console import show_summary
from lightning_flatness.reporting.dashboard import Mark, dashboard
from lightning_flatness.reporting.failures import Failures
from lightning_flatness.reporting.history import History
from lightning_flatness.reporting.loggers import Loggers, log_step
from lightning_flatness.rules.alert import Alert

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure

_SHARE = 0.01  # of the training's time that figures may take
_DURATION = 0.5  # of a figure, in seconds: rather more than less


class Display:
    """The history of a training, and everything that is drawn from it.

    Args:
        suffix: how the monitor's keys end.
        every: the figure is drawn anew in every so many validations; None: as often as drawing takes less than one
            percent of the training's time; 0: never.
        action_text: returns what was done about an alert, in two words; empty: nothing.

    Attributes:
        history: the values of the training.
        loggers: where pictures, texts and alerts go.
        facts: what is measured and how, by name: `layer`, `method`, `loss`, ...
        samples: how many samples the last validation had.
    """

    def __init__(self, suffix: str, every: int | None, action_text: Callable[[Alert], str]) -> None:
        self.history, self.loggers = History(), Loggers(suffix)
        self.facts: dict[str, str] = {}
        self.samples = 0
        self._every, self._action_text = every, action_text
        self._described: dict[str, str] = {}
        self._drawn: int | None = None  # how many validations the last figure shows
        self._began, self._drawing = time.monotonic(), 0.0  # when the training did; how long its figures took

    def begin(self) -> None:
        """Forget the training before; a checkpoint may bring its history back."""
        self.history, self.facts, self.samples = History(), {}, 0
        self._described, self._drawn = {}, None
        self._began, self._drawing = time.monotonic(), 0.0

    def note(self, facts: Mapping[str, str], samples: int, refused: str) -> None:
        """Take up what a validation found out.

        Args:
            facts: what was measured and how, by name.
            samples: of how many samples; 0: nothing was measured.
            refused: why a network was refused; empty: none was.
        """
        self.samples = samples
        self.facts = {name: fact for name, fact in {**self.facts, **facts}.items() if name != "not measured"}
        if refused and not samples:
            self.facts["not measured"] = refused

    def describe(self, trainer: Trainer) -> None:
        """Show the facts in the loggers, if they are new."""
        if self.facts != self._described:
            self._described = dict(self.facts)
            self.loggers.describe(trainer, self._described)

    def add(
        self,
        trainer: Trainer,
        values: Mapping[str, float],
        distributions: Mapping[str, Tensor],
        alerts: Sequence[Alert],
        is_alert: bool,
    ) -> None:
        """Add one validation of the training and show it; every process has to call this.

        Args:
            trainer: the Trainer.
            values: by key.
            distributions: the values of all samples by name, shape (n,).
            alerts: all alerts of the training.
            is_alert: whether the last of them is of this validation.
        """
        metrics = trainer.callback_metrics
        own = {key: float(value) for key, value in metrics.items() if key.startswith("val") and key not in values}
        self.history.add(log_step(trainer), trainer.current_epoch, {**values, **own})
        if trainer.is_global_zero and trainer.loggers:
            self.loggers.distributions(trainer, _arrays(distributions), is_alert)
        if is_alert or self._is_due():
            self._draw(trainer, alerts)

    def finish(self, trainer: Trainer, label: str, alerts: Sequence[Alert]) -> None:
        """Show the last figure and the table of the training."""
        self._draw(trainer, alerts)
        lines = [f"step {alert.step}, {alert.rule_name}: {alert.reason}" for alert in alerts]
        facts = {**self.facts, "samples": str(self.samples)} if self.samples else self.facts
        show_summary(trainer, label, self.history, facts, lines)

    def figure(self, alerts: Sequence[Alert], dark: bool = False) -> Figure:
        """Return the figure of the training so far, see `dashboard`.

        The factors are compared with the validation at which the last alert says that the change began, if there is one
        with such a step, else with the first validation.
        """
        facts = [f"{name} {self.facts[name]}" for name in ("layer", "method", "loss") if name in self.facts]
        if self.samples:
            facts.append(f"{self.samples:,} samples")
        since = next((alert.onset_step for alert in reversed(alerts) if alert.onset_step is not None), None)
        return dashboard(self.history, self._marks(alerts), " · ".join(facts), since, dark)

    def _draw(self, trainer: Trainer, alerts: Sequence[Alert]) -> None:
        if self._every == 0 or self._drawn == len(self.history) or not len(self.history):
            return
        if find_spec("matplotlib") is not None:
            began, self._drawn = time.monotonic(), len(self.history)
            self.loggers.figure(trainer, lambda: _pixels(self.figure(alerts)), self.history.steps[-1])
            self._drawing += time.monotonic() - began

    def _is_due(self) -> bool:
        """Return whether it is time for a figure, in a validation without an alert."""
        if self._every is not None:
            return self._every > 0 and len(self.history) % self._every == 0
        # Only the first process draws, so the others need not agree about the time.
        return self._drawing + _DURATION < _SHARE * (time.monotonic() - self._began)

    def _marks(self, alerts: Sequence[Alert]) -> list[Mark]:
        """Return the vertical lines of alerts: one for the alert, and one for what was done about it."""
        found = []
        for alert in alerts:
            found.append(Mark(alert.step, alert.rule_name))
            if done := self._action_text(alert):
                found.append(Mark(alert.step, done, is_action=True))
        return found


class Displayed(Callback):
    """A callback that shows its training.

    Attributes:
        display: the history of the training, and what is drawn from it.
    """

    display: Display
    _failures: Failures

    @property
    def alerts(self) -> list[Alert]:
        """All alerts so far, oldest first."""
        raise NotImplementedError

    @property
    def history(self) -> History:
        """The values of the validations of the last training: `steps`, `epochs`, `values` by key, `to_pandas()`."""
        return self.display.history

    def figure(self, dark: bool = False) -> Figure:
        """Return the figure of the last training so far, as the loggers have it; see `reporting.dashboard`.

        Args:
            dark: light lines on a dark ground.

        Raises:
            ValueError: if no validation has been measured yet.
            ModuleNotFoundError: if matplotlib is not installed.
        """
        return self.display.figure(self.alerts, dark)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: Any = None) -> None:
        """Leave no hook behind; say what is wrong where the Trainer was given the class and not a monitor."""
        if not isinstance(self, Displayed):  # Lightning calls the functions of a class, too
            raise TypeError("`callbacks` must hold a monitor; got the class. Write `callbacks=[FlatnessMonitor()]`.")
        self.teardown(trainer, pl_module, "")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the last figure, and a table of the training in the console."""
        with self._failures.contained(what="show its values"):
            self.display.finish(trainer, self._failures.label, self.alerts)


def _arrays(distributions: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Return what histograms are drawn of: of relative flatness the logarithm, since it spans orders of magnitude."""
    arrays = {}
    for name, each in distributions.items():
        quantity, *loader = name.split("/")
        if quantity == "relative_flatness":
            quantity, each = "log10_relative_flatness", each[each > 0].log10()
        arrays["/".join([quantity, *loader])] = each.detach().cpu().numpy()
    return arrays


def _pixels(figure: Figure) -> np.ndarray:
    """Return a figure as a picture, shape (height, width, 3)."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
