"""What the figures of the report show, read back from their axes."""

from __future__ import annotations

import pytest

pytest.importorskip("matplotlib")

from lightning_flatness.reporting.history import History
from lightning_flatness.reporting.run_figures import Look, margin_figure, run_curves
from lightning_flatness.reporting.runs import Histogram
from lightning_flatness.reporting.style import DARK, LIGHT


def test_each_key_has_a_panel_with_all_its_runs() -> None:
    panels = {
        "val_acc": {0: {5: 0.5, 11: 0.75}, 2: {3: 0.25}},
        "flatness/relative": {0: {5: 2.0, 11: 200.0}},
        "flatness/scale_free": {0: {5: -2.0, 11: 200.0}},
    }
    figure = run_curves(panels)
    accuracy, relative, scale_free = figure.axes
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "val_acc",
        "Relative flatness",
        "Scale-free flatness",
    ]
    assert [axes.get_yscale() for axes in figure.axes] == ["linear", "log", "symlog"]
    assert [line.get_xydata().tolist() for line in accuracy.lines] == [[[5, 0.5], [11, 0.75]], [[3, 0.25]]]
    assert [line.get_color() for line in accuracy.lines] == [LIGHT.curves[0], LIGHT.curves[2]]
    assert run_curves(panels, dark=True).axes[0].lines[0].get_color() == DARK.curves[0]
    low, high = accuracy.get_xlim()
    assert low < 3 < 11 < high
    assert "lower is flatter; unit: loss; log scale" in relative.texts[0].get_text()
    assert "linear within" in scale_free.texts[0].get_text()
    looks = [Look.of(number) for number in range(18)]
    assert len(set(looks)) == 18
    assert Look.of(18) == Look.of(0)


def quantiles(*centres: float) -> History:
    history = History()
    for step, centre in enumerate(centres):
        values = {f"margin/q{percent:02}/train": centre + percent - 50 for percent in (1, 5, 25, 50, 75, 95, 99)}
        history.add(step, 0, values)
    return history


def test_histograms_are_spread_on_common_bars() -> None:
    first = Histogram(5, [-2.0, 0.0, 1.0], [6.0, 2.0])
    last = Histogram(11, [0.0, 2.0, 4.0], [1.0, 3.0])
    (axes,) = margin_figure([first, first, last], quantiles(1.0), "/train").axes
    shown = {patch.get_label(): patch.get_data() for patch in axes.patches}
    assert list(shown) == ["last: step 11", "first: step 5"]
    for label, below_zero, up_to_two in (("last: step 11", 0, 25), ("first: step 5", 75, 100)):
        shares, edges, _ = shown[label]
        assert (edges[0], edges[-1], sum(shares)) == (-2, 4, pytest.approx(100))
        assert sum(shares[edges[1:] <= 1e-9]) == pytest.approx(below_zero)
        assert sum(shares[edges[1:] <= 2 + 1e-9]) == pytest.approx(up_to_two)
    (axes,) = margin_figure([last], quantiles(1.0), "/train").axes
    assert len(axes.patches) == 1


@pytest.mark.parametrize("histograms", [[], [Histogram(5, [0.0], [])], [Histogram(5, [0.0, 1.0], [0.0])]])
def test_without_histograms_the_quantiles_are_shown(histograms: list[Histogram]) -> None:
    (axes,) = margin_figure(histograms, quantiles(0.0, 7.0, 3.0), "/train").axes
    rows = {row: [] for row in (0.0, 2.0)}
    for bar in axes.collections:
        ((low, row), (high, _)) = bar.get_segments()[0]
        rows[row].append((low, high))
    assert rows == {
        row: [(centre - 49, centre + 49), (centre - 45, centre + 45), (centre - 25, centre + 25)]
        for row, centre in ((0.0, 0.0), (2.0, 3.0))
    }
    assert [text.get_text() for text in axes.get_yticklabels()] == ["step 0", "step 2"]
    assert margin_figure(histograms, quantiles(1.0), "") is None
