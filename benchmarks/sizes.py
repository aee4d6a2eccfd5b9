"""What the monitor costs in networks of four sizes, eager and compiled, beside other packages.

`python benchmarks/sizes.py NETWORK MODE ROUNDS` measures one network in a process of its own and puts its rows into
`sizes.csv`; `bench.py sizes` runs all of them, and draws the figure of the documentation. MODE is `eager`, `compiled`
or `peers`. All times are processor time of one thread, which other work on the machine disturbs least.
"""

from __future__ import annotations

import csv
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

import networks
import torch
from alternating import Took, alternating
from peers import PEERS, installed, prepared
from timing import interleaved
from torch import nn
from torch.utils.data import TensorDataset

from lightning_flatness.reporting.style import LIGHT, empty_figure, panel, title

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RESULTS = Path(__file__).with_name("sizes.csv")
FIGURE = Path(__file__).parents[1] / "docs" / "images" / "cost.png"
COLUMNS = "network", "mode", "round", "batch", "what", "seconds"
MODES = "eager", "compiled", "peers"
BATCHES = 8  # of a validation
UNMONITORED, MONITORED = "without", "with the monitor"


class Size(NamedTuple):
    """A network with ten classes, and what it is validated on."""

    title: str
    network: Callable[[int], nn.Module]
    side: int
    batch: int
    layer: str

    def data(self, samples: int) -> TensorDataset:
        """Return seeded noise."""
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(samples, 3, self.side, self.side, generator=generator)
        return TensorDataset(images, torch.randint(10, (samples,), generator=generator))


SIZES = {
    "resnet20": Size("ResNet-20, 32 x 32", networks.resnet20, 32, 128, "10.body.2.0"),
    "resnet18": Size("ResNet-18, 224 x 224", networks.resnet18, 224, 16, "10.body.2.0"),
    "resnet50": Size("ResNet-50, 224 x 224", networks.resnet50, 224, 16, "18.body.4.0"),
    "mobilenet_v2": Size("MobileNetV2, 224 x 224", networks.mobilenet_v2, 224, 16, "19.0"),
}


def pairs_of(
    size: Size, is_compiled: bool, pairs: int, batches: int = BATCHES, max_samples: int | None = None
) -> list[tuple[Took, Took]]:
    """Return what validations of a network took, see `alternating`."""
    images, labels = size.data(batches * size.batch).tensors
    pieces = zip(images.split(size.batch), labels.split(size.batch), strict=True)
    return alternating(networks.lively(size.network(10)), pieces, pairs, is_compiled, max_samples)


def validations(size: Size, is_compiled: bool, pairs: int) -> Iterator[tuple[int, int, str, float]]:
    """Yield round, batch, whether it is monitored, and seconds.

    Batch 0 is the first one, and batch 1 the mean of the others with what is done at the end of the validation.
    """
    for number, pair in enumerate(pairs_of(size, is_compiled, pairs)):
        for what, took in zip((MONITORED, UNMONITORED), pair, strict=True):
            yield number, 0, what, took.first
            yield number, 1, what, took.later


def peers(size: Size, rounds: int) -> Iterator[tuple[int, int, str, float]]:
    """Yield what other packages take for the trace of the last convolution, and a plain forward pass beside them."""
    model = networks.lively(size.network(10))
    x, y = size.data(size.batch).tensors
    runs: dict[str, Callable[[], object]] = {UNMONITORED: torch.no_grad()(partial(model, x))}
    for peer in (peer for peer in installed() if peer.exact):
        run = partial(peer.trace, prepared(model, size.layer), size.layer, x, y)
        try:
            run()
        except (NotImplementedError, RuntimeError) as error:
            print(f"{peer.name}: {error}")
        else:
            runs[peer.name] = run
    for name, seconds in interleaved(runs, rounds, time.process_time).items():
        yield from ((number, 0, name, took) for number, took in enumerate(seconds))


def main(name: str, mode: str, rounds: str) -> None:
    """Measure, and put the rows in the place of earlier ones."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    size, count = SIZES[name], int(rounds)
    found = peers(size, count) if mode == "peers" else validations(size, mode == "compiled", count)
    rows = [row for row in read() if (row["network"], row["mode"]) != (name, mode)]
    rows += [dict(zip(COLUMNS, (name, mode, *values, f"{took:.4f}"), strict=True)) for *values, took in found]
    with RESULTS.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(len(rows))


def read() -> list[dict[str, str]]:
    """Return the rows of all networks."""
    if not RESULTS.exists():
        return []
    with RESULTS.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def ratios(name: str, mode: str, what: str, is_first: bool = False) -> list[float]:
    """Return the time of a batch in unmonitored ones, pair by pair: of the first batches, or of the later ones."""
    times: dict[tuple[str, str], dict[str, float]] = {}
    for row in read():
        if (row["network"], row["mode"], row["batch"] == "0") == (name, mode, is_first):
            times.setdefault((row["round"], row["batch"]), {})[row["what"]] = float(row["seconds"])
    return [pair[what] / pair[UNMONITORED] for pair in times.values() if what in pair]


def table() -> Iterator[tuple[str, ...]]:
    """Yield a row for each network: medians with the monitor, first and later batches; the peers' beside them."""
    names = [peer.name for peer in PEERS if peer.exact]
    yield "a batch of", "eager: later", "first", "compiled: later", "first", *names
    for name, size in SIZES.items():
        found = [ratios(name, mode, MONITORED, is_first) for mode in MODES[:2] for is_first in (False, True)]
        found += [ratios(name, "peers", peer, True) for peer in names]
        yield f"{size.title}, {size.batch} images", *(f"{median(each):.2f}" if each else "-" for each in found)


def draw() -> None:
    """Draw the figure of the documentation: the monitor's share, and the peers."""
    figure = empty_figure(11, 5.2, LIGHT, dpi=150)
    left, right = (panel(figure, 1, 2, number, LIGHT) for number in (1, 2))
    kinds = [
        (mode, is_first, f"{mode}, {'first batch' if is_first else 'later batches'}")
        for mode in MODES[:2]
        for is_first in (False, True)
    ]
    for row, name in enumerate(SIZES):
        for kind, (mode, is_first, label) in enumerate(kinds):
            points(
                left,
                ratios(name, mode, MONITORED, is_first),
                row + 0.18 * (kind - 1.5),
                LIGHT.curves[kind // 2],
                label if not row else "",
                is_first,
            )
        points(right, ratios(name, "eager", MONITORED), row, LIGHT.curves[0], MONITORED if not row else "")
        for kind, peer in enumerate((peer for peer in PEERS if peer.exact), start=1):
            points(right, ratios(name, "peers", peer.name, True), row, LIGHT.curves[kind], peer.name if not row else "")
    for axes in (left, right):
        axes.grid(axis="x", color=LIGHT.grid)
        axes.grid(visible=False, axis="y")
        axes.set_yticks(
            range(len(SIZES)), [size.title for size in SIZES.values()] if axes is left else [""] * len(SIZES)
        )
        axes.set_ylim(len(SIZES) - 0.5, -0.5)
        axes.set_xlabel("time of a batch without the monitor = 1", fontsize=9.5, color=LIGHT.faint)
        axes.legend(fontsize=8.5, frameon=False, loc="upper center", bbox_to_anchor=(0.45, -0.13), ncols=2)
    right.set_xscale("log")
    right.xaxis.set_major_formatter("{x:g}")
    title(left, "A validation batch with the monitor", "all quantities; each pair, and the median", LIGHT)
    title(right, "The trace of the last convolution", "exact, of one batch; log scale", LIGHT)
    figure.tight_layout()
    figure.savefig(FIGURE)


def points(axes: Axes, values: list[float], height: float, colour: str, label: str, is_open: bool = False) -> None:
    """Draw the values of all pairs as small dots, and their median as a large one."""
    if values:
        axes.scatter(values, [height] * len(values), 9, color=colour, alpha=0.35, linewidths=0)
        axes.scatter(
            median(values),
            height,
            42,
            facecolors=LIGHT.paper if is_open else colour,
            edgecolors=colour,
            label=label,
            zorder=3,
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
