"""Figures of the logged values. Matplotlib is imported only when one is drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, SupportsFloat

from lightning_flatness.keys import KEYS, RELATIVE, SCALE_FREE, TRACE
from lightning_flatness.reporting.style import LIGHT, empty_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Two colours of the Okabe-Ito palette, which colour-blind readers can tell apart: geometry and prediction.
_GEOMETRY, _PREDICTION = "#D55E00", "#0072B2"
_INK, _FAINT, _GRID = "#222222", "#6B6B6B", "#E4E4E4"
_BARS = 5  # of a histogram to a decade
_LOGARITHMIC = {RELATIVE, TRACE, SCALE_FREE}


class Panel(NamedTuple):
    """How the curve of one key is drawn.

    Attributes:
        title: title of the panel.
        note: direction and unit, printed below the title.
        colour: colour of the curve.
        log: whether the axis of the values is logarithmic where all of them are positive.
        percent: whether the values are shown in percent.
    """

    title: str
    note: str = ""
    colour: str = _PREDICTION
    log: bool = False
    percent: bool = False

    @classmethod
    def of(cls, name: str) -> Panel:
        """Return how a key is drawn; a key that is not in `keys.KEYS` has its name as the title.

        Args:
            name: the key, as it is logged.

        Example:
            >>> Panel.of("flatness/relative").note
            'lower is flatter; unit: loss'
        """
        if name == "val_accuracy":
            return cls("Validation accuracy", "higher is better", percent=True)
        if name not in KEYS:
            return cls(name)
        key = KEYS[name]
        direction = key.direction if key.better else ""
        unit = "" if key.unit.startswith("none") else f"unit: {key.unit}"
        colour = _GEOMETRY if name.startswith("flatness/") else _PREDICTION
        return cls(key.title, "; ".join(filter(None, (direction, unit))), colour, log=name in _LOGARITHMIC)


def flatness_curves(history: Mapping[str, Sequence[SupportsFloat]], x: str = "epoch") -> Figure:
    """Return the curves of a training run, one small panel per logged key.

    Relative flatness, scale-free flatness and the trace change by orders of magnitude. Their axis is logarithmic where
    all their values are positive. The last value of each curve is printed at its end; values that are not finite leave
    a gap. The figure does not belong to `matplotlib.pyplot`: no window opens, and nothing has to be closed.

    Args:
        history: values of each key, in the order of the panels, and under `x` the positions that all curves share.
        x: key of the horizontal axis.

    Returns:
        A matplotlib figure with one axis per key other than `x`; save it with `figure.savefig("curves.png")`.

    Raises:
        ValueError: if `history` lacks `x` or any curve, or a curve has another length than `history[x]`.
        ModuleNotFoundError: if matplotlib is not installed.

    Example:
        >>> from lightning_flatness.reporting.figures import flatness_curves
        >>> figure = flatness_curves({"epoch": [0, 1], "flatness/relative": [27.0, 790.0], "margin/mean": [1, 6]})
        >>> [axes.get_title(loc="left") for axes in figure.axes]
        ['Relative flatness', 'Mean output margin']
    """
    keys = _curve_keys(history, x)
    columns = min(2, len(keys))
    rows = math.ceil(len(keys) / columns)
    figure = _figure(4.2 * columns, 2.5 * rows)
    for number, key in enumerate(keys, start=1):
        axes = figure.add_subplot(rows, columns, number)
        _draw(
            axes,
            [float(v) for v in history[x]],
            [float(v) for v in history[key]],
            Panel.of(key),
        )
        # Only the lowest panel of each column labels the shared axis.
        if number > len(keys) - columns:
            axes.set_xlabel(x, color=_FAINT, fontsize=9)
    return figure


def eigenvalue_density(eigenvalues: Sequence[float], title: str, note: str = "") -> Figure:
    """Return how densely eigenvalues lie, on a logarithmic axis: negative ones on the left, positive ones on the right.

    Each side is a histogram with five bars to a decade. A side without eigenvalues is left out.

    Args:
        eigenvalues: those that are not zero.
        title: title of the figure.
        note: printed below the title, beside the number of eigenvalues.

    Returns:
        A matplotlib figure; save it with `figure.savefig("spectrum.png")`.

    Raises:
        ValueError: if an eigenvalue is zero or not finite, or if there are none.
        ModuleNotFoundError: if matplotlib is not installed.

    Example:
        >>> from lightning_flatness.reporting.figures import eigenvalue_density
        >>> figure = eigenvalue_density([3.0, 0.2, 0.1, -0.01], "layer4")
        >>> [len(axes.patches) > 0 for axes in figure.axes]  # negative, positive
        [True, True]
    """
    magnitudes = [abs(value) for value in eigenvalues]
    if not magnitudes or not all(0 < value < math.inf for value in magnitudes):
        raise ValueError(
            f"`eigenvalues` must be finite and not zero, and at least one; got {list(eigenvalues)[:10]}. Leave "
            "out what is zero, or only rounding."
        )
    first, last = (math.floor(_BARS * math.log10(end(magnitudes))) for end in (min, max))
    bins = [10 ** (step / _BARS) for step in range(first, last + 2)]
    sides = {sign: [abs(value) for value in eigenvalues if sign * value > 0] for sign in (-1, 1)}
    shown = [sign for sign, values in sides.items() if values]
    figure = _figure(6.4, 3.2)
    row = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for axes, sign in zip(row, shown, strict=True):
        colour = _GEOMETRY if sign > 0 else _PREDICTION
        axes.hist(sides[sign], bins, color=colour, rwidth=0.86)
        _plain(axes)
        _log_bars(axes, bins, sign, ticks=8 // len(shown))
        axes.set_xlabel("eigenvalue: loss per squared weight", color=_FAINT, fontsize=9)
    row[0].set_title(title, loc="left", fontsize=10.5, fontweight="bold", color=_INK, pad=18)
    counted = "; ".join(filter(None, (f"{len(magnitudes)} eigenvalues, log scale", note)))
    row[0].text(0, 1.04, counted, transform=row[0].transAxes, fontsize=8.5, color=_FAINT)
    row[0].set_ylabel("eigenvalues per bar", color=_FAINT, fontsize=9)
    return figure


def _log_bars(axes: Axes, bins: list[float], sign: int, ticks: int) -> None:
    """Make the horizontal axis logarithmic; that of negative values falls from right to left."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    axes.set_xscale("log")
    axes.set_xlim(bins[0], bins[-1])
    if sign < 0:
        axes.invert_xaxis()
    axes.xaxis.set_major_locator(LogLocator(numticks=ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{sign * value:g}"))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))


def _figure(width: float, height: float) -> Figure:
    """Return an empty figure that does not belong to `matplotlib.pyplot`."""
    figure = empty_figure(width, height, LIGHT, dpi=200)
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure.set_layout_engine(ConstrainedLayoutEngine(w_pad=0.14, h_pad=0.12, wspace=0.03))
    return figure


def _plain(axes: Axes) -> None:
    """Draw grid and labels faintly, and no frame but the lower edge."""
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_FAINT)
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8.5, labelcolor=_FAINT, color=_FAINT)
    axes.tick_params(axis="y", length=0)


def _curve_keys(history: Mapping[str, Sequence[SupportsFloat]], x: str) -> list[str]:
    """Return the keys of the curves, after checking them against the horizontal axis."""
    keys = [key for key in history if key != x]
    if x not in history or not keys:
        raise ValueError(
            f"`history` must hold {x!r} and at least one curve; got keys {list(history)}. Name the horizontal axis "
            "with `x=...`, and pass the values of at least one other key."
        )
    for key in keys:
        if len(history[key]) != len(history[x]):
            raise ValueError(
                f"Each curve must have one value per {x!r}, {len(history[x])} in all; "
                f"got {len(history[key])} for {key!r}. Fill gaps with NaN."
            )
    return keys


def _draw(axes: Axes, positions: list[float], values: list[float], panel: Panel) -> None:
    """Draw one curve with its scale and its last value."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.plot(positions, values, color=panel.colour, linewidth=1.8, solid_capstyle="round")
    axes.set_title(panel.title, loc="left", fontsize=10.5, fontweight="bold", color=_INK, pad=18)
    _plain(axes)
    axes.margins(x=0.02, y=0.08)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, nbins=6))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10]))
    if panel.percent:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))
    measured = [(x, y) for x, y in zip(positions, values, strict=True) if math.isfinite(y)]
    note = panel.note
    if panel.log and measured:
        is_positive = min(y for _, y in measured) > 0
        note += ", log scale" if is_positive else ", linear scale: not all are positive"
        if is_positive:
            _log_scale(axes, [y for _, y in measured])
    axes.text(0, 1.04, note, transform=axes.transAxes, fontsize=8.5, color=_FAINT)
    if measured:
        _mark(axes, measured[-1], panel)


def _log_scale(axes: Axes, values: list[float]) -> None:
    """Make the axis logarithmic, labelled at powers of ten, and below two decades also at 2 and 5 times these."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_yscale("log")
    few_decades = max(values) / min(values) < 100
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few_decades else (1,), numticks=8))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _mark(axes: Axes, point: tuple[float, float], panel: Panel) -> None:
    """Draw a dot and print the value at the end of the curve."""
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
