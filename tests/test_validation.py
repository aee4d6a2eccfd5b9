"""The measurement of one validation: which passes are recorded, and how many samples of which loader count."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import CombinedLoader
from lightning_runs import Classifier, assert_same, hooks, images, report_of, trainer, values_of
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_flatness import FlatnessMonitor, ForwardRecorder, PooledMethod, Rule
from lightning_flatness.data.listening import LoggedValues
from lightning_flatness.data.verification import Verification
from lightning_flatness.reporting.failures import Failures
from lightning_flatness.validation import MeasuredValidation, Request, RunState


class Measures(Callback):
    """A `MeasuredValidation` without a monitor."""

    def __init__(self, data: Any = "val", max_samples: int | None = None) -> None:
        self.data, self.max_samples = data, max_samples

    def on_validation_epoch_start(self, run: Any, module: Any) -> None:
        def tools(_: Any) -> Any:
            return ForwardRecorder(module), PooledMethod()

        self.failures = Failures(strict=True)
        self.validation = MeasuredValidation(
            self.failures, tools, run, module, Request(self.data, self.max_samples), RunState(Verification())
        )

    def on_validation_batch_start(self, run: Any, module: Any, batch: Any, index: int, loader: int = 0) -> None:
        self.validation.before_batch(loader, index == loader == 0)

    def on_validation_batch_end(
        self, run: Any, module: Any, outputs: Any, batch: Any, index: int, loader: int = 0
    ) -> None:
        self.validation.after_batch(outputs, batch, loader)

    def on_validation_epoch_end(self, run: Any, module: Any) -> None:
        self.validation.close()
        self.values = self.validation.values(self.validation.agree(), "/mine")


def validated(tmp_path: Any, measures: Measures, loaders: int = 1) -> Classifier:
    module = Classifier(loaders=loaders)
    trainer(tmp_path, measures).validate(module, verbose=False)
    assert hooks(module) == 0
    return module


@pytest.mark.parametrize("max_samples", [None, 1, 5, 99])
def test_each_loader_has_values_over_its_own_samples(tmp_path: Any, max_samples: int | None) -> None:
    measures = Measures(max_samples=max_samples)
    module = validated(tmp_path, measures, loaders=2)
    assert measures.validation.measured == "`net.conv2` up to the loss"
    values = measures.values
    for index, loader in enumerate(module.val_dataloader()):
        expected = report_of(module, loader, max_samples=max_samples)
        for key, value in expected.items():
            assert float(values[f"{key}/mine/dataloader_idx_{index}"]) == pytest.approx(value, rel=1e-12)


class Together(Classifier):
    """The batches of two loaders come together, and the network sees one of them."""

    def __init__(self, mode: Any, names: bool) -> None:
        super().__init__(lambda module, batch: module.loss(batch["a" if names else 0]))
        self.mode, self.names = mode, names

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val_loss", self.step(self, batch), batch_size=4)

    def val_dataloader(self) -> Any:
        first, second = DataLoader(images(8, 2), batch_size=4), DataLoader(images(8, 3), batch_size=4)
        return CombinedLoader({"a": first, "b": second} if self.names else [first, second], self.mode)


@pytest.mark.parametrize("names", [True, False])
@pytest.mark.parametrize("mode", ["max_size_cycle", "max_size", "min_size"])
def test_loaders_whose_batches_come_together_have_one_value(tmp_path: Any, mode: str, names: bool) -> None:
    module = Together(mode, names)
    run = trainer(tmp_path, FlatnessMonitor(strict=True))
    run.fit(module)
    assert_same(values_of(run), report_of(module, DataLoader(images(8, 2), batch_size=4)))
    assert not [key for key in run.callback_metrics if "dataloader_idx" in key]
    run.validate(module, verbose=False)
    assert_same(values_of(run), report_of(module, DataLoader(images(8, 2), batch_size=4)))


def counted(module: Any, name: str, value: Any, **_: Any) -> None:
    module.counted.append(name)


class Logs(Classifier):
    """Has a `log` of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: list[str] = []


class LogsByMethod(Logs):
    def log(self, name: str, value: Any, **_: Any) -> None:
        self.counted.append(name)


class LogsByAttribute(Logs):
    def __init__(self) -> None:
        super().__init__()
        self.log = partial(counted, self)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("kind", [LogsByMethod, LogsByAttribute, Classifier])
def test_a_log_of_the_modules_own_is_called_and_stays(kind: Any, fails: bool) -> None:
    module = kind()
    own, logged = module.__dict__.get("log"), LoggedValues(module)
    for _ in range(2):
        logged.start()
        if kind is not Classifier:
            module.log("loss", torch.ones(1), prog_bar=True)
            module.log("text", 1.0)
            assert [name for name, _ in logged.values] == ["loss"]
        if not fails:
            logged.stop()  # else `start` does so, at the next batch
    logged.stop()
    assert module.__dict__.get("log") is own
    assert getattr(module, "counted", None) in (None, ["loss", "text"] * 2)


@pytest.mark.parametrize("kind", [LogsByMethod, LogsByAttribute])
def test_what_a_log_of_the_modules_own_is_given_is_measured(tmp_path: Any, kind: Any) -> None:
    values, module = [], kind()
    for callback in (FlatnessMonitor(strict=True), None):
        run = trainer(tmp_path, *([callback] if callback else []))
        module.counted.clear()
        run.validate(module, verbose=False)
        values.append([name for name in module.counted if name == "val_loss"])  # the monitor's values come there too
        if callback:
            assert_same(callback._values, callback._values | report_of(module, module.val_dataloader()))
    assert values[0] == values[1]


def test_own_batches_are_measured_once_before_the_first_batch(tmp_path: Any) -> None:
    own = DataLoader(Subset(images(9, 5), range(7)), batch_size=3)
    measures = Measures(data=own)
    module = validated(tmp_path, measures, loaders=2)
    values = measures.values
    for key, value in report_of(module, own).items():
        assert float(values[f"{key}/mine"]) == pytest.approx(value, rel=1e-12)
    assert torch.is_grad_enabled()


class Kinds(Classifier):
    """One loader is labelled; of the other the step makes something else."""

    def __init__(self, kind: str, odd: int) -> None:
        super().__init__(loaders=2)
        self.kind, self.odd = kind, odd
        self.other = nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 1)
        )
        self.other.double()

    def validation_step(self, batch: Any, index: int, dataloader_idx: int = 0) -> None:
        if dataloader_idx != self.odd:
            self.log("loss", self.loss(batch))
        elif self.kind == "no labels":
            self.log("spread", self(batch[0]).std())
        elif self.kind == "no network":
            self.log("mean", batch[0].mean())
        else:
            self.log("error", (self.other(batch[0])[:, 0] - batch[1]).mean().square())

    def val_dataloader(self) -> Any:
        labelled, (x, y) = images(10, 2), images(9, 3).tensors
        odd = TensorDataset(x) if self.kind == "no labels" else TensorDataset(x, y.double())
        loaders = [DataLoader(data, batch_size=4) for data in (labelled, odd)]
        return loaders[:: 1 if self.odd else -1]


@pytest.mark.parametrize("odd", [1, 0], ids=["the second", "the first"])
@pytest.mark.parametrize("kind", ["no labels", "no network", "another network"])
def test_a_loader_that_cannot_be_measured_takes_nothing_from_the_others(tmp_path: Any, kind: str, odd: int) -> None:
    module, labelled = Kinds(kind, odd), DataLoader(images(10, 2), batch_size=4)
    monitor = FlatnessMonitor(rules=[Rule(f"flatness/trace/dataloader_idx_{1 - odd}", above=0.0)])
    run = trainer(tmp_path, monitor, max_epochs=3)
    with pytest.warns(UserWarning, match="FlatnessMonitor did not measure") as caught:
        run.fit(module)
    assert sum("FlatnessMonitor" in str(warning.message) for warning in caught) == 1
    assert_same(values_of(run, f"/dataloader_idx_{1 - odd}"), report_of(module, labelled))
    assert not [key for key in run.callback_metrics if key.endswith(f"flatness/trace/dataloader_idx_{odd}")]
    assert len(monitor.alerts) == 3
    assert hooks(module) == 0


class Skips(Classifier):
    """Treats one batch of one validation in its own way; the sanity check is validation 0."""

    def __init__(self, how: str, at: tuple[int, int]) -> None:
        super().__init__()
        self.how, self.at, self.validations = how, at, -1

    def on_validation_epoch_start(self) -> None:
        self.validations += 1

    def validation_step(self, batch: Any, index: int) -> None:
        if (self.validations, index) != self.at:
            super().validation_step(batch, index)
        elif self.how == "another network":
            self.net.conv1(batch[0])
        elif self.how == "no classifier":
            nn.Sequential(*list(self.net)[:-1])(batch[0])


HOW = ["nothing runs", "another network", "no classifier"]
SKIPPED = [(how, at) for how in HOW for at in [(0, 0), (1, 0), (2, 0), (2, 1)]]


@pytest.mark.parametrize(("how", "at"), SKIPPED, ids=str)
def test_a_skipped_batch_costs_one_validation(tmp_path: Any, how: str, at: tuple[int, int]) -> None:
    monitor = FlatnessMonitor(rules=[Rule("flatness/trace", above=0.0)])
    module, run = Skips(how, at), trainer(tmp_path, monitor, max_epochs=4)
    with pytest.warns(UserWarning, match="FlatnessMonitor did not measure"):
        run.fit(module)
    assert_same(values_of(run), report_of(module, module.val_dataloader()))
    assert [alert.epoch for alert in monitor.alerts] == [epoch for epoch in range(4) if epoch + 1 != at[0]]


@pytest.mark.parametrize("refused", [1, 3])
def test_a_refused_network_is_tried_again_once_a_validation(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, refused: int
) -> None:
    """Another network may run then, as the classifier does after a phase of pretraining."""
    opened = []
    monkeypatch.setattr(
        MeasuredValidation,
        "_opened",
        lambda self, loader, original=MeasuredValidation._opened: (opened.append(loader), original(self, loader))[1],
    )

    def step(module: Classifier, batch: Any) -> torch.Tensor:
        loss = F.cross_entropy(module(batch[0]), batch[1])
        return loss.square() if module.current_epoch < refused else loss

    module, run = Classifier(step), trainer(tmp_path, FlatnessMonitor(), max_epochs=4, num_sanity_val_steps=0)
    with pytest.warns(UserWarning, match="FlatnessMonitor did not measure") as caught:
        run.fit(module)
    assert sum("FlatnessMonitor" in str(warning.message) for warning in caught) == 1
    assert len(opened) == 2 * refused + 2 * 3 * (4 - refused)  # before and after each batch
    assert_same(values_of(run), report_of(module, module.val_dataloader()))


class WithTeacher(Classifier):
    """A deeper network runs beside the one of the loss, which is logged, returned, or not handed over."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        convolutions = [part for n in (2, 3, 3) for part in (nn.Conv2d(n, 3, 3, padding=1), nn.ReLU())]
        self.teacher = nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3)).double()

    def validation_step(self, batch: Any, index: int) -> Any:
        phi, teacher = self(batch[0]), self.teacher(batch[0])
        loss = F.cross_entropy(phi, batch[1])
        if self.how == "logged":
            self.log("val_loss", loss)
        elif self.how == "accuracy":
            self.log("accuracy", (phi.argmax(1) == batch[1]).double().mean())
        return {"returned": loss, "both": loss + F.cross_entropy(teacher, batch[1])}.get(self.how)


@pytest.mark.parametrize("how", ["logged", "returned", "accuracy"])
def test_a_loss_of_another_branch_is_refused_and_the_layer_can_be_named(tmp_path: Any, how: str) -> None:
    """And never that of the deeper network assumed."""
    module, run = WithTeacher(how), trainer(tmp_path, FlatnessMonitor())
    message = r"`teacher.4`; it does not depend on it.* these ran, the deepest first: \['net.conv2'"
    with pytest.warns(UserWarning, match=message):
        run.validate(module, module.val_dataloader(), verbose=False)
    assert not [key for key in run.callback_metrics if "flatness" in key]
    if how != "accuracy":
        run = trainer(tmp_path, FlatnessMonitor(layer="net.conv2", strict=True))
        run.validate(module, module.val_dataloader(), verbose=False)
        report = report_of(module, module.val_dataloader(), layer="net.conv2")
        assert values_of(run)["flatness/trace"] == pytest.approx(report["flatness/trace"], rel=1e-12)


def test_a_loss_of_both_branches_is_measured_in_the_deeper_one(tmp_path: Any) -> None:
    module, run = WithTeacher("both"), trainer(tmp_path, FlatnessMonitor(strict=True))
    run.validate(module, module.val_dataloader(), verbose=False)
    report = report_of(module.teacher, module.val_dataloader())
    assert values_of(run)["flatness/trace"] == pytest.approx(report["flatness/trace"], rel=1e-12)


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("epochs", [1, 2])
def test_after_a_phase_of_another_network_the_choice_is_made_anew(tmp_path: Any, epochs: int, back: bool) -> None:
    """One of them is measured at its classifier; where the layer runs no more, one validation has no values."""

    class Phases(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Sequential(nn.Flatten(), nn.Linear(50, 3)).double()

        def validation_step(self, batch: Any, index: int) -> Any:
            network = self.net if (self.current_epoch < epochs) == back else self.other
            return F.cross_entropy(network(batch[0]), batch[1])

    monitor, module = FlatnessMonitor(rules=[Rule("flatness/trace", above=0.0)]), Phases()
    run = trainer(tmp_path, monitor, max_epochs=4)
    with pytest.warns(UserWarning, match="none did"):
        run.fit(module)
    assert [alert.epoch for alert in monitor.alerts] == [epoch for epoch in range(4) if epoch != epochs]
    assert values_of(run)["flatness/trace"] == pytest.approx(
        report_of(module.other if back else module.net, module.val_dataloader())["flatness/trace"], rel=1e-12
    )
