"""Looks for what grows when one process validates again and again.

    python benchmarks/soak.py 200

prints memory, tensors, autograd graphs, hooks, dispatch modes and open files, with the monitor and without. The numbers
of the documentation are from here. Linux only: memory and files are read from `/proc`.
"""

from __future__ import annotations

import gc
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.data import DataLoader, TensorDataset

from lightning_flatness import FlatnessMonitor


class Row(NamedTuple):
    """What there is after so many validations."""

    validations: int
    resident_kib: int
    tensors: int
    with_graph: int  # tensors that hold an autograd graph
    hooks: int
    modes: int
    files: int


class Classifier(LightningModule):
    """A small convolutional network on noise."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.BatchNorm2d(32),
            nn.SiLU(inplace=True),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(32, 10),
        )

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """Cross-entropy."""
        return F.cross_entropy(self.network(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        """Logs the cross-entropy."""
        self.log("val_loss", self.training_step(batch, index))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD."""
        return torch.optim.SGD(self.parameters(), 0.01)


class Count(Callback):
    """Counts before every `every`-th validation, when the one before has ended."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.rows: list[Row] = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count what the epochs so far have left."""
        epoch = trainer.current_epoch
        if epoch and epoch % self.every == 0:
            self.rows.append(row(epoch, pl_module))


def has_graph(tensor: Tensor) -> bool:
    """Return whether a tensor keeps a graph alive."""
    try:
        return tensor.grad_fn is not None
    except RuntimeError:  # a view that was made without gradients, of what has been changed with them: it has none
        return False


def row(validations: int, module: nn.Module) -> Row:
    """Count everything, after a garbage collection."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of objects that do not like to be looked at
        tensors = [each for each in gc.get_objects() if isinstance(each, Tensor)]
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return Row(
        validations,
        resident_kib=pages * os.sysconf("SC_PAGE_SIZE") // 1024,
        tensors=len(tensors),
        with_graph=sum(map(has_graph, tensors)),
        hooks=sum(len(each._forward_hooks) + len(each._forward_pre_hooks) for each in module.modules()),
        modes=len(_get_current_dispatch_mode_stack()),
        files=len(os.listdir("/proc/self/fd")),
    )


def soak(validations: int, every: int, folder: Path, monitored: bool = True) -> list[Row]:
    """Return what there is after every `every` validations of one training."""

    def loader(size: int) -> DataLoader[Any]:
        return DataLoader(TensorDataset(torch.randn(size, 3, 8, 8), torch.randint(10, (size,))), batch_size=32)

    count = Count(every)
    monitors = [FlatnessMonitor(rules="default", strict=True)] if monitored else []
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=validations + 1,
        limit_val_batches=4,
        callbacks=[*monitors, count],
        logger=CSVLogger(folder),
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(Classifier(), loader(32), loader(128))
    return count.rows


def main() -> None:
    """Print one table with the monitor and one without."""
    validations = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    torch.manual_seed(0)
    for monitored in (True, False):
        print("with the monitor" if monitored else "without")
        print(*Row._fields, sep="\t")
        with tempfile.TemporaryDirectory() as folder:
            for each in soak(validations, validations // 10, Path(folder), monitored):
                print(*each, sep="\t")


if __name__ == "__main__":
    main()
