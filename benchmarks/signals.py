"""Records what every monitored key does in real trainings, healthy and disturbed ones.

Each training is forked: the healthy run and the two that are disturbed at a known epoch are one run until then.
`judge.py` reads the result, chooses nothing, and says what the built-in rules make of it.

    python benchmarks/signals.py --processes 2
"""

from __future__ import annotations

import argparse
import copy
import csv
import gzip
import multiprocessing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LRScheduler, MultiStepLR

from lightning_flatness.examples.digits import ResidualBlock, digits_split
from lightning_flatness.metrics.evaluation import Evaluation

OUTPUT = Path(__file__).with_name("signals.csv.gz")
CHOOSING = range(10)
"""Seeds that rules may be chosen on."""
REPORT = range(100, 110)
"""Seeds that no choice has seen."""
EPOCHS, DISTURBED_AT = 34, 20
"""Validations 0 ... 19 come before the disturbance."""
BATCH_SIZE, CHANNELS = 32, 8
NOISE = 0.3
"""Share of the training labels that label noise replaces by random ones."""
LR_FACTOR = 10.0
KEYS = (
    *(f"flatness/{name}" for name in ("relative", "trace", "scale_free")),
    *(f"flatness/{name}" for name in ("confidence", "head", "kernel", "features", "alignment")),
    *(f"margin/{name}" for name in ("mean", "negative", "q05", "softmax_mean", "bound")),
)


def sgd_constant(network: nn.Module, steps: int) -> LRScheduler:
    """Momentum only, the learning rate stays."""
    return ConstantLR(SGD(network.parameters(), lr=0.05, momentum=0.9), factor=1.0)


def sgd_cosine(network: nn.Module, steps: int) -> LRScheduler:
    """The usual recipe for convolutional networks."""
    return CosineAnnealingLR(SGD(network.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4), T_max=steps)


def adamw_cosine(network: nn.Module, steps: int) -> LRScheduler:
    """The usual recipe for everything else."""
    return CosineAnnealingLR(AdamW(network.parameters(), lr=0.01, weight_decay=0.01), T_max=steps)


def adamw_step(network: nn.Module, steps: int) -> LRScheduler:
    """Cuts at a third and at three quarters of the run: a jump in every curve that is no disturbance."""
    return MultiStepLR(
        AdamW(network.parameters(), lr=0.005, weight_decay=0.01), [steps // 3, 3 * steps // 4], gamma=0.3
    )


SETTINGS: dict[str, Callable[[nn.Module, int], LRScheduler]] = {
    setting.__name__: setting for setting in (sgd_constant, sgd_cosine, adamw_cosine, adamw_step)
}


class Row(NamedTuple):
    """The values of one validation."""

    setting: str
    disturbance: str
    seed: int
    epoch: int
    values: dict[str, float]


class Training:
    """One run on the digits; `copy.deepcopy` forks it, with the state of everything random."""

    def __init__(self, setting: str, seed: int) -> None:
        torch.manual_seed(seed)
        self.setting, self.seed = setting, seed
        training, validation = digits_split(seed)
        (self.images, self.labels), self.validation = training.tensors, validation.tensors
        self.network = nn.Sequential(
            nn.Conv2d(1, CHANNELS, 3, padding=1, bias=False),
            nn.BatchNorm2d(CHANNELS),
            nn.ReLU(),
            ResidualBlock(CHANNELS),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(CHANNELS, 10),
        )
        self.generator = torch.Generator().manual_seed(seed)
        self.schedule = SETTINGS[setting](self.network, EPOCHS * (len(self.labels) // BATCH_SIZE))
        self.epoch = 0

    def fork(self) -> Training:
        """Return an independent copy; generators cannot be copied by `deepcopy`."""
        other = copy.copy(self)
        other.network, other.schedule = copy.deepcopy((self.network, self.schedule))
        other.generator = torch.Generator().set_state(self.generator.get_state())
        return other

    def randomise_labels(self) -> None:
        """Replace a share of the training labels by random ones."""
        chosen = torch.randperm(len(self.labels), generator=self.generator)[: int(NOISE * len(self.labels))]
        random = torch.randint(10, chosen.shape, generator=self.generator)
        self.labels = self.labels.index_put((chosen,), random)

    def raise_learning_rate(self) -> None:
        """Multiply the learning rate and the rest of its schedule."""
        optimizer: Optimizer = self.schedule.optimizer
        for group in optimizer.param_groups:
            group["lr"] *= LR_FACTOR
        self.schedule.base_lrs = [LR_FACTOR * base for base in self.schedule.base_lrs]

    def run(self, epochs: int, disturbance: str) -> Iterator[Row]:
        """Train for some epochs, with a validation after each."""
        for _ in range(epochs):
            self.train()
            yield Row(self.setting, disturbance, self.seed, self.epoch, self.measure())
            self.epoch += 1

    def train(self) -> None:
        """One epoch; the last images, fewer than a batch, are left out."""
        self.network.train()
        order = torch.randperm(len(self.labels), generator=self.generator)
        for batch in order[: len(order) // BATCH_SIZE * BATCH_SIZE].view(-1, BATCH_SIZE):
            self.schedule.optimizer.zero_grad()
            F.cross_entropy(self.network(self.images[batch]), self.labels[batch]).backward()
            self.schedule.optimizer.step()
            self.schedule.step()

    def measure(self) -> dict[str, float]:
        """All keys on the validation part, as the monitor computes them."""
        self.network.eval()
        images, labels = self.validation
        evaluation = Evaluation(torch.device("cpu"))
        with ForwardRecorder(self.network) as recorder, torch.no_grad():
            loss = F.cross_entropy(self.network(images), labels)
            evaluation.update(PooledMethod().quantities(recorder.take_pass(loss)))
        values: dict[str, Tensor] = evaluation.compute()
        return {key: float(values[key]) for key in KEYS}


def record(task: tuple[str, int]) -> list[Row]:
    """Return the curves of the four runs of one setting and seed."""
    torch.set_num_threads(1)
    training = Training(*task)
    noisy, rest = Training(*task), EPOCHS - DISTURBED_AT
    noisy.randomise_labels()
    rows = list(noisy.run(EPOCHS, "noise_from_start"))
    shared = list(training.run(DISTURBED_AT, "healthy"))
    for disturbance, disturb in (
        ("healthy", None),
        ("label_noise", Training.randomise_labels),
        ("lr_x10", Training.raise_learning_rate),
    ):
        fork = training.fork()
        if disturb:
            disturb(fork)
        rows += [row._replace(disturbance=disturbance) for row in shared]
        rows += fork.run(rest, disturbance)
    return rows


def write(rows: list[Row], path: Path) -> None:
    """Write the curves, five significant digits of each value."""
    # mtime=0: the same curves give the same bytes.
    with gzip.GzipFile(path, "wb", mtime=0) as packed:
        lines: list[tuple[object, ...]] = [("setting", "disturbance", "seed", "epoch", *KEYS)]
        lines += [
            (*row[:4], *(f"{row.values[key]:.5g}" for key in KEYS)) for row in sorted(rows, key=lambda row: row[:4])
        ]
        packed.write("".join(",".join(map(str, line)) + "\n" for line in lines).encode())


def read(path: Path = OUTPUT) -> list[Row]:
    """Return the recorded curves, in the order of the epochs of each run."""
    with gzip.open(path, "rt", encoding="utf-8", newline="") as lines:
        return [
            Row(
                row["setting"],
                row["disturbance"],
                int(row["seed"]),
                int(row["epoch"]),
                {k: float(row[k]) for k in KEYS},
            )
            for row in csv.DictReader(lines)
        ]


def main() -> None:
    """Record all runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2, help="runs at the same time, one thread each")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="where the curves go")
    arguments = parser.parse_args()
    tasks = [(setting, seed) for seed in (*CHOOSING, *REPORT) for setting in SETTINGS]
    rows: list[Row] = []
    with multiprocessing.get_context("spawn").Pool(arguments.processes) as pool:
        for done, part in enumerate(pool.imap_unordered(record, tasks), start=1):
            rows += part
            print(f"{done} of {len(tasks)}: {part[0].setting}, seed {part[0].seed}", flush=True)
            write(rows, arguments.output)


if __name__ == "__main__":
    main()
