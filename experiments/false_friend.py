"""Is flatness a false friend? "Flatness is a false friend" (arXiv 2006.09091), and ways to train that test it.

    python -m experiments.false_friend [--smoke] [--data NAME] [--jobs 2] [--seeds N]

Each network is trained plainly and in a way that is said to generalize better. All measures are exact: the trace of the
Hessian of the training loss over all parameters, and the Frobenius and spectral norm of the whole Hessian (`logistic`
and `mlp`) or of the block of the last convolution (the others). A measure is fooled where it calls the network with the
smaller test error the sharper one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import pandas as pd
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn import functional as F
from torch.optim.swa_utils import get_swa_avg_fn

from experiments.data import Images, split
from experiments.networks import POOLED, network
from experiments.runs import Options, Row, completed, options
from experiments.statistics import Estimate, share
from experiments.training import Classifier, evaluated, fit, measured
from lightning_flatness import measure, spectrum

NAME = "false_friend"
DATA, SEEDS = "digits", 10
NETWORKS = {"logistic": (0, 0), "mlp": (12, 1), "plain": (8, 1), "vgg": (8, 2), "preactivated": (6, 1), "wide": (9, 1)}
"""Networks with width and depth; `wide` is a pre-activated one."""
WAYS = ("plain", "l2", "averaging", "augmentation", "sam")
TRAINING, SMALL = 300, 60
"""Training images, and those of the smoke version."""
STEPS, VALIDATIONS = 100, 6
LEARNING_RATE, L2, RADIUS = 0.05, 5e-3, 0.05
AVERAGED_FROM = 0.5
"""Share of the steps after which the weights are averaged."""
ADAPTED_ON = 100
"""Images per batch that recompute the statistics of batch norm."""
CHUNK = 64
"""Columns of the Hessian that are computed together."""
MEASURES = {
    "trace of the network": "trace",
    "Frobenius norm": "frobenius_norm",
    "spectral norm": "spectral_norm",
    "trace of the layer": "flatness/trace",
    "relative flatness": "flatness/relative",
    "scale-free flatness": "flatness/scale_free",
    "training loss": "training_loss",
}


@dataclass(frozen=True)
class Task:
    """The configuration of one training."""

    data: str
    network: str
    way: str
    seed: int
    training: int = TRAINING
    steps: int = STEPS


def averaging(first: int) -> Callback:
    """Return a callback that averages the weights from a step on with equal weight; they are those that remain."""
    from lightning.pytorch.callbacks import WeightAveraging  # since Lightning 2.6; this package supports earlier ones

    class Averaging(WeightAveraging):
        def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
            return step_idx is not None and step_idx >= first

    return Averaging(avg_fn=get_swa_avg_fn())


def tasks(smoke: bool = False, data: str | None = None, seeds: int | None = None) -> Iterator[Task]:
    """Yield the trainings."""
    if smoke:
        yield from (Task(data or DATA, "plain", way, 0, SMALL, steps=2) for way in ("plain", "averaging"))
        return
    for seed, name, way in product(range(seeds or SEEDS), NETWORKS, WAYS):
        yield Task(data or DATA, name, way, seed)


def run(task: Task) -> list[Row]:
    """Return the measures and errors of one trained network."""
    data, (width, depth) = split(task.data, task.training, 200, task.seed), NETWORKS[task.network]
    torch.manual_seed(task.seed)
    kind = "preactivated" if task.network == "wide" else task.network
    net = network(kind, data.shape, data.classes, width, depth)
    optimizer, decay = "sam" if task.way == "sam" else "sgd", L2 if task.way == "l2" else 0.0
    module = Classifier(net, optimizer, LEARNING_RATE, decay, augmentation=task.way == "augmentation")
    is_averaged, first = task.way == "averaging", round(AVERAGED_FROM * task.steps * VALIDATIONS)
    fit(module, data, task.seed, VALIDATIONS, task.steps, callbacks=[averaging(first)] if is_averaged else [])
    if is_averaged:
        adapt_statistics(module, data.training)
    loss, accuracy = evaluated(module, data.training)
    keys = {name: value for name, value in measured(module, data.training).items() if name in MEASURES.values()}
    row = {
        "test_loss": evaluated(module, data.test)[0],
        "test_error": 1 - evaluated(module, data.test)[1],
        "training_accuracy": accuracy,
        "training_loss": loss,
        "parameters": sum(p.numel() for p in module.parameters()),
        "squared_norm": float(sum(p.detach().square().sum() for p in module.parameters())),
        **norms(net, data.training, has_convolution=kind in POOLED),
        **keys,
    }
    return [row]


@torch.no_grad()
def adapt_statistics(module: nn.Module, images: Images) -> None:
    """Recompute the statistics of batch norm for weights that no training step has used."""
    norms = [layer for layer in module.modules() if isinstance(layer, nn.BatchNorm2d)]
    for layer in norms:
        layer.reset_running_stats()
        layer.momentum = None  # a plain mean over the batches
    module.train()
    for batch in images.images.split(ADAPTED_ON):
        module(batch)
    module.eval()


def norms(net: nn.Module, images: Images, has_convolution: bool) -> dict[str, float]:
    """Return the trace over all parameters, the norms, and the rank of the last convolution's block with its bound."""
    batches = [(images.images, images.labels)]
    trace = measure(net, batches, method="jacobian", layer="all", loss="cross_entropy").network_trace
    if has_convolution:
        found = spectrum(net, batches, loss="cross_entropy")
        norms = found.frobenius_norm, found.spectral_norm, found.numerical_rank, found.rank_bound
    else:
        values = torch.linalg.eigvalsh(hessian(net, images))
        norms = float(values.norm()), float(values.abs().max()), float("nan"), float("nan")
    names = "frobenius_norm", "spectral_norm", "layer_rank", "layer_rank_bound"
    return {"trace": trace, **dict(zip(names, norms, strict=True))}


def hessian(net: nn.Module, images: Images) -> Tensor:
    """Return the Hessian of the mean loss with respect to all parameters, float64."""
    parameters = {name: p.detach() for name, p in net.eval().named_parameters()}
    sizes = [p.numel() for p in parameters.values()]

    def loss(flat: Tensor) -> Tensor:
        parts = zip(parameters.items(), flat.split(sizes), strict=True)
        values = {name: part.view(p.shape) for (name, p), part in parts}
        return F.cross_entropy(functional_call(net, values, (images.images,)), images.labels)

    flat = torch.cat([p.flatten() for p in parameters.values()])
    columns = vmap(lambda column: jvp(grad(loss), (flat,), (column,))[1], chunk_size=CHUNK)
    found = columns(torch.eye(len(flat))).double()
    return (found + found.T) / 2


def record(chosen: Options) -> pd.DataFrame:
    """Return a row for each trained network."""
    return completed(__spec__.name, tasks(chosen.smoke, chosen.data, chosen.seeds), chosen)


def fooled(rows: pd.DataFrame) -> pd.DataFrame:
    """Return, for each way and measure, the share of networks in which the measure is wrong about it.

    The measure compares the network with the one that was trained plainly, from the same start on the same images.
    Where both have the same test error it cannot be wrong.
    """
    same = ["data", "network", "seed"]
    plain = rows[rows.way == "plain"].set_index(same)
    found: dict[str, dict[str, Estimate | str]] = {}
    for way, group in rows[rows.way != "plain"].groupby("way", sort=False):
        group = group.set_index(same)
        both = group.join(plain.add_suffix("_plain"), how="inner")
        both = both[both.test_error != both.test_error_plain]
        better = both.test_error < both.test_error_plain
        found[str(way)] = {"generalizes better": share(better.sum(), len(both))}
        for name, column in MEASURES.items():
            known = both[both[column].notna() & both[f"{column}_plain"].notna()]
            sharper = known[column] > known[f"{column}_plain"]
            found[str(way)][name] = share((sharper == better[known.index]).sum(), len(known))
    return pd.DataFrame(found)


if __name__ == "__main__":
    print(fooled(record(options(__doc__))).to_string())
