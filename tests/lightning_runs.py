"""What the tests of whole trainings share: a module, its data, a Trainer, and everything that a run leaves behind."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_flatness import Alert, FlatnessMonitor, measure

KEYS = {"flatness/relative", "flatness/trace", "flatness/confidence", "margin/mean"}


FIELDS = {
    "flatness/relative": "relative_flatness",
    "flatness/trace": "hessian_trace",
    "flatness/confidence": "confidence",
}


def images(n: int, seed: int, classes: int = 3) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 2, 5, 5, generator=generator, dtype=torch.float64)
    return TensorDataset(x, torch.randint(classes, (n,), generator=generator))


class Network(nn.Sequential):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 3, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(3)
        self.act = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(3, 4, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(4)
        self.act2 = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.3)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.head = nn.Linear(4, 3)


class Classifier(LightningModule):
    """What a user writes; `step` says how validation treats a batch."""

    def __init__(self, step: Callable[[Classifier, Any], Tensor] | None = None, loaders: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = Network().double()
        self.step = step
        self.loaders = loaders
        self.losses: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def training_step(self, batch: Any, index: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Any, index: int, dataloader_idx: int = 0) -> None:
        loss = self.loss(batch) if self.step is None else self.step(self, batch)
        self.log("val_loss", loss)
        self.losses.append(float(loss))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)]

    def train_dataloader(self) -> DataLoader:
        return DataLoader(images(24, 1), batch_size=4, shuffle=True)

    def val_dataloader(self) -> Any:
        loaders = [DataLoader(images(10 + i, 2 + i), batch_size=4) for i in range(self.loaders)]
        return loaders if self.loaders > 1 else loaders[0]


def trainer(tmp_path: Any, *callbacks: Callback, **options: Any) -> Trainer:
    defaults: dict[str, Any] = {"max_epochs": 2, "accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": tmp_path}
    if options.get("barebones"):
        defaults, quiet = {"max_epochs": 2, "accelerator": "cpu"}, {}
    return Trainer(**(defaults | quiet | options), callbacks=list(callbacks))


def report_of(module: Classifier, loader: DataLoader, **options: Any) -> dict[str, float]:
    report = measure(module, loader, **options)
    return {key: getattr(report, field) for key, field in FIELDS.items()} | {"margin/mean": report.margins["mean"]}


def values_of(run: Trainer, suffix: str = "") -> dict[str, float]:
    return {key: float(run.callback_metrics[key + suffix]) for key in KEYS}


def assert_same(first: dict[str, float], second: dict[str, float]) -> None:
    assert first == pytest.approx(second, rel=1e-12)


def everything(module: Classifier, run: Trainer) -> list[Any]:
    """All that a training leaves behind, to the last bit."""
    return [
        {name: value.tolist() for name, value in module.state_dict().items()},
        {name: (p.grad is None, p.requires_grad) for name, p in module.named_parameters()},
        str(run.optimizers[0].state_dict()),
        [scheduler.scheduler.state_dict() for scheduler in run.lr_scheduler_configs],
        [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()],
        module.losses,
        hooks(module),
        torch.is_grad_enabled(),
    ]


def hooks(module: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


def firings(monitor: FlatnessMonitor) -> list[Alert]:
    """The alert of each rule, also of those that share an event."""
    return [each for alert in monitor.alerts for each in (alert, *alert.others)]


def given_batches() -> list[Any]:
    return list(DataLoader(images(6, 9), batch_size=3))


class Broken(Callback):
    """Raises in one hook, once training has begun."""

    def __init__(self, hook: str, error: BaseException) -> None:
        def fail(run: Trainer, *_: Any, **__: Any) -> None:
            if not run.sanity_checking:
                raise error

        setattr(self, hook, fail)


class Values(Callback):
    """Notes after every validation the step, whether it is the sanity check, and the logged Hessian trace."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, bool, float | None]] = []

    def on_validation_end(self, run: Trainer, module: LightningModule) -> None:
        value = run.callback_metrics.get("flatness/trace")
        self.seen.append((run.global_step, run.sanity_checking, None if value is None else float(value)))
