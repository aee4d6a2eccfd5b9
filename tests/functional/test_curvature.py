"""Curvature of the cross-entropy: its definition, and its precision for confident predictions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_flatness.functional import (
    HadamardGram,
    centred_rows,
    confidence,
    curvature_diagonal,
    curvature_factor,
    relative_flatness,
)


def curvature(logits: Tensor) -> Tensor:
    """`diag(S) - S S^T` in float64. Its rows sum to 0, so the diagonal follows from the rest without cancellation."""
    probabilities = logits.double().softmax(-1)
    outer = probabilities.unsqueeze(1) * probabilities.unsqueeze(2)
    off = outer - torch.diag_embed(outer.diagonal(dim1=1, dim2=2))
    return torch.diag_embed(off.sum(-1)) - off


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


# Rows whose top logit leads by 30 have 1 - S_top near 1e-13.
LOGITS = {
    "two classes": lambda: normal(6, 2),
    "many classes": lambda: normal(3, 1000),
    "confident": lambda: normal(6, 10) + 30 * torch.eye(10, dtype=torch.float64)[:6],
    "masked classes": lambda: normal(6, 5).index_fill(1, torch.tensor([1, 3]), -torch.inf),
    "ties": lambda: torch.zeros(4, 3, dtype=torch.float64),
    "one sample": lambda: normal(1, 4),
    "no sample": lambda: normal(0, 4),
}
PRECISIONS = {torch.float64: 1e-12, torch.float32: 2e-5}


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize("name", LOGITS)
def test_all_forms_are_the_curvature(name: str, dtype: torch.dtype) -> None:
    logits = LOGITS[name]().to(dtype)
    n, classes = logits.shape
    head, square = normal(classes, 4).to(dtype), normal(n, 4, 4).to(dtype)
    gram = HadamardGram(torch.ones(4, 4).to(dtype), square, square)
    exact = curvature(logits)
    pulled_back = head.double().mT @ exact @ head.double()
    rows = centred_rows(logits, head)
    expected = {
        "confidence": (confidence(logits), exact.diagonal(dim1=1, dim2=2).sum(-1)),
        "diagonal": (curvature_diagonal(logits, head), pulled_back.diagonal(dim1=1, dim2=2)),
        **{
            f"contracted, {count} temperatures": (
                relative_flatness(logits.unsqueeze(-1).expand(-1, -1, count), rows, gram)[:, 0],
                (pulled_back * (square @ square.mT).double()).sum((1, 2)),
            )
            for count in (
                1,
                5000,
            )  # first from the rows and their mean, then from the distances between all pairs of rows
        },
    }
    for value, reference in expected.values():
        torch.testing.assert_close(value.double(), reference, rtol=PRECISIONS[dtype] * 10, atol=0)


def test_a_shift_of_all_rows_does_not_change_the_diagonal() -> None:
    logits, head = normal(4, 3), normal(3, 5)
    torch.testing.assert_close(curvature_diagonal(logits, head + normal(5)), curvature_diagonal(logits, head))


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
def test_diagonal_where_two_rows_are_close_and_the_third_is_far(dtype: torch.dtype) -> None:
    head = torch.tensor([[1.0], [1.0 + 1e-4], [-3.0]], dtype=dtype)
    logits = torch.tensor([[20.0, 5.0, -30.0]], dtype=dtype)
    expected = curvature_diagonal(logits.double(), head.double())
    assert (expected > 0).all()
    exact = head.double().mT @ curvature(logits) @ head.double()
    torch.testing.assert_close(expected, exact.diagonal(dim1=1, dim2=2), rtol=1e-6, atol=0)
    torch.testing.assert_close(curvature_diagonal(logits, head).double(), expected, rtol=PRECISIONS[dtype], atol=0)


def test_the_factor_gives_the_curvature_and_keeps_its_precision() -> None:
    logits = torch.tensor([[0.2, -1.0, 2.0], [40.0, 0.0, 3.0]]).double()
    s = logits.softmax(1)
    factor = curvature_factor(logits)
    torch.testing.assert_close(factor.mT @ factor, s.diag_embed() - s[:, :, None] * s[:, None])
    single = curvature_factor(logits.float())
    torch.testing.assert_close(single.square().sum((1, 2)).double(), factor.square().sum((1, 2)), rtol=1e-5, atol=0)
