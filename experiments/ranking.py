"""Which key ranks networks by their generalization? Trains families of networks that differ in one hyperparameter.

    python -m experiments.ranking [--smoke] [--data NAME] [--jobs 2] [--seeds N]

Every key is measured on the training images when the training ends: at a training loss of 0.02, or after all steps. The
protocol is that of Dziugaite et al., "In search of robust measures of generalization" (arXiv 2010.11924).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations, product

import numpy as np
import pandas as pd
import torch
from lightning.pytorch.callbacks import EarlyStopping
from torch import nn

from experiments.data import Images, Split, split
from experiments.networks import network
from experiments.runs import Options, Row, completed, options
from experiments.statistics import Estimate, over_pairs, pearson, spearman
from experiments.training import Classifier, evaluated, fit, measured

NAME = "ranking"
DATA, SEEDS = ("digits", "mnist5k"), 1
FAMILIES = ("residual", "plain", "mobile", "dense")
TRAINING = 300
HUNDREDTH = {"digits": 18}
"""Number of images of the rival `validation_loss`: a hundredth of the data; 50 where nothing else is said."""
FEWEST = 5
"""Pairs or networks that a number rests on at least."""
SMALLEST = 50
"""Networks of a data set that a table is made of at least."""
FITTED_LOSS, FITTED_ACCURACY = 0.02, 0.99
STEPS, VALIDATIONS = 50, 14
"""Training steps before a validation, and validations at most."""
DRAWS, NOISE = 5, 0.1
"""Of the rival `perturbation`: the noise of a weight is this share of it."""
HYPERPARAMETERS = "network width depth weight_decay learning_rate batch_size augmentation label_noise".split()
KEYS = (
    *"relative trace scale_free confidence head kernel features alignment aceht margin_share".split(),
    *"mean q05 scale_free_margin softmax_mean skewness bound".split(),
)
RIVALS = ("training_loss", "validation_loss", "squared_norm", "path_norm", "perturbation")
HIGHER_IS_BETTER = ("mean", "q05", "scale_free_margin", "softmax_mean", "margin_share")
"""Of these a large value predicts a small error; of all others a small one."""


@dataclass(frozen=True)
class Task:
    """The configuration of one training."""

    data: str
    network: str = "residual"
    width: int = 8
    depth: int = 1
    weight_decay: float = 0.0
    learning_rate: float = 0.1
    batch_size: int = 32
    augmentation: bool = False
    label_noise: float = 0.0
    seed: int = 0
    validations: int = VALIDATIONS
    steps: int = STEPS


def tasks(smoke: bool = False, data: str | None = None, seeds: int | None = None) -> Iterator[Task]:
    """Yield all combinations of four hyperparameters, and for some of them the three others changed, one at a time."""
    if smoke:
        yield from (Task(data or "digits", "plain", width, validations=1, steps=5) for width in (4, 6, 8))
        return
    for seed, name in product(range(seeds or SEEDS), (data,) if data else DATA):
        for width, rate, decay, depth, family in product((8, 16), (0.1, 0.03), (0.0, 5e-3), (1, 2), FAMILIES):
            yield Task(name, family, width, depth, decay, rate, seed=seed)
        for family, width, decay in product(FAMILIES, (8, 16), (0.0, 5e-3)):
            task = Task(name, family, width, weight_decay=decay, seed=seed)
            for change in ({"batch_size": 128}, {"augmentation": True}, {"label_noise": 0.1}):
                yield replace(task, **change)


def run(task: Task) -> list[Row]:
    """Return the keys, the rivals and the errors of one trained network."""
    module, whole = trained(task)
    steps = module.global_step  # before `keys`, whose validation has another Trainer
    loss, accuracy = evaluated(module, whole.training)
    return [
        {
            "test_error": 1 - evaluated(module, whole.test)[1],
            "training_accuracy": accuracy,
            "steps_taken": steps,
            "parameters": sum(p.numel() for p in module.parameters()),
            **keys(module, whole.training),
            "training_loss": loss,
            "validation_loss": evaluated(module, whole.validation)[0],
            "squared_norm": float(sum(p.detach().square().sum() for p in module.parameters())),
            "path_norm": path_norm(module, whole.shape),
            "perturbation": perturbation(module, whole.training, task.seed),
        }
    ]


def trained(task: Task, pooled: bool = True) -> tuple[Classifier, Split]:
    """Return a network that has been trained, and its data.

    Args:
        task: the configuration.
        pooled: whether the network ends in a global average pooling.
    """
    whole = split(task.data, TRAINING, HUNDREDTH.get(task.data, 50), task.seed)
    whole.training.randomise_labels(task.label_noise, task.seed)
    torch.manual_seed(task.seed)
    net = network(task.network, whole.shape, whole.classes, task.width, task.depth, pooled)
    module = Classifier(net, "sgd_cosine", task.learning_rate, task.weight_decay, task.augmentation)
    # The training images stand in for the validation ones: their loss ends the training.
    on_training = Split(whole.training, whole.training, whole.test)
    stop = EarlyStopping("val_loss", patience=task.validations, stopping_threshold=FITTED_LOSS, check_finite=False)
    fit(module, on_training, task.seed, task.validations, task.steps, task.batch_size, [stop])
    return module, whole


def keys(module: Classifier, images: Images) -> Row:
    """Return the keys that are compared, on some images."""
    found = measured(module, images)
    return {key: found[full_name(key)] for key in KEYS if full_name(key) in found}


@torch.no_grad()
def path_norm(module: nn.Module, shape: tuple[int, int, int]) -> float:
    """Return the sum over all paths of the squared product of their weights; normalisation counts as its scale."""
    squared = copy.deepcopy(module).eval()
    for layer in squared.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.weight /= (layer.running_var + layer.eps).sqrt()
            layer.running_mean.zero_()
            layer.running_var.fill_(1 - layer.eps)
            layer.bias.zero_()
    for parameter in squared.parameters():
        parameter.square_()
    return float(squared(torch.ones(1, *shape)).sum())


@torch.no_grad()
def perturbation(module: nn.Module, images: Images, seed: int) -> float:
    """Return the mean increase of the training loss under noise in proportion to each weight."""
    generator, base, rises = torch.Generator().manual_seed(seed), evaluated(module, images)[0], []
    for _ in range(DRAWS):
        moved = copy.deepcopy(module)
        for p in moved.parameters():
            p += NOISE * p.abs() * torch.randn(p.shape, generator=generator)
        rises.append(evaluated(moved, images)[0] - base)
    return float(np.mean(rises))


def record(chosen: Options) -> pd.DataFrame:
    """Return a row for each trained network."""
    return completed(__spec__.name, tasks(chosen.smoke, chosen.data, chosen.seeds), chosen)


def predictors(rows: pd.DataFrame) -> pd.DataFrame:
    """Return keys and rivals such that a larger value predicts a larger error; logarithms where all are positive."""
    found = {}
    for key in (*KEYS, *RIVALS):
        values = rows[key].astype(float)
        if key in HIGHER_IS_BETTER:
            found[key] = -values
        else:
            found[key] = np.log(values) if (values > 0).all() else values
    return pd.DataFrame(found, index=rows.index)


def fitted(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the networks that have learnt their training images."""
    return rows[rows.training_accuracy >= FITTED_ACCURACY].reset_index(drop=True)


def pairs(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the pairs of rows that differ in one hyperparameter, and in their error by more than its standard error.

    Returns:
        A table with the positions `first` and `second` of both rows and the `hyperparameter`.
    """
    same = [*HYPERPARAMETERS, "data", "seed"]
    values, found = rows[same].to_numpy(dtype=object), []
    error = rows.test_error.to_numpy()
    tested = np.where(rows.data == "digits", 1797 - TRAINING - HUNDREDTH["digits"], 2000)
    noise = np.sqrt(2 * error * (1 - error) / tested)
    for one, other in combinations(range(len(rows)), 2):
        differs = np.flatnonzero(values[one] != values[other])
        is_one = len(differs) == 1 and differs[0] < len(HYPERPARAMETERS)
        if is_one and abs(error[one] - error[other]) > max(noise[one], noise[other]):
            found.append((one, other, HYPERPARAMETERS[differs[0]]))
    table = pd.DataFrame(found, columns=["first", "second", "hyperparameter"])
    return table.astype({"first": int, "second": int})


def sign_errors(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the table of `pairs`, with whether each key orders a pair wrongly: 1, 0, or a half if it says nothing."""
    chosen, scores = pairs(rows), predictors(rows)
    one, other = chosen["first"].to_numpy(), chosen["second"].to_numpy()
    truth = np.sign(rows.test_error.to_numpy()[one] - rows.test_error.to_numpy()[other])
    wrong = {
        key: (1 - truth * np.sign(scores[key].to_numpy()[one] - scores[key].to_numpy()[other])) / 2 for key in scores
    }
    return chosen.assign(**wrong)


def over_networks(wrong: pd.DataFrame, key: str) -> Estimate:
    """Return the sign error of a key over some rows of `sign_errors`, with its interval over the networks."""
    return over_pairs(wrong[key].to_numpy(), wrong["first"].to_numpy(), wrong["second"].to_numpy())


def full_name(key: str) -> str:
    """Return a key as the monitor logs it, and a rival in words."""
    if key in RIVALS:
        return key.replace("_", " ")
    if key in ("mean", "q05", "softmax_mean", "skewness", "bound", "scale_free_margin"):
        return f"margin/{key.removesuffix('_margin')}"
    return f"flatness/{key}"


def by_data(rows: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield the networks of each data set of which enough are there."""
    for data, group in rows.groupby("data"):
        if len(group) >= SMALLEST:
            yield str(data), group


def summary(rows: pd.DataFrame) -> dict[str, dict[str, Estimate | str]]:
    """Return by key: pooled correlations, and the mean and the worst sign error over the hyperparameters."""
    learnt = fitted(rows)
    everything, scores, wrong = predictors(rows), predictors(learnt), sign_errors(learnt)
    groups = {name: group for name, group in wrong.groupby("hyperparameter") if len(group) >= FEWEST}
    found: dict[str, dict[str, Estimate | str]] = {}
    for key in scores:
        by = {name: over_networks(group, key) for name, group in groups.items()}
        worst = max(by, key=lambda name: by[name].value, default="")
        found[key] = {
            "r, all": pearson(everything[key].to_numpy(), rows.test_error.to_numpy()),
            "r, fitted": pearson(scores[key].to_numpy(), learnt.test_error.to_numpy()),
            "Spearman, fitted": spearman(scores[key].to_numpy(), learnt.test_error.to_numpy()),
            "sign error": over_networks(wrong, key),
            "within a family": over_networks(wrong[wrong.hyperparameter != "network"], key),
            "worst": f"{by[worst]} ({worst})" if worst else "none",
            **by,
        }
    return found


if __name__ == "__main__":
    trained = record(options(__doc__))
    for data, group in by_data(trained):
        print(f"{data}: {len(group)} networks, {len(fitted(group))} fitted")
        print(pd.DataFrame(summary(group)).T.to_string())
