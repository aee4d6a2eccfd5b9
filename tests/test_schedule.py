"""Which validations are measured, and what is said about those that never will be."""

from __future__ import annotations

import math
import re
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning_runs import Classifier, trainer
from torch.utils.data import DataLoader, IterableDataset

from lightning_flatness import AllOf, AnyOf, FlatnessMonitor, FlattestCheckpoint, Rule
from lightning_flatness.schedule import Schedule, notices, planned_validations


def validation(fn: str = "fit", sanity: bool = False) -> Any:
    return SimpleNamespace(state=SimpleNamespace(fn=fn), sanity_checking=sanity)


def measured(schedule: Schedule, count: int) -> list[tuple[bool, bool]]:
    """Whether each of the next validations is due, and whether rules see it."""
    found = []
    for _ in range(count):
        found.append((schedule.is_due(validation()), schedule.is_judged()))
        schedule.complete(validation())
    return found


@pytest.mark.parametrize("every", [1, 2, 3])
def test_the_first_and_every_nth(every: int) -> None:
    schedule = Schedule(every)
    assert measured(schedule, 7) == [(index % every == 0,) * 2 for index in range(7)]
    schedule.start()
    assert measured(schedule, 3) == [(index % every == 0,) * 2 for index in range(3)]


@pytest.mark.parametrize("before", [1, 2, 3])
def test_a_resumed_training_starts_with_a_value_and_keeps_its_turn(before: int) -> None:
    schedule = Schedule(2)
    schedule.start()
    schedule.resume(before)
    assert schedule.is_resuming
    turns = [(before + index) % 2 == 0 for index in range(4)]
    assert measured(schedule, 4) == [(True, turns[0]), *((turn, turn) for turn in turns[1:])]
    assert not schedule.is_resuming


@pytest.mark.parametrize("other", [validation("validate"), validation(sanity=True)], ids=["validate", "sanity check"])
def test_other_validations_are_measured_and_not_counted(other: Any) -> None:
    schedule = Schedule(2)
    schedule.start()
    for _ in range(3):
        assert schedule.is_due(other)
        schedule.complete(other)
    measured(schedule, 1)
    assert schedule.is_due(other)
    schedule.complete(other)
    assert measured(schedule, 2) == [(False, False), (True, True)]


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(Classifier().train_dataloader().dataset)


STREAM = {"train_dataloaders": DataLoader(Stream(), batch_size=4)}
# Flags of the Trainer, what `fit` gets, and how many validations there are at most: six batches in an epoch.
PLANS: dict[str, tuple[dict[str, Any], dict[str, Any], float]] = {
    "each epoch": ({"max_epochs": 3}, {}, 3),
    "every second epoch": ({"max_epochs": 5, "check_val_every_n_epoch": 2}, {}, 2),
    "never": ({"max_epochs": 2, "check_val_every_n_epoch": 3}, {}, 0),
    "twice an epoch": ({"max_epochs": 2, "val_check_interval": 0.5}, {}, 4),
    "by step": ({"max_epochs": 2, "val_check_interval": 5, "check_val_every_n_epoch": None}, {}, 2),
    "few steps": ({"max_epochs": 9, "max_steps": 7}, {}, 2),
    "accumulated": ({"max_epochs": 9, "max_steps": 3, "accumulate_grad_batches": 2}, {}, 1),
    "endless": ({"max_epochs": -1, "max_steps": 7, "val_check_interval": 2}, {}, 6),
    "stream": ({"max_epochs": 2}, STREAM, 2),
    "stream, by step": ({"max_epochs": 1, "val_check_interval": 2}, STREAM, math.inf),
    "no batches": ({"limit_val_batches": 0}, {}, 0),
    "no loader": ({}, {"val_dataloaders": []}, 0),
}


@pytest.mark.parametrize(("flags", "data", "planned"), PLANS.values(), ids=PLANS)
def test_planned_validations_are_an_upper_bound(
    tmp_path: Any, flags: dict[str, Any], data: dict[str, Any], planned: float
) -> None:
    class Count(FlatnessMonitor):
        count = 0

        def on_train_start(self, run: Any, module: Any) -> None:
            self.planned = planned_validations(run)

        def on_validation_start(self, run: Any, module: Any) -> None:
            self.count += not run.sanity_checking

    monitor = Count()
    trainer(tmp_path, monitor, **flags).fit(Classifier(), **data)
    assert monitor.planned == planned
    assert monitor.count <= planned


SHIFT, LEVEL = Rule("flatness/trace", shift_up=8.0), Rule("margin/mean", below=0.0)
# Rules, validations, and what must be in the notice; None: there is none.
NOTICES: dict[str, tuple[list[Any], int, str | None]] = {
    "no validation": ([], 0, "measures nothing in this training"),
    "no validation for rules": ([LEVEL], 0, "measures nothing and judges no rule"),
    "enough for a shift": ([SHIFT], 9, None),
    "too few for a shift": ([SHIFT], 8, r"8 validations at most .* \['flatness/trace shift_up 8'\]"),
    "too few for one of two": ([AllOf([SHIFT, LEVEL])], 8, "AllOf"),
    "enough for the other": ([AnyOf([SHIFT, LEVEL])], 8, None),
    "too few after a warm-up": ([Rule("margin/mean", below=0.0, warmup=3)], 3, "margin/mean below 0"),
    "too few for patience": ([Rule("margin/mean", below=0.0, patience=4)], 3, "margin/mean below 0"),
    "one for a level": ([LEVEL], 1, None),
    "per cent": ([Rule("flatness/trace", rise=50, reference="best")], 9, r"51 times .* write `rise=0.5`"),
    "per cent in a joined rule": ([AllOf([Rule(rise=50, reference="best"), LEVEL])], 9, r"write `rise=0.5`"),
    "much, not per cent": ([Rule("flatness/trace", rise=4.0, reference="best")], 9, None),
}


@pytest.mark.parametrize(("rules", "count", "wanted"), NOTICES.values(), ids=NOTICES)
def test_what_is_said_at_the_start(rules: list[Any], count: int, wanted: str | None) -> None:
    run: Any = SimpleNamespace(
        enable_validation=count > 0,
        num_val_batches=[],
        val_check_batch=6,
        num_training_batches=6,
        max_epochs=count,
        max_steps=-1,
        accumulate_grad_batches=1,
        check_val_every_n_epoch=1,
        fast_dev_run=False,
        callbacks=[],
    )
    said = list(notices(run, rules, every=1))
    assert len(said) == (wanted is not None)
    assert wanted is None or re.search(wanted, said[0])


@pytest.mark.parametrize(
    ("callback", "wanted"),
    [
        (EarlyStopping("flatness/relative"), "ends a healthy training early"),
        (ModelCheckpoint(monitor="flatness/trace"), "keeps an early checkpoint"),
        (EarlyStopping("flatness/relative", mode="max"), None),
        (EarlyStopping("val_loss"), None),
        (ModelCheckpoint(), None),
        (FlattestCheckpoint("val_acc", mode="max", tolerance=0.1), None),
    ],
)
def test_choosing_by_flatness_alone_is_said(callback: Callback, wanted: str | None, tmp_path: Any) -> None:
    said = list(notices(trainer(tmp_path, callback, enable_checkpointing=True), [], every=1))
    assert wanted is None or wanted in said.pop()
    assert not [each for each in said if "flattest" in each]


def test_the_monitor_says_it_once_and_by_its_name(tmp_path: Any) -> None:
    monitors = [FlatnessMonitor(), FlatnessMonitor(name="twin", rules=[Rule("margin/mean/twin", below=0.0)])]
    runs = [trainer(tmp_path, *monitors, limit_val_batches=0) for _ in range(2)]
    with pytest.warns(UserWarning, match="FlatnessMonitor measures nothing in this") as caught:
        [run.fit(Classifier()) for run in runs]
    said = [str(warning.message) for warning in caught if "FlatnessMonitor" in str(warning.message)]
    assert [text.split(" this ")[0] for text in said] == [
        "FlatnessMonitor measures nothing in",
        "FlatnessMonitor `twin` measures nothing and judges no rule in",
    ]
