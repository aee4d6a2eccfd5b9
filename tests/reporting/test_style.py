from __future__ import annotations

import pytest
from matplotlib.colors import to_rgb

from lightning_flatness.reporting.style import DARK, LIGHT, Theme


def luminance(colour: str) -> float:
    """Of WCAG 2."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", [LIGHT, DARK])
@pytest.mark.parametrize(("part", "least"), [("ink", 7.0), ("faint", 4.5), ("margin", 3.0), ("flatness", 3.0)])
def test_lines_and_letters_stand_out(theme: Theme, part: str, least: float) -> None:
    light, dark = sorted((luminance(theme.paper), luminance(getattr(theme, part))), reverse=True)
    assert (light + 0.05) / (dark + 0.05) >= least
