"""What the ranking rests on: without the pooling, width against depth at equal parameters, and after a rescaling.

    python -m experiments.ablation [--smoke] [--data NAME] [--jobs 2] [--seeds N]

The networks, the training and the protocol are those of `experiments.ranking`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise, product

import numpy as np
import pandas as pd
import torch
from torch import nn

from experiments import ranking
from experiments.ranking import FAMILIES, KEYS
from experiments.runs import Options, Row, completed, options
from experiments.statistics import Estimate, bootstrapped
from experiments.training import evaluated

NAME = "ablation"
DATA, SEEDS = "digits", 1
SHAPES = ((16, 1), (11, 2), (8, 4))
"""Widths and depths with about as many parameters: those of a block grow with the square of the width."""
EQUAL, RESCALED = "width against depth", "factor of a rescaling"
"""Names of a comparison, and of the median factor by which a rescaling moves a key."""
SPREAD = 1.0
"""Standard deviation of the logarithm of a factor of the rescaling."""
HOMOGENEOUS = nn.ReLU, nn.AdaptiveAvgPool2d, nn.Flatten
"""Layers that hand a positive factor on."""


@dataclass(frozen=True)
class Task(ranking.Task):
    """The configuration of one training."""

    pooled: bool = True


def tasks(smoke: bool = False, data: str | None = None, seeds: int | None = None) -> Iterator[Task]:
    """Yield networks of two widths with and without pooling, and of equal size with it."""
    if smoke:
        yield from (Task(data or DATA, "plain", 4, validations=1, steps=5, pooled=pooled) for pooled in (True, False))
        return
    for seed, family, rate, decay in product(range(seeds or SEEDS), FAMILIES, (0.1, 0.03), (0.0, 5e-3)):
        shapes = [(shape, True) for shape in (*SHAPES, (8, 1))] + [(shape, False) for shape in ((16, 1), (8, 1))]
        for (width, depth), pooled in shapes:
            yield Task(data or DATA, family, width, depth, decay, rate, seed=seed, pooled=pooled)


def run(task: Task) -> list[Row]:
    """Return the error of one trained network, its keys, and those after a rescaling (`rescaled_...`)."""
    module, data = ranking.trained(task, task.pooled)
    other = rescaled(module, task.seed)
    difference = (module.eval()(data.test.images) - other(data.test.images)).detach().abs().max()
    return [
        {
            "test_error": 1 - evaluated(module, data.test)[1],
            "training_accuracy": evaluated(module, data.training)[1],
            "parameters": sum(p.numel() for p in module.parameters()),
            "difference": float(difference),
            **dict.fromkeys(KEYS),
            **ranking.keys(module, data.training),
            **{f"rescaled_{key}": None for key in KEYS},
            **{f"rescaled_{key}": value for key, value in ranking.keys(other, data.training).items()},
        }
    ]


@torch.no_grad()
def rescaled(module: nn.Module, seed: int) -> nn.Module:
    """Return a copy in eval mode that computes the same function from other weights.

    Random factors multiply each convolution before a normalisation, with the statistics of that; and each normalisation
    whose result reaches the next weights through `HOMOGENEOUS` layers alone, while those weights are divided.
    """
    other, generator = copy.deepcopy(module).eval(), torch.Generator().manual_seed(seed)
    for parent in list(other.modules()):
        layers = [layer for layer in parent.children() if not isinstance(layer, HOMOGENEOUS)]
        for one, following in pairwise(layers):
            factor = torch.randn((), generator=generator).mul(SPREAD).exp()
            if isinstance(one, nn.Conv2d) and isinstance(following, nn.BatchNorm2d):
                one.weight *= factor
                following.running_mean *= factor
                following.running_var.add_(following.eps).mul_(factor**2).sub_(following.eps)
            elif isinstance(one, nn.BatchNorm2d) and isinstance(following, nn.Conv2d | nn.Linear):
                one.weight *= factor
                one.bias *= factor
                following.weight /= factor
    return other


def record(chosen: Options) -> pd.DataFrame:
    """Return a row for each trained network."""
    return completed(__spec__.name, tasks(chosen.smoke, chosen.data, chosen.seeds), chosen)


def variants(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return the networks of each comparison, with the columns that `ranking` reads.

    Those of equal size differ in width and depth together, which counts as one hyperparameter.
    """
    rows = rows.assign(**dict.fromkeys(ranking.RIVALS, 1.0))
    equal = pd.MultiIndex.from_frame(rows[["width", "depth"]]).isin(SHAPES)
    shallow = rows[rows.depth == 1]
    return {
        "as trained": shallow[shallow.pooled],
        "without pooling": shallow[~shallow.pooled],
        EQUAL: rows[rows.pooled & equal].assign(width=0),
    }


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the sign error of each key within a family in each comparison, and how far a rescaling moves the key."""
    found: dict[str, dict[str, Estimate]] = {key: {} for key in KEYS}
    for name, group in variants(rows).items():
        errors = ranking.sign_errors(ranking.fitted(group))
        # Networks of equal size differ in width and depth together; the other pairs are those of one family.
        is_chosen = errors.hyperparameter == "depth" if name == EQUAL else errors.hyperparameter != "network"
        errors = errors[is_chosen]
        for key in KEYS:
            found[key][name] = ranking.over_networks(errors, key)
    for key in KEYS:
        moved = np.exp(np.abs(np.log(np.abs(rows[f"rescaled_{key}"] / rows[key])))).dropna()
        found[key][RESCALED] = bootstrapped(np.median, moved.to_numpy())
    return pd.DataFrame(found).T.rename(index=ranking.full_name).rename_axis("key")


if __name__ == "__main__":
    print(summary(record(options(__doc__))).to_string())
