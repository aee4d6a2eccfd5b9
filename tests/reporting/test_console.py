from __future__ import annotations

import io
import logging
import math
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import tqdm
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning_runs import Classifier, trainer

from lightning_flatness import FlatnessMonitor, Rule
from lightning_flatness.reporting.console import own_line, say, show_summary, summary, warn
from lightning_flatness.reporting.history import History


def history() -> History:
    made = History()
    for epoch, (flatness, margin) in enumerate([(9.0, 1.0), (4.0, math.nan), (5.0, 0.5)]):
        made.add(epoch, epoch, {"flatness/relative": flatness, "margin/mean": margin, "margin/q05": 1.0, "val_loss": 2})
    return made


def test_the_best_value_follows_the_direction_of_the_key() -> None:
    assert [list(row) for row in summary(history()).rows] == [
        ["flatness/relative", "9", "4 in epoch 1", "5"],
        ["margin/mean", "1", "1 in epoch 0", "0.5"],
    ]


def test_messages_start_on_a_line_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    with tqdm.tqdm(total=9, file=screen, mininterval=0, miniters=1) as bar:
        bar.update()
        with own_line():
            screen.write("message\n")
    before = screen.getvalue().split("message")[0]
    assert before.endswith("\r")
    assert not before.rsplit("\r", 2)[1].strip()  # the bar has been wiped
    assert "1/9" in screen.getvalue().split("message")[1]
    with pytest.warns(UserWarning, match="careful"):
        warn("careful")
    monkeypatch.delitem(sys.modules, "tqdm")
    say("nobody has a bar")


@pytest.mark.parametrize(
    ("enabled", "level", "is_shown"),
    [(True, logging.INFO, True), (False, logging.INFO, False), (True, logging.ERROR, False)],
)
def test_a_training_ends_with_a_table_where_lightning_speaks(
    tmp_path: Any, caplog: pytest.LogCaptureFixture, enabled: bool, level: int, is_shown: bool
) -> None:
    monitor = FlatnessMonitor(rules=[Rule("flatness/trace", above=-1.0, name="always", cooldown=9)], prog_bar=True)
    with caplog.at_level(level, "lightning.pytorch"):
        run = trainer(tmp_path, monitor, enable_progress_bar=enabled)
        run.fit(Classifier())
    said = [record.getMessage() for record in caplog.records if "over 2 validations" in record.getMessage()]
    assert len(said) == is_shown
    for text in said:
        for part in ("flatness/relative", " in epoch ", "layer: net.conv2", "samples: 10", "alerts: 1", "always: "):
            assert part in text
    if enabled:
        shown = run.progress_bar_callback.get_metrics(run, run.lightning_module)
        assert {"flatness/relative", "flatness/scale_free", "flatness/trace", "margin/mean"} <= set(shown)
        assert "margin/q05" not in shown


def test_without_prog_bar_nothing_is_added_to_the_bar(tmp_path: Any) -> None:
    run = trainer(tmp_path, FlatnessMonitor(), TQDMProgressBar(refresh_rate=0), enable_progress_bar=True)
    run.fit(Classifier())
    assert not [key for key in run.progress_bar_metrics if "/" in key]


def test_rich_text_where_lightning_uses_it(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich", reason="rich is not installed")

    class RichProgressBar: ...

    run = SimpleNamespace(progress_bar_callback=RichProgressBar(), is_global_zero=True)
    show_summary(run, "FlatnessMonitor", history(), {"layer": "net[3]"}, ["step 3, [rule]: rose"])
    printed = capsys.readouterr().out
    for part in ("flatness/relative", "4 in epoch 1", "layer: net[3]", "[rule]: rose", "│"):
        assert part in printed
