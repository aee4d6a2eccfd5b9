"""Times validations of one training, of which every other one is measured: each has a neighbour to compare with."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable
from typing import NamedTuple

import lightning as L
import torch
from timing import Clock
from torch import nn
from torch.utils.data import DataLoader
from validation import Validated

from lightning_flatness import FlatnessMonitor


class Took(NamedTuple):
    """What one validation took, in seconds.

    Attributes:
        first: until the end of the first batch.
        whole: in all.
        batches: how many there were.
    """

    first: float
    whole: float
    batches: int

    @property
    def later(self) -> float:
        """Each batch after the first one; what is done at the end of the validation is spread over them."""
        return (self.whole - self.first) / (self.batches - 1)


class Stopwatch(L.Callback):
    """Times validations: the first of the callbacks starts, the last stops."""

    def __init__(self, clock: Clock, started: list[float] | None = None) -> None:
        self._clock = clock
        self.started = [0.0] if started is None else started
        self.is_last = started is not None
        self.took: list[Took] = []
        self._first, self._batches = 0.0, 0

    def on_validation_epoch_start(self, *_: object) -> None:
        """Start; what the monitor does before the first batch belongs to it."""
        self._batches = 0
        if not self.is_last:
            self.started[0] = self._clock()

    def on_validation_batch_end(self, *_: object) -> None:
        """Note the end of the first batch."""
        if self.is_last and not self._batches:
            self._first = self._clock() - self.started[0]
        self._batches += 1

    def on_validation_end(self, *_: object) -> None:
        """Stop; what is computed once for all batches belongs to them."""
        if self.is_last:
            self.took.append(Took(self._first, self._clock() - self.started[0], self._batches))


class Trained(Validated):
    """Trains nothing that is validated."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network)
        self.unused = nn.Parameter(torch.zeros(()))

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        """Return a loss."""
        return self.unused * 0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return one of the unused parameter."""
        return torch.optim.SGD([self.unused])


def alternating(
    network: nn.Module,
    batches: Iterable[object],
    pairs: int,
    is_compiled: bool,
    max_samples: int | None = None,
    accelerator: str = "cpu",
    clock: Clock = time.process_time,
) -> list[tuple[Took, Took]]:
    """Return what validations took with the monitor and without it, pair by pair.

    Args:
        network: the network; it is compiled here.
        batches: of a validation.
        pairs: how many count.
        is_compiled: whether to compile the network.
        max_samples: of the monitor.
        accelerator: of the Trainer.
        clock: returns seconds.
    """
    warnings.filterwarnings("ignore", module="lightning")
    skipped = 2 if is_compiled else 1  # pairs that do not count; in the second one a compiled network is split
    if is_compiled:
        network = torch.compile(network)  # `network.compile()` compiles each child of a bare `Sequential` by itself
    start = Stopwatch(clock)
    stop = Stopwatch(clock, start.started)
    trainer = L.Trainer(
        accelerator=accelerator,
        devices=1,
        max_epochs=2 * (skipped + pairs),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[start, FlatnessMonitor(strict=True, every_n_validations=2, max_samples=max_samples), stop],
    )
    trainer.fit(Trained(network), DataLoader(torch.zeros(1, 1)), DataLoader(list(batches), batch_size=None))
    return list(zip(stop.took[2 * skipped :: 2], stop.took[2 * skipped + 1 :: 2], strict=True))
