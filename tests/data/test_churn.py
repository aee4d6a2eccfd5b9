"""Changed predictions: what is compared with what, and against a count by hand in a real training."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning_runs import Classifier, given_batches, images, trainer
from torch.utils.data import DataLoader

from lightning_flatness import FlatnessMonitor, Rule
from lightning_flatness.data.churn import PredictionChurn

LOADER = object()
FIRST, SECOND = torch.tensor([[0], [1], [2]]), torch.tensor([[0], [2], [1]])


def validated(churn: PredictionChurn, *predictions: torch.Tensor | None, source: Any = LOADER) -> int | None:
    churn.start()
    for prediction in predictions:
        churn.add(0, prediction, source)
    changed = churn.changed(0)
    churn.finish([0])
    return changed


@pytest.mark.parametrize(
    ("earlier", "later", "source", "changed"),
    [
        ([FIRST], [SECOND], LOADER, 2),
        ([FIRST], [FIRST[:1], FIRST[1:]], LOADER, 0),
        ([FIRST == 1], [FIRST == 2], LOADER, 2),
        ([], [], LOADER, 0),  # of a process without samples
        ([FIRST], [FIRST[:2]], LOADER, None),
        ([FIRST], [], LOADER, None),
        ([], [FIRST], LOADER, None),
        ([FIRST], [FIRST], object(), None),
        ([FIRST], [None], LOADER, None),
        ([FIRST], [FIRST.repeat(1, 2)], LOADER, None),
    ],
)
def test_same_samples_are_compared(earlier: Any, later: Any, source: Any, changed: int | None) -> None:
    churn = PredictionChurn()
    assert validated(churn, *earlier) == (None if earlier else 0)
    assert validated(copy.deepcopy(churn), *later, source=source) == (None if later else 0)
    assert validated(churn, *later, source=source) == changed


def test_a_loader_is_not_kept_alive() -> None:
    churn = PredictionChurn()
    loader = in_order()
    validated(churn, FIRST, source=loader)
    known = weakref.ref(loader)
    del loader
    assert known() is None
    assert validated(churn, FIRST, source=in_order()) is None


def test_without_an_order_nothing_is_compared() -> None:
    churn = PredictionChurn()
    assert [validated(churn, FIRST, source=None) for _ in range(2)] == [None, None]


class Predicts(Callback):
    """The predictions of the network by hand, and what was logged beside them."""

    def __init__(self, loader: Any, key: str) -> None:
        self.loader, self.key = loader, key
        self.predictions: list[torch.Tensor] = []
        self.logged: list[float | None] = []

    def on_validation_end(self, run: Any, module: Any) -> None:
        if not run.sanity_checking:
            with torch.inference_mode():
                self.predictions.append(torch.cat([module(x).argmax(1) for x, _ in self.loader]))
            value = run.callback_metrics.get(self.key)
            self.logged.append(None if value is None else float(value))

    @property
    def expected(self) -> list[float]:
        pairs = zip(self.predictions, self.predictions[1:], strict=False)
        return [float((after != before).double().mean()) for before, after in pairs]


class Validated(Classifier):
    def __init__(self, loader: Any) -> None:
        super().__init__()
        self.loader = loader

    def val_dataloader(self) -> Any:
        return self.loader() if callable(self.loader) else self.loader


def in_order(n: int = 10, **options: Any) -> DataLoader:
    return DataLoader(images(n, 2), batch_size=4, **options)


KNOWN: dict[str, tuple[Any, dict[str, Any]]] = {
    "in order": (in_order(), {}),
    "whole batches": (DataLoader(list(in_order()), batch_size=None), {}),
    "given batches": (in_order(), {"data": given_batches()}),
}
UNKNOWN: dict[str, Any] = {
    "shuffled": in_order(shuffle=True),
    "drawn": in_order(sampler=torch.utils.data.SubsetRandomSampler(range(10))),
    "new in every epoch": in_order,
}


@pytest.mark.parametrize(("loader", "options"), KNOWN.values(), ids=KNOWN)
def test_share_of_changed_predictions_in_a_training(tmp_path: Any, loader: Any, options: dict[str, Any]) -> None:
    seen = Predicts(options.get("data", loader), "margin/churn")
    rule = Rule("margin/churn", above=-1.0)
    monitor = FlatnessMonitor(strict=True, rules=[rule], **options)
    run = trainer(tmp_path, monitor, seen, max_epochs=5)
    run.fit(Validated(loader))
    assert seen.logged[0] is None
    assert seen.logged[1:] == pytest.approx(seen.expected)
    assert any(seen.expected)
    assert [alert.epoch for alert in monitor.alerts] == [1, 2, 3, 4]
    run.validate(Validated(loader), verbose=False)
    assert "margin/churn" not in run.callback_metrics


@pytest.mark.parametrize("loader", UNKNOWN.values(), ids=UNKNOWN)
def test_no_share_where_the_order_is_not_known(tmp_path: Any, loader: Any) -> None:
    seen = Predicts(in_order(), "margin/churn")
    monitor = FlatnessMonitor(strict=True, rules=[Rule("flatness/trace", above=0.0)])
    trainer(tmp_path, monitor, seen, max_epochs=3, reload_dataloaders_every_n_epochs=1).fit(Validated(loader))
    assert seen.logged == [None] * 3
    assert len(monitor.alerts) == 3


def test_a_validation_without_a_share_takes_nothing_from_the_rules(tmp_path: Any) -> None:
    seen = Predicts(in_order(), "margin/churn")
    monitor = FlatnessMonitor(strict=True, rules=[Rule("flatness/trace", above=0.0)])
    run = trainer(tmp_path, monitor, seen, max_epochs=4, reload_dataloaders_every_n_epochs=2, num_sanity_val_steps=0)
    run.fit(Validated(in_order))
    assert [value is None or value != value for value in seen.logged] == [True, False, True, False]
    assert len(monitor.alerts) == 4


def test_samples_of_the_training_set_are_the_same_in_every_validation(tmp_path: Any) -> None:
    seen = Predicts(DataLoader(images(24, 1), batch_size=24), "margin/churn/train")
    trainer(tmp_path, FlatnessMonitor(data="train", strict=True), seen, max_epochs=4).fit(Classifier())
    assert seen.logged[0] is None
    assert seen.logged[1:] == pytest.approx(seen.expected)
