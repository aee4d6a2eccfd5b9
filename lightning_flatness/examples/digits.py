"""Handwritten digits: real images that need no download, and a residual network that learns them in seconds."""

from __future__ import annotations

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_flatness.errors import missing_package

TRAINING_IMAGES = 1200
"""Number of images in the training part; the other 597 are the validation part."""


def digits_split(seed: int = 0) -> tuple[TensorDataset, TensorDataset]:
    """Return the training part and the validation part of scikit-learn's 1,797 handwritten digits.

    The split is random and stratified: each digit has the same share in both parts. Both parts are standardised by the
    mean and the standard deviation of the training pixels, so that no information from the validation part reaches the
    training.

    Args:
        seed: seed of the split; the same seed gives the same parts.

    Returns:
        The training part (1,200 images) and the validation part (597 images). An item is an image, float32 of shape
        (1, 8, 8), and its digit, an int64 scalar from 0 to 9.

    Raises:
        ModuleNotFoundError: if scikit-learn is not installed.

    Example:
        >>> from lightning_flatness.examples.digits import digits_split
        >>> training, validation = digits_split(seed=0)
        >>> len(training), len(validation)
        (1200, 597)
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ModuleNotFoundError as error:
        raise missing_package("The data set of digits", "sklearn") from error
    pixels, digits = load_digits(return_X_y=True)
    images = torch.as_tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8)
    targets = torch.as_tensor(digits, dtype=torch.int64)
    training, validation = train_test_split(
        range(len(targets)), train_size=TRAINING_IMAGES, stratify=targets, random_state=seed
    )
    mean, std = images[training].mean(), images[training].std()
    images = (images - mean) / std
    return (
        TensorDataset(images[training], targets[training]),
        TensorDataset(images[validation], targets[validation]),
    )


class DigitsDataModule(L.LightningDataModule):
    """The handwritten digits of `digits_split` for a Trainer.

    Args:
        seed: seed of the split and of the order of the training batches.
        batch_size: images per training batch; a validation batch always has 256.

    Example:
        >>> from lightning_flatness.examples.digits import DigitsDataModule
        >>> data = DigitsDataModule(seed=0, batch_size=32)
        >>> data.setup("fit")
        >>> images, targets = next(iter(data.train_dataloader()))
        >>> images.shape, targets.shape
        (torch.Size([32, 1, 8, 8]), torch.Size([32]))
    """

    training: TensorDataset
    validation: TensorDataset

    def __init__(self, seed: int = 0, batch_size: int = 32) -> None:
        super().__init__()
        self.seed = seed
        self.batch_size = batch_size

    def setup(self, stage: str) -> None:
        """Load and split the images; all stages use the same split."""
        self.training, self.validation = digits_split(self.seed)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return the training batches, in a new order each epoch."""
        # With its own generator, the order depends on the seed alone and not on other random draws.
        order = torch.Generator().manual_seed(self.seed)
        return DataLoader(self.training, batch_size=self.batch_size, shuffle=True, generator=order)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return the validation batches, in a fixed order."""
        return DataLoader(self.validation, batch_size=256)


class ResidualBlock(nn.Module):
    r"""A residual block \(\operatorname{relu}(x + f(x))\), where \(f\) is two normalised 3x3 convolutions.

    Args:
        channels: channels of input and output, both of shape (n, channels, height, width).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map a tensor of shape (n, channels, height, width) to one of the same shape."""
        residual = F.relu(self.bn1(self.conv1(x)))
        return F.relu(x + self.bn2(self.conv2(residual)))


class ResidualGapNet(nn.Module):
    """A small residual network with global average pooling (GAP) and 29,046 parameters.

    It consists of a stem, two residual blocks at the full 8x8 resolution, the mean over positions and a linear
    classifier. The last convolution is `blocks.1.conv2`, which has 28 filters and an 8x8 output map.

    Example:
        >>> import torch
        >>> from lightning_flatness.examples.digits import ResidualGapNet
        >>> ResidualGapNet()(torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5, 10])
    """

    def __init__(self) -> None:
        super().__init__()
        channels = 28
        self.stem = nn.Sequential(nn.Conv2d(1, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU())
        self.blocks = nn.Sequential(ResidualBlock(channels), ResidualBlock(channels))
        self.classifier = nn.Linear(channels, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Map images of shape (n, 1, 8, 8) to logits of shape (n, 10)."""
        features = self.blocks(self.stem(images)).mean((2, 3))
        return self.classifier(features)


class DigitsClassifier(L.LightningModule):
    """`ResidualGapNet`, trained with cross-entropy and SGD with a cosine schedule.

    It logs `train_loss`, `val_loss` (both in nats) and `val_accuracy` (from 0 to 1) once per epoch.

    Args:
        learning_rate: learning rate of the first step; the schedule ends at zero.
        weight_decay: weight decay of all parameters.

    Example:
        >>> import torch
        >>> from lightning_flatness.examples.digits import DigitsClassifier
        >>> DigitsClassifier(learning_rate=0.1)(torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5, 10])
    """

    def __init__(self, learning_rate: float = 0.05, weight_decay: float = 5e-4) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.net = ResidualGapNet()

    def forward(self, images: Tensor) -> Tensor:
        """Map images of shape (n, 1, 8, 8) to logits of shape (n, 10)."""
        return self.net(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return and log the mean cross-entropy of the batch."""
        images, targets = batch
        loss = F.cross_entropy(self(images), targets)
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log loss and accuracy; Lightning weights the batches by their size."""
        images, targets = batch
        logits = self(images)
        self.log("val_loss", F.cross_entropy(logits, targets))
        self.log("val_accuracy", (logits.argmax(1) == targets).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return SGD with momentum 0.9 and a cosine schedule that ends with the last training step."""
        optimizer = torch.optim.SGD(
            self.parameters(), lr=self.learning_rate, momentum=0.9, weight_decay=self.weight_decay
        )
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
