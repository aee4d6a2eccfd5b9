"""Colours, headings, axes and curves that all figures of a training or a report share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_flatness.errors import missing_package

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The Okabe-Ito palette, which colour-blind readers can tell apart.
ORANGE, SKY, GREEN, BLUE, VERMILION, PURPLE = "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7"


class Theme(NamedTuple):
    """The colours that differ between a light and a dark figure."""

    paper: str
    ink: str
    faint: str
    grid: str
    margin: str
    flatness: str
    curves: tuple[str, ...]


LIGHT = Theme(
    *("#FFFFFF", "#1F1F1F", "#5F6368", "#E3E5E8", BLUE, VERMILION),
    curves=(BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY),
)
DARK = Theme(
    *("#1E1F22", "#F1F1F1", "#A9ADB3", "#3A3C40", SKY, "#F0803C"),
    curves=(SKY, "#F0803C", GREEN, ORANGE, PURPLE, "#F0E442"),
)


def empty_figure(width: float, height: float, theme: Theme) -> Figure:
    """Return a figure without panels, in inches at 100 dots per inch; it does not belong to `matplotlib.pyplot`.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise missing_package("A figure", "matplotlib") from error
    return Figure(figsize=(width, height), dpi=100, facecolor=theme.paper)


def panel(figure: Figure, rows: int, columns: int, number: int, theme: Theme) -> Axes:
    """Add the panel with this number, counted from 1, to a figure."""
    axes = figure.add_subplot(rows, columns, number, facecolor=theme.paper)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(theme.faint)
    axes.tick_params(labelsize=9.5, labelcolor=theme.faint, color=theme.faint)
    axes.grid(axis="y", color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    return axes


def title(axes: Axes, heading: str, note: str, theme: Theme) -> None:
    """Write a heading above a panel, and a note below it."""
    axes.set_title(heading, loc="left", fontsize=12.5, fontweight="bold", color=theme.ink, pad=19)
    axes.text(0, 1.035, note, transform=axes.transAxes, fontsize=9.5, color=theme.faint, parse_math=False)


def step_axis(axes: Axes, steps: Sequence[int], theme: Theme) -> None:
    """Number the steps, and leave a little room before the first and behind the last."""
    from matplotlib.ticker import MaxNLocator

    first, last = steps[0], steps[-1]
    room = max(last - first, 1)
    axes.set_xlim(first - 0.02 * room, last + 0.02 * room)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, nbins=6))
    axes.set_xlabel("step", fontsize=9.5, color=theme.faint)


def log_axis(axes: Axes, values: Sequence[float]) -> str:
    """Make the axis logarithmic if there is something to show on it; return what it is, in words."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator, SymmetricalLogLocator

    sizes = [abs(value) for value in values if value]
    if not sizes:
        return "no values yet"
    axes.yaxis.set_minor_locator(NullLocator())
    if min(values) > 0:
        axes.set_yscale("log")
        subs = (1, 2, 5) if max(sizes) / min(sizes) < 100 else (1,)
        axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=7))
        kind = "log scale"
    else:
        threshold = 10 ** math.floor(math.log10(max(min(sizes), 1e-4 * max(sizes))))
        axes.set_yscale("symlog", linthresh=threshold)
        axes.yaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=threshold))
        kind = f"log scale, linear within ±{threshold:g}"
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    return kind


def curve(
    axes: Axes, steps: Sequence[int], series: Sequence[float], name: str, colour: str, style: str = "-"
) -> list[float]:
    """Draw a curve, with dots while there are few; return its finite values."""
    marker: dict[str, Any] = {"marker": "o", "markersize": 4} if len(steps) < 8 else {}
    finite = [value for value in series if math.isfinite(value)]
    shown = [value if math.isfinite(value) else math.nan for value in series]
    axes.plot(steps, shown, style, color=colour, linewidth=2, label=name, solid_capstyle="round", **marker)
    return finite
