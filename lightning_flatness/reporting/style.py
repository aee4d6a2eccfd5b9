"""Colours and headings that all figures of a training or a report share."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

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


LIGHT = Theme("#FFFFFF", "#1F1F1F", "#5F6368", "#E3E5E8", BLUE, VERMILION)
DARK = Theme("#1E1F22", "#F1F1F1", "#A9ADB3", "#3A3C40", SKY, "#F0803C")


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
