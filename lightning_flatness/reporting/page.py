"""One HTML page of several trainings, which opens without a network: a table, curves, alerts, margins."""

from __future__ import annotations

import base64
import io
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lightning_flatness.keys import KEYS, MARGIN, RELATIVE, SCALE_FREE
from lightning_flatness.reporting.dashboard import Mark, dashboard
from lightning_flatness.reporting.run_figures import Look, margin_figure, run_curves
from lightning_flatness.reporting.runs import Run, best_step, monitor_of, runs_in
from lightning_flatness.reporting.style import DARK, LIGHT

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ACCURACY = "accuracy"
"""What the table shows of runs without a metric of their own: the share of samples whose margin is not negative."""
_NEGATIVE = "margin/negative"
_SHOWN = (RELATIVE, SCALE_FREE, MARGIN)
_LOWER_IS_BETTER = ("loss", "err", "mse", "mae", "nll", "perplexity")
_MOST_METRICS = 4  # in the curves
_DOTS = 150  # per inch


class _Cell(NamedTuple):
    """A cell of the table: the number that it is sorted by (None: missing) and its text."""

    value: float | None
    text: str


class _View(NamedTuple):
    """One row of the table: a run as one monitor, loader or layer has seen it."""

    run: int
    ending: str
    name: str
    look: Look
    cells: list[_Cell]


def html_report(*folders: str | Path, metric: str | None = None) -> str:
    """Return one HTML page about the trainings in log folders.

    It holds a table of the runs that can be sorted, their curves, and of each run its alerts with their reasons, the
    figure of the training and the distribution of its margins. Pictures are part of the page, in light and in dark.

    The table has three values of each quantity: at the first validation, at the best one, and at the last. The best
    validation is the one with the best value of `metric`, for all quantities: a row shows what this network had.

    Args:
        folders: log folders of TensorBoard or of Lightning's CSVLogger; runs in their subfolders are found.
        metric: the module's own metric that stands first; it is better if higher, unless its name says that it is a
            loss or an error. None: the most frequent `val...` with `acc` in its name, else any other but a loss, else
            the share of samples whose margin is not negative.

    Returns:
        The page.

    Raises:
        ValueError: if a folder has no log, or none with values of a `FlatnessMonitor`, or if no run has the metric.
        ModuleNotFoundError: if matplotlib is not installed, or tensorboard and there are event files.

    Example:
        >>> from lightning.pytorch.loggers import CSVLogger
        >>> logger = CSVLogger("logs", name="first")
        >>> logger.log_metrics({"val_acc": 0.9, "flatness/relative": 3.0}, step=7)
        >>> logger.save()
        >>> page = html_report("logs")
        >>> page[:15], "Relative flatness" in page
        ('<!DOCTYPE html>', True)
    """
    from jinja2 import Environment

    runs, notes = runs_in(*folders)
    first = _first_metric(runs, metric)
    views = _views(runs, first)
    panels = _panels(runs, views, first) if len(views) > 1 else {}
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    return (
        Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        .from_string(template)
        .render(
            runs=runs,
            views=views,
            notes=notes,
            metric=first,
            metric_direction="lower" if _is_lower_better(first) else "higher",
            quantities=[first, *(KEYS[key].title for key in _SHOWN)],
            curves=_picture(lambda dark: run_curves(panels, dark)) if panels else None,
            sections=[_section(run, [view for view in views if view.run == n]) for n, run in enumerate(runs)],
            light=LIGHT,
            dark=DARK,
        )
    )


def _is_lower_better(metric: str) -> bool:
    return any(word in metric.lower() for word in _LOWER_IS_BETTER)


def _first_metric(runs: Sequence[Run], wanted: str | None) -> str:
    found = Counter(metric for run in runs for metric in run.own_metrics)
    if wanted is not None:
        if wanted not in found:
            raise ValueError(
                f"`metric` must be a metric of the module whose name begins with `val`; got {wanted!r}. The logs have: "
                f"{', '.join(found) or 'none'}."
            )
        return wanted
    others = [metric for metric, _ in found.most_common() if not _is_lower_better(metric)]
    return next((metric for metric in others if "acc" in metric.lower()), others[0] if others else ACCURACY)


def _views(runs: Sequence[Run], metric: str) -> list[_View]:
    views: list[_View] = []
    for number, run in enumerate(runs):
        # What has the trace alone, as the whole network beside its layers, has nothing to show here.
        shown = [each for each in run.endings if any(_series(run, key, each) for key in _SHOWN)]
        for ending in shown or [""]:
            name = f"{run.name}{ending.replace('/', ' ', 1)}"
            views.append(_View(number, ending, name, Look.of(len(views)), _cells(run, ending, metric)))
    return views


def _series(run: Run, key: str, ending: str) -> Mapping[int, float]:
    if key == ACCURACY:
        negative = run.series.get(f"{_NEGATIVE}{run.without_layer(ending)}", {})
        return {step: 1 - share for step, share in negative.items()}
    return run.series.get(f"{key}{ending}", {}) if key in KEYS else run.own(key, ending)


def _cells(run: Run, ending: str, metric: str) -> list[_Cell]:
    """Return the cells of a row: of each quantity the first value, the one in the best validation, the last."""
    best = best_step(_series(run, metric, ending), _is_lower_better(metric))
    cells = []
    for key in (metric, *_SHOWN):
        series = _series(run, key, ending)
        values = list(series.values())
        shown = (values[0], None if best is None else series.get(best), values[-1]) if values else (None, None, None)
        cells += [_Cell(None, "-") if v is None else _Cell(v if math.isfinite(v) else None, f"{v:.4g}") for v in shown]
    return cells


def _panels(runs: Sequence[Run], views: Sequence[_View], metric: str) -> dict[str, dict[int, Mapping[int, float]]]:
    """Return the panels of the curves: by key and number of the view, the value at each step."""
    own = dict.fromkeys(each for run in runs for each in run.own_metrics if each != metric)
    panels = {
        key: {n: found for n, view in enumerate(views) if (found := _series(runs[view.run], key, view.ending))}
        for key in (metric, *_SHOWN, *list(own)[: _MOST_METRICS - 1])
    }
    return {key: series for key, series in panels.items() if series}


def _section(run: Run, views: Sequence[_View]) -> list[dict[str, object]]:
    """Return what the page shows of each monitor and loader of a run: its facts and its pictures."""
    return [
        {
            "name": view.ending.removeprefix("/"),
            "facts": dict(sorted(run.facts.get(monitor_of(view.ending), {}).items())),
            "dashboard": _picture(lambda dark, view=view: _dashboard(run, view.ending, dark)),  # type: ignore[misc]
            "margins": _picture(lambda dark, view=view: _margins(run, view.ending, dark)),  # type: ignore[misc]
        }
        for view in views
        if view.ending in run.endings and not run.is_layer(view.ending)
    ]


def _dashboard(run: Run, ending: str, dark: bool) -> Figure:
    alerts = [alert for alert in run.alerts if alert.monitor == monitor_of(ending)]
    since = next((alert.onset_step for alert in reversed(alerts) if alert.onset_step is not None), None)
    return dashboard(run.history(ending), (Mark(each.step, each.rule) for each in alerts), since=since, dark=dark)


def _margins(run: Run, ending: str, dark: bool) -> Figure | None:
    return margin_figure(run.histograms.get(ending, []), run.history(ending), ending, dark)


def _picture(draw: Callable[[bool], Figure | None]) -> dict[str, str] | None:
    """Return a figure in light and in dark as addresses that hold the picture itself."""
    drawn = {}
    for name, dark in (("light", False), ("dark", True)):
        if (figure := draw(dark)) is None:
            return None
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=_DOTS)
        drawn[name] = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    return drawn
