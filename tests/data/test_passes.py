"""Passes on own batches: as in the module's own steps, with the state of the model preserved."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from networks import Net
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_flatness.data.passes import callable_module, transferred


class Doubling:
    """Data hooks, of a module or of a data module."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch[0] + 1, batch[1]]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch[0] * 2, batch[1]]


class Model(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = Net()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, index: int) -> None:
        return None

    def validation_step(self, batch: Any, index: int) -> None:
        self.seen.append(batch[0])

    def configure_optimizers(self) -> None:
        return None


class ModelWithHooks(Doubling, Model):
    pass


class Data(LightningDataModule):
    def train_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(torch.ones(4, 2, 5, 4), torch.zeros(4, dtype=torch.long)), batch_size=2)

    val_dataloader = train_dataloader


class DataWithHooks(Doubling, Data):
    pass


class Moves(Callback):
    """Moves the batches of validation once more."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.batches = list(transferred(Data().val_dataloader(), trainer, pl_module))


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-true", "bf16-mixed"])
@pytest.mark.parametrize(("model", "data"), [(Model, Data), (ModelWithHooks, Data), (Model, DataWithHooks)])
def test_batches_arrive_as_in_the_modules_own_steps(model: Any, data: Any, precision: str) -> None:
    module, moves = model(), Moves()
    trainer = Trainer(
        fast_dev_run=2,
        accelerator="cpu",
        precision=precision,
        callbacks=[moves],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.validate(module, data(), verbose=False)
    for (inputs, targets), seen in zip(moves.batches, module.seen, strict=True):
        assert inputs.dtype == seen.dtype
        assert torch.equal(inputs, seen)
        assert targets.dtype == torch.long


class NoForward(LightningModule):
    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


def test_what_is_called_with_inputs() -> None:
    whole, part = Model(), NoForward(net=Net(), loss=nn.CrossEntropyLoss(), head=nn.Linear(3, 3))
    assert callable_module(whole) is whole
    assert callable_module(part) is part.net


@pytest.mark.parametrize(
    ("children", "message"),
    [({"a": Net(), "b": Net()}, r"2 networks: \['a', 'b'\]"), ({"fc": nn.Linear(2, 2)}, "0 networks")],
)
def test_no_way_to_tell_what_to_call(children: dict[str, nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=rf"`NoForward` has no `forward`, and {message}"):
        callable_module(NoForward(**children))
