"""Does flatness choose networks, checkpoints and trials? Random trials, measured on their training images.

    python -m experiments.choosing [--smoke] [--data NAME] [--jobs 2] [--seeds N]

A *search* is the trials with the same data, labels and seed. Which checkpoint of a training and which trials of a
search a key chooses follows from the recorded curves. Networks are chosen among those of `experiments.ranking`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from experiments.data import Images, Split, split
from experiments.networks import network
from experiments.ranking import FAMILIES, fitted, full_name, predictors
from experiments.runs import Options, Row, completed, options
from experiments.statistics import Estimate, mean, over_members
from experiments.training import Classifier, evaluated, fit, quiet_monitor

NAME = "choosing"
DATA, SEEDS = ("digits", "mnist5k"), 6
WRONG_LABELS = (0.0, 0.3)
"""Shares of the training labels that are random."""
TRIALS, VALIDATIONS, STEPS = 8, 16, 75
"""Trials of a search, and validations of a trial with the training steps before each."""
TRAINING, VALIDATION = 300, 100
TOLERANCE = 0.005
"""Of `FlattestCheckpoint` on the training accuracy."""
CHUNK = 50
"""Images whose gradients are computed together."""
RUNGS = (2, 4, 8)
"""Validations after which the worse half of the trials is pruned."""
SIGNS = {
    "flatness/relative": 1,
    "flatness/trace": 1,
    "flatness/scale_free": 1,
    "flatness/confidence": 1,
    "margin/mean": -1,
    "margin/scale_free": -1,
    "training_loss": 1,
    "information_criterion": 1,
    "val_loss": 1,
}
"""The keys that choose; of those with -1 a large value is chosen."""
EVALUATED = ("training_loss", "information_criterion")
"""Those of them that the monitor does not measure."""
OUT_OF = 10
"""Random networks of `experiments.ranking` that one is chosen out of."""
CHOOSE_NETWORKS = (
    *"relative trace scale_free confidence mean scale_free_margin margin_share".split(),
    *"training_loss squared_norm path_norm perturbation validation_loss".split(),
)
"""The columns of `experiments.ranking` that choose."""
SEARCH = ["data", "wrong_labels", "seed"]


@dataclass(frozen=True)
class Task:
    """The configuration of one trial; its hyperparameters follow from its number and the seed."""

    data: str
    wrong_labels: float
    trial: int
    seed: int
    validations: int = VALIDATIONS
    steps: int = STEPS


class Evaluation(Callback):
    """Keeps, after each validation, what is known of the training images, and the test error."""

    def __init__(self, data: Split) -> None:
        self.data, self.values = data, list[Row]()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate once more."""
        loss, accuracy = evaluated(pl_module, self.data.training)
        error = 1 - evaluated(pl_module, self.data.test)[1]
        criterion = information_criterion(pl_module, self.data.training)
        names = "test_error", "training_loss", "training_accuracy", "information_criterion"
        self.values.append(dict(zip(names, (error, loss, accuracy, criterion), strict=True)))


def information_criterion(module: nn.Module, images: Images) -> float:
    """Return Takeuchi's information criterion, with the traces of its matrices in place of the matrices.

    It is `loss + tr(C) / (n tr(F))` (nats), where `C` is the second moment of the gradients of the samples' losses and
    `F` the Gauss-Newton matrix of the loss, both over all parameters; `tr(F^-1 C) / n` is what the criterion adds.

    Args:
        module: maps images to logits, in eval mode.
        images: the training images with their labels.
    """
    parameters = {name: each.detach() for name, each in module.named_parameters()}

    def losses(parameters: dict[str, Tensor], image: Tensor) -> Tensor:
        return -functional_call(module, parameters, (image[None],))[0].log_softmax(0)

    def norms(image: Tensor, label: Tensor) -> Tensor:
        jacobian = jacrev(losses)(parameters, image).values()  # what the loss would be with each label
        squares = sum(each.flatten(1).square().sum(1) for each in jacobian)
        values = losses(parameters, image)
        return torch.stack([values[label], squares[label], squares @ torch.exp(-values)])

    with torch.inference_mode(False):
        loss, covariance, gauss_newton = vmap(norms, chunk_size=CHUNK)(images.images, images.labels).mean(0)
    return float(loss + covariance / (len(images) * gauss_newton))


def tasks(smoke: bool = False, data: str | None = None, seeds: int | None = None) -> Iterator[Task]:
    """Yield the trials, search by search."""
    if smoke:
        yield from (Task(data or "digits", 0.0, trial, 0, validations=3, steps=4) for trial in range(2))
        return
    names = (data,) if data else DATA
    for seed, name, wrong, trial in product(range(seeds or SEEDS), names, WRONG_LABELS, range(TRIALS)):
        yield Task(name, wrong, trial, seed)


def hyperparameters(task: Task) -> dict[str, Any]:
    """Return the random hyperparameters of a trial; they are the same with and without wrong labels."""
    draw = random.Random(f"{task.data} {task.trial} {task.seed}")
    return {
        "network": draw.choice(FAMILIES),
        "width": draw.choice((6, 8, 12)),
        "depth": draw.choice((1, 2)),
        "learning_rate": 10 ** draw.uniform(-2.5, -0.5),
        "weight_decay": 10 ** draw.uniform(-5, -2),
        "batch_size": draw.choice((16, 32, 64)),
    }


def run(task: Task) -> list[Row]:
    """Return a row for each validation of a trial; the keys are those on the training images."""
    data, chosen = split(task.data, TRAINING, VALIDATION, task.seed), hyperparameters(task)
    data.training.randomise_labels(task.wrong_labels, task.seed)
    torch.manual_seed(task.seed)
    net = network(chosen["network"], data.shape, data.classes, chosen["width"], chosen["depth"])
    module = Classifier(net, "sgd_cosine", chosen["learning_rate"], chosen["weight_decay"])
    evaluation, monitor = Evaluation(data), quiet_monitor(data="train", name="")
    fit(module, data, task.seed, task.validations, task.steps, chosen["batch_size"], [evaluation, monitor])
    curves = monitor.history.values
    return [
        {**chosen, "validation": number, **evaluation.values[number], **_row(curves, number)}
        for number in range(task.validations)
    ]


def _row(curves: Any, number: int) -> Row:
    keys = [*(key for key in SIGNS if key not in EVALUATED), "val_accuracy"]
    return {key: curves[key][number] for key in keys}


def record(chosen: Options) -> pd.DataFrame:
    """Return a row for each validation of each trial."""
    return completed(__spec__.name, tasks(chosen.smoke, chosen.data, chosen.seeds), chosen)


def trials(rows: pd.DataFrame) -> Iterator[tuple[str, list[pd.DataFrame]]]:
    """Yield the complete searches: what they have in common but the seed, and the curves of their trials."""
    for (data, wrong, _), search in rows.groupby(SEARCH, sort=False):
        curves = [curve.sort_values("validation") for _, curve in search.groupby("trial")]
        if len(curves) >= (TRIALS if int(search.validations.iloc[0]) == VALIDATIONS else 1):
            yield f"{data}, {wrong:.0%} wrong labels", curves


def checkpoints(curve: pd.DataFrame) -> dict[str, float]:
    """Return the test error of the checkpoint of one training that each rule keeps.

    `training accuracy, then ...` is `FlattestCheckpoint` without a validation image, `val_accuracy, then ...` with the
    noise of the best validation accuracy as its tolerance.
    """
    error = curve.test_error.to_numpy()
    found = {"the best": error.min(), "any (mean)": error.mean(), "the last": error[-1]}
    for key in (*EVALUATED, "val_loss"):
        found[_words(key)] = error[curve[key].to_numpy().argmin()]
    found["val_accuracy"] = error[curve.val_accuracy.to_numpy().argmax()]
    best = curve.val_accuracy.max()
    tolerances = {"training_accuracy": TOLERANCE, "val_accuracy": math.sqrt(best * (1 - best) / VALIDATION)}
    for metric, tolerance in tolerances.items():
        is_candidate = (curve[metric] >= curve[metric].max() - tolerance).to_numpy()
        for key, sign in SIGNS.items():
            if "/" in key:
                scores = np.where(is_candidate, sign * curve[key].to_numpy(), np.inf)
                found[f"{_words(metric)}, then {key}"] = error[scores.argmin()]
    return {name: float(value) for name, value in found.items()}


def pruned(curves: Sequence[pd.DataFrame]) -> dict[str, float]:
    """Return the test error at the end of the trial that each key chooses by successive halving.

    After each of `RUNGS` the better half of the trials goes on, so all keys train equally long; at the end the key
    chooses again. A value that is not finite is the worst.
    """
    ends = [float(curve.test_error.iloc[-1]) for curve in curves]
    found = {"the best": min(ends), "any (mean)": float(np.mean(ends))}
    for key, sign in SIGNS.items():
        left = list(range(len(curves)))
        for rung in (*(rung for rung in RUNGS if rung < len(curves[0])), len(curves[0])):
            scores = {trial: sign * float(curves[trial][key].iloc[rung - 1]) for trial in left}
            ordered = sorted(left, key=lambda trial: scores[trial] if math.isfinite(scores[trial]) else math.inf)
            left = ordered[: math.ceil(len(left) / 2)]
        found[_words(key)] = ends[left[0]]
    return found


def _words(key: str) -> str:
    return key.replace("training_", "training ").replace("information_", "information ")


def errors(rows: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the test errors of the chosen checkpoints and of the chosen trials, a row for each search.

    The row of a search has the means over its trainings: they share images and labels, so the searches are what
    intervals are made of.
    """
    kept, chosen = [], []
    for kind, curves in trials(rows):
        kept.append({"kind": kind, **pd.DataFrame([checkpoints(curve) for curve in curves]).mean()})
        chosen.append({"kind": kind, **pruned(curves)})
    return pd.DataFrame(kept), pd.DataFrame(chosen)


def table(found: pd.DataFrame, reference: str) -> pd.DataFrame:
    """Return mean test errors over the searches, of all and of each kind, and the difference to a reference.

    Args:
        found: one of the tables of `errors`.
        reference: the column that each is compared with, search by search.
    """
    rows: dict[str, dict[str, Estimate | float]] = {}
    for name in found.columns.drop("kind"):
        rows[name] = {
            "test error": mean(found[name].to_numpy()),
            f"less {reference}": mean((found[name] - found[reference]).to_numpy()),
            **{str(kind): float(group[name].mean()) for kind, group in found.groupby("kind")},
        }
    return pd.DataFrame(rows).T.rename_axis("chosen by")


def networks(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the mean test error of the network that each key chooses out of a few random ones that are fitted.

    Args:
        rows: of `experiments.ranking`, of one data set.

    Returns:
        A row for each key, with intervals over the networks; empty if there are too few.
    """
    learnt = fitted(rows)
    if len(learnt) <= OUT_OF:
        return pd.DataFrame()
    scores, error = predictors(learnt), learnt.test_error.to_numpy()
    by = {"the best": error, **{full_name(key): scores[key].to_numpy() for key in CHOOSE_NETWORKS}}
    names = [*by, "any (mean)"]

    def errors(drawn: np.ndarray) -> np.ndarray:
        found = [expected(values[drawn], error[drawn]) for values in by.values()]
        found = np.array([*found, error[drawn].mean()])
        return np.concatenate([found, found - found[names.index("training loss")]])

    estimates = over_members(errors, len(learnt))
    columns = {"test error": estimates[: len(names)], "less training loss": estimates[len(names) :]}
    return pd.DataFrame(columns, index=pd.Index(names, name="chosen by"))


def expected(scores: np.ndarray, errors: np.ndarray) -> float:
    """Return the mean error of the one with the smallest score out of `OUT_OF`, over all choices of so many."""
    n = len(scores)
    # The one with rank r is the smallest of those in which all others rank behind it.
    weights = [math.comb(n - 1 - rank, OUT_OF - 1) / math.comb(n, OUT_OF) for rank in range(n)]
    return float(errors[np.argsort(scores, kind="stable")] @ np.array(weights))


if __name__ == "__main__":
    kept, chosen = errors(record(options(__doc__)))
    print(table(kept, "training loss").to_string())
    print(table(chosen, "val_loss").to_string())
