"""One monitor in several runs: resumed, evaluated in between, used again; what it remembers and what it measures."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning_runs import Classifier, Values, assert_same, report_of, trainer, values_of

from lightning_flatness import FlatnessMonitor, ReduceLR, Rule, StopTraining

KEY = "flatness/trace"


class Evaluated(Classifier):
    def test_step(self, batch: Any, index: int) -> None:
        self.loss(batch)

    def predict_step(self, batch: Any, index: int) -> torch.Tensor:
        return self(batch[0])


def saving(**options: Any) -> ModelCheckpoint:
    return ModelCheckpoint(".", save_top_k=-1, enable_version_counter=False, **options)


def steps(monitor: FlatnessMonitor) -> list[tuple[int, str]]:
    return [(alert.step, alert.key) for alert in monitor.alerts]


def rules() -> list[Rule]:
    return [Rule(KEY, rise=0.01, reference="previous"), Rule(KEY, above=0.0, warmup=1, cooldown=1)]


@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("stopped", [1, 2, 3])
def test_a_resumed_run_goes_on_as_the_unbroken_one(tmp_path: Any, every: int, stopped: int) -> None:
    """Also for callbacks that fail if their key is missing."""
    counting = [Rule(KEY, above=0.0), Rule(KEY, above=0.0, warmup=1, cooldown=1, name="slow")]

    def run(epochs: int, checkpoint: str | None = None) -> tuple[list[Any], int]:
        monitor = FlatnessMonitor(every_n_validations=every, rules=counting, strict=True)
        callbacks = [monitor, EarlyStopping(KEY, patience=50), saving(filename=f"{epochs}")]
        run = trainer(tmp_path, *callbacks, max_epochs=epochs, enable_checkpointing=True)
        run.fit(Classifier(), ckpt_path=checkpoint)
        return [(alert.step, str(alert.rule)) for alert in monitor.alerts], run.current_epoch

    unbroken = run(6)
    run(stopped)
    assert run(6, f"{stopped}.ckpt") == unbroken


@pytest.mark.parametrize("epochs", [1, 2, 3])
def test_a_validation_that_is_asked_for_is_measured_and_not_counted(tmp_path: Any, epochs: int) -> None:
    monitor, module, watch = FlatnessMonitor(every_n_validations=2, rules=rules(), strict=True), Classifier(), Values()
    run = trainer(tmp_path, monitor, watch, max_epochs=epochs)
    for asks in (run, trainer(tmp_path, monitor)):
        asks.validate(module, verbose=False)
        assert_same(values_of(asks), report_of(module, module.val_dataloader()))
    watch.seen.clear()
    run.fit(module)
    before = steps(monitor)
    for asks in (run, run, trainer(tmp_path, monitor)):
        asks.validate(module, verbose=False)
        assert_same(values_of(asks), report_of(module, module.val_dataloader()))
    _, *seen = [value for _, sanity, value in watch.seen[: epochs + 1]]
    assert [first == second for first, second in pairwise(seen)] == [True, False][: epochs - 1]
    assert steps(monitor) == before


def test_the_first_validation_of_each_fit_is_measured(tmp_path: Any) -> None:
    monitor, module = FlatnessMonitor(every_n_validations=2, strict=True), Classifier()
    for _ in range(3):
        run = trainer(tmp_path, monitor, EarlyStopping(KEY, patience=9), max_epochs=1, num_sanity_val_steps=0)
        run.fit(module)
        assert_same(values_of(run), report_of(module, module.val_dataloader()))


@pytest.mark.parametrize("method", ["validate", "test", "predict"])
def test_evaluating_a_checkpoint_leaves_the_alerts_alone(tmp_path: Any, method: str) -> None:
    monitor = FlatnessMonitor(rules=rules(), strict=True)
    best = ModelCheckpoint(".", "{epoch}", monitor=KEY, mode="min", save_top_k=1)
    run = trainer(tmp_path, monitor, best, max_epochs=5, enable_checkpointing=True)
    run.fit(Evaluated())
    alerts, state = monitor.alerts, str(monitor.state_dict())
    assert len(alerts) > 2
    loader = Evaluated().val_dataloader()
    getattr(run, method)(Evaluated(), dataloaders=loader, ckpt_path="best")
    assert (monitor.alerts, str(monitor.state_dict())) == (alerts, state)
    # In another process: a checkpoint has the alerts of its training, an evaluation has none.
    fresh = FlatnessMonitor(rules=rules(), strict=True)
    getattr(trainer(tmp_path, fresh), method)(Evaluated(), dataloaders=loader, ckpt_path=best.best_model_path)
    assert fresh.alerts == []


RULES: dict[str, Callable[[], Rule]] = {
    "the best": lambda: Rule(KEY, rise=0.2, reference="best", warmup=1),
    "the value before": lambda: Rule(KEY, rise=0.2, reference="previous"),
    "warm-up": lambda: Rule(KEY, above=0.0, warmup=2),
    "escalation": lambda: Rule(KEY, above=0.0, warmup=1, action=[ReduceLR(0.5), StopTraining()]),
    "cooldown": lambda: Rule(KEY, above=0.0, cooldown=9),
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_folds_do_not_know_of_each_other(tmp_path: Any, rule: Callable[[], Rule]) -> None:
    def fold(monitor: FlatnessMonitor, scale: float) -> tuple[list[Any], int]:
        module, before = Classifier(), len(monitor.alerts)
        with torch.no_grad():
            module.net.head.weight.mul_(scale)
        run = trainer(tmp_path, monitor, max_epochs=4)
        run.fit(module)
        return steps(monitor)[before:], run.current_epoch

    shared = FlatnessMonitor(rules=[rule()], strict=True)
    first = fold(shared, 1.0)
    assert fold(shared, 8.0) == fold(FlatnessMonitor(rules=[rule()], strict=True), 8.0)
    assert steps(shared)[: len(first[0])] == first[0]  # still readable
    assert len(shared.state_dict()["alerts"]) == len(shared.alerts) - len(first[0])


def test_alerts_that_a_checkpoint_brings_back_are_there_once(tmp_path: Any) -> None:
    monitor = FlatnessMonitor(rules=[Rule(KEY, above=0.0)], strict=True)
    for epochs, checkpoint in ((2, None), (4, "1.ckpt")):
        callbacks = [monitor, saving(filename="{epoch}", auto_insert_metric_name=False)]
        run = trainer(tmp_path, *callbacks, max_epochs=epochs, enable_checkpointing=True)
        run.fit(Classifier(), ckpt_path=checkpoint)
    assert [alert.epoch for alert in monitor.alerts] == [0, 1, 2, 3]


class SavesAmidAValidation(Classifier):
    """In its second batch."""

    def validation_step(self, batch: Any, index: int) -> None:
        super().validation_step(batch, index)
        if self.trainer.current_epoch == index == 1 and not self.trainer.sanity_checking:
            self.trainer.save_checkpoint("amid.ckpt")


def test_a_validation_that_goes_on_in_its_middle_is_named_and_not_judged(tmp_path: Any) -> None:
    def fitted(module: Classifier, **options: Any) -> FlatnessMonitor:
        monitor = FlatnessMonitor(rules=[Rule(KEY, above=0.0)])
        trainer(tmp_path, monitor, EarlyStopping(KEY, mode="max", patience=9), max_epochs=4).fit(module, **options)
        return monitor

    unbroken = fitted(SavesAmidAValidation())
    with pytest.warns(UserWarning, match="measured a part of this validation") as caught:
        resumed = fitted(Classifier(), ckpt_path="amid.ckpt")
    assert sum("FlatnessMonitor" in str(warning.message) for warning in caught) == 1
    assert [alert.epoch for alert in unbroken.alerts] == [0, 1, 2, 3]
    assert [alert.epoch for alert in resumed.alerts] == [0, 2, 3]


@pytest.mark.parametrize("every", [2, 3])
@pytest.mark.parametrize("interval", [2, 6])
def test_a_checkpoint_before_a_due_validation_keeps_the_turns(tmp_path: Any, every: int, interval: int) -> None:
    """Lightning goes on behind the validation, so it must count."""
    last = 18

    def alerts(*callbacks: Any, checkpoint: str | None = None) -> list[int]:
        monitor = FlatnessMonitor(every_n_validations=every, rules=[Rule(KEY, above=0.0)], strict=True)
        flags: dict[str, Any] = {"max_epochs": 3, "enable_checkpointing": True, "val_check_interval": interval}
        trainer(tmp_path, monitor, *callbacks, **flags).fit(Classifier(), ckpt_path=checkpoint)
        return [alert.step for alert in monitor.alerts]

    saved = saving(filename="{step}", every_n_train_steps=1, auto_insert_metric_name=False)
    unbroken = alerts(saved)
    assert unbroken == [step - 1 for step in range(interval, last + 1, interval * every)]
    for step in (3, 6, 8, 12):
        left_out = step - 1 if step % interval == 0 else None
        assert alerts(checkpoint=f"{step}.ckpt") == [each for each in unbroken if each != left_out]
