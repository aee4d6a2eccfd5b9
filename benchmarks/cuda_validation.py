"""What the monitor costs on a CUDA device, eager and compiled: whole validations of a Trainer."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from statistics import median
from typing import NamedTuple

import lightning as L
import networks
import torch
from sizes import Trained
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_flatness import FlatnessMonitor

BATCH, BATCHES, PAIRS = 64, 20, 7
NETWORKS = networks.resnet18, networks.resnet50, networks.mobilenet_v2


class Took(NamedTuple):
    """What one validation took, in seconds."""

    first: float
    whole: float

    @property
    def later(self) -> float:
        """Each batch after the first one; what is done at the end of the validation is spread over them."""
        return (self.whole - self.first) / (BATCHES - 1)


class Stopwatch(L.Callback):
    """Times validations: the first of the callbacks starts, the last stops; amid them the device is not waited for."""

    def __init__(self, started: list[float] | None = None) -> None:
        self.started = [0.0] if started is None else started
        self.is_last = started is not None
        self.took: list[Took] = []
        self._first = 0.0

    def on_validation_epoch_start(self, *_: object) -> None:
        """Start; what the monitor does before the first batch belongs to it."""
        if not self.is_last:
            self.started[0] = _now()

    def on_validation_batch_end(self, *arguments: object) -> None:
        """Note the end of the first batch."""
        if self.is_last and arguments[4] == 0:
            self._first = _now() - self.started[0]

    def on_validation_end(self, *_: object) -> None:
        """Stop."""
        if self.is_last:
            self.took.append(Took(self._first, _now() - self.started[0]))


def _now() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


def timed(build: Callable[[int], nn.Module], is_compiled: bool) -> tuple[list[Took], list[Took]]:
    """Return what validations took with the monitor and without it, in one training where every other one has it."""
    warnings.filterwarnings("ignore", module="lightning")
    network = networks.lively(build(10))
    skipped = 2 if is_compiled else 1  # pairs that do not count; in the second one a compiled network is split
    network = torch.compile(network) if is_compiled else network
    first = Stopwatch()
    last = Stopwatch(first.started)
    trainer = L.Trainer(
        accelerator="gpu",
        devices=1,
        max_epochs=2 * (skipped + PAIRS),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[first, FlatnessMonitor(strict=True, every_n_validations=2), last],
    )
    trainer.fit(Trained(network), DataLoader(torch.zeros(1, 1)), batches())
    return last.took[2 * skipped :: 2], last.took[2 * skipped + 1 :: 2]


def batches() -> DataLoader[tuple[Tensor, Tensor]]:
    """Return seeded noise that is on the device already: the time to get it there would hide the monitor's."""
    generator = torch.Generator("cuda").manual_seed(0)
    images = torch.randn(BATCH, 3, 224, 224, device="cuda", generator=generator)
    labels = torch.randint(10, (BATCH,), device="cuda", generator=generator)
    return DataLoader([(images, labels)] * BATCHES, batch_size=None)


def rows() -> Iterator[tuple[str, ...]]:
    """Yield a row for each network and mode."""
    yield (
        "network, 224 x 224, batch 64",
        "",
        "a batch, ms",
        "with the monitor, ms",
        "ratio",
        "first batch",
        "validation",
    )
    if not torch.cuda.is_available():
        yield "no CUDA device where this page was made", *[""] * 6
        return
    for build in NETWORKS:
        for is_compiled in (False, True):
            pairs = list(zip(*timed(build, is_compiled), strict=True))
            alone, both = (median(pair[side].later for pair in pairs) * 1e3 for side in (1, 0))
            ratios = [
                median(getattr(own, part) / getattr(plain, part) for own, plain in pairs)
                for part in ("later", "first", "whole")
            ]
            mode = "compiled" if is_compiled else "eager"
            yield build.__name__, mode, f"{alone:.2f}", f"{both:.2f}", *(f"{each:.2f}" for each in ratios)
