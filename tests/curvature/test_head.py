"""The second derivative of curved heads: which are simple, and that all columns are those of autograd."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from networks import CosineLinear, RootMeanSquare
from torch import Tensor, nn

from lightning_flatness.curvature.head import HeadCurvature

N, J, C = 5, 6, 3


def stretched(p: Tensor) -> Tensor:
    """A norm of another kind: neither the features, the gradient nor a constant vector spans what it adds."""
    return p / (p.square() * torch.arange(1.0, J + 1).double()).sum(1, keepdim=True).sqrt()


# Name -> (head without its last linear layer, whether its second derivative is simple).
HEADS: dict[str, tuple[Callable[[], Callable[[Tensor], Tensor]], bool]] = {
    "layer norm": (lambda: nn.LayerNorm(J), True),
    "root mean square": (RootMeanSquare, True),
    "cosine": (lambda: CosineLinear(J, J), True),
    "silu of the features": (nn.SiLU, True),
    "learned temperature": (lambda: lambda p: p / (1 + p.square().sum(1, keepdim=True)), True),
    "squared distances": (lambda: lambda p: (p[:, None] - torch.eye(J).double()).square().sum(2), True),
    "hidden silu": (lambda: nn.Sequential(nn.Linear(J, 4), nn.SiLU(), nn.Linear(4, J)), False),
    "group norm": (lambda: nn.GroupNorm(2, J), False),
    "silu behind layer norm": (lambda: nn.Sequential(nn.LayerNorm(J), nn.SiLU()), False),
    "another norm": (lambda: stretched, False),
}


def curvature(name: str) -> tuple[HeadCurvature, Tensor]:
    """What is under test, and the same by autograd, one sample after the other, shape (n, j, j)."""
    torch.manual_seed(3)
    built = HEADS[name][0]()
    front = built.double() if isinstance(built, nn.Module) else built
    last, slopes = nn.Linear(J, C).double(), torch.randn(N, C).double()
    slopes[0] *= 1e-12  # a confident sample
    point = torch.randn(N, J).double().requires_grad_()
    (gradient,) = torch.autograd.grad((last(front(point)) * slopes).sum(), point, create_graph=True)

    def value(row: Tensor, slope: Tensor) -> Tensor:
        return last(front(row[None]))[0] @ slope

    pairs = zip(point.detach(), slopes, strict=True)
    rows = [torch.autograd.functional.hessian(lambda row, slope=slope: value(row, slope), row) for row, slope in pairs]
    return HeadCurvature(gradient, point, weights=7), torch.stack(rows)


@pytest.mark.parametrize("name", HEADS)
def test_every_column_is_that_of_autograd(name: str) -> None:
    found, expected = curvature(name)
    size = expected.abs().amax((1, 2), keepdim=True)
    assert ((found.dense() - expected).abs() <= 1e-10 * size).all()
    assert found.size == (0 if HEADS[name][1] else 7 * J)
    chosen = torch.tensor([True, False, True, True, False])
    some = found.select(chosen).select(slice(1, 3)).to(torch.float32)
    assert len(some) == 2
    for chunk_bytes, groups in ((1, J), (4 * 2 * J * 8, 2), (2**20, 1)):
        parts = list(some.columns(chunk_bytes))
        assert len(parts) == groups
        assert parts[0][0].start == 0
        whole = torch.cat([rows for _, rows in parts], 1)
        torch.testing.assert_close(whole, expected[[2, 3]].float(), rtol=1e-5, atol=1e-6)


def test_a_head_without_second_derivative_has_none() -> None:
    point = torch.randn(N, J).double().requires_grad_()
    assert not HeadCurvature(torch.ones(N, J).double(), point).dense().any()


def test_one_feature() -> None:
    point = torch.randn(N, 1).double().requires_grad_()
    (gradient,) = torch.autograd.grad(point.tanh().sum(), point, create_graph=True)
    (expected,) = torch.autograd.grad(gradient.sum(), point, retain_graph=True)
    torch.testing.assert_close(HeadCurvature(gradient, point).dense()[:, 0], expected)
