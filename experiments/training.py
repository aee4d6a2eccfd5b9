"""One training with the monitor in a Lightning Trainer; what the experiments vary is an argument."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    LRScheduler,
    OneCycleLR,
)
from torch.utils.data import DataLoader, RandomSampler

from experiments.data import Images, Split
from lightning_flatness import FlatnessMonitor

RESTARTS = 3
"""Periods of the cosine with warm restarts in one training."""
_PLAIN: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class SAM(SGD):
    """SGD at the gradient of the worst point within a radius (Foret et al., arXiv 2010.01412).

    Args:
        radius: distance of that point, in the norm of all parameters.
    """

    def __init__(self, params: object, radius: float = 0.05, **options: float) -> None:
        super().__init__(params, **options)
        self.radius = radius

    def step(self, closure: object = None) -> object:
        """Differentiate here, climb, differentiate there, and step from here."""
        loss = closure()
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        with torch.no_grad():
            norm = torch.stack([p.grad.norm() for p in parameters]).norm() + 1e-12
            moves = [self.radius * p.grad / norm for p in parameters]
            for p, move in zip(parameters, moves, strict=True):
                p += move
        closure()
        with torch.no_grad():
            for p, move in zip(parameters, moves, strict=True):
                p -= move
        super().step()
        return loss


class Classifier(L.LightningModule):
    """A network trained with cross-entropy; logs `val_loss` (nats) and `val_accuracy`.

    Args:
        network: maps images to logits.
        optimizer: `sgd`, `sgd_cosine`, `sgd_restarts`, `adamw_cosine`, `adamw_onecycle` or `sam`.
        learning_rate: the highest one of the schedule.
        weight_decay: of all parameters.
        augmentation: whether training images are shifted by up to one pixel.
    """

    def __init__(
        self, network: nn.Module, optimizer: str, learning_rate: float, weight_decay: float, augmentation: bool = False
    ) -> None:
        super().__init__()
        self.network = network
        self.optimizer, self.learning_rate, self.weight_decay = optimizer, learning_rate, weight_decay
        self.augmentation = augmentation

    def forward(self, images: Tensor) -> Tensor:
        """Map images to logits."""
        return self.network(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the mean cross-entropy of the batch."""
        images, labels = batch
        return F.cross_entropy(self(_shifted(images) if self.augmentation else images), labels)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log loss and accuracy."""
        images, labels = batch
        logits = self(images)
        self.log("val_loss", F.cross_entropy(logits, labels))
        self.log("val_accuracy", (logits.argmax(1) == labels).float().mean())

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the optimizer and its schedule over all steps."""
        kind, steps, rate = self.optimizer, int(self.trainer.estimated_stepping_batches), self.learning_rate
        if kind.startswith("adamw"):
            optimizer: Optimizer = AdamW(self.parameters(), lr=rate, weight_decay=self.weight_decay)
        else:
            make = SAM if kind == "sam" else SGD
            optimizer = make(self.parameters(), lr=rate, momentum=0.9, weight_decay=self.weight_decay)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": _schedule(kind, optimizer, steps), "interval": "step"},
        }


def _schedule(kind: str, optimizer: Optimizer, steps: int) -> LRScheduler:
    if kind.endswith("cosine"):
        return CosineAnnealingLR(optimizer, T_max=steps)
    if kind.endswith("restarts"):
        return CosineAnnealingWarmRestarts(optimizer, T_0=math.ceil(steps / RESTARTS))
    if kind.endswith("onecycle"):
        return OneCycleLR(optimizer, max_lr=optimizer.param_groups[0]["lr"], total_steps=steps + 1)
    return ConstantLR(optimizer, factor=1.0)


def _shifted(images: Tensor) -> Tensor:
    """Return images that are all shifted by the same random pixel, -1 to 1 along each axis."""
    down, right = torch.randint(-1, 2, (2,)).tolist()
    return images.roll((down, right), (2, 3))


def fit(
    module: L.LightningModule,
    data: Split,
    seed: int,
    validations: int,
    steps: int,
    batch_size: int = 32,
    callbacks: Sequence[Callback] = (),
    checkpoint: Path | None = None,
) -> None:
    """Train a module in a Trainer without loggers, checkpoints and a progress bar.

    Args:
        module: with a `training_step` and a `validation_step` for (images, labels).
        data: its training part is used and may be changed by the callbacks.
        seed: seed of the order of the batches and of everything that the training draws.
        validations: number of validations.
        steps: training steps before each of them.
        batch_size: training images per step.
        callbacks: of the Trainer.
        checkpoint: a file of an earlier training with the same arguments, which goes on from there.
    """
    # As many permutations of the images as are needed, one after the other.
    order = RandomSampler(data.training, num_samples=steps * batch_size, generator=torch.Generator().manual_seed(seed))
    loaders = _loader(data.training, batch_size, order), _loader(data.validation, len(data.validation))
    with _quiet():
        trainer = L.Trainer(
            max_epochs=validations,
            num_sanity_val_steps=0,
            callbacks=list(callbacks),
            **_PLAIN,
        )
        torch.manual_seed(seed)
        trainer.fit(module, *loaders, ckpt_path=checkpoint)


def quiet_monitor(**options: Any) -> FlatnessMonitor:
    """Return a monitor that draws nothing."""
    return FlatnessMonitor(figure_every_n_validations=0, **options)


def measured(module: L.LightningModule, images: Images) -> dict[str, float]:
    """Return all keys of a module on a part of the data, and its `val_loss` and `val_accuracy` there."""
    with _quiet():
        trainer = L.Trainer(callbacks=[FlatnessMonitor()], **_PLAIN)
        trainer.validate(module, _loader(images, len(images)), verbose=False)
    return {key: float(value) for key, value in trainer.callback_metrics.items()}


@contextmanager
def _quiet() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _loader(images: Images, batch_size: int, order: RandomSampler | None = None) -> DataLoader:
    return DataLoader(images, batch_size, sampler=order, collate_fn=_as_it_is)


def _as_it_is(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return batch


@torch.no_grad()
def evaluated(module: nn.Module, images: Images) -> tuple[float, float]:
    """Return the mean cross-entropy and the accuracy in eval mode."""
    was_training = module.training
    logits = module.eval()(images.images)
    module.train(was_training)
    return float(F.cross_entropy(logits, images.labels)), float((logits.argmax(1) == images.labels).float().mean())
