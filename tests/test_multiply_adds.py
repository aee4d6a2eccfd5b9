"""Counted multiply-adds against counts by hand."""

from __future__ import annotations

import torch
from recorded import Measured
from torch import nn

from benchmarks.multiply_adds import multiply_adds
from lightning_flatness.curvature.pooled.closed_form import relative_flatness


def test_network_and_monitor() -> None:
    filters, inputs, side, classes, n = 8, 4, 6, 3, 5
    model = nn.Sequential(
        nn.Conv2d(inputs, filters, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(filters, classes)
    )
    x, y = torch.randn(n, inputs, side, side), torch.zeros(n).long()
    forward = n * (filters * inputs * side**2 + classes * filters)
    assert multiply_adds(lambda: model(x)) == forward
    with Measured(model.eval()) as recorder:
        model(x)
        derivatives = recorder.derivatives(y)
    # With 4 weights and 36 positions `a = M P` and `a a^T` take the fewest.
    least = n * (filters * inputs * side**2 + filters**2 * inputs)
    assert least <= multiply_adds(lambda: relative_flatness(derivatives)) < least + forward * 10
    assert multiply_adds(lambda: torch.ones(3) + 1) == 0
