"""Rows that are pulled back, and what they contribute, against autograd."""

from __future__ import annotations

import pytest
import torch
from layer_cases import CASES, Case, recorded

from lightning_flatness.curvature.jacobian.network import network_of
from lightning_flatness.curvature.jacobian.pullback import contributions, gradients

SOME = [case for case in CASES if case.name in ("LeNet", "VGG-like", "two views", "residual, max-pool, groups, PReLU")]


@pytest.mark.parametrize("case", SOME, ids=str)
def test_gradients_of_rows_are_those_of_autograd(case: Case) -> None:
    model, (x, y) = case.model(), case.data()
    network = network_of(recorded(model, x, y))
    found, part = contributions(network, slice(1, 3), chunk_bytes=1), slice(1, 3)
    for layer, weight in network.recorded.layers.items():
        rows, _ = gradients(network, part, weight)
        parameter = model.get_parameter(f"{layer}.weight")
        for n in (0, 1):
            for row, cotangent in zip(rows[n], network.factor(part)[0][:, n], strict=True):
                (expected,) = torch.autograd.grad(model(x[1 + n : 2 + n])[0], parameter, cotangent)
                torch.testing.assert_close(row.flatten().sort().values, expected.flatten().sort().values)
        torch.testing.assert_close(found[weight][0], rows.square().sum((1, 2, 3)))
