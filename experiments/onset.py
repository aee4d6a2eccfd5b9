"""What falls when generalization sets in? A training that fits its images long before it generalizes.

    python -m experiments.onset [--smoke] [--data NAME] [--jobs 2] [--seeds N]

As in Omnigrok (Liu et al., arXiv 2210.01117): a fully connected network on 1,000 images with its initial weights scaled
up, AdamW with weight decay. Relative flatness of the classifier, its factors, its scale-free value, and the product of
uncertainty, head and features that "Flatness is necessary, neural collapse is not" (arXiv 2509.17738) computes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pandas as pd
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from scipy.stats import spearmanr

from experiments.data import Images, split
from experiments.networks import network
from experiments.runs import Options, Row, completed, options
from experiments.training import Classifier, evaluated, fit, quiet_monitor

NAME = "onset"
DATA, SEEDS = "mnist5k", 3
TRAINING, VALIDATION, BATCH_SIZE = 1000, 500, 200
WIDTH, DEPTH = 64, 2
LEARNING_RATE = 1e-3
SCALES = {"usual": (1.0, 0.01), "delayed": (8.0, 1.0)}
"""Factor of the initial weights, and weight decay."""
STEPS, VALIDATIONS = 50, 40
KEYS = {
    "relative flatness": "flatness/relative",
    "scale-free flatness": "flatness/scale_free",
    "uncertainty": "flatness/confidence",
    "head": "flatness/head",
    "features": "flatness/features",
    "alignment": "flatness/alignment",
    "proxy": "proxy",
    "margin share": "flatness/margin_share",
}
FITTED = 0.99
"""Training accuracy at which a training has fitted its images."""


@dataclass(frozen=True)
class Task:
    """The configuration of one training."""

    data: str
    start: str
    seed: int
    validations: int = VALIDATIONS
    steps: int = STEPS


def tasks(smoke: bool = False, data: str | None = None, seeds: int | None = None) -> Iterator[Task]:
    """Yield the trainings."""
    if smoke:
        yield Task(data or "digits", "delayed", 0, validations=3, steps=5)
        return
    for seed in range(seeds or SEEDS):
        for start in SCALES:
            yield Task(data or DATA, start, seed)


class TrainingAccuracy(Callback):
    """Keeps the accuracy on the training images after each validation, in `values`."""

    def __init__(self, images: Images) -> None:
        self.images, self.values = images, list[float]()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate once more."""
        self.values.append(evaluated(pl_module, self.images)[1])


def run(task: Task) -> list[Row]:
    """Return a row for each validation; the keys are those on the training images."""
    data, (scale, decay) = split(task.data, TRAINING, VALIDATION, task.seed), SCALES[task.start]
    torch.manual_seed(task.seed)
    net = network("mlp", data.shape, data.classes, WIDTH, DEPTH)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter *= scale
    accuracy = TrainingAccuracy(data.training)
    monitor = quiet_monitor(method="classifier", data="train", name="")
    module = Classifier(net, "adamw", LEARNING_RATE, decay)
    fit(module, data, task.seed, task.validations, task.steps, BATCH_SIZE, [accuracy, monitor])
    curves = {**monitor.history.values, "training_accuracy": accuracy.values}
    return [
        {"step": (number + 1) * task.steps, **{key: series[number] for key, series in curves.items()}}
        for number in range(task.validations)
    ]


def record(chosen: Options) -> pd.DataFrame:
    """Return a row for each validation of each training."""
    return with_proxy(completed(__spec__.name, tasks(chosen.smoke, chosen.data, chosen.seeds), chosen))


def with_proxy(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows with the product of uncertainty, head and features."""
    return rows.assign(proxy=rows["flatness/confidence"] * rows["flatness/head"] * rows["flatness/features"])


def changes(rows: pd.DataFrame) -> pd.DataFrame:
    """Return what each training does from the validation in which it has fitted its images to its last one.

    Returns:
        A row for each training: the validation accuracy then and at the end, the factor by which each of `KEYS`
        changes, and (`rank ...`) Spearman's correlation of the key with the validation accuracy in between.
    """
    found = []
    for (data, start, seed), training in rows.groupby(["data", "start", "seed"]):
        after = training.sort_values("step")
        after = after[(after.training_accuracy >= FITTED).cummax()]
        if len(after) < 3:
            continue
        row = {"data": data, "start": start, "seed": seed, "fitted at step": after.step.iloc[0]}
        row["validation accuracy then"], row["at the end"] = after.val_accuracy.iloc[[0, -1]]
        for name, key in KEYS.items():
            row[name] = after[key].iloc[-1] / after[key].iloc[0]
            row[f"rank {name}"] = float(spearmanr(after[key], after.val_accuracy).statistic)
        found.append(row)
    return pd.DataFrame(found)


if __name__ == "__main__":
    print(changes(record(options(__doc__))).T.to_string())
