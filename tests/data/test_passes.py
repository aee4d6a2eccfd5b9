"""Passes on own batches: as in the module's own steps, with the state of the model preserved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from networks import Net
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_flatness import measure
from lightning_flatness.data.passes import callable_module, preserved_state, transferred


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
    perceptron = NoForward(net=nn.Linear(3, 3), loss=nn.CrossEntropyLoss())
    assert callable_module(perceptron) is perceptron.net


@pytest.mark.parametrize(
    ("children", "message"),
    [({"a": Net(), "b": Net()}, r"2 networks: \['a', 'b'\]"), ({"loss": nn.CrossEntropyLoss()}, "0 networks")],
)
def test_no_way_to_tell_what_to_call(children: dict[str, nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=rf"`NoForward` has no `forward`, and {message}"):
        callable_module(NoForward(**children))


def count_in_place(net: Counting) -> None:
    net.calls += 1
    net.scale[0] = -0.0  # equal to 0, but not the same bits


def count_in_a_new_tensor(net: Counting) -> None:
    net.calls = net.calls + 1
    net.scale = None


def count_behind_autograd(net: Counting) -> None:
    net.calls.data.fill_(7)
    net.scale.data = torch.ones(3)


def replace_all(net: Counting) -> None:
    net.register_buffer("last", torch.ones(2), persistent=False)
    del net.calls
    net.register_buffer("calls", torch.ones(()), persistent=False)


class Counting(Net):
    """Counts its calls in a buffer; other state changes with it."""

    def __init__(self, count: Callable[[Counting], None] = count_in_place) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("scale", torch.tensor([0.0, torch.nan]))
        self.register_buffer("nothing", None)
        self.count = count
        self.python_calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.count(self)
        self.python_calls += 1
        return super().forward(x)


def buffers_of(model: nn.Module) -> list[Any]:
    return [
        [(name, id(value), None if value is None else (value.dtype, value.tolist())) for name, value in held.items()]
        for held in (module._buffers for module in model.modules())
    ] + [sorted(module._non_persistent_buffers_set) for module in model.modules()]


COUNTS = [count_in_place, count_in_a_new_tensor, count_behind_autograd, replace_all]


@pytest.mark.parametrize("count", COUNTS)
def test_buffers_are_as_before_to_the_last_bit(count: Callable[[Counting], None]) -> None:
    net, batch = Counting(count), (torch.randn(3, 2, 5, 4), torch.zeros(3, dtype=torch.long))
    before = buffers_of(net)
    measure(net, [batch, batch])
    assert str(buffers_of(net)) == str(before)  # NaN equals NaN as text, and 0 does not equal -0
    # What is not a buffer stays as the two batches left it; what verifies the record leaves nothing.
    assert net.python_calls == 2


def test_buffers_are_restored_after_an_error() -> None:
    net, targets = Counting(), torch.tensor([9])
    with pytest.raises(ValueError, match="Targets must lie in"):
        measure(net, [(torch.randn(1, 2, 5, 4), targets)])
    assert (net.calls, net.python_calls) == (0, 1)


def test_buffers_that_did_not_change_are_not_written_to() -> None:
    """A graph that saved them would refuse its backward pass."""
    net = Counting(lambda _: None)
    x = torch.ones(2, requires_grad=True)
    loss = (x * net.scale).sum()
    measure(net, [(torch.randn(3, 2, 5, 4), torch.zeros(3, dtype=torch.long))])
    loss.backward()


@pytest.mark.parametrize("inference", [False, True])
def test_buffers_of_inference_mode(inference: bool) -> None:
    with torch.inference_mode(inference):
        net = Counting()
    with torch.inference_mode(), preserved_state(net):
        net.calls.add_(1)
    assert net.calls == 0
    assert net.calls.is_inference() is inference


def test_buffers_without_numbers_of_their_own() -> None:
    sparse = nn.Module()
    sparse.register_buffer("sparse", torch.eye(2).to_sparse())
    sparse.register_buffer("expanded", torch.zeros(1).expand(3))
    for module in (nn.LazyBatchNorm2d(), nn.BatchNorm2d(2, device="meta"), sparse):
        with preserved_state(module):
            assert not module.training
