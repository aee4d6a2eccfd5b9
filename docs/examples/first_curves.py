"""Trains a small network and draws what the monitor logged."""

import csv

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split

from lightning_flatness import FlatnessMonitor
from lightning_flatness.reporting.figures import flatness_curves


class Classifier(L.LightningModule):
    """Two convolutions, the mean over all positions, and a linear classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
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

    def training_step(self, batch, batch_idx):
        """Return the cross-entropy of the batch."""
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def validation_step(self, batch, batch_idx):
        """Log the accuracy, and return the loss."""
        images, labels = batch
        logits = self.net(images)
        accuracy = (logits.argmax(1) == labels).float().mean()
        self.log("val_accuracy", accuracy, prog_bar=True)
        return F.cross_entropy(logits, labels)

    def configure_optimizers(self):
        """Use Adam with a constant learning rate."""
        return torch.optim.Adam(self.parameters(), lr=0.005)


def loaders() -> tuple[DataLoader, DataLoader]:
    """Return training and validation batches of handwritten digits."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    data = TensorDataset(images, torch.tensor(digits.target))
    training, validation = random_split(data, [1200, 597])
    return (
        DataLoader(training, batch_size=32, shuffle=True),
        DataLoader(validation, batch_size=256),
    )


def draw(file: str) -> None:
    """Draw four of the logged curves."""
    keys = ("val_accuracy", "flatness/relative", "flatness/scale_free", "margin/mean")
    with open(file) as table:
        rows = [row for row in csv.DictReader(table) if row["flatness/relative"]]
    curves = {key: [float(row[key]) for row in rows] for key in ("epoch", *keys)}
    flatness_curves(curves).savefig("first-curves.png")


def main() -> None:
    """Train for twenty epochs."""
    L.seed_everything(0)
    logger = CSVLogger(".", name="first-curves")
    trainer = L.Trainer(
        max_epochs=20,
        accelerator="cpu",
        logger=logger,
        callbacks=[FlatnessMonitor()],
    )
    trainer.fit(Classifier(), *loaders())
    draw(f"{logger.log_dir}/metrics.csv")


if __name__ == "__main__":
    main()
