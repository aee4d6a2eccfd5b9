from __future__ import annotations

import io
import math
import sys
from typing import Any

import numpy as np
import pytest

from lightning_flatness.keys import FACTORS, RELATIVE, SCALE_FREE
from lightning_flatness.reporting.dashboard import Mark, dashboard
from lightning_flatness.reporting.history import History

QUANTILES = dict(zip((5, 25, 50, 75, 95), (-2.0, 0.5, 1.0, 2.0, 4.0), strict=True))


def history(n: int = 3, suffix: str = "", **changes: list[float]) -> History:
    """Factors that double, halve, ...: uncertainty halves each time, the others grow by 2, 4, 8, 16."""
    made = History()
    for at in range(n):
        factors = {key: 2.0 ** (at * (rate or -1)) for rate, key in enumerate(FACTORS)}
        values = {RELATIVE: math.prod(factors.values()), SCALE_FREE: 3.0 + at, **factors}
        values |= {f"margin/q{percent:02}": value + at for percent, value in QUANTILES.items()}
        values = {f"{key}{suffix}": value for key, value in values.items()}
        values |= {"val_loss": 0.9 - at / 10, "val_acc": at / 3}
        values |= {key.replace("__", "/"): series[at] for key, series in changes.items()}
        made.add(10 * at, at, values)
    return made


def drawn(axes: Any) -> dict[str, list[float]]:
    return {line.get_label(): list(line.get_ydata()) for line in axes.lines if not line.get_label().startswith("_")}


def note(axes: Any) -> str:
    return axes.texts[0].get_text()


@pytest.mark.parametrize("suffix", ["", "/train", "/dataloader_idx_0"])
def test_panels_show_the_series_they_were_given(suffix: str) -> None:
    given = history(suffix=suffix)
    flatness, own, margins, factors, right = dashboard(given).axes
    assert drawn(flatness) == {
        "relative": given.values[f"{RELATIVE}{suffix}"],
        "scale-free": given.values[f"{SCALE_FREE}{suffix}"],
    }
    assert flatness.get_yscale() == "log"
    assert (drawn(own), drawn(right)) == (
        {"val_acc": given.values["val_acc"]},
        {"val_loss (right)": given.values["val_loss"]},
    )
    assert drawn(margins) == {"median": [1.0, 2.0, 3.0]}
    bands = {each.get_label(): each.get_paths()[0].vertices[:, 1] for each in margins.collections}
    for label, low, high in (("5 to 95 %", -2.0, 6.0), ("quartiles", 0.5, 4.0)):
        assert (bands[label].min(), bands[label].max()) == (low, high)
    assert 0.0 in [line.get_ydata()[0] for line in margins.lines if line.get_label().startswith("_")]
    # doublings over two validations: the factors' and their sum
    assert [bar.get_width() for bar in factors.patches] == pytest.approx([-2, 2, 4, 6, 8, 18])
    assert [tick.get_text() for tick in factors.get_yticklabels()][-1] == "product"


@pytest.mark.parametrize("suffix", ["", "/train"])
def test_of_several_layers_the_first_are_shown(suffix: str) -> None:
    made = History()
    names = [f"net.{number}" for number in range(6)]
    for step in (5, 11):
        layers = {f"{RELATIVE}/{name}/ggn{suffix}": step + at for at, name in enumerate(names)}
        made.add(step, 0, {**layers, **{f"margin/q{p:02}{suffix}": value for p, value in QUANTILES.items()}})
    flatness, _, margins, _ = dashboard(made).axes
    assert drawn(flatness) == {f"net.{at}/ggn": [5 + at, 11 + at] for at in range(4)}
    assert note(flatness).startswith("the first 4 of 6 layers")
    assert drawn(margins) == {"median": [1.0, 1.0]}


def test_factors_are_compared_with_the_onset() -> None:
    factors = dashboard(history(), since=10).axes[3]
    assert [bar.get_width() for bar in factors.patches] == pytest.approx([-1, 1, 2, 3, 4, 9])
    assert factors.texts[-1].get_text() == "log2 of the change from step 10 to 20"
    unknown = dashboard(history(), since=7).axes[3]
    assert unknown.texts[-1].get_text() == "log2 of the change from step 0 to 20"


@pytest.mark.parametrize(
    ("values", "scale", "words"),
    [
        ([1.0, 10.0, 100.0], "log", "log scale"),
        ([1.0, -10.0, 100.0], "symlog", "linear within"),
        ([0.0, 10.0, 100.0], "symlog", "linear within"),
        ([math.nan, math.inf, 2.0], "log", "log scale"),
    ],
)
def test_signed_values_survive(values: list[float], scale: str, words: str) -> None:
    figure = dashboard(history(flatness__relative=values))
    axes = figure.axes[0]
    assert axes.get_yscale() == scale
    assert words in note(axes)
    shown = drawn(axes)["relative"]
    np.testing.assert_array_equal(shown, [value if math.isfinite(value) else math.nan for value in values])
    figure.savefig(io.BytesIO())
    bars = dashboard(history(flatness__alignment=values)).axes[3]
    labels = [text.get_text() for text in bars.texts]
    assert ("no logarithm" in labels) == (not (values[0] > 0 and math.isfinite(values[0])))


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("n", [1, 2, 40])
def test_runs_of_any_length_can_be_drawn(n: int, dark: bool) -> None:
    marks = [Mark(10 * at, f"$rule_{at}", is_action=bool(at % 2)) for at in range(min(n, 9))]
    picture = io.BytesIO()
    dashboard(history(n), marks, "layer $net_1$", dark=dark).savefig(picture)
    assert picture.getvalue().startswith(b"\x89PNG")


def test_alerts_and_actions_are_lines_with_names() -> None:
    figure = dashboard(history(), [Mark(10, "label noise"), Mark(20, "lr / 10", is_action=True)], "layer net.3")
    for axes in figure.axes[:3]:
        vertical = [line for line in axes.lines if list(line.get_xdata()) in ([10, 10], [20, 20])]
        assert [line.get_linestyle() for line in vertical] == ["--", "-"]
    assert {"label noise", "lr / 10"} < {text.get_text() for text in figure.axes[0].texts}
    assert figure.texts[0].get_text() == "layer net.3"


def test_what_is_missing_is_said() -> None:
    bare = History()
    bare.add(1, 0, {RELATIVE: 0.0})
    figure = dashboard(bare)
    assert [note(axes).split(";")[-1].split(":")[0].strip() for axes in figure.axes[:3]] == [
        "no values yet",
        "none",
        "none",
    ]
    figure.savefig(io.BytesIO())
    many = history(**{f"val_{name}": [0.0, 1.0, 2.0] for name in "abc"})
    assert "4 of 5" in note(dashboard(many).axes[1])
    with pytest.raises(ValueError, match="at least one validation"):
        dashboard(History())


def test_without_matplotlib_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install .*\[plots\]"):
        dashboard(history())


def test_pyplot_is_not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    dashboard(history()).savefig(io.BytesIO())
