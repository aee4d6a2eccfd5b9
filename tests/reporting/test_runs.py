"""What is read back from log folders is what the monitor measured."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning_runs import Classifier, trainer

from lightning_flatness import FlatnessMonitor, Rule
from lightning_flatness.reporting.runs import LoggedAlert, best_step, runs_in

RULE = Rule("flatness/trace", above=-1.0, name="always | ever", cooldown=5)


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> tuple[FlatnessMonitor, Path]:
    """One training in the folders `csv` and `board`, and both logs in one folder, `both`."""
    pytest.importorskip("tensorboard")
    folder = tmp_path_factory.mktemp("logs")
    monitor = FlatnessMonitor(rules=[RULE], figure_every_n_validations=0)
    loggers = [CSVLogger(folder, "csv", ""), TensorBoardLogger(folder, "board", "")]
    trainer(folder, monitor, logger=loggers, max_epochs=3, log_every_n_steps=1).fit(Classifier())
    for name in ("csv", "board"):
        shutil.copytree(folder / name, folder / "both", dirs_exist_ok=True)
    return monitor, folder


@pytest.mark.parametrize(("name", "tolerance"), [("csv", 0), ("board", 1e-6), ("both", 0)])
def test_the_values_are_those_of_the_monitor(logs: tuple[FlatnessMonitor, Path], name: str, tolerance: float) -> None:
    monitor, folder = logs
    expected = monitor.history
    (run,), notes = runs_in(folder / name)
    assert (notes, run.name, run.endings, run.own_metrics, run.refused) == ([], name, [""], ["val_loss"], "")
    found = run.history("")
    assert (found.steps, found.epochs) == (expected.steps, expected.epochs)
    assert set(found.values) == set(expected.values)
    for key, series in expected.values.items():
        # Lightning's own float32 stands between the module's metric and the log.
        rel = max(tolerance, 1e-6 if key == "val_loss" else 0)
        assert found.values[key] == pytest.approx(series, rel=rel, abs=0, nan_ok=True), key
    (alert,) = run.alerts
    assert (alert.rule, alert.step, alert.epoch) == ("always | ever", 5, 0)
    assert alert.reason == monitor.alerts[0].reason
    assert alert.severity == ("" if name == "board" else monitor.alerts[0].severity)  # TensorBoard has none
    if name == "csv":
        assert run.facts == {"": {"layer": "net.conv2"}}
        return
    what = {"layer": "net.conv2", "method": "pooled", "loss": "logged by validation_step as val_loss"}
    assert run.facts == {"": what}
    histograms = run.histograms[""]
    assert [each.step for each in histograms] == expected.steps
    for number, each in enumerate(histograms):
        assert sum(each.counts) == 10
        assert len(each.edges) == len(each.counts) + 1
        below = sum(count for count, edge in zip(each.counts, each.edges[1:], strict=True) if edge <= 0)
        assert below == pytest.approx(10 * expected.values["margin/negative"][number])


def write(folder: Path, *rows: str, alerts: tuple[Any, ...] = ()) -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.csv").write_text("\n".join(rows) + "\n")
    if alerts:
        lines = [each if isinstance(each, str) else json.dumps(each) for each in alerts]
        (folder / "alerts.jsonl").write_text("\n".join(lines))
    return folder


GOOD = ("epoch,step,val_acc,flatness/relative", "0,7,0.5,2.0", "1,15,0.25,")
ALERT = {"monitor": "", "event": "alert", "rule": "a", "step": 7, "epoch": 0, "reason": "It rose.", "ratio": None}


@pytest.mark.parametrize("logger", [CSVLogger, TensorBoardLogger])
def test_the_prefix_of_a_logger_is_left_out(tmp_path: Path, logger: Any) -> None:
    monitor = FlatnessMonitor(figure_every_n_validations=0)
    trainer(tmp_path, monitor, logger=logger(tmp_path, prefix="my/run-1"), max_epochs=2).fit(Classifier())
    (run,), _ = runs_in(tmp_path)
    found = run.history("")
    assert (set(found.values), found.epochs) == (set(monitor.history.values), monitor.history.epochs)


def test_runs_are_found_in_subfolders_and_sorted_as_people_count(tmp_path: Path) -> None:
    for number in (10, 9):
        write(tmp_path / "logs" / f"version_{number}", *GOOD)
    write(tmp_path / "logs" / "version_9" / "histograms", "step,other", "1,2")
    runs, (note,) = runs_in(tmp_path / "logs")
    assert [run.name for run in runs] == ["version_9", "version_10"]
    assert note.endswith("histograms has no value of a FlatnessMonitor and no metric `val...`.")
    alone, _ = runs_in(tmp_path / "logs" / "version_10" / "metrics.csv")
    assert [run.name for run in alone] == ["version_10"]
    assert len(runs_in(tmp_path / "logs", tmp_path / "logs" / "version_9")[0]) == 2
    write(tmp_path / "more" / "version_9", *GOOD)
    several, _ = runs_in(tmp_path / "logs" / "version_9", tmp_path / "more")
    assert [run.name for run in several] == ["logs", "more"]


def test_files_of_a_training_that_broke_off(tmp_path: Path) -> None:
    """Cells without a number, an alert that was written again with its action, and half a line."""
    done = ALERT | {"action": "Stopped.", "others": ["b"]}
    write(
        tmp_path / "run", *GOOD, "x,31,nan,inf", "2,23,text,4", alerts=(ALERT, done, {"event": "new"}, '{"event": "al')
    )
    ((run,), _) = runs_in(tmp_path)
    assert run.series["flatness/relative"] == {7: 2.0, 23: 4.0, 31: math.inf}
    assert run.series["val_acc"] == pytest.approx({7: 0.5, 15: 0.25, 23: math.nan, 31: math.nan}, nan_ok=True)
    assert run.alerts == [LoggedAlert("", "a", 7, 0, "It rose.", "Stopped.", others=["b"])]
    assert best_step(run.series["flatness/relative"], is_lower_better=False) == 23
    assert best_step({1: math.nan}, is_lower_better=True) is None


def test_each_loader_has_its_own_metrics(tmp_path: Path) -> None:
    keys = [f"{key}/dataloader_idx_{n}" for n in (0, 1) for key in ("flatness/relative/train", "val_acc")]
    write(tmp_path / "run", ",".join(["step", *keys, "val_f1"]), "7,1,2,3,4,5")
    ((run,), _) = runs_in(tmp_path)
    endings = ["/train/dataloader_idx_0", "/train/dataloader_idx_1"]
    assert (run.endings, run.own_metrics) == (endings, ["val_acc", "val_f1"])
    assert [run.history(ending).values for ending in endings] == [
        {f"flatness/relative{endings[n]}": [value], "val_acc": [value + 1], "val_f1": [5]}
        for n, value in enumerate((1, 3))
    ]


def test_layers_are_told_from_monitors(tmp_path: Path) -> None:
    names = "flatness/relative/net.conv1,flatness/trace/net.conv1,margin/mean,margin_quantiles/q50/train"
    write(tmp_path / "run", f"step,{names}", "7,1,2,3,4")
    ((run,), _) = runs_in(tmp_path)
    assert {ending: run.is_layer(ending) for ending in run.endings} == {"/net.conv1": True, "": False, "/train": False}
    assert run.history("/train").values == {"margin/q50/train": [4.0]}
    values = {"flatness/relative/net.conv1": [1.0], "flatness/trace/net.conv1": [2.0], "margin/mean": [3.0]}
    assert run.history("").values == values


def empty(folder: Path) -> None: ...


def wandb(folder: Path) -> None:
    (folder / "run-1.wandb").touch()


def no_monitor(folder: Path) -> None:
    write(folder / "run", "step,val_acc", "7,0.5")


def refused(folder: Path) -> None:
    write(folder / "run", "step,val_acc", "7,0.5", alerts=({"event": "refused", "reason": "It flattens."},))


def another_table(folder: Path) -> None:
    write(folder / "run", "time,value", "7,0.5")


def binary(folder: Path) -> None:
    write(folder / "run").joinpath("metrics.csv").write_bytes(b"\xff\xfe\x00")


def corrupt_events(folder: Path) -> None:
    pytest.importorskip("tensorboard")
    (folder / "events.out.tfevents.1.host").write_bytes(bytes(range(250)))


def gone(folder: Path) -> None:
    folder.rmdir()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (empty, "holds neither. Give the folder that the logger wrote to"),
        (wandb, "holds files of W&B only. Train with a CSVLogger as well"),
        (no_monitor, r"of 1 none does: it has val_acc. Train with `callbacks=\[FlatnessMonitor\(\)\]` and a logger"),
        (refused, "of 1 none does: the network was refused. It flattens"),
        (another_table, "cannot be read: `metrics.csv` must be written by Lightning's CSVLogger; it has no column"),
        (binary, "run cannot be read: .*utf-8"),
        (corrupt_events, r"has no value of a FlatnessMonitor and no metric `val...`. Train with"),
        (gone, "A log folder must exist; .* does not"),
    ],
)
def test_where_nothing_can_be_shown_a_sentence_helps(tmp_path: Path, make: Any, message: str) -> None:
    folder = tmp_path / "logs"
    folder.mkdir()
    make(folder)
    with pytest.raises(ValueError, match=message):
        runs_in(folder)


def test_an_unreadable_run_does_not_hide_the_others(tmp_path: Path) -> None:
    write(tmp_path / "a", *GOOD)
    another_table(tmp_path)
    runs, (note,) = runs_in(tmp_path)
    assert [run.name for run in runs] == ["a"]
    assert "cannot be read" in note


def test_event_files_need_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "events.out.tfevents.1.host").touch()
    monkeypatch.setitem(sys.modules, "tensorboard.backend.event_processing.event_accumulator", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install tensorboard"):
        runs_in(tmp_path)
