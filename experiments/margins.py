"""Do margins predict flatness? "On flat minima, large margins and generalizability" (submission to ICLR 2021).

    python -m experiments.margins [--smoke] [--data NAME] [--jobs 2] [--seeds N]

During a training, Pearson's r over samples between the exact Hessian trace of the whole network and the trace of its
classifier (ACEHT), the margin bound and the output margin; for correct and wrong samples apart, and without the
outliers that LocalOutlierFactor finds. Small and large batches take equally many steps.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np
import pandas as pd
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from scipy.stats import pearsonr
from sklearn.neighbors import LocalOutlierFactor
from torch import nn

from experiments.data import Images, split
from experiments.networks import network
from experiments.runs import Options, Row, completed, options
from experiments.training import Classifier, fit, quiet_monitor
from lightning_flatness import measure

NAME = "margins"
DATA, SEEDS = "mnist5k", 6
NETWORKS = {"logistic": 0, "lenet": 0, "mlp_norm": 64}
"""An affine predictor, the paper's LeNet-5, and its fully connected network with batch norm, with their widths."""
BATCH_SIZES = {"small": 16, "large": 128}
TRAINING, VALIDATION = 1000, 300
STEPS, VALIDATIONS = 40, 10
LEARNING_RATE = 0.02
MEASURED_AFTER = (1, 4, 10)
"""Validations after which the exact trace of the whole network is measured."""
NEIGHBOURS = 20
"""Of LocalOutlierFactor, its default."""
QUANTITIES = {"aceht": "affine_hessian_trace", "bound": "margin_bound", "margin": "output_margin"}


@dataclass(frozen=True)
class Task:
    """The configuration of one training."""

    data: str
    network: str
    batch: str
    seed: int
    validations: int = VALIDATIONS
    steps: int = STEPS


class Copies(Callback):
    """Keeps a copy of the network after some validations.

    Attributes:
        networks: by the number of validations.
    """

    def __init__(self, after: tuple[int, ...]) -> None:
        self.after, self.networks = after, dict[int, nn.Module]()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Copy when it is time."""
        if trainer.current_epoch + 1 in self.after:
            self.networks[trainer.current_epoch + 1] = copy.deepcopy(pl_module.network)


def tasks(smoke: bool = False, data: str | None = None, seeds: int | None = None) -> Iterator[Task]:
    """Yield the trainings."""
    if smoke:
        yield Task(data or "digits", "lenet", "small", 0, validations=4, steps=8)
        return
    for seed, name, batch in product(range(seeds or SEEDS), NETWORKS, BATCH_SIZES):
        yield Task(data or DATA, name, batch, seed)


def run(task: Task) -> list[Row]:
    """Return a row for each validation; correlations where the whole network was measured."""
    data = split(task.data, TRAINING, VALIDATION, task.seed)
    torch.manual_seed(task.seed)
    net = network(task.network, data.shape, data.classes, NETWORKS[task.network])
    module, copies = Classifier(net, "sgd", LEARNING_RATE, 0.0), Copies(MEASURED_AFTER)
    monitor = quiet_monitor(method="classifier")
    fit(module, data, task.seed, task.validations, task.steps, BATCH_SIZES[task.batch], [copies, monitor])
    curves, rows = monitor.history.values, list[Row]()
    for number in range(task.validations):
        row = {"validation": number + 1, **{key: values[number] for key, values in curves.items()}}
        if number + 1 in copies.networks:
            row |= correlations(copies.networks[number + 1], data.validation)
        rows.append(row)
    return sorted(rows, key=len, reverse=True)


def correlations(net: nn.Module, images: Images) -> dict[str, float]:
    """Return the mean trace of the whole network, and its correlations over samples."""
    batches, kept = [(images.images, images.labels)], {"per_sample": True, "loss": "cross_entropy"}
    whole = measure(net, batches, method="jacobian", layer="all", **kept).samples["network_trace"].numpy()
    own = measure(net, batches, method="classifier", **kept).samples
    right = own["output_margin"].numpy() > 0
    found = {"network_trace": float(whole.mean()), "wrong": int((~right).sum())}
    for name, quantity in QUANTITIES.items():
        other = own[quantity].numpy()
        for kind, chosen in (("correct", right), ("wrong", ~right)):
            pair = np.stack((whole[chosen], other[chosen]), 1).astype(float)
            found[f"r_{name}_{kind}"] = correlation(pair)
            found[f"r_{name}_{kind}_inliers"] = correlation(pair[inliers(pair)])
    return found


def inliers(pairs: np.ndarray) -> np.ndarray:
    """Return which pairs LocalOutlierFactor keeps; each quantity is divided by its standard deviation before."""
    if len(pairs) <= NEIGHBOURS:
        return np.ones(len(pairs), dtype=bool)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # samples that are equal
        return LocalOutlierFactor(NEIGHBOURS).fit_predict(pairs / np.maximum(pairs.std(0), 1e-12)) > 0


def correlation(pairs: np.ndarray) -> float:
    """Return Pearson's r; NaN for fewer than ten pairs, or where a quantity is constant."""
    return float(pearsonr(*pairs.T).statistic) if len(pairs) >= 10 and (pairs.std(0) > 0).all() else np.nan


def record(chosen: Options) -> pd.DataFrame:
    """Return a row for each validation of each training."""
    return completed(__spec__.name, tasks(chosen.smoke, chosen.data, chosen.seeds), chosen)


if __name__ == "__main__":
    rows = record(options(__doc__))
    print(rows.dropna(subset="network_trace").groupby(["network", "batch", "validation"]).mean(numeric_only=True).T)
