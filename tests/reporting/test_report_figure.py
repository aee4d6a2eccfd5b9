from __future__ import annotations

import io
import sys
from typing import Any

import pytest
import torch
from lightning_runs import Network, images
from torch.utils.data import DataLoader

from lightning_flatness import FlatnessReport, compare, measure


@pytest.fixture(scope="module")
def report() -> FlatnessReport:
    torch.manual_seed(0)
    return measure(Network().double(), DataLoader(images(20, 3), batch_size=7), per_sample=True)


@pytest.mark.parametrize("dark", [False, True])
def test_the_samples_are_drawn_as_they_are(report: FlatnessReport, dark: bool) -> None:
    figure = report.plot(dark)
    left, right = figure.axes
    assert sum(bar.get_height() for bar in left.patches) == 20
    assert list(right.lines[0].get_xdata()) == report.samples["output_margin"].tolist()
    assert list(right.lines[0].get_ydata()) == report.samples["relative_flatness"].tolist()
    assert right.get_yscale() == "log"
    figure.savefig(io.BytesIO())


@pytest.mark.parametrize("changes", [{"samples": None}, {"samples": None, "margins": {}}, {"samples": {}}])
def test_without_samples_it_shows_the_statistics(report: FlatnessReport, changes: dict[str, Any]) -> None:
    figure = FlatnessReport(**(vars(report) | changes)).plot()
    left, right = figure.axes
    if "margins" not in changes:
        assert [line.get_xdata()[0] for line in left.lines[:1]] == [report.margins["q50"]]
    assert right.texts[0].get_text().startswith("layer")
    figure.savefig(io.BytesIO())


def test_values_of_both_signs_have_an_axis(report: FlatnessReport) -> None:
    signed = report.samples | {"relative_flatness": -report.samples["relative_flatness"]}
    figure = FlatnessReport(**(vars(report) | {"samples": signed})).plot()
    assert figure.axes[1].get_yscale() == "symlog"
    figure.savefig(io.BytesIO())


def test_a_notebook_shows_the_lines_of_the_text(report: FlatnessReport) -> None:
    html = report._repr_html_()
    assert html.count("<tr>") == len(str(report).splitlines()) + 1
    assert f"<td>{report.relative_flatness:.6g}  (lower is flatter)</td>" in html


def test_two_reports_are_compared_number_by_number(report: FlatnessReport) -> None:
    other = FlatnessReport(**(vars(report) | {"relative_flatness": 3 * report.relative_flatness, "margins": {}}))
    rows = {row[0]: row[1:] for row in compare(report, other).rows}
    assert rows["relative flatness"][2] == "3"
    assert rows["Hessian trace"][2] == "1"
    assert rows["margin mean"][1:] == ("", "")
    assert rows["samples"] == ("20", "20", "")


def test_without_matplotlib_the_error_names_the_extra(report: FlatnessReport, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install .*\[plots\]"):
        report.plot()
