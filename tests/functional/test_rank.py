"""The bounds hold, and are attained where nothing else limits the rank."""

from __future__ import annotations

import pytest
import torch
from cases import SUPPORTED

from lightning_flatness import oracle
from lightning_flatness.functional import head_rank_bound, rank_bound

CASES = {case.name: case for case in SUPPORTED}


@pytest.mark.parametrize("name", ["relu", "groups", "residual", "global max", "1x1"])
@pytest.mark.parametrize("samples", [1, 2, 5])
def test_rank_of_the_layer(name: str, samples: int) -> None:
    model, (x, y) = CASES[name].model(), CASES[name].data()
    hessian = oracle.layer_hessian(model, "conv", x[:samples], y[:samples]).mean(0)
    filters, weights = hessian.shape[:2]
    rank = int(torch.linalg.matrix_rank(hessian.reshape(filters * weights, -1), rtol=1e-9, hermitian=True))
    assert rank <= rank_bound(filters, weights, samples, classes=3)
    assert samples > 1 or name == "groups" or rank == 2


def test_rank_of_the_head() -> None:
    linear = torch.nn.Linear(3, 4, bias=False).double()
    x = torch.cat([torch.randn(20, 2, dtype=torch.float64), torch.ones(20, 1, dtype=torch.float64)], 1)
    hessian = oracle.layer_hessian(linear, "", x, torch.randint(4, (20,))).mean(0).reshape(12, 12)
    assert (
        int(torch.linalg.matrix_rank(hessian, rtol=1e-9, hermitian=True)) == head_rank_bound(features=2, classes=4) == 9
    )
