"""Trains a network with curves in TensorBoard and in Weights & Biases (offline)."""

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_flatness import FlatnessMonitor, measure
from lightning_flatness.examples.digits import digits_split


def network() -> nn.Module:
    """Return the network; put yours here."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


class Module(L.LightningModule):
    """A network and its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()  # an attribute, so that Lightning and the monitor find it

    def training_step(self, batch, batch_idx):
        """Return the loss."""
        images, labels = batch
        loss = F.cross_entropy(self.net(images), labels)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        """Log what you watch, and return the loss: the monitor measures what is returned."""
        images, labels = batch
        logits = self.net(images)
        loss = F.cross_entropy(logits, labels)
        self.log("val_loss", loss)
        self.log("val_acc", (logits.argmax(1) == labels).float().mean())
        return loss

    def configure_optimizers(self):
        """Use SGD with momentum."""
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def main() -> None:
    """Check the network on one batch, then train it for twelve epochs."""
    L.seed_everything(0)
    training, validation = digits_split()
    train_loader = DataLoader(training, batch_size=32, shuffle=True)
    val_loader = DataLoader(validation, batch_size=256)
    module = Module()

    print(measure(module.net, [next(iter(val_loader))], loss="cross_entropy"))

    loggers = [TensorBoardLogger("logs"), WandbLogger(project="flatness", save_dir="logs", offline=True)]
    monitor = FlatnessMonitor(rules="default", prog_bar=True)
    trainer = L.Trainer(max_epochs=12, accelerator="cpu", logger=loggers, callbacks=[monitor])
    trainer.fit(module, train_loader, val_loader)


if __name__ == "__main__":
    main()
