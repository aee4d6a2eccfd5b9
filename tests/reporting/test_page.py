"""The page is parsed, and compared with what the loggers were given."""

from __future__ import annotations

import base64
import math
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lightning_flatness import html_report
from lightning_flatness.keys import logger_key
from lightning_flatness.reporting import page

pytest.importorskip("matplotlib")

ACC = [0.5, 0.9, 0.8]
RUN = {
    "flatness/relative": [2.0, 30.0, 40.0],
    "flatness/scale_free": [1.0, 9.0, -3.0],
    "margin/mean": [-1.0, 4.0, math.nan],
    "margin/negative": [0.6, 0.2, 0.1],
    **{f"margin/q{percent:02}": [percent / 10, percent / 5, percent] for percent in (1, 5, 25, 50, 75, 95, 99)},
}
FLATTER = {key: [value / 2 for value in series] for key, series in RUN.items()}


def write(folder: Path, values: dict[str, list[float]], kind: Any = CSVLogger, suffix: str = "") -> Path:
    logger = kind(folder, name="", version="")
    for step, row in enumerate(zip(*values.values(), strict=True), 1):
        shown = dict(zip(values, row, strict=True))
        names = {key: logger_key(f"{key}{suffix}") if "/" in key else key for key in shown}
        logger.log_metrics({names[key]: value for key, value in shown.items()} | {"epoch": step - 1}, 10 * step)
    logger.save()
    logger.finalize("success")
    return folder


class Page(HTMLParser):
    """The rows of the table as name and numbers, the pictures, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[float | None]] = []
        self.names: list[str] = []
        self.pictures: list[str] = []
        self.texts: list[str] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.feed(text)
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append(tag)
        if tag == "tr":
            self.rows.append([])
        if "data-value" in given:
            self.rows[-1].append(float(given["data-value"]) if given["data-value"] else None)
        self.pictures += [given[name] for name in ("src", "srcset") if name in given]
        self.addresses += [given[name] for name in ("src", "srcset", "href") if name in given]

    def handle_data(self, data: str) -> None:
        if self.tags[-1:] == ["a"] and data.strip():
            self.names.append(data.strip())
        if self.tags[-1:] not in (["style"], ["script"]):
            self.texts.append(data)

    def handle_endtag(self, tag: str) -> None:
        self.tags.append("")


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes a quarter of a second a picture."""
    monkeypatch.setattr(page, "_picture", lambda draw: {"light": "data:light", "dark": "data:dark"})


def page_of(*folders: Path, **options: Any) -> Page:
    return Page(html_report(*folders, **options))


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("kind", [CSVLogger, TensorBoardLogger])
def test_the_table_has_the_first_the_best_and_the_last_validation(tmp_path: Path, kind: Any) -> None:
    if kind is TensorBoardLogger:
        pytest.importorskip("tensorboard")
    write(tmp_path / "a", {"val_loss": [2.0, 1.0, 0.5], "val_acc": ACC} | RUN, kind)
    write(tmp_path / "b", {"val_acc": [0.7, 0.6, 0.5]} | FLATTER)
    shown = page_of(tmp_path)
    _, _, first, second = shown.rows
    assert first.pop(-2) is None
    assert first == pytest.approx([0, 0.5, 0.9, 0.8, 2, 30, 40, 1, 9, -3, -1, 4, 0], rel=1e-6)
    assert second == [1, 0.7, 0.7, 0.5, 1, 1, 20, 0.5, 0.5, -1.5, -0.5, -0.5, None, 0]
    assert shown.names == ["a", "b"]
    quantities = ("val_acc", "Relative flatness", "Scale-free flatness", "Mean output margin")
    for quantity in quantities:
        assert f"{quantity} " in shown.text
    assert len(shown.pictures) == 2 * (1 + 2 + 2)  # light and dark: curves of all, and figure and margins of each


def test_the_page_needs_nothing_from_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "_DOTS", 15)  # small pictures take less time
    write(tmp_path / "a", {"val_acc": ACC} | RUN)
    text = html_report(tmp_path)
    shown = Page(text)
    assert len(shown.pictures) == 2 * 2
    for address in shown.pictures:
        scheme, data = address.split(",")
        assert scheme == "data:image/png;base64"
        assert base64.b64decode(data).startswith(b"\x89PNG")
    assert all(address.startswith(("data:", "#run-")) for address in shown.addresses)
    assert not re.search(r"https?://|@import|url\(", text)


@pytest.mark.usefixtures("no_pictures")
def test_a_metric_of_ones_own_comes_first(tmp_path: Path) -> None:
    write(tmp_path / "a", {"val_loss": [2.0, 0.5, 1.0], "val_f1": [0.1, 0.2, 0.3], "val_acc": ACC} | RUN)
    for metric, shown, relative in (("val_loss", [2, 0.5, 1], 30), ("val_f1", [0.1, 0.3, 0.3], 40)):
        row = page_of(tmp_path, metric=metric).rows[-1]
        assert (row[1:4], row[5]) == (shown, relative)
    assert "(lower is better)" in page_of(tmp_path, metric="val_loss").text
    with pytest.raises(ValueError, match=r"`metric` must be .*; got 'f1'. The logs have: val_acc, val_f1, val_loss"):
        html_report(tmp_path, metric="f1")


@pytest.mark.usefixtures("no_pictures")
def test_without_a_metric_the_margins_tell_the_accuracy(tmp_path: Path) -> None:
    write(tmp_path / "a", {"val_loss": [2.0, 0.5, 1.0]} | RUN)
    shown = page_of(tmp_path)
    assert shown.rows[-1][1:6] == pytest.approx([0.4, 0.9, 0.9, 2, 40])
    assert "accuracy" in shown.text
    lonely = write(tmp_path / "b", {"flatness/trace": [1.0, 2.0]})
    assert page_of(lonely).rows[-1][1:] == [None] * 12 + [0]
    several = page_of(lonely, write(tmp_path / "c", {"flatness/trace": [1.0, 2.0]}))
    assert "Curves" not in several.text  # there would be none


@pytest.mark.usefixtures("no_pictures")
def test_a_validation_that_was_not_measured_has_no_flatness(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,val_acc,flatness/relative\n1,0.5,2\n2,0.9,\n3,0.6,4\n")
    shown = page_of(tmp_path)
    assert shown.rows[-1][1:7] == [0.5, 0.9, 0.6, 2, None, 4]


@pytest.mark.usefixtures("no_pictures")
def test_monitors_and_layers_are_rows_of_their_own(tmp_path: Path) -> None:
    write(tmp_path / "a" / "x", {"val_acc": ACC} | RUN, suffix="/train")
    layers = {"flatness/relative/net.conv": ACC, "flatness/trace/network": ACC}
    write(tmp_path / "a" / "y", {"val_acc": ACC, "margin/mean": ACC} | layers)
    write(tmp_path / "a" / "z", {"val_acc": ACC, "val_loss": ACC})
    shown = page_of(tmp_path)
    assert shown.names == ["x train", "y net.conv", "y", "z"]
    assert [row[4] for row in shown.rows[2:]] == [2, 0.5, None, None]
    assert "No value of a FlatnessMonitor" in shown.text


ALERT = """{"monitor": "", "event": "alert", "rule": "too <b>sharp", "step": 20, "epoch": 1, "reason": "It rose.",
"severity": "critical", "causes": "a high rate", "look_at": "the rate", "action": "Rate cut.", "others": ["noise"],
"onset_step": 10}"""
REFUSED = '{"event": "refused", "reason": "It flattens its map."}'


@pytest.mark.usefixtures("no_pictures")
def test_a_layer_has_the_accuracy_of_its_monitor(tmp_path: Path) -> None:
    names = "flatness/relative/net.conv/ggn,margin_statistics/negative,margin/mean"
    (tmp_path / "metrics.csv").write_text(f"step,{names}\n1,5,0.75,1\n2,6,0.5,1\n")
    rows = page_of(tmp_path).rows[2:]
    assert [row[1:7] for row in rows] == [[0.25, 0.5, 0.5, 5, 6, 6], [0.25, 0.5, 0.5, None, None, None]]


@pytest.mark.usefixtures("no_pictures")
def test_alerts_are_shown_with_their_reasons(tmp_path: Path) -> None:
    write(tmp_path / "a", {"val_acc": ACC} | RUN)
    (tmp_path / "a" / "alerts.jsonl").write_text(ALERT.replace("\n", " ") + "\n" + REFUSED)
    write(tmp_path / "b", {"val_acc": ACC} | RUN)
    shown = page_of(tmp_path)
    for sentence in (
        "too <b>sharp (and noise), step 20, epoch 1, critical",
        "It rose.",
        "Usual causes: a high rate.",
        "Look at: the rate.",
        "Done: Rate cut.",
        "Not measured: It flattens its map.",
    ):
        assert sentence in shown.text
    assert "b" not in shown.tags  # what a user writes is text
    assert [row[-1] for row in shown.rows[2:]] == [1, 0]
    assert shown.text.count("No alerts") == 1


@pytest.mark.usefixtures("no_pictures")
def test_what_is_left_out_is_said(tmp_path: Path) -> None:
    write(tmp_path / "a", {"val_acc": ACC} | RUN)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "metrics.csv").write_text("time\n1\n")
    assert "cannot be read: `metrics.csv` must be written by Lightning's CSVLogger" in page_of(tmp_path).text


def test_pictures_need_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, {"val_acc": ACC} | RUN)
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install .*\[plots\]"):
        html_report(tmp_path)
