"""What has to be measured in a process of its own: `python benchmarks/alone.py FUNCTION ARGUMENT ...`.

The last line that it prints has the numbers.
"""

from __future__ import annotations

import sys
import time as clocks
from copy import deepcopy
from functools import partial
from statistics import median

import networks
import torch
from sizes import SIZES, pairs_of
from timing import THREADS, best_ratio, interleaved, own_peak_megabytes, ratio, seconds
from validation import SETTINGS, validation
from whole_network import jacobian, network, ways

from lightning_flatness import measure


def memory(name: str, monitored: str) -> tuple[float]:
    """Return the peak resident memory of one validation, in MB; `monitored` is 0 or 1."""
    validation(SETTINGS[name], monitored == "1")()
    return (own_peak_megabytes(),)


def time(name: str, rounds: str) -> tuple[float, float]:
    """Return validation time with the monitor / without: median of the rounds' ratios, ratio of the shortest times."""
    runs = {kind: validation(SETTINGS[name], kind == "with") for kind in ("with", "without")}
    times = interleaved(runs, int(rounds))
    return ratio(times["with"], times["without"]), best_ratio(times["with"], times["without"])


def samples(count: str) -> tuple[float, float]:
    """Return what `measure` takes for one of `count` samples, in seconds, and the peak resident memory in MB."""
    model, x, y = networks.lively(networks.resnet20(width=4)), torch.randn(256, 3, 32, 32), torch.zeros(256).long()
    measure(model, [(x, y)])
    took = seconds(lambda: measure(model, ((x, y) for _ in range(int(count) // len(x)))))
    return took / int(count), own_peak_megabytes()


def layers(rounds: str) -> list[float]:
    """Return, for each of the `ways`, median and shortest time in forward passes and the relative error.

    It is processor time of one thread, which other work on the machine disturbs least.
    """
    torch.set_num_threads(1)
    model, x, y = network()
    exact = jacobian(deepcopy(model).double(), x.double(), y, "all")
    runs = {name: partial(way.trace, deepcopy(model), x, y) for name, way in ways().items()}
    errors = {name: abs(float(run()) / ways()[name].exact(exact) - 1) for name, run in runs.items()}
    times = interleaved(runs | {"": torch.no_grad()(partial(model, x))}, int(rounds), clocks.process_time)
    return [
        value
        for name, error in errors.items()
        for value in (ratio(times[name], times[""]), best_ratio(times[name], times[""]), error)
    ]


def layer_memory(name: str) -> tuple[float]:
    """Return by how much one of the `ways` raises the peak of the resident memory above a forward pass's, in MB."""
    torch.set_num_threads(1)
    model, x, y = network()
    with torch.no_grad():
        model(x)
    before = own_peak_megabytes()
    ways()[name].trace(model, x, y)
    return (own_peak_megabytes() - before,)


def compiled(max_samples: str, rounds: str) -> tuple[float, float, float]:
    """Return what a validation of a compiled ResNet-20 takes, in unmonitored ones: median, lowest and highest pair.

    It has ten batches of 64, and is processor time of one thread; `max_samples` is a number, or 0 for all.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    size = SIZES["resnet20"]._replace(batch=64)
    pairs = pairs_of(size, True, int(rounds), 10, int(max_samples) or None)
    ratios = sorted(own.whole / plain.whole for own, plain in pairs)
    return median(ratios), ratios[0], ratios[-1]


if __name__ == "__main__":
    torch.set_num_threads(THREADS)
    functions = {each.__name__: each for each in (memory, time, samples, layers, layer_memory, compiled)}
    print(*functions[sys.argv[1]](*sys.argv[2:]))
