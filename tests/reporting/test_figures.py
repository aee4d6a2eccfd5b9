from __future__ import annotations

import io
import math
import sys

import numpy as np
import pytest
import torch

from lightning_flatness.reporting.figures import eigenvalue_density, flatness_curves

HISTORY = {
    "epoch": [0, 1, 2, 3],
    "val_accuracy": [0.40, 0.83, 0.95, 0.993],
    "flatness/relative": [27.0, 410.0, 790.0, 850.0],
    "flatness/trace": [0.9, 12.0, 25.0, 28.0],
    "margin/mean": torch.tensor([-0.5, 3.0, 5.0, 5.9]).unbind(),
    "my_own": [3, 1, 2, 0],
}


def test_each_curve_is_the_series_it_was_given() -> None:
    figure = flatness_curves(HISTORY)
    for axes, key in zip(figure.axes, list(HISTORY)[1:], strict=True):
        curve = axes.lines[0]
        np.testing.assert_array_equal(curve.get_xdata(), HISTORY["epoch"])
        np.testing.assert_array_equal(curve.get_ydata(), [float(value) for value in HISTORY[key]])


def test_panels_show_title_scale_direction_and_last_value() -> None:
    figure = flatness_curves(HISTORY)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == [
        "Validation accuracy",
        "Relative flatness",
        "Hessian trace",
        "Mean output margin",
        "my_own",
    ]
    assert [axes.get_yscale() for axes in figure.axes] == ["linear", "log", "log", "linear", "linear"]
    notes = [axes.texts[0].get_text() for axes in figure.axes]
    assert [note.split(";")[0] for note in notes] == [
        "higher is better",
        "lower is flatter",
        "lower is flatter",
        "higher is better",
        "",
    ]
    lasts = [axes.texts[1].get_text() for axes in figure.axes]
    assert lasts == ["99.3%", "850", "28.0", "5.90", "0.00"]


@pytest.mark.parametrize(
    ("values", "scale", "last"),
    [
        ([27.0, math.nan, 850.0, math.inf], "log", "850"),
        ([27.0, 30.0, 0.0, 1.0], "linear", "1.00"),
        ([-1.0, 30.0, 2.0, 1e6], "linear", "1.00e+06"),
        ([math.nan] * 4, "linear", None),
    ],
)
def test_values_without_a_logarithm(values: list[float], scale: str, last: str | None) -> None:
    figure = flatness_curves({"step": [0, 10, 20, 30], "flatness/relative": values}, x="step")
    (axes,) = figure.axes
    assert axes.get_yscale() == scale
    assert axes.texts[0].get_text().endswith("log scale") == (scale == "log")
    assert [text.get_text() for text in axes.texts[1:]] == ([last] if last else [])
    assert axes.get_xlabel() == "step"
    figure.savefig(io.BytesIO())


@pytest.mark.parametrize("length", [0, 1])
def test_short_runs_can_be_drawn(length: int) -> None:
    flatness_curves({key: series[:length] for key, series in HISTORY.items()}).savefig(io.BytesIO())


def test_pyplot_is_not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    picture = io.BytesIO()
    flatness_curves(HISTORY).savefig(picture)
    assert picture.getvalue().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("history", "message"),
    [
        ({"flatness/relative": [1.0]}, r"must hold 'epoch'.*; got keys \['flatness/relative'\]"),
        ({"epoch": [0]}, r"at least one curve; got keys \['epoch'\]"),
        ({"epoch": [0, 1], "margin/mean": [1.0]}, "2 in all; got 1 for 'margin/mean'"),
    ],
)
def test_wrong_history(history: dict[str, list[float]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        flatness_curves(history)


def test_without_matplotlib_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install .*\[plots\]"):
        flatness_curves(HISTORY)


@pytest.mark.parametrize(
    ("eigenvalues", "sides"),
    [([3.0, 0.2, 0.1, -0.01, -4.0], [2, 3]), ([1e-9, 1e3], [2]), ([-2.0], [1]), ([1.0], [1]), ([0.5] * 40, [40])],
)
def test_every_eigenvalue_is_in_a_bar_of_its_side(eigenvalues: list[float], sides: list[int]) -> None:
    figure = eigenvalue_density(eigenvalues, "conv", "5 of 10 are zero")
    assert [sum(bar.get_height() for bar in axes.patches) for axes in figure.axes] == sides
    assert figure.axes[0].get_title(loc="left") == "conv"
    assert figure.axes[0].texts[0].get_text() == f"{len(eigenvalues)} eigenvalues, log scale; 5 of 10 are zero"
    figure.savefig(io.BytesIO())
    negative = min(eigenvalues) < 0
    assert figure.axes[0].xaxis_inverted() == negative


@pytest.mark.parametrize("eigenvalues", [[], [1.0, 0.0], [1.0, math.nan], [math.inf]])
def test_eigenvalues_must_have_a_logarithm(eigenvalues: list[float]) -> None:
    with pytest.raises(ValueError, match="finite and not zero"):
        eigenvalue_density(eigenvalues, "conv")


@pytest.mark.parametrize(("values", "is_log"), [([9.0, 4.0], True), ([9.0, -4.0], False), ([0.0, 4.0], False)])
def test_a_logarithmic_axis_needs_positive_values_and_says_so(values: list[float], is_log: bool) -> None:
    (axes,) = flatness_curves({"epoch": [0, 1], "flatness/trace": values}).axes
    assert axes.get_yscale() == ("log" if is_log else "linear")
    (note,) = [text.get_text() for text in axes.texts if "scale" in text.get_text()]
    assert note.endswith(", log scale" if is_log else ", linear scale: not all are positive")
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), values)
