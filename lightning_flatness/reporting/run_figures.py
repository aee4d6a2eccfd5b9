"""Figures of trainings that were read back from their logs: curves of several, and the margins of one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_flatness.keys import KEYS, RELATIVE, SCALE_FREE
from lightning_flatness.reporting.history import History
from lightning_flatness.reporting.runs import Histogram
from lightning_flatness.reporting.style import (
    DARK,
    LIGHT,
    Theme,
    curve,
    empty_figure,
    log_axis,
    panel,
    step_axis,
    title,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_STYLES = ("-", "--", ":")
_BARS = 60  # of a histogram
_PERCENT = (1, 5, 25, 50, 75, 95, 99)


class Look(NamedTuple):
    """How the curves of one run are drawn in every panel: the number of a colour in `Theme.curves`, and the dashes."""

    colour: int
    style: str

    @classmethod
    def of(cls, number: int) -> Look:
        """Return the look of the run with this number: first the colours change, then the dashes.

        Example:
            >>> Look.of(0), Look.of(7)
            (Look(colour=0, style='-'), Look(colour=1, style='--'))
        """
        colours = len(LIGHT.curves)
        return cls(number % colours, _STYLES[number // colours % len(_STYLES)])


def run_curves(panels: Mapping[str, Mapping[int, Mapping[int, float]]], dark: bool = False) -> Figure:
    """Return the curves of several runs, one panel a key, two panels a row.

    Args:
        panels: by key and by the number of the run, the value at each step; at least one value.
        dark: light lines on a dark ground.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed.

    Example:
        >>> figure = run_curves({"margin/mean": {0: {5: 1.0, 11: 2.0}, 1: {5: 0.5}}})
        >>> [len(axes.lines) for axes in figure.axes]
        [2]
    """
    theme, rows = DARK if dark else LIGHT, -(-len(panels) // 2)
    height = 3.0 * rows
    figure = empty_figure(10, height, theme)
    figure.subplots_adjust(
        left=0.075,
        right=0.97,
        top=1 - 0.5 / height,
        bottom=0.55 / height,
        wspace=0.2,
        hspace=1.05 / (height / rows - 1),
    )
    for number, (key, runs) in enumerate(panels.items(), 1):
        axes = panel(figure, rows, 2, number, theme)
        shown: list[float] = []
        for index, series in runs.items():
            look = Look.of(index)
            shown += curve(axes, list(series), list(series.values()), "", theme.curves[look.colour], look.style)
        steps = sorted({step for series in runs.values() for step in series})
        step_axis(axes, steps, theme)
        heading, *notes = _heading(key)
        if key in (RELATIVE, SCALE_FREE):
            notes.append(log_axis(axes, shown))
        title(axes, heading, "; ".join(notes), theme)
    return figure


def _heading(key: str) -> list[str]:
    if key not in KEYS:
        return [key, "logged by the module" if key.startswith("val") else "from the margins"]
    known = KEYS[key]
    return [known.title, known.direction, f"unit: {known.unit}"]


def margin_figure(histograms: Sequence[Histogram], history: History, ending: str, dark: bool = False) -> Figure | None:
    """Return the distribution of the margins in the first and in the last validation of a run.

    Where the log has histograms it shows these, else the quantiles from 1 to 99 %.

    Args:
        histograms: oldest first.
        history: the values of the run.
        ending: how the monitor's keys end.
        dark: light lines on a dark ground.

    Returns:
        The figure; None if the log has neither histograms nor quantiles.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed.
    """
    theme = DARK if dark else LIGHT
    usable = [each for each in histograms if len(each.edges) > 1 and sum(each.counts) > 0]
    quantiles = [history.values.get(f"margin/q{percent:02}{ending}") for percent in _PERCENT]
    if not usable and not all(quantiles):
        return None
    figure = empty_figure(10, 2.7, theme)
    figure.subplots_adjust(left=0.075, right=0.97, top=0.78, bottom=0.22)
    axes = panel(figure, 1, 1, 1, theme)
    if usable:
        _histograms(axes, usable[-1], usable[0], theme)
    else:
        _quantiles(axes, history.steps, [series for series in quantiles if series], theme)
    axes.axvline(0, color=theme.ink, linewidth=1.0)
    axes.set_xlabel("margin (logit)", fontsize=9.5, color=theme.faint)
    return figure


def _histograms(axes: Axes, last: Histogram, first: Histogram, theme: Theme) -> None:
    """Draw the last one filled and the first one as a line, on common bars of equal width."""
    import numpy as np

    edges = np.linspace(min(last.edges[0], first.edges[0]), max(last.edges[-1], first.edges[-1]), _BARS + 1)
    filled: dict[str, Any] = {"fill": True, "color": theme.margin, "alpha": 0.45}
    line: dict[str, Any] = {"color": theme.flatness, "linewidth": 1.8}
    for word, each, style in (("last", last, filled), ("first", first, line))[: 1 if first is last else 2]:
        # Within one bar of the log the samples are spread evenly.
        below = np.interp(edges, each.edges, [0, *accumulate(each.counts)])
        axes.stairs(100 * np.diff(below) / below[-1], edges, label=f"{word}: step {each.step}", **style)
    title(axes, "Margins", "% of the samples; below 0: misclassified", theme)
    axes.legend(
        loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, fontsize=9.5, frameon=False, labelcolor=theme.ink
    )


def _quantiles(axes: Axes, steps: Sequence[int], quantiles: Sequence[Sequence[float]], theme: Theme) -> None:
    title(axes, "Margins", "median, quartiles, 5 to 95 %, 1 to 99 %; below 0: misclassified", theme)
    rows = sorted({0, len(steps) - 1})
    for row in rows:
        q01, q05, q25, q50, q75, q95, q99 = (series[row] for series in quantiles)
        for low, high, width in ((q01, q99, 1.6), (q05, q95, 6.0), (q25, q75, 18.0)):
            axes.hlines(row, low, high, color=theme.margin, linewidth=width, alpha=0.6)
        axes.plot(q50, row, "o", color=theme.ink, markersize=6)
    axes.set_yticks(rows, [f"step {steps[row]}" for row in rows])
    axes.set_ylim(rows[-1] + 0.5 * max(rows[-1], 1), -0.5 * max(rows[-1], 1))
