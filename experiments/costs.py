"""What a validation costs: nothing besides, a monitor, one on training images, and `experiments.layer_traces`.

    python -m experiments.costs [--smoke] [--data NAME] [--jobs 1] [--seeds N]

The time is that of the processor, in which other processes do not count, for the networks of `experiments.alerts`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import pandas as pd
import torch
from lightning.pytorch.callbacks import Callback

from experiments.alerts import BATCH_SIZE, DATA, NETWORKS, TRAINING, VALIDATION
from experiments.data import split
from experiments.layer_traces import LayerTraces
from experiments.networks import network
from experiments.runs import Options, Row, completed, options
from experiments.training import Classifier, fit, quiet_monitor

NAME = "costs"
SEEDS, VALIDATIONS = 1, 20
SOURCES = ("nothing", "monitor", "on training images", "layer traces")
"""What a validation is made with besides."""


@dataclass(frozen=True)
class Task:
    """The configuration of the trainings that are compared."""

    data: str
    network: str
    seed: int
    validations: int = VALIDATIONS


def tasks(smoke: bool = False, data: str | None = None, seeds: int | None = None) -> Iterator[Task]:
    """Yield the networks."""
    if smoke:
        yield Task(data or "digits", "plain", 0, validations=2)
        return
    for seed, name, net in product(range(seeds or SEEDS), (data,) if data else DATA, NETWORKS):
        yield Task(name, net, seed)


def run(task: Task) -> list[Row]:
    """Return the milliseconds that a validation takes longer with each of `SOURCES`, the first one included."""
    data, found = split(task.data, TRAINING, VALIDATION, task.seed), {}
    for source in SOURCES:
        torch.manual_seed(task.seed)
        net = network(task.network, data.shape, data.classes, depth=2)
        module = Classifier(net, "sgd", 0.05, 0.0)
        made: dict[str, list[Callback]] = {
            "monitor": [quiet_monitor()],
            "on training images": [quiet_monitor(data="train", max_samples=VALIDATION)],
            "layer traces": [LayerTraces(data.training, task.seed)],
        }
        start = time.process_time()
        fit(module, data, task.seed, task.validations, 1, BATCH_SIZE, made.get(source, []))
        found[source] = 1000 * (time.process_time() - start) / task.validations
    return [{source: value - found["nothing"] if source != "nothing" else value for source, value in found.items()}]


def record(chosen: Options) -> pd.DataFrame:
    """Return a row for each network."""
    return completed(__spec__.name, tasks(chosen.smoke, chosen.data, chosen.seeds), chosen)


if __name__ == "__main__":
    print(record(options(__doc__)).to_string())
