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
    samples: int


CLASSES = 10
SETTINGS = {
    "resnet20": Setting("ResNet-20 (16-32-64), 32 x 32", networks.resnet20, 32, 256, 10_000),
    "resnet18": Setting("ResNet-18, 64 x 64", lambda: networks.resnet18(CLASSES), 64, 256, 10_000),
    "resnet18-stem": Setting(
        "ResNet-18 with a 3 x 3 stem, 64 x 64", lambda: networks.resnet18(CLASSES, False), 64, 32, 1_000
    ),
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


def images_and_labels(setting: Setting) -> tuple[Tensor, Tensor]:
    """Return seeded noise of the setting's shape."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(setting.samples, 3, setting.side, setting.side, generator=generator)
    return images, torch.randint(CLASSES, (setting.samples,), generator=generator)


def validation(setting: Setting, monitored: bool) -> Callable[[], object]:
    """Return a function that validates the network on all samples."""
    warnings.filterwarnings("ignore", module="lightning")
    data = TensorDataset(*images_and_labels(setting))
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
