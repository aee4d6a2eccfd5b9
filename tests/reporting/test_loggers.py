from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.core.saving import load_hparams_from_yaml
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from torch.utils.data import DataLoader
from wandb_files import records

from lightning_flatness.reporting.loggers import LAYER, LoggerAlerts, log_layers, log_step
from lightning_flatness.rules.alert import Alert

KEY, REASON, DONE = "flatness/relative", "flatness/relative rose from 1 to 2.3 since step 4.", "Training stops."


class Line(LightningModule):
    """One weight; an epoch has four batches."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.layer(batch).square().mean()

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None: ...

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(torch.zeros(4, 1))

    val_dataloader = train_dataloader


class AlertAlways(Callback):
    def __init__(self) -> None:
        self.loggers, self.steps = LoggerAlerts(), []

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.log(KEY, 2.0 + trainer.current_epoch)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        value = 2.0 + trainer.current_epoch
        alert = Alert("rule", KEY, value, 1.0, trainer.global_step, trainer.current_epoch, REASON)
        self.steps.append(log_step(trainer))
        self.loggers.show(trainer, alert, DONE)


def fitted(*loggers: Logger) -> Trainer:
    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=list(loggers),
        callbacks=[AlertAlways()],
        accumulate_grad_batches=2,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    trainer.fit(Line())
    return trainer


def test_tensorboard_shows_text_and_mark_at_the_step_of_the_metrics() -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trainer = fitted(TensorBoardLogger("."), CSVLogger("."))
    events = event_accumulator.EventAccumulator(trainer.loggers[0].log_dir, {"tensors": 0, "scalars": 0}).Reload()
    metric, marks, texts = (
        events.Scalars(KEY),
        events.Scalars(f"alert/{KEY}"),
        events.Tensors(f"alert/{KEY}/text_summary"),
    )
    assert [(each.step, each.value) for each in marks] == [(each.step, each.value) for each in metric]
    assert [each.step for each in texts] == [each.step for each in metric] == trainer.callbacks[0].steps
    assert [each.tensor_proto.string_val for each in texts] == [[f"{REASON} {DONE}".encode()]] * 2
    assert "alert" not in Path(trainer.loggers[1].log_dir, "metrics.csv").read_text()


def test_wandb_has_an_alert_of_the_run(tmp_path: Path) -> None:
    wandb = pytest.importorskip("wandb")
    wandb.teardown()  # of an earlier test, with another working directory
    fitted(WandbLogger(offline=True, save_dir=tmp_path))
    wandb.teardown()  # its process has written the file only when it has ended
    (path,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    alerts = [record.alert for record in records(path) if record.HasField("alert")]
    assert [(each.title, each.text, each.level) for each in alerts] == [
        (f"{KEY} at step {step}", f"{REASON} {DONE}", "WARN") for step in (2, 4)
    ]


class Experiment:
    """The experiment of a logger, with the given methods."""

    def __init__(self, *methods: str) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        for method in methods:
            setattr(self, method, lambda *args, method=method, **kwargs: self.calls.append((method, args, kwargs)))


def trainer_of(*experiments: Any, is_global_zero: bool = True) -> Any:
    loggers = [SimpleNamespace(experiment=experiment) for experiment in experiments]
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(_batches_that_stepped=7))
    return SimpleNamespace(loggers=loggers, is_global_zero=is_global_zero, fit_loop=loop, global_step=8)


ALERT = Alert("rule", "flatness/relative/" + "x" * 60, math.nan, 1.0, 8, 1, REASON)


def test_loggers_are_known_by_what_they_can_do() -> None:
    board, run, other = Experiment("add_text", "add_scalar"), Experiment("alert", "define_metric"), Experiment("alert")
    LoggerAlerts().show(trainer_of(board, run, other, None), ALERT)
    assert [call[0] for call in board.calls] == ["add_text", "add_scalar"]
    assert board.calls[0][1:] == ((f"alert/{ALERT.key}", REASON, 7), {})
    assert [len(call[2]["title"]) for call in run.calls] == [63]
    assert not other.calls
    assert log_step(SimpleNamespace(fit_loop=None, global_step=8)) == 8


def test_only_the_first_process_touches_a_logger() -> None:
    board = Experiment("add_text", "add_scalar")
    LoggerAlerts().show(trainer_of(board, is_global_zero=False), ALERT)
    assert not board.calls


class FullDisk(CSVLogger):
    """Writes numbers, but nothing else."""

    @property
    def experiment(self) -> Any:
        return SimpleNamespace(add_text=self.fail, add_scalar=self.fail)

    def fail(self, *_: Any) -> None:
        raise OSError("no space left")

    def log_metrics(self, *args: Any, **kwargs: Any) -> None: ...

    log_hyperparams = log_graph = save = finalize = log_metrics


def test_a_failing_logger_is_one_warning_and_the_others_go_on() -> None:
    board = Experiment("add_text", "add_scalar")
    with pytest.warns(UserWarning, match="FullDisk could not show an alert: OSError") as caught:
        trainer = fitted(FullDisk("."))
    assert len([each for each in caught if "could not show" in str(each.message)]) == 1
    assert trainer.global_step == 4
    with pytest.warns(UserWarning, match="could not show"):
        LoggerAlerts().show(trainer_of(FullDisk(".").experiment, board), ALERT)
    assert len(board.calls) == 2


class NameLayers(Callback):
    """Names the layers of two epochs; that of the second has changed."""

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        log_layers(trainer, {} if trainer.sanity_checking else {LAYER: f"conv{trainer.current_epoch}"})


def named(*loggers: Logger, hyperparameters: bool = False) -> Trainer:
    module = Line()
    if hyperparameters:
        module.save_hyperparameters({"width": 1})
    options: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1}
    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=list(loggers),
        callbacks=[NameLayers()],
        enable_checkpointing=False,
        **options,
    )
    trainer.fit(module)
    return trainer


@pytest.mark.parametrize("hyperparameters", [True, False])
def test_layers_are_hyperparameters(hyperparameters: bool) -> None:
    """The user's own stay, and no curve is drawn that was not there."""
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trainer = named(TensorBoardLogger("."), CSVLogger("."), hyperparameters=hyperparameters)
    own = {"width": 1} if hyperparameters else {}
    for logger in trainer.loggers:
        assert load_hparams_from_yaml(str(Path(logger.log_dir, "hparams.yaml"))) == own | {LAYER: "conv1"}
    events = event_accumulator.EventAccumulator(trainer.loggers[0].log_dir).Reload()
    assert ("hp_metric" in events.Tags()["scalars"]) == hyperparameters
    texts = events.Tensors(f"{LAYER}/text_summary")
    assert [(each.step, each.tensor_proto.string_val) for each in texts] == [(3, [b"conv0"]), (7, [b"conv1"])]


def test_layers_are_in_the_configuration_of_a_wandb_run() -> None:
    config: dict[str, Any] = {}
    logger = SimpleNamespace(experiment=Experiment("alert", "define_metric"), log_hyperparams=config.update)
    trainer = trainer_of()
    trainer.loggers = [logger]
    log_layers(trainer, {LAYER: "conv"})
    trainer.is_global_zero = False
    log_layers(trainer, {LAYER: "another"})
    assert config == {LAYER: "conv"}


def test_a_logger_that_takes_no_hyperparameters_is_one_warning() -> None:
    config: dict[str, Any] = {}
    trainer = trainer_of()
    trainer.loggers = [SimpleNamespace(experiment=None), SimpleNamespace(log_hyperparams=config.update)]
    with pytest.warns(UserWarning, match="could not log which layer is measured: AttributeError"):
        log_layers(trainer, {LAYER: "conv"})
    assert config == {LAYER: "conv"}
