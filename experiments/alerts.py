"""Do the alerts work? Records trainings with a disturbance at a known validation, and healthy ones.

    python -m experiments.alerts [--smoke] [--data NAME] [--jobs 2] [--seeds N]

`experiments.detection` judges rules and other detectors on the recorded curves.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from experiments.data import split
from experiments.layer_traces import KEYS as LAYER_TRACES
from experiments.layer_traces import LayerTraces
from experiments.networks import network
from experiments.runs import Options, Row, completed, options
from experiments.training import Classifier, fit, quiet_monitor

NAME = "alerts"
GROUP = ["data", "network", "optimizer", "validations", "steps", "seed"]
"""Columns that identify a group of runs."""
DATA, SEEDS = ("digits", "mnist5k"), 4
"""Data sets, and seeds of each; no seed serves both of them."""
NETWORKS = ("residual", "plain", "unnormalised")
OPTIMIZERS = {"sgd": 0.05, "sgd_cosine": 0.05, "sgd_restarts": 0.05, "adamw_onecycle": 0.01}
"""Settings with their learning rates."""
UNNORMALISED_RATE = 0.5
"""Factor of the learning rate of the network without normalisation."""
WEIGHT_DECAY = 5e-4
CHANGES = (
    "labels_5 labels_10 labels_30 rate_x2 rate_x3 rate_x10 no_augmentation no_weight_decay corrupted_inputs".split()
)
"""What is done at a known validation; the number behind the name says how much of it."""
UNDISTURBED = ("healthy", "slow")
KINDS = (*UNDISTURBED, *CHANGES, "memorisation")
WRONG_LABELS = 0.3
"""Share of the labels that are random from the start in `memorisation`."""
SLOW = 10
"""`slow` has the learning rate divided by this."""
NOISE = 1.0
"""Standard deviation of the noise of `corrupted_inputs`, in that of the training pixels."""
LENGTHS = {24: 15, 40: 14, 100: 8, 200: 5}
"""Validations of a run, and training steps before each."""
DISTURBED_AT, AFTER = 0.6, 5
"""Share of the validations of a run before its disturbance, and the number of those after it."""
TRAINING, VALIDATION, BATCH_SIZE = 1000, 200, 64
"""Numbers of images; as many training images as validation images are measured."""
ON_TRAINING = tuple(
    f"{key}/train"
    for key in (
        *"flatness/relative flatness/trace flatness/scale_free flatness/confidence flatness/features".split(),
        *"margin/mean margin/q05 margin/negative margin/scale_free".split(),
    )
)
"""Keys that are recorded on training images as well."""


@dataclass(frozen=True)
class Task:
    """The configuration of the runs of all kinds; those with a change are one run until then."""

    data: str
    network: str
    optimizer: str
    validations: int
    steps: int
    seed: int

    @property
    def disturbed_at(self) -> int:
        """Number of validations before the disturbance."""
        return round(DISTURBED_AT * self.validations)


class Disturbance(Callback):
    """Changes the training after a number of validations, and may end it some validations later.

    Args:
        kind: one of `CHANGES`.
        after: the number of validations.
        seed: of what is random about it.
        remaining: the number of validations until the end; None: the training goes on.
    """

    def __init__(self, kind: str, after: int, seed: int, remaining: int | None = None) -> None:
        self.kind, self.after, self.seed, self.remaining = kind, after, seed, remaining

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Disturb when it is time: a validation ends each epoch."""
        if trainer.current_epoch != self.after:
            return
        what, _, amount = self.kind.rpartition("_")
        images = trainer.train_dataloader.dataset
        if what == "labels":
            images.randomise_labels(int(amount) / 100, self.seed)
        elif what == "rate":
            scale_learning_rate(trainer, float(amount[1:]))
        elif self.kind == "no_augmentation":
            pl_module.augmentation = False
        elif self.kind == "no_weight_decay":
            trainer.optimizers[0].param_groups[0]["weight_decay"] = 0.0
        else:
            images.add_noise(NOISE, self.seed)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the training when enough has been seen."""
        if self.remaining is not None and trainer.current_epoch + 1 >= self.after + self.remaining:
            trainer.should_stop = True


class Progress(Callback):
    """Keeps what a Trainer knows after each validation, in `values`.

    That is the learning rate, and the mean training loss of the batches since the validation before.
    """

    def __init__(self) -> None:
        self.values, self._losses = list[Row](), list[float]()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        """Keep the loss of a batch."""
        self._losses.append(float(outputs["loss"]))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep both."""
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        self.values.append({"learning_rate": rate, "training_loss": fmean(self._losses)})
        self._losses.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed training needs."""
        return {"values": list(self.values)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the checkpoint was saved."""
        self.values = state_dict["values"]


class Fork(Callback):
    """Saves a checkpoint after a number of validations.

    Args:
        after: the number of validations.
        path: the file.
    """

    def __init__(self, after: int, path: Path) -> None:
        self.after, self.path = after, path

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save when it is time; at the start of an epoch Lightning's loops would skip it after a resume."""
        if trainer.current_epoch + 1 == self.after:
            trainer.save_checkpoint(self.path)


def scale_learning_rate(trainer: Trainer, factor: float) -> None:
    """Multiply the learning rate and the rest of its schedule."""
    scheduler = trainer.lr_scheduler_configs[0].scheduler
    if hasattr(scheduler, "base_lrs"):  # `ReduceLROnPlateau` computes from the present rate
        scheduler.base_lrs = [factor * rate for rate in scheduler.base_lrs]
    for group in trainer.optimizers[0].param_groups:
        group.update({name: factor * group[name] for name in ("lr", "initial_lr", "max_lr", "min_lr") if name in group})


def tasks(smoke: bool = False, data: str | None = None, seeds: int | None = None) -> Iterator[Task]:
    """Yield the groups of runs, in rounds of a seed on each data set.

    The groups of a round come in a random order: a part of them is a sample of all.
    """
    if smoke:
        yield Task(data or "digits", "plain", "sgd_cosine", validations=8, steps=2, seed=0)
        return
    names, seeds, settings = (data,) if data else DATA, seeds or SEEDS, list(product(NETWORKS, OPTIMIZERS))
    for first in range(seeds):
        orders = [random.Random(f"{name} {first}").sample(settings, len(settings)) for name in names]
        for number, round_ in enumerate(zip(*orders, strict=True)):
            length = {5: 100, 11: 200}.get(number, 40 if number % 4 == 3 else 24)
            for shift, (name, (net, optimizer)) in enumerate(zip(names, round_, strict=True)):
                yield Task(name, net, optimizer, length, LENGTHS[length], first * len(names) + shift)


def run(task: Task) -> list[Row]:
    """Return the curves of the runs of all kinds, a row for each validation; a fork has no row of what is before it."""
    with TemporaryDirectory() as folder:
        fork = Path(folder) / "fork.ckpt"
        rows = curve(task, "healthy", Fork(task.disturbed_at, fork))
        rows += [row for kind in ("slow", "memorisation") for row in curve(task, kind)]
        for kind in CHANGES:
            forked = curve(task, kind, Disturbance(kind, task.disturbed_at, task.seed, AFTER), checkpoint=fork)
            rows += forked[task.disturbed_at :]
    return rows


def curve(task: Task, kind: str, *callbacks: Callback, checkpoint: Path | None = None) -> list[Row]:
    """Return the values of all validations of one run."""
    data = split(task.data, TRAINING, VALIDATION, task.seed)
    if kind == "memorisation":
        data.training.randomise_labels(WRONG_LABELS, task.seed)
    torch.manual_seed(task.seed)
    rate = OPTIMIZERS[task.optimizer] / (SLOW if kind == "slow" else 1)
    rate *= UNNORMALISED_RATE if task.network == "unnormalised" else 1
    net = network(task.network, data.shape, data.classes, depth=2)
    module = Classifier(net, task.optimizer, rate, WEIGHT_DECAY, augmentation=True)
    monitor, on_training = quiet_monitor(), quiet_monitor(data="train", max_samples=VALIDATION)
    progress, traces = Progress(), LayerTraces(data.training, task.seed)
    callbacks = (*callbacks, monitor, on_training, progress, traces)
    fit(module, data, task.seed, task.validations, task.steps, BATCH_SIZE, callbacks, checkpoint)
    curves = monitor.history.values
    return [
        {
            "kind": kind,
            "validation": number,
            **{key: series[number] for key, series in curves.items()},
            **{key: on_training.history.values[key][number] for key in ON_TRAINING},
            **progress.values[number],
            **dict.fromkeys(LAYER_TRACES),
            **traces.values[number],
        }
        for number in range(len(monitor.history))
    ]


def record(chosen: Options) -> pd.DataFrame:
    """Return the curves of all runs, as a table with a row for each validation."""
    return completed(__spec__.name, tasks(chosen.smoke, chosen.data, chosen.seeds), chosen, ".csv.gz")


if __name__ == "__main__":
    curves = record(options(__doc__))
    print(f"{len(curves)} validations of {curves.groupby([*GROUP, 'kind']).ngroups} runs")
