"""Does acting help? Trainings of `experiments.alerts` to their end, with and without actions.

    python -m experiments.acting [--smoke] [--data NAME] [--jobs 2] [--seeds N]

The actions are those of the built-in rules; beside them stand their counterparts on `val_loss`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import pandas as pd
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping
from torch.optim.lr_scheduler import ReduceLROnPlateau

from experiments.alerts import CHANGES, OPTIMIZERS, TRAINING, VALIDATION, WEIGHT_DECAY, Disturbance
from experiments.data import split
from experiments.networks import network
from experiments.runs import Options, Row, completed, options
from experiments.statistics import mean
from experiments.training import Classifier, evaluated, fit, quiet_monitor
from lightning_flatness import ReduceLR, StopTraining, rules

NAME = "acting"
DATA, SEEDS = "mnist5k", 6
"""Not the data set that the rules were tuned on."""
NETWORKS, KINDS = ("residual", "plain"), ("healthy", "labels_30", "rate_x10")
ACTIONS = ("none", "stop", "reduce", "early_stopping", "plateau")
"""Nothing; the built-in rules with `StopTraining` and with `ReduceLR`; their counterparts on `val_loss`."""
VALIDATIONS, DISTURBED_AT, STEPS, BATCH_SIZE = 30, 16, 15, 64
PATIENCE = 5
"""Of `EarlyStopping` and `ReduceLROnPlateau`."""


@dataclass(frozen=True)
class Task:
    """The configuration of one training."""

    data: str
    network: str
    kind: str
    action: str
    seed: int
    validations: int = VALIDATIONS
    disturbed_at: int = DISTURBED_AT
    steps: int = STEPS


class OnPlateau(Classifier):
    """A classifier whose learning rate is cut tenfold when `val_loss` no longer falls."""

    def configure_optimizers(self) -> Any:
        """Return the same optimizer with another schedule."""
        optimizer = super().configure_optimizers()["optimizer"]
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": ReduceLROnPlateau(optimizer, patience=PATIENCE), "monitor": "val_loss"},
        }


def tasks(smoke: bool = False, data: str | None = None, seeds: int | None = None) -> Iterator[Task]:
    """Yield the trainings."""
    if smoke:
        for action in ("none", "reduce", "plateau"):
            yield Task(data or DATA, "plain", "rate_x10", action, 0, validations=4, disturbed_at=2, steps=2)
        return
    for seed, name, kind, action in product(range(seeds or SEEDS), NETWORKS, KINDS, ACTIONS):
        yield Task(data or DATA, name, kind, action, seed)


def run(task: Task) -> list[Row]:
    """Return the test accuracy at the end, and when the training was stopped or its learning rate first cut."""
    data = split(task.data, TRAINING, VALIDATION, task.seed)
    torch.manual_seed(task.seed)
    net, make = network(task.network, data.shape, data.classes, depth=2), Classifier
    action = {"stop": StopTraining(), "reduce": ReduceLR()}.get(task.action)
    monitor = quiet_monitor(rules=rules.default(action) if action else ())
    callbacks: list[Callback] = [monitor]
    if task.kind in CHANGES:
        callbacks.append(Disturbance(task.kind, task.disturbed_at, task.seed))
    if task.action == "early_stopping":
        callbacks.append(EarlyStopping("val_loss", patience=PATIENCE, check_finite=False))
    if task.action == "plateau":
        make = OnPlateau
    module = make(net, "sgd", OPTIMIZERS["sgd"], WEIGHT_DECAY, augmentation=True)
    fit(module, data, task.seed, task.validations, task.steps, BATCH_SIZE, callbacks)
    loss, accuracy = evaluated(module, data.test)
    return [
        {
            "test_accuracy": accuracy,
            "test_loss": loss,
            "validations_run": len(monitor.history),
            "alerts": len(monitor.alerts),
            "final_rate": module.optimizers().param_groups[0]["lr"],
        }
    ]


def record(chosen: Options) -> pd.DataFrame:
    """Return a row for each training."""
    return completed(__spec__.name, tasks(chosen.smoke, chosen.data, chosen.seeds), chosen)


def with_gains(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the trainings beside the same ones without an action.

    Returns:
        With two more columns: `gain` of test accuracy, and `acted`: whether it ended earlier or with a smaller rate.
    """
    same = ["data", "network", "kind", "seed"]
    without = rows[rows.action == "none"].set_index(same)[["test_accuracy", "final_rate"]]
    both = rows.join(without, on=same, rsuffix="_without")
    is_cut = both.final_rate < both.final_rate_without * 0.99
    acted = (both.validations_run < both.validations) | is_cut
    return both.assign(gain=both.test_accuracy - both.test_accuracy_without, acted=acted)


def gains(rows: pd.DataFrame) -> pd.DataFrame:
    """Return, by kind and action, the mean test accuracy, its gain over no action, and the validations run."""
    found = [
        {
            "kind": kind,
            "action": action,
            "test accuracy": mean(group.test_accuracy.to_numpy()),
            "gain": mean(group.gain.dropna().to_numpy()),
            "validations": group.validations_run.mean(),
            "acted": f"{group.acted.sum()}/{len(group)}",
        }
        for (kind, action), group in with_gains(rows).groupby(["kind", "action"], sort=False)
    ]
    return pd.DataFrame(found)


if __name__ == "__main__":
    print(gains(record(options(__doc__))).to_string())
