from __future__ import annotations

import json
import logging
import multiprocessing
import os
import re
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.connectors.logger_connector import result
from lightning_runs import Classifier, Network, given_batches, images, trainer
from lightning_utilities.core import rank_zero
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader, IterableDataset, SubsetRandomSampler, TensorDataset
from wandb_files import records

from lightning_flatness import FlatnessMonitor, Notify, ReduceLR, Rule, StopTraining, keys, measure

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="the processes are forked"),
]

KEYS = [key for key in keys.KEYS if key != keys.CHURN]  # which the first validation lacks


def processes(count: int) -> dict[str, Any]:
    """Options of a Trainer with so many processes; one that waits for another forever is an error."""
    strategy = DDPStrategy(start_method="fork", process_group_backend="gloo", timeout=timedelta(seconds=30))
    return {"devices": count, "strategy": strategy} if count > 1 else {}


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def nothing(run: Trainer) -> None: ...


class Note(Callback):
    """Writes down in each process what it has come to: nothing else of a forked process is left."""

    def __init__(self, look: Callable[[Trainer], Any] = nothing) -> None:
        self.look = look

    def on_validation_end(self, run: Trainer, module: LightningModule) -> None:
        values = {key: float(value) for key, value in run.callback_metrics.items() if "loss" not in key}
        Path(f"process{run.global_rank}.json").write_text(json.dumps([run.global_step, values, self.look(run)]))

    on_fit_end = on_validation_end


def notes(count: int) -> list[Any]:
    """What the processes have written; they must agree, to the last bit."""
    written = [Path(f"process{index}.json").read_text() for index in range(count)]
    assert len(set(written)) == 1
    return json.loads(written[0])


class Shared(IterableDataset):
    """A stream of which each process reads its own part: every so-many-th sample, or the first process all."""

    def __init__(self, first_reads_all: bool = False) -> None:
        self.first_reads_all = first_reads_all

    def __iter__(self) -> Any:
        world = dist.get_world_size() if dist.is_initialized() else 1
        samples = list(images(13, 2))
        return iter(([] if rank() else samples) if self.first_reads_all else samples[rank() :: world])


def loader(n: int = 13, **options: Any) -> DataLoader:
    return DataLoader(images(n, 2), batch_size=4 if n < 100 else 100, **options)


VALIDATION: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "1 sample": (lambda: loader(1), {}, ""),
    "13 samples": (loader, {}, ""),
    "1000 samples": (lambda: loader(1000), {}, ""),
    "shuffled": (lambda: loader(shuffle=True), {}, ""),
    "sampler": (lambda: loader(sampler=SubsetRandomSampler(range(13))), {}, ""),
    "list": (lambda: [loader(7), loader()], {}, "/dataloader_idx_1"),
    "dictionary": (lambda: {"small": loader(7), "large": loader()}, {}, "/dataloader_idx_1"),
    "stream": (lambda: DataLoader(Shared(), batch_size=4), {}, ""),
    "stream of one": (lambda: DataLoader(Shared(first_reads_all=True), batch_size=4), {}, ""),
    "max_samples": (loader, {"max_samples": 7}, ""),
    "max_samples=1": (loader, {"max_samples": 1}, ""),
    "given batches": (loader, {"data": given_batches()}, ""),
    "some given batches": (loader, {"data": given_batches(), "max_samples": 4}, ""),
}


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize(("build", "options", "suffix"), VALIDATION.values(), ids=VALIDATION)
def test_values_are_those_of_one_process(
    tmp_path: Any, build: Callable[[], Any], options: dict[str, Any], suffix: str, count: int
) -> None:
    values = []
    for devices in (1, count):
        run = trainer(tmp_path, FlatnessMonitor(**options, strict=True), Note(), **processes(devices))
        run.validate(Classifier(), build(), verbose=False)
        _, logged, _ = notes(devices)
        values.append({key: logged[key + suffix] for key in KEYS})
    assert values[1] == pytest.approx(values[0], rel=1e-10)


class Curved(Classifier):
    """Has a curved step behind its first convolution in some validation batches: those of the first process alone."""

    def validation_step(self, batch: Any, index: int, dataloader_idx: int = 0) -> None:
        self.net.act = torch.nn.SiLU() if index == 0 and rank() == 0 else torch.nn.ReLU()
        super().validation_step(batch, index)


@pytest.mark.parametrize("options", [{}, {"max_samples": 1}, {"data": given_batches()}])
@pytest.mark.parametrize("layer", ["all", ["net.conv1", "net.head"]])
def test_values_of_layers_are_those_of_one_process(tmp_path: Any, layer: Any, options: dict[str, Any]) -> None:
    values = []
    for devices in (1, 2):
        monitor = FlatnessMonitor(layer, method="jacobian", **options, strict=True)
        run = trainer(tmp_path, monitor, Note(), **processes(devices))
        run.validate(Classifier(), loader(), verbose=False)
        _, logged, _ = notes(devices)
        values.append({key: value for key, value in logged.items() if key.startswith("flatness/")})
    assert len(values[0]) == (8 if layer == "all" else 5)
    assert values[1] == pytest.approx(values[0], rel=1e-10)


def test_processes_agree_on_the_label(tmp_path: Any) -> None:
    run = trainer(tmp_path, FlatnessMonitor("all", method="jacobian", strict=True), Note(), **processes(2))
    run.validate(Curved(), loader(), verbose=False)
    _, logged, _ = notes(2)
    layers = {key for key in logged if key.startswith("flatness/trace/")}
    assert {key.removeprefix("flatness/trace/") for key in layers} == {
        "net.conv1/ggn",
        "net.conv2",
        "net.head",
        "network/ggn",
    }


class Still(Classifier):
    """Trains without moving."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.0)

    def on_train_start(self) -> None:
        for norm in (self.net.norm1, self.net.norm2):
            norm.momentum = 0.0


class Jumps(Still):
    """Has another classifier in each validation."""

    def on_validation_epoch_start(self) -> None:
        generator = torch.Generator().manual_seed(7 * (self.current_epoch % 2))
        self.net.head.weight.data = torch.randn(3, 4, generator=generator, dtype=torch.float64)
        self.net.head.bias.data.zero_()

    def val_dataloader(self) -> Any:
        return loader()


OWN = {"all": {}, "some": {"max_samples": 7}, "one": {"max_samples": 1}, "given": {"data": given_batches()}}


@pytest.mark.parametrize("options", OWN.values(), ids=OWN)
def test_share_of_changed_predictions_is_that_of_one_process(tmp_path: Any, options: dict[str, Any]) -> None:
    values = []
    for devices in (1, 2):
        run = trainer(tmp_path, FlatnessMonitor(**options, strict=True), Note(), max_epochs=4, **processes(devices))
        run.fit(Jumps())
        values.append(notes(devices)[1]["margin/churn"])
    assert values[1] == pytest.approx(values[0], rel=1e-12)
    assert 0 < values[0] < 1 or options


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("max_samples", [None, 7, 1])
def test_training_samples_are_those_of_one_process(tmp_path: Any, max_samples: int | None, count: int) -> None:
    values = []
    for devices in (1, count):
        monitor = FlatnessMonitor(data="train", max_samples=max_samples, strict=True)
        run = trainer(tmp_path, monitor, Note(), max_epochs=1, **processes(devices))
        run.fit(Still())
        _, logged, _ = notes(devices)
        values.append({key: logged[f"{key}/train"] for key in KEYS})
    assert values[1] == pytest.approx(values[0], rel=1e-10)


def with_images_of_the_second(change: Callable[[torch.Tensor], torch.Tensor]) -> DataLoader:
    """Validation images, those of the second of two processes changed."""
    x, y = images(12, 2).tensors
    x[1::2] = change(x[1::2])
    return DataLoader(TensorDataset(x, y), batch_size=3)


@pytest.fixture
def log() -> Iterator[Path]:
    """What Lightning and its callbacks log, in all processes."""
    handler = logging.FileHandler("log.txt")
    logger = rank_zero.log  # of `lightning`, or of `pytorch_lightning` where a test has imported that
    logger.addHandler(handler)
    yield Path("log.txt")
    logger.removeHandler(handler)
    handler.close()


@pytest.mark.parametrize("factor", [1, 1000])
def test_all_act_on_the_data_of_one(tmp_path: Any, log: Path, factor: float) -> None:
    tensorboard = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    told = Path("told.txt")
    actions = [ReduceLR(0.5), Notify(lambda alert: told.open("a").write(f"{alert.step}\n")), StopTraining()]
    monitor = FlatnessMonitor(rules=[Rule("margin/min", below=-10.0, action=actions)], strict=True)
    note = Note(lambda run: [run.optimizers[0].param_groups[0]["initial_lr"], [alert.step for alert in monitor.alerts]])
    logger = TensorBoardLogger(".", version=0)
    flags: dict[str, Any] = {"logger": logger, "val_check_interval": 1, "log_every_n_steps": 1}
    run = trainer(tmp_path, monitor, note, **flags, max_epochs=2, **processes(2))
    run.fit(Classifier(), val_dataloaders=with_images_of_the_second(lambda x: factor * x))
    step, _, (lr, alerts) = notes(2)
    events = tensorboard.EventAccumulator(logger.log_dir).Reload()
    assert (alerts, step, lr) == (([], 6, 0.1) if factor == 1 else ([0, 1, 2], 3, 0.05))
    assert log.read_text().count("Flatness alert") == len(alerts)
    assert told.read_text() == "1\n" if alerts else not told.exists()
    table = "monitor/alerts/text_summary"
    assert (table in events.Tags()["tensors"]) == bool(alerts)
    assert "flatness/layer/text_summary" in events.Tags()["tensors"]
    assert len(events.Tensors(table) if alerts else []) == len(alerts)
    lines = Path(logger.log_dir, "alerts.jsonl")
    assert len(lines.read_text().splitlines() if lines.exists() else []) == len(alerts)
    if find_spec("matplotlib"):
        assert [each.step for each in events.Images("monitor/dashboard")] == (alerts or [5])
    assert {each.histogram_value.num for each in events.Histograms("per_sample/margin")} == {12}


def test_wandb_gets_one_alert(tmp_path: Any) -> None:
    pytest.importorskip("wandb")

    class Finish(Callback):
        def teardown(self, run: Trainer, module: LightningModule, stage: str) -> None:
            if run.is_global_zero:
                run.logger.experiment.finish()  # a forked process ends without

    monitor = FlatnessMonitor(rules=[Rule("flatness/trace", above=0.0, cooldown=9)])
    logger = WandbLogger(offline=True, save_dir=".")
    trainer(tmp_path, monitor, Finish(), logger=logger, **processes(2)).fit(Classifier())
    (path,) = Path("wandb").glob("offline-run-*/*.wandb")
    alerts = [record.alert for record in records(path) if record.HasField("alert")]
    assert [alert.title for alert in alerts] == ["flatness/trace at step 2"]


def targets(batch: Any) -> torch.Tensor:
    if rank() == 1:
        raise ValueError("mine")
    return batch[1]


def silent(module: Classifier, batch: Any) -> torch.Tensor:
    """Computes no loss, so that one is assumed."""
    module(batch[0])
    return torch.zeros(())


def coupled(module: Classifier, batch: Any) -> torch.Tensor:
    return F.cross_entropy(module(batch[0]), batch[1]) ** (1 + rank())


FAILURES: dict[str, tuple[str, Callable[[torch.Tensor], torch.Tensor], Any, Any]] = {
    "NaN in the images": ("the loss is NaN", lambda x: x * torch.nan, None, silent),
    "targets out of range": ("Targets must lie in", lambda x: x, lambda batch: batch[1] + 3 * rank(), silent),
    "an error": ("mine", lambda x: x, targets, silent),
    "samples that see each other": ("the loss couples", lambda x: x, None, coupled),
}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(("message", "change", "target", "step"), FAILURES.values(), ids=FAILURES)
def test_one_that_cannot_measure(
    tmp_path: Any, message: str, change: Callable[[torch.Tensor], torch.Tensor], target: Any, step: Any, strict: bool
) -> None:
    class Tell(Callback):
        def on_fit_end(self, run: Trainer, module: LightningModule) -> None:
            with Path("told.txt").open("a") as told:
                told.writelines(f"{warning.message}\n" for warning in caught)

    monitor = FlatnessMonitor(target=target, strict=strict, rules=[Rule("flatness/trace", above=0.0)])
    run = trainer(tmp_path, monitor, Note(), Tell(), **processes(2))
    loader = with_images_of_the_second(change)
    with warnings.catch_warnings(record=True) as caught:
        if strict:
            with pytest.raises(Exception, match=message):
                run.fit(Classifier(step), val_dataloaders=loader)
            return
        run.fit(Classifier(step), val_dataloaders=loader)
    assert notes(2) == [6, {}, None]
    assert len(re.findall(f"FlatnessMonitor .*{message}", Path("told.txt").read_text())) == 1


def test_the_next_validation_is_measured_again(tmp_path: Any) -> None:
    failing = [True]

    class Heal(Callback):
        def on_train_epoch_start(self, run: Trainer, module: LightningModule) -> None:
            failing[0] = run.current_epoch == 0

    monitor = FlatnessMonitor(target=lambda batch: targets(batch) if failing[0] else batch[1])
    trainer(tmp_path, monitor, Heal(), Note(), **processes(2)).fit(Classifier(silent))
    assert set(notes(2)[1]) - {keys.CHURN, keys.logger_key(keys.CHURN)} == {*KEYS, *map(keys.logger_key, KEYS)}


@pytest.mark.slow
def test_spawned_processes_start_with_a_copy(tmp_path: Any) -> None:
    rule = Rule("flatness/trace", above=0.0, action=[ReduceLR(), StopTraining()])
    callbacks = [FlatnessMonitor(rules=[rule], strict=True), Note()]
    strategy = DDPStrategy(start_method="spawn", process_group_backend="gloo", timeout=timedelta(seconds=60))
    run = trainer(tmp_path, *callbacks, max_epochs=9, devices=2, strategy=strategy)
    run.fit(Classifier())
    step, values, _ = notes(2)
    assert step == 6
    assert set(values) - {keys.CHURN, keys.logger_key(keys.CHURN)} == {*KEYS, *map(keys.logger_key, KEYS)}


class Unplaced(TorchFunctionMode):
    """Marks tensors that were made without a device, or taken to the CPU, until they are moved to a device."""

    FACTORIES = (
        *(torch.tensor, torch.as_tensor, torch.zeros, torch.ones, torch.empty, torch.full, torch.arange),
        *(torch.scalar_tensor, torch.rand, torch.randperm, torch.from_numpy, torch.linspace),
    )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            if func in self.FACTORIES:
                result.is_unplaced = (kwargs or {}).get("device") is None
            elif func in (torch.Tensor.cpu, torch.Tensor.to):
                result.is_unplaced = func is torch.Tensor.cpu or "cpu" in args[1:]
        return result


def refusing(collective: Callable[..., Any]) -> Callable[..., Any]:
    """The collective, which takes tensors of the network's device only, as those of NCCL."""

    def call(*args: Any, **kwargs: Any) -> Any:
        flat = [part for arg in [*args, *kwargs.values()] for part in (arg if isinstance(arg, list) else [arg])]
        if any(getattr(part, "is_unplaced", False) for part in flat):
            raise RuntimeError("No backend type associated with device type cpu")
        return collective(*args, **kwargs)

    return call


@pytest.fixture
def nccl_alike(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("all_reduce", "all_gather", "all_gather_into_tensor", "broadcast", "reduce", "gather", "scatter"):
        monkeypatch.setattr(dist, name, refusing(getattr(dist, name)))
    with Unplaced():
        yield


@pytest.mark.usefixtures("nccl_alike")
def test_the_guard_refuses_what_is_on_no_device() -> None:
    for refused in (torch.tensor(1.0), torch.ones(2).to(torch.float64), torch.ones(2, device="cpu").cpu()):
        with pytest.raises((RuntimeError, ValueError), match=r"No backend type|process group"):
            dist.all_reduce(refused)
    with pytest.raises(ValueError, match="process group has not been initialized"):
        dist.all_reduce(torch.ones(2, device="cpu"))


WITH: dict[str, dict[str, Any]] = {
    "validation batches": {"rules": "default"},
    "training batches": {"data": "train"},
    "given batches": {"data": given_batches(), "max_samples": 4},
    "some samples": {"max_samples": 3, "every_n_validations": 2},
}


@pytest.mark.usefixtures("nccl_alike")
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("options", WITH.values(), ids=WITH)
def test_collectives_get_tensors_of_the_device(tmp_path: Any, options: dict[str, Any], count: int) -> None:
    rules = options.get("rules") or [Rule("margin/mean/mine", above=-1e9)]
    monitor = FlatnessMonitor(**{**options, "rules": rules, "name": "" if rules == "default" else "mine"}, strict=True)
    flags = processes(2) | {"devices": count}
    trainer(tmp_path, monitor, Note(), **flags).fit(Classifier(loaders=2))
    _, logged, _ = notes(count)
    assert {key.removesuffix("/dataloader_idx_0").removesuffix("/mine") for key in logged} >= set(KEYS)


@pytest.mark.parametrize("count", [1, 2])
def test_lightning_has_no_advice_about_our_keys(tmp_path: Any, count: int) -> None:
    """It advises `sync_dist=True` for each key that is logged without, once in a process."""

    class Tell(Callback):
        def on_fit_end(self, run: Trainer, module: LightningModule) -> None:
            Path(f"said{run.global_rank}.txt").write_text("\n".join(str(warning.message) for warning in caught))

    stopping = EarlyStopping("flatness/trace/dataloader_idx_0", patience=9)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result.warning_cache.clear()
        flags = processes(2) | {"devices": count}
        trainer(tmp_path, stopping, FlatnessMonitor(strict=True), Note(), Tell(), **flags).fit(Classifier(loaders=2))
    assert {f"{key}/dataloader_idx_1" for key in KEYS} <= set(notes(count)[1])
    advice = re.findall(r"self\.log\('([^']*)'", Path("said0.txt").read_text())
    assert set(advice) == {"val_loss"}  # the module's own


def test_alerts_of_forked_processes_are_in_their_checkpoints(tmp_path: Any) -> None:
    monitor = FlatnessMonitor(rules=[Rule("flatness/trace", above=0.0, action=StopTraining())], strict=True)
    checkpoint = ModelCheckpoint(".", filename="last")
    run = trainer(tmp_path, monitor, checkpoint, max_epochs=9, enable_checkpointing=True, **processes(2))
    run.fit(Classifier())
    assert monitor.alerts == []
    saved = torch.load("last.ckpt", weights_only=True)["callbacks"][monitor.state_key]
    assert [alert["epoch"] for alert in saved["alerts"]] == [0]
    monitor.load_state_dict(saved)
    assert [alert.epoch for alert in monitor.alerts] == [0]


class Perceptron(Classifier):
    """It has no convolution; or, in one of the processes, one that has a closed form."""

    def __init__(self, convolves: Callable[[], bool] = lambda: False) -> None:
        super().__init__()
        self.convolves = convolves
        self.other = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(50, 3)).double()

    def forward(self, x: Any) -> Any:
        return self.net(x) if self.convolves() else self.other(x)


@pytest.mark.parametrize("samples", [1, 13])
def test_processes_without_samples_take_the_choice_of_the_others(tmp_path: Any, samples: int) -> None:
    values = []
    for devices in (1, 2):
        data = DataLoader(Shared(first_reads_all=True), batch_size=4) if samples > 1 else loader(1)
        run = trainer(tmp_path, FlatnessMonitor(strict=True), Note(), **processes(devices))
        run.validate(Perceptron(), data, verbose=False)
        _, logged, _ = notes(devices)
        values.append({key: logged[key] for key in KEYS if key != "flatness/kernel"})
    assert values[1] == pytest.approx(values[0], rel=1e-10)


def test_processes_that_choose_different_layers_have_no_values(tmp_path: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = trainer(tmp_path, FlatnessMonitor(), Note(), **processes(2))
        run.validate(Perceptron(lambda: rank() == 0), loader(), verbose=False)
    _, logged, _ = notes(2)
    assert not logged


def measured_in_the_first(rank: int, folder: str) -> None:
    """Two processes share a group, with collectives that must not be called."""
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=20))

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a collective was called")

    dist.barrier()
    if rank == 0:
        for name in ("all_reduce", "all_gather", "all_gather_object", "barrier", "broadcast", "gather"):
            setattr(dist, name, refuse)
        report = measure(Network().double(), DataLoader(images(10, 2), batch_size=4), loss="cross_entropy")
        Path(folder, "report.json").write_text(json.dumps(report.to_dict()))


def test_measure_is_for_the_process_that_calls_it(tmp_path: Any) -> None:
    torch.manual_seed(0)
    context = multiprocessing.get_context("fork")
    started = [context.Process(target=measured_in_the_first, args=(rank, str(tmp_path))) for rank in range(2)]
    for process in started:
        process.start()
    for process in started:
        process.join(60)
    assert [process.exitcode for process in started] == [0, 0]
    alone = measure(Network().double(), DataLoader(images(10, 2), batch_size=4), loss="cross_entropy")
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(json.dumps(alone.to_dict()))
