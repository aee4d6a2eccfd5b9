"""The monitor's values among Lightning's metrics: where they are, and what they leave alone."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers.logger import DummyLogger
from lightning_runs import KEYS, Classifier, images, report_of, trainer
from torch.utils.data import DataLoader

from lightning_flatness import FlatnessMonitor
from lightning_flatness.keys import logger_key


class Rows(DummyLogger):
    """Keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, float]] = []

    def log_metrics(self, metrics: dict[str, float], step: Any = None) -> None:
        self.rows.append({"step": step, **metrics})


class Trace(Callback):
    """What a callback that comes first sees at the end of each validation."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.values: list[float | None] = []

    def on_validation_end(self, run: Any, module: Any) -> None:
        value = run.callback_metrics.get(self.key)
        if not run.sanity_checking:
            self.values.append(None if value is None else float(value))


class Own(Classifier):
    """Logs a metric under one of the monitor's keys, in one of its hooks."""

    def __init__(self, where: str) -> None:
        super().__init__(loaders=2 if where == "a loader's step" else 1)
        self.where = where

    def log_own(self, here: str, **options: Any) -> None:
        if here == self.where:
            self.log("margin/mean", torch.tensor(-5.0, dtype=torch.float64), **options)

    def training_step(self, batch: Any, index: int) -> Any:
        self.log_own("training")
        return super().training_step(batch, index)

    def validation_step(self, batch: Any, index: int, dataloader_idx: int = 0) -> None:
        self.log_own("step", prog_bar=True)
        self.log_own("a loader's step")
        super().validation_step(batch, index)

    def on_validation_epoch_start(self) -> None:
        self.log_own("epoch start")

    def on_validation_epoch_end(self) -> None:
        self.log_own("epoch end", prog_bar=True)
        self.log_own("epoch end, plain")


@pytest.mark.parametrize(
    "where", ["step", "a loader's step", "epoch start", "epoch end", "epoch end, plain", "training"]
)
def test_a_metric_of_the_module_stays_its_own(tmp_path: Any, where: str) -> None:
    key = "margin/mean/dataloader_idx_0" if where == "a loader's step" else "margin/mean"
    seen: dict[bool, list[Any]] = {}
    for monitored in (False, True):
        trace, rows = Trace(key), Rows()
        monitors = [FlatnessMonitor(strict=True)] * monitored
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer(tmp_path, trace, *monitors, logger=rows, max_epochs=3, log_every_n_steps=1).fit(Own(where))
        logged = [row[key] for row in rows.rows if key in row]
        # Whether training or validation has logged a key is known after the first of them.
        seen[monitored] = [trace.values[1:], set(logged)] if where == "training" else [trace.values, logged]
        said = [str(warning.message) for warning in caught if "FlatnessMonitor" in str(warning.message)]
        assert len(said) == monitored
        assert not monitored or "name=" in said[0]
    assert seen[True] == seen[False]
    assert seen[True][0][-1] == -5.0


def test_other_callbacks_keep_what_they_log_in_the_same_hooks(tmp_path: Any) -> None:
    class Logs(Callback):
        def __init__(self, key: str) -> None:
            self.state_key_ = key

        def on_validation_epoch_start(self, run: Any, module: Any) -> None:
            self.log(f"{self.state_key_}/start", float(run.current_epoch))

        def on_validation_epoch_end(self, run: Any, module: Any) -> None:
            self.log(f"{self.state_key_}/end", float(run.current_epoch))

    rows = Rows()
    monitors = [FlatnessMonitor(strict=True), FlatnessMonitor(name="twin", strict=True)]
    trainer(tmp_path, Logs("a"), monitors[0], Logs("b"), monitors[1], logger=rows, max_epochs=3).fit(Classifier())
    wanted = {f"{name}/{hook}" for name in "ab" for hook in ("start", "end")}
    validations = [row for row in rows.rows if "val_loss" in row]
    assert [{key: row[key] for key in wanted} for row in validations] == [
        dict.fromkeys(wanted, float(e)) for e in range(3)
    ]
    logged = {logger_key(f"{key}{suffix}") for key in KEYS for suffix in ("", "/twin")}
    assert all(set(row) >= logged for row in validations)


@pytest.mark.parametrize("every", [1, 2, 3])
def test_loggers_get_each_value_once(tmp_path: Any, every: int) -> None:
    rows = Rows()
    monitor = FlatnessMonitor(every_n_validations=every, strict=True)
    trainer(tmp_path, monitor, logger=rows, max_epochs=5).fit(Classifier())
    has_value = ["flatness/trace" in row for row in rows.rows if "val_loss" in row]
    assert has_value == [epoch % every == 0 for epoch in range(5)]


class Fails(Callback):
    """The second validation cannot be measured."""

    def __init__(self, monitor: FlatnessMonitor) -> None:
        self.monitor, self.count = monitor, 0

    def on_validation_start(self, run: Any, module: Any) -> None:
        self.count += not run.sanity_checking
        self.monitor.target = (lambda batch: batch[0]) if self.count == 2 else None


def test_a_value_that_is_missing_is_nan_for_callbacks_and_nothing_for_loggers(tmp_path: Any) -> None:
    monitor, trace, rows = FlatnessMonitor(loss="cross_entropy"), Trace("flatness/trace"), Rows()
    with pytest.warns(UserWarning, match="Targets must be"):
        trainer(tmp_path, trace, Fails(monitor), monitor, logger=rows, max_epochs=3).fit(Classifier())
    assert [math.isnan(value or 0.0) for value in trace.values] == [False, True, False]
    assert ["flatness/trace" in row for row in rows.rows if "val_loss" in row] == [True, False, True]


@pytest.mark.parametrize("check_finite", [True, False])
def test_what_lightning_does_about_a_missing_value(tmp_path: Any, check_finite: bool) -> None:
    monitor = FlatnessMonitor(loss="cross_entropy")
    stopping = EarlyStopping("flatness/trace", patience=9, check_finite=check_finite)
    best = ModelCheckpoint(tmp_path, "{epoch}", monitor="flatness/trace", mode="max")
    run = trainer(tmp_path, stopping, Fails(monitor), monitor, best, max_epochs=4, enable_checkpointing=True)
    with pytest.warns(UserWarning, match="Targets must be"):
        run.fit(Classifier())
    assert run.current_epoch == (2 if check_finite else 4)
    assert stopping.wait_count == (0 if check_finite else stopping.wait_count)
    assert "epoch=1" not in best.best_model_path


def test_nothing_is_marked_that_was_never_there(tmp_path: Any) -> None:
    run = trainer(
        tmp_path, FlatnessMonitor(loss="cross_entropy", target=lambda batch: batch[0]), num_sanity_val_steps=0
    )
    with pytest.warns(UserWarning, match="Targets must be"):
        run.fit(Classifier())
    assert not KEYS & set(run.callback_metrics)


def test_values_after_a_metric_of_the_module_are_right(tmp_path: Any) -> None:
    """The value of a key that the module logs too is judged by the rules all the same."""
    module, monitor = Own("step"), FlatnessMonitor()
    run = trainer(tmp_path, monitor)
    with pytest.warns(UserWarning, match="name="):
        run.fit(module, val_dataloaders=DataLoader(images(10, 2), batch_size=4))
    expected = report_of(module, module.val_dataloader())
    assert monitor._values["margin/mean"] == pytest.approx(expected["margin/mean"], rel=1e-12)
