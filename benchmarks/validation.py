"""A validation by a Lightning Trainer, with or without the monitor."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import NamedTuple

import lightning as L
import networks
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_flatness import FlatnessMonitor


class Setting(NamedTuple):
    """A network and what it is validated on."""

    title: str
    network: Callable[[], nn.Module]
    side: int
    batch: int
    classes: int


SETTINGS = {
    "resnet20": Setting("ResNet-20 (16-32-64), 32 x 32", networks.resnet20, 32, 256, 10),
    "resnet18": Setting("ResNet-18, 64 x 64", lambda: networks.resnet18(10), 64, 256, 10),
    "resnet18-stem": Setting("ResNet-18 with a 3 x 3 stem, 64 x 64", lambda: networks.resnet18(10, False), 64, 32, 10),
}


class Validated(L.LightningModule):
    """A network whose validation loss is logged."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        return self.network(images)

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        """Log the loss."""
        images, labels = batch
        self.log("val/loss", nn.functional.cross_entropy(self(images), labels))


def images_and_labels(setting: Setting, samples: int) -> tuple[Tensor, Tensor]:
    """Return seeded noise of the setting's shape."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(samples, 3, setting.side, setting.side, generator=generator)
    return images, torch.randint(setting.classes, (samples,), generator=generator)


def validation(setting: Setting, batches: int, monitored: bool) -> Callable[[], object]:
    """Return a function that validates the network on so many batches."""
    warnings.filterwarnings("ignore", module="lightning")
    data = TensorDataset(*images_and_labels(setting, batches * setting.batch))
    trainer = L.Trainer(
        accelerator="auto",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[FlatnessMonitor(strict=True)] if monitored else [],
    )
    torch.manual_seed(0)
    module = Validated(networks.lively(setting.network()))
    return lambda: trainer.validate(module, DataLoader(data, setting.batch), verbose=False)
