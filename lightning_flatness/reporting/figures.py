"""Figures of what the monitor measures; matplotlib is imported only when one is drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, SupportsFloat

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Two colours of the Okabe-Ito palette, told apart by colour-blind readers too: geometry and prediction.
_GEOMETRY, _PREDICTION = "#D55E00", "#0072B2"
_INK, _FAINT, _GRID = "#222222", "#6B6B6B", "#E4E4E4"


class _Panel(NamedTuple):
    """How one series is drawn."""

    title: str
    note: str = ""
    colour: str = _PREDICTION
    log: bool = False
    percent: bool = False


_PANELS = {
    "val_accuracy": _Panel("Validation accuracy", "higher is better", percent=True),
    "flatness/relative": _Panel("Relative flatness", "lower is flatter; nats", _GEOMETRY, log=True),
    "flatness/trace": _Panel("Hessian trace", "lower is flatter; nats per squared weight", _GEOMETRY, log=True),
    "flatness/scale_free": _Panel("Scale-free flatness", "lower is flatter; nats", _GEOMETRY, log=True),
    "flatness/confidence": _Panel("Confidence factor", "lower is more confident", _GEOMETRY),
    "margin/mean": _Panel("Mean output margin", "higher is safer; logits"),
}


def flatness_curves(history: Mapping[str, Sequence[SupportsFloat]], x: str = "epoch") -> Figure:
    """Curves of a training run, one small panel per logged key.

    Relative flatness and trace, which grow by orders of magnitude, have a logarithmic axis where all their
    values are positive. Each curve ends in its last value; values that are not finite leave a gap. The figure
    is none of `matplotlib.pyplot`'s: no window opens, and nothing has to be closed.

    Args:
        history: Values of each key, in the order of the panels, and the positions `history[x]` they share.
        x: Key of the horizontal axis.

    Returns:
        A matplotlib figure with one axis per key other than `x`; save it with `figure.savefig("curves.png")`.

    Raises:
        ValueError: If `history` lacks `x` or any curve, or a curve has another length than `history[x]`.
        ModuleNotFoundError: If matplotlib is not installed.

    Example:
        >>> figure = flatness_curves({"epoch": [0, 1], "flatness/relative": [27.0, 790.0], "margin/mean": [1, 6]})
        >>> [axes.get_title(loc="left") for axes in figure.axes]
        ['Relative flatness', 'Mean output margin']
    """
    keys = _curve_keys(history, x)
    try:
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Figures need matplotlib, which is not installed. Install it with `pip install lightning-flatness[plots]`."
        ) from error
    columns = min(2, len(keys))
    rows = math.ceil(len(keys) / columns)
    figure = Figure(
        figsize=(4.2 * columns, 2.5 * rows),
        dpi=200,
        layout=ConstrainedLayoutEngine(w_pad=0.14, h_pad=0.12, wspace=0.03),
        facecolor="white",
    )
    for number, key in enumerate(keys, start=1):
        axes = figure.add_subplot(rows, columns, number)
        _draw(
            axes,
            [float(v) for v in history[x]],
            [float(v) for v in history[key]],
            _PANELS.get(key, _Panel(key)),
        )
        # Only the lowest panel of each column names the shared axis.
        if number > len(keys) - columns:
            axes.set_xlabel(x, color=_FAINT, fontsize=9)
    return figure


def _curve_keys(history: Mapping[str, Sequence[SupportsFloat]], x: str) -> list[str]:
    """Keys of the curves, checked against the horizontal axis."""
    keys = [key for key in history if key != x]
    if x not in history or not keys:
        raise ValueError(f"`history` must hold {x!r} and at least one curve: got keys {list(history)}.")
    for key in keys:
        if len(history[key]) != len(history[x]):
            raise ValueError(
                f"Each curve must have one value per {x!r}, {len(history[x])} in all: "
                f"got {len(history[key])} for {key!r}."
            )
    return keys


def _draw(axes: Axes, positions: list[float], values: list[float], panel: _Panel) -> None:
    """Draws one curve, its scale and its last value."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.plot(positions, values, color=panel.colour, linewidth=1.8, solid_capstyle="round")
    axes.set_title(panel.title, loc="left", fontsize=10.5, fontweight="bold", color=_INK, pad=18)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_FAINT)
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.margins(x=0.02, y=0.08)
    axes.tick_params(labelsize=8.5, labelcolor=_FAINT, color=_FAINT)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, nbins=6))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10]))
    if panel.percent:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))
    measured = [(x, y) for x, y in zip(positions, values, strict=True) if math.isfinite(y)]
    note = panel.note
    if panel.log and measured and min(y for _, y in measured) > 0:
        note += ", log scale"
        _log_scale(axes, [y for _, y in measured])
    axes.text(0, 1.04, note, transform=axes.transAxes, fontsize=8.5, color=_FAINT)
    if measured:
        _mark(axes, measured[-1], panel)


def _log_scale(axes: Axes, values: list[float]) -> None:
    """Logarithmic axis, numbered at each power of ten, below two decades also at 2 and 5 times it."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_yscale("log")
    few_decades = max(values) / min(values) < 100
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few_decades else (1,), numticks=8))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _mark(axes: Axes, point: tuple[float, float], panel: _Panel) -> None:
    """A dot and the value in figures, at the end of the curve."""
    axes.plot(*point, marker="o", markersize=5, color=panel.colour, clip_on=False)
    axes.annotate(
        f"{point[1]:.1%}" if panel.percent else f"{point[1]:#.3g}".rstrip("."),
        point,
        xytext=(9, 0),
        textcoords="offset points",
        va="center",
        fontsize=9,
        fontweight="bold",
        color=panel.colour,
        annotation_clip=False,
    )
