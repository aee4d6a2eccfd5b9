from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.core.saving import load_hparams_from_yaml
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning_runs import Classifier, trainer
from torch.utils.data import DataLoader

from lightning_flatness import FlatnessMonitor, ReduceLR, Rule
from lightning_flatness.reporting.loggers import LAYER, Loggers, log_folder, log_layers, log_step
from lightning_flatness.rules.alert import Alert

REASON, DONE = "flatness/relative rose from 1 to 2.3 since step 4.", "Training stops."
ALERT = Alert("rule", "flatness/relative/" + "x" * 60, math.nan, 1.0, 8, 1, REASON)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "alerts.jsonl").read_text().splitlines()]


class Experiment:
    """The experiment of a logger, with the given methods."""

    def __init__(self, *methods: str) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        for method in methods:
            setattr(self, method, lambda *args, method=method, **kwargs: self.calls.append((method, args, kwargs)))


BOARD = ("add_text", "add_image", "add_histogram", "add_custom_scalars", "add_scalar")


def trainer_of(folder: Path | None = None, *experiments: Any, is_global_zero: bool = True) -> Any:
    loggers = [SimpleNamespace(experiment=experiment) for experiment in experiments]
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(_batches_that_stepped=7))
    return SimpleNamespace(
        loggers=loggers, is_global_zero=is_global_zero, fit_loop=loop, global_step=8, default_root_dir=folder
    )


def everything(loggers: Loggers, run: Any) -> None:
    loggers.start(run)
    loggers.describe(run, {"layer": "net.3", "not measured": "flattened"})
    loggers.show(run, ALERT, DONE)
    loggers.distributions(run, {"margin": np.arange(3.0)}, is_alert=True)
    loggers.figure(run, lambda: np.zeros((2, 2, 3), np.uint8), step=7)


def test_loggers_are_known_by_what_they_can_do(tmp_path: Path) -> None:
    board, other = Experiment(*BOARD), Experiment("alert")
    everything(Loggers(), trainer_of(tmp_path, board, other, None))
    assert [call[0] for call in board.calls] == [
        "add_custom_scalars",
        "add_text",
        "add_text",
        "add_scalar",
        "add_histogram",
        "add_image",
    ]
    tags = {call[1][0]: call[1][2] for call in board.calls[1:]}
    mark = f"monitor/alerts/{ALERT.key}"
    names = ("monitor/configuration", "monitor/alerts", mark, "per_sample/margin", "monitor/dashboard")
    assert tags == dict.fromkeys(names, 7)
    assert not other.calls
    assert [each["event"] for each in lines(tmp_path)] == ["refused", "alert"]
    assert lines(tmp_path)[1] == {
        "monitor": "",
        "event": "alert",
        "rule": "rule",
        "key": ALERT.key,
        "step": 8,
        "epoch": 1,
        "onset_step": None,
        "value": None,  # JSON has no NaN
        "reference": 1.0,
        "ratio": None,
        "reason": REASON,
        "severity": "warning",
        "causes": "",
        "look_at": "",
        "others": [],
        "action": DONE,
    }
    assert log_step(SimpleNamespace(fit_loop=None, global_step=8)) == 8


def test_the_table_of_alerts_grows_and_begins_anew_with_a_training(tmp_path: Path) -> None:
    board, loggers = Experiment(*BOARD), Loggers("/train")
    run = trainer_of(tmp_path, board)
    for _ in range(2):
        loggers.show(run, ALERT)
    loggers.start(run, ["", "/train"])  # the first monitor lays out the scalars, not this one
    loggers.show(run, ALERT)
    texts = [call[1] for call in board.calls if call[0] == "add_text"]
    assert [text.count("\n") for _, text, _ in texts] == [2, 3, 2]
    assert {tag for tag, _, _ in texts} == {"monitor/alerts/train"}


def test_only_the_first_process_touches_a_logger(tmp_path: Path) -> None:
    board = Experiment(*BOARD)
    everything(Loggers(), trainer_of(tmp_path, board, is_global_zero=False))
    assert not board.calls
    assert not list(tmp_path.iterdir())


def test_a_failing_logger_is_one_warning_and_the_others_go_on(tmp_path: Path) -> None:
    class Full(Experiment):
        def __getattribute__(self, name: str) -> Any:
            if name in BOARD:
                return self.fail
            return super().__getattribute__(name)

        def fail(self, *_: Any, **__: Any) -> None:
            raise OSError("no space left")

    board = Experiment(*BOARD)
    with pytest.warns(UserWarning, match="could not show a layout: OSError") as caught:
        everything(Loggers(), trainer_of(tmp_path, Full(), board))
    assert len(caught) == 1
    assert len(board.calls) == 6


class Broken(CSVLogger):
    """Writes numbers, but nothing else."""

    @property
    def experiment(self) -> Any:
        return SimpleNamespace(**dict.fromkeys(BOARD, self.fail))

    def fail(self, *_: Any, **__: Any) -> None:
        raise OSError("no connection")

    def log_metrics(self, *args: Any, **kwargs: Any) -> None: ...

    log_hyperparams = log_graph = save = finalize = log_metrics


def alerting(**options: Any) -> FlatnessMonitor:
    rule = Rule("flatness/trace", above=-1.0, action=ReduceLR(0.5), name="always", cooldown=5)
    return FlatnessMonitor(rules=[rule], **options)


def test_a_logger_that_fails_costs_a_training_one_warning(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="Broken could not show") as caught:
        trainer(tmp_path, alerting(), logger=Broken(tmp_path)).fit(Classifier())
    assert len([each for each in caught if "could not" in str(each.message)]) == 1


@pytest.mark.parametrize("kind", [None, CSVLogger])
def test_a_folder_that_cannot_be_written_costs_one_warning(tmp_path: Path, kind: type[Logger] | None) -> None:
    (tmp_path / "alerts.jsonl").mkdir()
    (tmp_path / "dashboard.png").mkdir()
    logger = kind(tmp_path, name="", version="") if kind else False
    with pytest.warns(UserWarning, match="could not") as caught:
        trainer(tmp_path, alerting(), logger=logger).fit(Classifier())
    said = [str(each.message) for each in caught if "could not" in str(each.message)]
    assert [line.split()[0] for line in said] == (["alerts.jsonl"] + ["dashboard.png"] * (kind is not None))


def test_with_logging_switched_off_only_alerts_leave_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    watching = FlatnessMonitor(figure_every_n_validations=1)
    trainer(tmp_path, watching, logger=False).fit(Classifier())
    with pytest.warns(UserWarning, match="did not measure"):
        trainer(tmp_path, FlatnessMonitor(), logger=False).fit(Classifier(coupled))
    assert not list(tmp_path.iterdir())
    assert len(watching.figure().axes) >= 4
    trainer(tmp_path, alerting(), logger=False).fit(Classifier())
    assert [path.name for path in tmp_path.iterdir()] == ["alerts.jsonl"]


def test_without_a_logger_for_pictures_there_are_files(tmp_path: Path) -> None:
    run = trainer(tmp_path, alerting(), logger=CSVLogger(tmp_path, name="", version=""), max_epochs=3)
    run.fit(Classifier())
    (alert,) = lines(tmp_path)
    assert (alert["rule"], alert["step"]) == ("always", 5)
    assert alert["action"].startswith("Learning rate cut from ")
    assert {path.name for path in tmp_path.iterdir()} == {
        "alerts.jsonl",
        "dashboard.png",
        "metrics.csv",
        "hparams.yaml",
    }
    assert (tmp_path / "dashboard.png").read_bytes().startswith(b"\x89PNG")
    header, *rows = (tmp_path / "metrics.csv").read_text().splitlines()
    columns = header.split(",")
    assert {"flatness/relative", "margin/mean", "margin_quantiles/q05"} < set(columns)
    assert "margin/q05" not in columns
    assert "margin/q05" in run.callback_metrics
    assert len(rows) == 3


@pytest.mark.parametrize("options", [{"fast_dev_run": True}, {"barebones": True}])
def test_trials_leave_no_files(tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trainer(tmp_path, alerting(), **options).fit(Classifier())
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def coupled(module: Classifier, batch: Any) -> torch.Tensor:
    logits = module(batch[0])
    return torch.nn.functional.cross_entropy(logits - logits.mean(0), batch[1])


def test_a_refused_network_is_visible(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="", version="")
    with pytest.warns(UserWarning, match="did not measure"):
        trainer(tmp_path, FlatnessMonitor(), logger=logger).fit(Classifier(coupled))
    (line,) = lines(tmp_path)
    assert line["event"] == "refused"
    assert "mean" in line["reason"]
    assert not (tmp_path / "dashboard.png").exists()


def test_the_folder_is_that_of_the_first_logger_that_has_one(tmp_path: Path) -> None:
    def folder(*loggers: Any) -> Path | None:
        return log_folder(SimpleNamespace(loggers=loggers, default_root_dir="root"))

    wandb = SimpleNamespace(experiment=SimpleNamespace(dir="run/files"), log_dir=None, save_dir=".")
    remote = SimpleNamespace(experiment=None, log_dir=None, save_dir="s3://bucket")
    csv = SimpleNamespace(experiment=None, log_dir="csv/version_0", save_dir="csv")
    assert [folder(), folder(remote), folder(remote, csv), folder(wandb, csv)] == [
        Path(each) for each in ("root", "root", "csv/version_0", "run/files")
    ]
    run = Trainer(fast_dev_run=True, accelerator="cpu")
    assert log_folder(run) is None


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
