"""Factors of the softmax curvature: their products are its definition, in full relative precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_flatness.functional import competitor_cotangents, curvature_factor, margin_cotangent


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


# With a lead of 26, 1 - S_top is 5e-12; with 60 its square is below float32's smallest number.
LOGITS = {
    "two classes": lambda: normal(6, 2),
    "many classes": lambda: normal(3, 200),
    "sure": lambda: 0.1 * normal(6, 7) + 26 * torch.eye(7, dtype=torch.float64)[:6],
    "very sure": lambda: 0.1 * normal(6, 7) + 60 * torch.eye(7, dtype=torch.float64)[:6],
    "masked classes": lambda: normal(6, 5).index_fill(1, torch.tensor([1, 3]), -torch.inf),
    "ties": lambda: torch.zeros(4, 3, dtype=torch.float64),
    "no sample": lambda: normal(0, 4),
}
PRECISIONS = {torch.float64: 1e-13, torch.float32: 1e-5}


def curvature(logits: Tensor) -> Tensor:
    """`diag(S) - S S^T` in float64. Its rows sum to 0, so the diagonal follows from the rest without cancellation."""
    probabilities = logits.double().softmax(-1)
    outer = probabilities.unsqueeze(1) * probabilities.unsqueeze(2)
    off = outer - torch.diag_embed(outer.diagonal(dim1=1, dim2=2))
    return torch.diag_embed(off.sum(-1)) - off


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize("name", LOGITS)
def test_products_are_the_curvature(name: str, dtype: torch.dtype) -> None:
    logits = LOGITS[name]().to(dtype)
    n, classes = logits.shape
    exact = curvature(logits)
    factor = curvature_factor(logits)
    assert factor.shape == (n, classes - 1, classes)
    torch.testing.assert_close(
        (factor.mT @ factor).double(), exact, rtol=PRECISIONS[dtype], atol=torch.finfo(dtype).tiny
    )
    for target in (logits.argmax(-1), torch.full((n,), classes - 1)):
        margin, competitors = margin_cotangent(logits, target), competitor_cotangents(logits, target)
        assert competitors.shape == (n, classes - 2, classes)
        product = margin.unsqueeze(2) * margin.unsqueeze(1) + competitors.mT @ competitors
        torch.testing.assert_close(
            product.diagonal(dim1=1, dim2=2).double(),
            exact.diagonal(dim1=1, dim2=2),
            rtol=PRECISIONS[dtype],
            atol=0,
        )
        torch.testing.assert_close(product.double(), exact, rtol=PRECISIONS[dtype], atol=PRECISIONS[dtype] * 1e-2)


def test_a_sure_prediction_keeps_its_digits_in_float32() -> None:
    logits = LOGITS["sure"]().float()
    trace = curvature_factor(logits).double().square().sum((1, 2))
    exact = curvature(logits).diagonal(dim1=1, dim2=2).sum(-1)
    assert 1e-12 < exact.min() < exact.max() < 1e-10
    torch.testing.assert_close(trace, exact, rtol=4e-6, atol=0)


def test_the_margin_is_the_odds_times_the_squared_gradient() -> None:
    logits, target = normal(8, 5), torch.randint(5, (8,))
    logits.requires_grad_()
    (gradient,) = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, target, reduction="sum"), logits)
    likely = logits.detach().softmax(-1).gather(1, target.unsqueeze(1))
    expected = (likely / (1 - likely)).sqrt() * -gradient
    torch.testing.assert_close(margin_cotangent(logits.detach(), target), expected)


def test_without_a_rival_there_is_no_curvature() -> None:
    logits, target = torch.tensor([[0.0, -torch.inf, -torch.inf]]), torch.tensor([0])
    values = curvature_factor(logits), margin_cotangent(logits, target), competitor_cotangents(logits, target)
    assert all(not value.any() and value.isfinite().all() for value in values)
