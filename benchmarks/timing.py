"""Times functions against each other on a machine that may be busy."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

THREADS = 2


Clock = Callable[[], float]


def seconds(run: Callable[[], object], clock: Clock = time.perf_counter) -> float:
    """Return how long one call takes, with the device's work done."""
    start = clock()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - start


def interleaved(
    runs: dict[str, Callable[[], object]], rounds: int, clock: Clock = time.perf_counter
) -> dict[str, list[float]]:
    """Return the seconds of every function, called in turn in every round, after one round that does not count."""
    for run in runs.values():
        seconds(run, clock)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(seconds(run, clock))
    return times


def ratio(times: list[float], base: list[float]) -> float:
    """Return the median of the ratios round by round: a drift of the machine's speed cancels."""
    return median(a / b for a, b in zip(times, base, strict=True))


def best_ratio(times: list[float], base: list[float]) -> float:
    """Return the ratio of the shortest times: what was least disturbed by other work on the machine."""
    return min(times) / min(base)


def printed(*arguments: object, **environment: str) -> list[float]:
    """Return the numbers that a Python process of its own prints as its last line."""
    command = [sys.executable, *map(str, arguments)]
    run = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | environment)
    return [float(word) for word in run.stdout.splitlines()[-1].split()]


def own_peak_megabytes() -> float:
    """Return the peak resident memory of this process so far."""
    status = Path("/proc/self/status")
    if status.exists():  # `getrusage` would count what the parent process had as well
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # bytes, on macOS
