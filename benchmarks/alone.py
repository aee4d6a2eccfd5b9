"""What has to be measured in a process of its own: `python benchmarks/alone.py FUNCTION ARGUMENT ...`.

The last line that it prints has the numbers.
"""

from __future__ import annotations

import sys

import networks
import torch
from timing import THREADS, best_ratio, interleaved, own_peak_megabytes, ratio, seconds
from validation import SETTINGS, validation

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


if __name__ == "__main__":
    torch.set_num_threads(THREADS)
    print(*{"memory": memory, "time": time, "samples": samples}[sys.argv[1]](*sys.argv[2:]))
