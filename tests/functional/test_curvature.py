"""Curvature of the cross-entropy: what it is, and that confident predictions do not lose it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_flatness.functional import class_distances, confidence, curvature_root


def curvature(logits: Tensor) -> Tensor:
    """`diag(S) - S S^T` in float64, entry by entry: off the diagonal nothing cancels, and the rows sum to 0."""
    probabilities = logits.double().softmax(-1)
    outer = probabilities.unsqueeze(1) * probabilities.unsqueeze(2)
    off = outer - torch.diag_embed(outer.diagonal(dim1=1, dim2=2))
    return torch.diag_embed(off.sum(-1)) - off


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


# Rows with a winner by 30 have 1 - S_top near 1e-13.
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
    metric = square @ square.mT
    exact = curvature(logits)
    pulled_back = head.double().mT @ exact @ head.double()
    root = curvature_root(logits, head)
    probabilities = logits.softmax(-1)
    distances = class_distances(logits, head, metric)
    contracted = torch.einsum("nc,ncb,nb->n", probabilities, distances, probabilities) / 2
    expected = {
        "confidence": (confidence(logits), exact.diagonal(dim1=1, dim2=2).sum(-1)),
        "root": (root.square().sum(1), pulled_back.diagonal(dim1=1, dim2=2)),
        "distances": (contracted, (pulled_back * metric.double()).sum((1, 2))),
    }
    for value, reference in expected.values():
        torch.testing.assert_close(value.double(), reference, rtol=PRECISIONS[dtype] * 10, atol=0)


def test_distances_are_zero_on_the_diagonal_and_do_not_see_a_common_shift() -> None:
    logits, head, metric = normal(4, 3), normal(3, 5), torch.eye(5, dtype=torch.float64).expand(4, -1, -1)
    distances = class_distances(logits, head, metric)
    assert (distances.diagonal(dim1=1, dim2=2) == 0).all()
    torch.testing.assert_close(distances, torch.cdist(head, head).square().expand(4, -1, -1))
    torch.testing.assert_close(class_distances(logits, head + normal(5), metric), distances)
