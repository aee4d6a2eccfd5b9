"""What the monitor costs on a CUDA device, eager and compiled: whole validations of a Trainer."""

from __future__ import annotations

import time
from collections.abc import Iterator
from statistics import median

import networks
import torch
from alternating import alternating
from torch import Tensor

BATCH, BATCHES, PAIRS = 64, 20, 7
NETWORKS = networks.resnet18, networks.resnet50, networks.mobilenet_v2


def _now() -> float:
    """Return the time when the device has done its work; amid a validation it is not waited for."""
    torch.cuda.synchronize()
    return time.perf_counter()


def batches() -> list[tuple[Tensor, Tensor]]:
    """Return seeded noise that is on the device already: the time to get it there would hide the monitor's."""
    generator = torch.Generator("cuda").manual_seed(0)
    images = torch.randn(BATCH, 3, 224, 224, device="cuda", generator=generator)
    labels = torch.randint(10, (BATCH,), device="cuda", generator=generator)
    return [(images, labels)] * BATCHES


def rows() -> Iterator[tuple[str, ...]]:
    """Yield a row for each network and mode."""
    yield (
        "network, 224 x 224, batch 64",
        "",
        "a batch, ms",
        "with the monitor, ms",
        "ratio",
        "first batch",
        "validation",
    )
    if not torch.cuda.is_available():
        yield "no CUDA device where this page was made", *[""] * 6
        return
    for build in NETWORKS:
        for is_compiled in (False, True):
            network = networks.lively(build(10))
            pairs = alternating(network, batches(), PAIRS, is_compiled, accelerator="gpu", clock=_now)
            alone, both = (median(pair[side].later for pair in pairs) * 1e3 for side in (1, 0))
            ratios = [
                median(getattr(own, part) / getattr(plain, part) for own, plain in pairs)
                for part in ("later", "first", "whole")
            ]
            mode = "compiled" if is_compiled else "eager"
            yield build.__name__, mode, f"{alone:.2f}", f"{both:.2f}", *(f"{each:.2f}" for each in ratios)
