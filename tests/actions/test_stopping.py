from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger
from torch.utils.data import DataLoader

from lightning_flatness.actions.stopping import HeldStop, may_stop, stop_when_permitted

BATCHES = 4


class Line(LightningModule):
    """One weight; an epoch has four batches."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss = self.layer(batch).square().mean()
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None: ...

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(torch.ones(BATCHES, 1))

    val_dataloader = train_dataloader


class Rows(Logger):
    """Notes the steps at which the training's loss is logged."""

    name = version = None

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[int] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if "loss" in metrics:
            self.steps.append(step)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...


class Stop(Callback):
    """Asks for a stop in one validation, as a rule does."""

    def __init__(self, validation: int = 0, raises_the_flag: bool = False) -> None:
        self.left, self.raises_the_flag, self.flags = validation, raises_the_flag, []

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        self.flags.append(trainer.should_stop)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.left -= 1
        if self.left == -1:
            if self.raises_the_flag:
                trainer.should_stop = True
            else:
                stop_when_permitted(trainer)
                stop_when_permitted(trainer)


def fitted(*callbacks: Callback, ckpt_path: Any = None, **options: Any) -> Trainer:
    defaults: dict[str, Any] = {"max_epochs": 9, "accelerator": "cpu", "num_sanity_val_steps": 0, "logger": False}
    run = Trainer(
        **defaults | options,
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(each, ModelCheckpoint) for each in callbacks),
    )
    run.fit(Line(), ckpt_path=ckpt_path)
    return run


LIMITS: list[tuple[dict[str, Any], int]] = [
    ({}, 4),
    ({"val_check_interval": 1}, 1),
    ({"min_epochs": 1, "val_check_interval": 2}, 4),
    ({"min_epochs": 3}, 12),
    ({"min_steps": 6, "val_check_interval": 2}, 6),
    ({"min_steps": 7, "min_epochs": 1}, 7),
    ({"min_epochs": 2, "min_steps": 9, "accumulate_grad_batches": 2}, 9),
    ({"min_epochs": 3, "max_epochs": 3}, 12),
    ({"min_epochs": 3, "max_steps": 5}, 5),
]


@pytest.mark.parametrize(("options", "steps"), LIMITS)
def test_a_stop_comes_when_that_of_lightning_comes(options: dict[str, Any], steps: int) -> None:
    ends = []
    for raises_the_flag in (True, False):
        stop, rows = Stop(raises_the_flag=raises_the_flag), Rows()
        run = fitted(stop, logger=rows, log_every_n_steps=1000, **options)
        ends.append((run.global_step, run.current_epoch, -stop.left))
        assert run.global_step == steps
        assert not any(isinstance(callback, HeldStop) for callback in run.callbacks)
    assert ends[0] == ends[1]
    assert not any(stop.flags)
    assert len(rows.steps) <= 1  # with the raised flag, Lightning logs in every step


@pytest.mark.parametrize("options", [{"min_epochs": 5}, {"min_steps": 18}])
def test_a_waiting_stop_can_be_asked_for_again_after_a_resume(tmp_path: Path, options: dict[str, Any]) -> None:
    class Resume(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            assert not may_stop(trainer)
            stop_when_permitted(trainer)

    whole = fitted(Stop(), ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1), **options)
    assert not any("HeldStop" in key for key in torch.load(tmp_path / "epoch=1.ckpt")["callbacks"])
    for checkpoint in sorted(tmp_path.glob("*.ckpt"))[: whole.current_epoch - 1]:
        resumed = fitted(Resume(), ckpt_path=checkpoint, **options)
        assert (resumed.global_step, resumed.current_epoch) == (whole.global_step, whole.current_epoch)


def test_an_exception_leaves_nothing_behind() -> None:
    class Fail(Callback):
        def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            if trainer.current_epoch == 2:
                assert isinstance(trainer.callbacks[0], HeldStop)
                self.trainer = trainer
                raise RuntimeError("fault")

    fail = Fail()
    with pytest.raises(RuntimeError, match="fault"):
        fitted(Stop(), fail, min_epochs=5)
    assert not any(isinstance(callback, HeldStop) for callback in fail.trainer.callbacks)


class Write(Callback):
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        held = any(isinstance(callback, HeldStop) for callback in trainer.callbacks)
        Path(f"rank{trainer.global_rank}.txt").write_text(f"{trainer.global_step} {trainer.current_epoch} {held}")


@pytest.mark.timeout(60)
def test_two_processes_stop_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fork beside threads
        fitted(Stop(), Write(), min_epochs=2, min_steps=5, strategy="ddp_fork", devices=2)
    assert Path("rank0.txt").read_text() == Path("rank1.txt").read_text() == "5 3 False"
