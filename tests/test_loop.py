"""Every way in which Lightning runs validations, again and again."""

from __future__ import annotations

import random
import socket
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import CombinedLoader
from lightning_runs import (
    KEYS,
    Classifier,
    Values,
    assert_same,
    everything,
    hooks,
    images,
    report_of,
    trainer,
    values_of,
)
from torch import Tensor
from torch.optim.swa_utils import get_ema_avg_fn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from benchmarks.soak import soak
from lightning_flatness import FlatnessMonitor, Rule


class Stream(IterableDataset):
    """Says nothing about its length."""

    def __init__(self, data: TensorDataset) -> None:
        self.data = data

    def __iter__(self) -> Any:
        return iter(self.data)


def batched(data: TensorDataset, *sizes: int) -> DataLoader:
    """Batches of these sizes, also of none."""
    parts = [tuple(part) for part in zip(*(tensor.split(sizes) for tensor in data.tensors), strict=True)]
    return DataLoader(parts, batch_size=None)


class Careful(Classifier):
    """Has no loss where there is no sample."""

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1], reduction="sum") / max(1, len(batch[1]))


def streams() -> dict[str, Any]:
    loaders = DataLoader(Stream(images(24, 1)), batch_size=4), DataLoader(Stream(images(10, 2)), batch_size=4)
    return dict(zip(("train_dataloaders", "val_dataloaders"), loaders, strict=True))


VAL = images(10, 2)
# What is given to `fit`, and to the Trainer.
LOOPS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "streams": (streams(), {}),
    "streams of limited length": (streams(), {"limit_train_batches": 3, "val_check_interval": 2}),
    "empty last batch": ({"val_dataloaders": batched(VAL, 4, 6, 0)}, {}),
    "empty first batch": ({"val_dataloaders": batched(VAL, 0, 4, 6)}, {}),
    "batches of one": ({"val_dataloaders": batched(VAL, *[1] * 10)}, {}),
    "one batch": ({"val_dataloaders": batched(VAL, 10)}, {}),
    "amid accumulated gradients, by step": (
        {},
        {"accumulate_grad_batches": 4, "val_check_interval": 5, "check_val_every_n_epoch": None},
    ),
    "every second epoch": ({}, {"check_val_every_n_epoch": 2, "max_epochs": 4}),
    "by steps": ({}, {"max_epochs": -1, "max_steps": 7, "val_check_interval": 2}),
    "new loaders every epoch": ({}, {"reload_dataloaders_every_n_epochs": 1}),
    "anomaly detection": ({}, {"detect_anomaly": True}),
    "clipped gradients": ({}, {"gradient_clip_val": 0.1}),
    "deterministic": ({}, {"deterministic": True}),
    "full sanity check": ({}, {"num_sanity_val_steps": -1}),
    "no grad instead of inference mode": ({}, {"inference_mode": False}),
    "profiled": ({}, {"profiler": "simple"}),
}


class Last(Callback):
    """Reports what the monitor's last value must be, at the time of the last validation."""

    def on_validation_epoch_start(self, run: Any, module: Classifier) -> None:
        self.state = {name: value.clone() for name, value in module.state_dict().items()}


def last_report(last: Last, loader: Any = None) -> dict[str, float]:
    module = Careful()
    module.load_state_dict(last.state)
    return report_of(module, loader or module.val_dataloader())


@pytest.mark.parametrize(("data", "flags"), LOOPS.values(), ids=LOOPS)
def test_values_and_neutrality(tmp_path: Any, data: dict[str, Any], flags: dict[str, Any]) -> None:
    results = []
    for monitored in (True, False):
        random.seed(3), np.random.seed(3)
        module, last = Careful(), Last()
        run = trainer(tmp_path, *[FlatnessMonitor(strict=True)] * monitored, last, **flags)
        run.fit(module, **data)
        results.append(everything(module, run))
        if monitored:
            assert_same(values_of(run), last_report(last))
    torch.use_deterministic_algorithms(False)
    assert results[0] == results[1]


LOADERS: dict[str, Callable[[list[DataLoader]], Any]] = {
    "dictionary": lambda loaders: dict(zip("ab", loaders, strict=True)),
    "sequential": lambda loaders: CombinedLoader(loaders, "sequential"),
}


@pytest.mark.parametrize("combine", LOADERS.values(), ids=LOADERS)
def test_combined_loaders(tmp_path: Any, combine: Callable[[list[DataLoader]], Any]) -> None:
    loaders = [DataLoader(images(size, size), batch_size=4) for size in (5, 9)]
    module, run = Classifier(), trainer(tmp_path, FlatnessMonitor(strict=True))
    run.fit(module, val_dataloaders=combine(loaders))
    for index, loader in enumerate(loaders):
        assert_same(values_of(run, f"/dataloader_idx_{index}"), report_of(module, loader))


def test_batches_side_by_side(tmp_path: Any) -> None:
    """A batch of two batches has no inputs and targets of its own; the loss of the step has all that is needed."""
    loaders = CombinedLoader([DataLoader(images(5, i), batch_size=4) for i in range(2)], "max_size_cycle")
    module = Classifier(lambda m, batch: m.loss(batch[0]))
    run = trainer(tmp_path, FlatnessMonitor(strict=True), max_epochs=3, num_sanity_val_steps=0)
    run.fit(module, val_dataloaders=loaders)
    assert_same(values_of(run), report_of(module, DataLoader(images(5, 0), batch_size=4)))


def test_batches_side_by_side_without_a_loss_are_one_warning(tmp_path: Any) -> None:
    loaders = CombinedLoader([DataLoader(images(5, i), batch_size=4) for i in range(2)], "max_size_cycle")
    module = Classifier(lambda m, batch: m(batch[0][0]).detach().argmax().double())
    run = trainer(tmp_path, FlatnessMonitor(), max_epochs=3, num_sanity_val_steps=0)
    with pytest.warns(UserWarning, match="Targets must be .* got list") as caught:
        run.fit(module, val_dataloaders=loaders)
    assert sum("FlatnessMonitor" in str(warning.message) for warning in caught) == 1


class Manual(Careful):
    """Steps by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, index: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


def test_manual_optimisation(tmp_path: Any) -> None:
    module, last = Manual(), Last()
    run = trainer(tmp_path, FlatnessMonitor(strict=True), last)
    run.fit(module)
    assert_same(values_of(run), last_report(last))


class Tested(Classifier):
    def test_step(self, batch: Any, index: int) -> None:
        self.loss(batch)

    def predict_step(self, batch: Any, index: int) -> Tensor:
        return self(batch[0])


def test_one_object_for_everything(tmp_path: Any) -> None:
    """Also for several modules and Trainers, one after the other."""
    monitor = FlatnessMonitor(strict=True, rules=[Rule("flatness/trace", above=0.0)])
    for _ in range(2):
        module, run = Tested(), trainer(tmp_path, monitor)
        for method in (run.validate, run.fit, run.test, run.predict, run.validate):
            options = {} if method == run.fit else {"dataloaders": module.val_dataloader()}
            method(module, **options)
            assert hooks(module) == 0
            if method in (run.validate, run.fit):
                assert_same(values_of(run), report_of(module, module.val_dataloader()))
    assert [alert.step for alert in monitor.alerts] == [5, 11] * 2


AVERAGES: dict[str, dict[str, Any]] = {
    "mean": {},
    "moving average": {"avg_fn": get_ema_avg_fn(0.7)},
    "moving average with statistics": {"avg_fn": get_ema_avg_fn(0.7), "use_buffers": True},
}


@pytest.mark.parametrize("first", [True, False], ids=["monitor first", "average first"])
@pytest.mark.parametrize("average", AVERAGES.values(), ids=AVERAGES)
def test_averaged_weights_are_the_ones_that_count(tmp_path: Any, average: dict[str, Any], first: bool) -> None:
    kind = pytest.importorskip("lightning.pytorch.callbacks.weight_averaging").WeightAveraging  # since 2.6

    class Averaged(Callback):
        """Takes the averaged model while validation runs on it."""

        def on_validation_batch_end(self, run: Any, module: Classifier, *_: Any) -> None:
            self.state = {name: value.clone() for name, value in module.state_dict().items()}

    results = []
    for monitors in ([FlatnessMonitor(strict=True)], []):
        random.seed(3), np.random.seed(3)
        module, averages, watch = Classifier(), kind(**average), Averaged()
        run = trainer(tmp_path, *monitors * first, averages, *monitors * (not first), watch, max_epochs=3)
        run.fit(module)
        results.append(everything(module, run))
        if monitors:
            averaged = Classifier()
            averaged.load_state_dict(watch.state)
            assert_same(values_of(run), report_of(averaged, module.val_dataloader()))
            own = averages._average_model.module
            assert all(torch.equal(value, watch.state[name]) for name, value in own.state_dict().items())
    assert results[0] == results[1]


def test_each_validation_is_measured_once(tmp_path: Any) -> None:
    watch = Values()
    flags = {"val_check_interval": 2, "max_epochs": 3, "num_sanity_val_steps": 1}
    trainer(tmp_path, FlatnessMonitor(strict=True), watch, **flags).fit(Classifier())
    steps = [step for step, sanity, _ in watch.seen if not sanity]
    assert steps == [2, 4, 6, 8, 10, 12, 14, 16, 18]
    values = [value for _, _, value in watch.seen]
    assert len(set(values)) == len(values)


def test_opens_no_connection(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("a socket was opened")

    for name in ("socket", "create_connection", "getaddrinfo", "socketpair"):
        monkeypatch.setattr(socket, name, refuse)
    monitor = FlatnessMonitor(strict=True, rules="default")
    run = trainer(tmp_path, monitor, logger=CSVLogger(tmp_path))
    run.fit(Classifier())
    assert set(run.callback_metrics) >= KEYS


def test_twenty_validations_leave_nothing(tmp_path: Any) -> None:
    """`benchmarks/soak.py` is the long version, with memory."""
    rows = soak(20, every=5, folder=tmp_path)
    assert [row.validations for row in rows] == [5, 10, 15, 20]
    for name in ("hooks", "tensors", "with_graph", "files", "modes"):
        assert len({getattr(row, name) for row in rows[1:]}) == 1, (name, rows)
    assert rows[-1].hooks == rows[-1].modes == 0
