from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from lightning_flatness.reporting.style import DARK, LIGHT, Theme, empty_figure


def luminance(colour: str) -> float:
    """Of WCAG 2."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", [LIGHT, DARK])
@pytest.mark.parametrize(("part", "least"), [("ink", 7.0), ("faint", 4.5), ("margin", 3.0), ("flatness", 3.0)])
def test_lines_and_letters_stand_out(theme: Theme, part: str, least: float) -> None:
    light, dark = sorted((luminance(theme.paper), luminance(getattr(theme, part))), reverse=True)
    assert (light + 0.05) / (dark + 0.05) >= least


def test_a_notebook_learns_to_show_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    printers: dict[type, Callable[[Figure], bytes]] = {}
    formatter = SimpleNamespace(type_printers=printers, for_type=printers.setdefault)
    shell = SimpleNamespace(display_formatter=SimpleNamespace(formatters={"image/png": formatter}))
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    figure = empty_figure(1, 1, LIGHT, dpi=10)
    assert printers[Figure](figure).startswith(b"\x89PNG")
    printers[Figure] = own = lambda _: b""  # what `%matplotlib inline` has set stays
    empty_figure(1, 1, LIGHT, dpi=10)
    assert printers == {Figure: own}
