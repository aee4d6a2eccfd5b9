"""The one figure of a training: flatness, the user's metrics, margins and what changed. Matplotlib comes when drawn."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from lightning_flatness.keys import (
    ALIGNMENT,
    CONFIDENCE,
    FACTORS,
    FEATURES,
    HEAD,
    KERNEL,
    KEYS,
    OF_LAYER,
    RELATIVE,
    RELATIVE_GGN,
    SCALE_FREE,
    key_suffix,
    quantity,
)
from lightning_flatness.reporting.history import History
from lightning_flatness.reporting.style import (
    DARK,
    GREEN,
    LIGHT,
    ORANGE,
    PURPLE,
    SKY,
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

_OWN_COLOURS = (GREEN, ORANGE, PURPLE, SKY)
_MOST_CURVES, _MOST_NAMES = len(_OWN_COLOURS), 6
_FACTOR_NAMES = {
    CONFIDENCE: "uncertainty",
    HEAD: "classifier",
    KERNEL: "filters",
    FEATURES: "features",
    ALIGNMENT: "alignment",
    RELATIVE: "product",
}


class Mark(NamedTuple):
    """A vertical line in the figure.

    Attributes:
        step: where it stands.
        text: what is written at it.
        is_action: whether it is something that was done, not an alert.
    """

    step: int
    text: str
    is_action: bool = False


def dashboard(
    history: History, marks: Iterable[Mark] = (), footer: str = "", since: int | None = None, dark: bool = False
) -> Figure:
    """Return the figure of a training, of 10 by 6.6 inches at 100 dots per inch.

    It has four panels over the steps of the training:

    - relative and scale-free flatness, on a logarithmic axis; of several layers the relative flatness of the first
      four. Behind curved activations both can be negative; the axis is then linear around zero and logarithmic beyond,
      so that no value is lost;
    - the first four of the module's own `val...` metrics: those between 0 and 1 on the left axis, losses and others on
      the right one;
    - the margins: median, quartiles, 5 to 95 %, and the zero below which samples are misclassified;
    - how often each factor of relative flatness doubled (+1) or halved (-1) up to the last validation. Their sum is the
      change of relative flatness. A factor without a logarithm has no bar.

    With several validation loaders it shows the first one. The figure does not belong to `matplotlib.pyplot`: no window
    opens, and nothing has to be closed.

    Args:
        history: the values of the training.
        marks: alerts and actions, drawn as vertical lines.
        footer: a line below the panels.
        since: the step with which the factors are compared; None: the first validation.
        dark: light lines on a dark ground.

    Returns:
        A matplotlib figure; save it with `figure.savefig("dashboard.png")`.

    Raises:
        ValueError: if the history is empty.
        ModuleNotFoundError: if matplotlib is not installed.

    Example:
        >>> history = History()
        >>> history.add(step=9, epoch=0, values={"flatness/relative": 27.0, "val_accuracy": 0.4})
        >>> history.add(step=19, epoch=1, values={"flatness/relative": 790.0, "val_accuracy": 0.8})
        >>> figure = dashboard(history, [Mark(19, "label noise")], footer="layer net.3")
        >>> [axes.get_title(loc="left") for axes in figure.axes]
        ['Flatness', 'Own metrics', 'Margins', 'Factors of relative flatness']
    """
    if len(history) == 0:
        raise ValueError(
            "A figure needs at least one validation with values; got none. Draw it after a validation of `fit`."
        )
    theme, marks = DARK if dark else LIGHT, list(marks)
    figure = empty_figure(10, 6.6, theme)
    # Fixed positions: a layout engine would draw everything twice.
    figure.subplots_adjust(left=0.075, right=0.94, top=0.9, bottom=0.135, wspace=0.24, hspace=0.5)
    panels = [panel(figure, 2, 2, number, theme) for number in range(1, 5)]
    values, suffix = history.values, _first_suffix(history.values)
    _flatness(panels[0], history.steps, values, suffix, theme)
    _own_metrics(panels[1], history.steps, values, theme)
    _margins(panels[2], history.steps, values, suffix, theme)
    for axes in panels[:3]:
        step_axis(axes, history.steps, theme)
        _draw_marks(axes, marks, theme, with_text=axes is panels[0])
    _factors(panels[3], history, suffix, since, theme)
    figure.text(0.012, 0.018, footer, color=theme.faint, fontsize=9.5, parse_math=False)
    return figure


def _first_suffix(values: Mapping[str, Sequence[float]]) -> str:
    """Return how the keys of the first monitor and loader end, without the layers that some of them name."""
    own = [key for key in values if quantity(key) in KEYS]
    return next((key_suffix(key) for key in [*(each for each in own if quantity(each) not in OF_LAYER), *own]), "")


def _flatness(
    axes: Axes, steps: Sequence[int], values: Mapping[str, Sequence[float]], suffix: str, theme: Theme
) -> None:
    """Draw both kinds of flatness; of several layers the relative flatness of the first ones."""
    shown: list[float] = []
    for key, name, colour, style in (
        (RELATIVE, "relative", theme.flatness, "-"),
        (RELATIVE_GGN, "relative, Gauss-Newton", theme.flatness, "-"),
        (SCALE_FREE, "scale-free", theme.margin, "--"),
    ):
        if series := values.get(f"{key}{suffix}"):
            shown += curve(axes, steps, series, name, colour, style)
    layers = {} if shown else {k: v for k, v in values.items() if quantity(k) == RELATIVE and k.endswith(suffix)}
    for (key, series), colour in zip(layers.items(), theme.curves[:_MOST_CURVES], strict=False):
        shown += curve(axes, steps, series, key_suffix(key).removesuffix(suffix).removeprefix("/"), colour)
    kind = log_axis(axes, shown)
    if layers:
        which = f"the first {_MOST_CURVES} of {len(layers)} layers" if len(layers) > _MOST_CURVES else "by layer"
        title(axes, "Relative flatness", f"{which}; lower is flatter; unit: loss; {kind}", theme)
        # Names of layers can be too long to stand above the panel.
        axes.legend(loc="upper left", fontsize=8.5, facecolor=theme.paper, edgecolor="none", labelcolor=theme.ink)
    else:
        title(axes, "Flatness", f"lower is flatter; unit: loss; {kind}", theme)
        _legend(axes, theme)


def _own_metrics(axes: Axes, steps: Sequence[int], values: Mapping[str, Sequence[float]], theme: Theme) -> None:
    own = {key: series for key, series in values.items() if key.startswith("val")}
    shown = dict(list(own.items())[:_MOST_CURVES])
    shares = [key for key, series in shown.items() if "loss" not in key and not any(y < 0 or y > 1 for y in series)]
    others = [key for key in shown if key not in shares]
    note = "logged by the module as `val...`" if shown else "none: the module logs no `val...`"
    title(axes, "Own metrics", f"{note}, {len(shown)} of {len(own)}" if len(own) > len(shown) else note, theme)
    right = axes
    if shares and others:
        right = axes.twinx()
        right.spines[:].set_visible(False)
        right.tick_params(labelsize=9.5, labelcolor=theme.faint, color=theme.faint)
    colours = dict(zip(shown, _OWN_COLOURS, strict=False))
    for key in shares:
        curve(axes, steps, shown[key], key, colours[key])
    for key in others:
        curve(right, steps, shown[key], f"{key} (right)" if right is not axes else key, colours[key], "--")
    _legend(axes, theme, *([right] if right is not axes else []))


def _margins(
    axes: Axes, steps: Sequence[int], values: Mapping[str, Sequence[float]], suffix: str, theme: Theme
) -> None:
    q05, q25, q50, q75, q95 = (values.get(f"margin/q{percent:02}{suffix}") for percent in (5, 25, 50, 75, 95))
    if q05 and q25 and q50 and q75 and q95:
        axes.fill_between(steps, q05, q95, color=theme.margin, alpha=0.18, linewidth=0, label="5 to 95 %")
        axes.fill_between(steps, q25, q75, color=theme.margin, alpha=0.35, linewidth=0, label="quartiles")
        curve(axes, steps, q50, "median", theme.margin)
        axes.axhline(0, color=theme.ink, linewidth=1.0)
        note = "unit: logit; below 0: misclassified"
    else:
        note = "none: this loss has no margins"
    title(axes, "Margins", note, theme)
    _legend(axes, theme)


def _factors(axes: Axes, history: History, suffix: str, since: int | None, theme: Theme) -> None:
    from matplotlib.ticker import MaxNLocator

    start = history.steps.index(since) if since in history.steps else 0
    changes = _doublings(history, suffix, start)
    names, sizes = list(changes), [0.0 if math.isnan(change) else change for change in changes.values()]
    places = range(len(names))
    axes.barh(places, sizes, color=[theme.flatness if size > 0 else theme.margin for size in sizes], height=0.62)
    for place, change, size in zip(places, changes.values(), sizes, strict=True):
        axes.annotate(
            "no logarithm" if math.isnan(change) else f"x {2**change:.3g}",
            (size, place),
            xytext=(-4 if size < 0 else 4, 0),
            textcoords="offset points",
            ha="right" if size < 0 else "left",
            va="center",
            fontsize=9.5,
            color=theme.ink,
        )
    axes.axvline(0, color=theme.ink, linewidth=1.0)
    axes.set_yticks(places, [_FACTOR_NAMES[key] for key in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color=theme.grid, linewidth=0.8)
    axes.tick_params(axis="y", length=0)
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(axis="x", length=0)
    low, high = min([*sizes, 0.0]), max([*sizes, 0.0])
    room = 0.28 * max(high - low, 1.0)
    axes.set_xlim(low - room * (low < 0), high + room)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
    axes.set_xlabel("doublings", fontsize=9.5, color=theme.faint)
    if len(names) > 1:
        axes.axhline(len(names) - 1.5, color=theme.grid, linewidth=1.0)
    title(
        axes,
        "Factors of relative flatness",
        f"log2 of the change from step {history.steps[start]} to {history.steps[-1]}",
        theme,
    )


def _doublings(history: History, suffix: str, start: int) -> dict[str, float]:
    """Return log2 of the change of each factor and of relative flatness; NaN where there is no logarithm."""
    changes = {}
    for key in (*FACTORS, RELATIVE):
        if (series := history.values.get(f"{key}{suffix}")) is not None:
            before, after = series[start], series[-1]
            has_logarithm = 0 < before < math.inf and 0 < after < math.inf
            changes[key] = math.log2(after / before) if has_logarithm else math.nan
    return changes


def _legend(axes: Axes, theme: Theme, *others: Axes) -> None:
    handles = [handle for each in (axes, *others) for handle in each.get_legend_handles_labels()[0]]
    if handles:
        # A fixed place: the best one would have to be looked for.
        legend = axes.legend(
            handles=handles,
            loc="lower right",
            bbox_to_anchor=(1.01, 1.085),
            ncols=3,
            fontsize=9,
            frameon=False,
            handlelength=1.4,
            columnspacing=1.0,
            borderaxespad=0.1,
            labelcolor=theme.ink,
        )
        legend.set_zorder(5)


def _draw_marks(axes: Axes, marks: Sequence[Mark], theme: Theme, with_text: bool) -> None:
    """Draw the vertical lines; the last few are named, from the top down so that their names do not overlap."""
    for number, mark in enumerate(marks):
        colour, style, over = (theme.faint, "-", 2.2) if mark.is_action else (PURPLE, "--", 2.3)
        axes.axvline(mark.step, color=colour, linestyle=style, linewidth=1.6, zorder=over)
        if with_text and number >= len(marks) - _MOST_NAMES:
            row = number - max(len(marks) - _MOST_NAMES, 0)
            left = mark.step < sum(axes.get_xlim()) / 2
            axes.annotate(
                mark.text[:42],
                (mark.step, 0.97 - 0.1 * row),
                xycoords=("data", "axes fraction"),
                xytext=(4 if left else -4, 0),
                textcoords="offset points",
                ha="left" if left else "right",
                va="top",
                fontsize=9.5,
                color=theme.ink,
                parse_math=False,
                bbox={"facecolor": theme.paper, "alpha": 0.85, "linewidth": 0, "pad": 1.0},
            )
