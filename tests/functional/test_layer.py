"""What cotangents contribute, against the gradients themselves."""

from __future__ import annotations

import pytest
import torch

from lightning_flatness.functional import ConvGeometry, flatness_of_cotangents, gradients_of_cotangents


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("space", [(5, 4), (2, 2), (9, 9)])
@pytest.mark.parametrize("stride", [1, 2])
def test_contributions_equal_those_of_autograd(groups: int, space: tuple[int, int], stride: int) -> None:
    generator = torch.Generator().manual_seed(0)
    conv = torch.nn.Conv2d(4, 6, 2, stride, 1, groups=groups, bias=False).double()
    x = torch.randn(2, 4, *space, generator=generator, dtype=torch.float64)
    shape = conv(x).shape
    cotangents = torch.randn(2, 3, *shape[1:], generator=generator, dtype=torch.float64)
    geometry, gram = ConvGeometry.of(conv), torch.randn(6, 6, generator=generator, dtype=torch.float64)
    trace, relative = flatness_of_cotangents(x, cotangents.flatten(3), geometry, gram)
    rows = gradients_of_cotangents(x, cotangents.flatten(3), geometry)
    for n in range(2):
        for m in range(3):
            (a,) = torch.autograd.grad(conv(x[n : n + 1]), conv.weight, cotangents[n, m][None])
            a = a.flatten(1)
            torch.testing.assert_close(trace[n, m], a.square().sum())
            torch.testing.assert_close(relative[n, m], (gram * (a @ a.T)).sum())
            torch.testing.assert_close(rows[n, m] @ rows[n, m].T, a @ a.T)
    assert flatness_of_cotangents(x, cotangents.flatten(3), geometry)[1] is None
