"""The figure of one report: how margins and flatness are distributed over the samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from lightning_flatness.reporting.style import DARK, LIGHT, Theme, empty_figure, panel, title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


_WIDTH = 62  # characters of a line beside the margins


def report_figure(
    margins: Mapping[str, float], samples: Mapping[str, Tensor] | None, text: str, footer: str = "", dark: bool = False
) -> Figure:
    """Return the figure of one report, of 10 by 3.8 inches at 100 dots per inch.

    Left are the margins: their histogram if the values of the samples are there, else median, quartiles and the range
    from 1 to 99 %. Right is the relative flatness of each sample over its margin, or the numbers of the report.

    Args:
        margins: statistics of the margins by name, such as `q50`; empty: there are none.
        samples: `output_margin` and `relative_flatness` of each sample, shape (n,); None: not kept. Without one of
            them, as of several layers, it is as if they were not kept.
        text: the report in words.
        footer: a line below the panels.
        dark: light lines on a dark ground.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed.
    """
    theme = DARK if dark else LIGHT
    figure = empty_figure(10, 3.8, theme)
    figure.subplots_adjust(left=0.075, right=0.97, top=0.82, bottom=0.23, wspace=0.24)
    left, right = (panel(figure, 1, 2, number, theme) for number in (1, 2))
    given = samples if samples is not None and {"output_margin", "relative_flatness"} <= set(samples) else None
    if given is not None:
        _histogram(left, given["output_margin"], theme)
        _scatter(right, given["output_margin"], given["relative_flatness"], theme)
    else:
        _box(left, margins, theme)
        right.set_axis_off()
        lines = "\n".join(line if len(line) <= _WIDTH else f"{line[: _WIDTH - 1]}…" for line in text.splitlines())
        right.text(0, 1.1, lines, transform=right.transAxes, va="top", family="monospace", fontsize=8, color=theme.ink)
    figure.text(0.012, 0.03, footer, color=theme.faint, fontsize=9.5, parse_math=False)
    return figure


def _histogram(axes: Axes, margins: Tensor, theme: Theme) -> None:
    axes.hist(margins.double().cpu().numpy(), bins=40, color=theme.margin)
    axes.axvline(0, color=theme.ink, linewidth=1.0)
    axes.set_xlabel("margin (logit)", fontsize=9.5, color=theme.faint)
    title(axes, "Margins", "number of samples; below 0: misclassified", theme)


def _box(axes: Axes, margins: Mapping[str, float], theme: Theme) -> None:
    title(axes, "Margins", "median, quartiles, 1 to 99 %; below 0: misclassified" if margins else "none", theme)
    axes.set_yticks([])
    if margins:
        for low, high, width in (("q01", "q99", 1.6), ("q05", "q95", 6.0), ("q25", "q75", 22.0)):
            axes.hlines(0, margins[low], margins[high], color=theme.margin, linewidth=width, alpha=0.6)
        axes.plot(margins["q50"], 0, "o", color=theme.ink, markersize=6)
        axes.axvline(0, color=theme.ink, linewidth=1.0)
        axes.set_xlabel("margin (logit)", fontsize=9.5, color=theme.faint)


def _scatter(axes: Axes, margins: Tensor, flatness: Tensor, theme: Theme) -> None:
    values = flatness.double().cpu()
    is_positive = bool((values > 0).all())
    axes.plot(margins.double().cpu(), values, "o", color=theme.flatness, markersize=3.5, alpha=0.6, markeredgewidth=0)
    axes.set_yscale("log" if is_positive else "symlog")
    axes.axvline(0, color=theme.ink, linewidth=1.0)
    axes.set_xlabel("margin (logit)", fontsize=9.5, color=theme.faint)
    title(axes, "Relative flatness over margin", "one dot per sample; unit: loss; lower is flatter", theme)
