"""The mean Hessian in its three forms against brute force, on the whole table."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from cases import SUPPORTED, Case
from recorded import Measured
from torch import Tensor

from lightning_flatness import oracle
from lightning_flatness.curvature.pooled import mean_hessian
from lightning_flatness.curvature.pooled.mean_hessian import PooledHessian
from lightning_flatness.functional import signed_eigenvalues

CASES = {case.name: case for case in SUPPORTED}
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross-entropy": F.cross_entropy,
    "label smoothing": lambda phi, y: F.cross_entropy(phi, y, label_smoothing=0.2),
    "binary": lambda phi, y: F.binary_cross_entropy_with_logits(phi, F.one_hot(y, 3).to(phi)),
    "squared error": lambda phi, y: F.mse_loss(phi, F.one_hot(y, 3).to(phi)),
    "squared error of probabilities": lambda phi, y: F.mse_loss(phi.softmax(1), F.one_hot(y, 3).to(phi)),
    "focal": lambda phi, y: (
        ((1 - phi.softmax(1).gather(1, y[:, None])[:, 0]) ** 2).mul(F.cross_entropy(phi, y, reduction="none")).mean()
    ),
}
SOME = ["relu", "silu", "groups", "residual silu", "hidden layer", "curved hidden layer", "layer norm behind silu"]


def hessian_of(case: Case, loss: Callable[[Tensor, Tensor], Tensor] | None = None) -> PooledHessian:
    model, (x, y) = case.model().eval(), case.data()
    parts = []
    with Measured(model, loss=loss) as recorder:
        for inputs, targets in zip(x.split(2), y.split(2), strict=True):
            with torch.no_grad():
                model(inputs)
            parts.append(recorder.derivatives(targets))
    return PooledHessian(parts)


def brute_force(case: Case, loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    hessian = oracle.layer_hessian(case.model(), case.layer, *case.data(), loss).mean(0)
    filters, weights = hessian.shape[:2]
    return hessian.reshape(filters * weights, -1)


def check(case: Case, loss: Callable[[Tensor, Tensor], Tensor] | None = None) -> None:
    hessian, expected = hessian_of(case, loss), brute_force(case, loss or F.cross_entropy).detach()
    values = torch.linalg.eigvalsh((expected + expected.mT) / 2)
    atol = 1e-9 * float(values.abs().max())
    primal = hessian.primal()
    torch.testing.assert_close(torch.linalg.eigvalsh(primal), values, rtol=0, atol=atol)
    vector = torch.randn(hessian.size, dtype=torch.float64)  # in the order of the weight, unlike the rows of `primal`
    torch.testing.assert_close(hessian.product(vector), expected @ vector, rtol=0, atol=atol)
    assert (hessian.dual_size is None) == hessian.is_curved
    if not hessian.is_curved:
        dual = signed_eigenvalues(*hessian.dual())
        assert len(dual) == hessian.dual_size
        count = max(len(dual), len(values))
        padded = [F.pad(v, (0, count - len(v))).sort().values for v in (dual, values)]
        torch.testing.assert_close(*padded, rtol=0, atol=atol)
    rank = torch.linalg.matrix_rank(expected, rtol=1e-10, hermitian=True)
    assert rank <= hessian.rank_bound <= hessian.size


@pytest.mark.parametrize("case", SUPPORTED, ids=str)
def test_equals_brute_force(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", SOME)
def test_equals_brute_force_for_other_losses(name: str, loss: str) -> None:
    check(CASES[name], LOSSES[loss])


@pytest.mark.parametrize("name", ["groups", "depthwise", "curved hidden layer behind silu", "conv3d"])
def test_little_memory_changes_nothing(name: str) -> None:
    with mock.patch.object(mean_hessian, "_CHUNK_BYTES", 1):
        check(CASES[name])


@pytest.mark.parametrize("name", ["silu", "curved hidden layer", "layer norm behind silu"])
def test_the_gauss_newton_part_is_positive_and_has_a_dual(name: str) -> None:
    part = hessian_of(CASES[name]).gauss_newton()
    values = torch.linalg.eigvalsh(part.primal())
    assert values.min() > -1e-12 * values.max()
    assert (part.is_curved, part.dual_size) == (False, 10)


def test_batches_of_different_losses_are_padded() -> None:
    """Three classes under cross-entropy give two directions, three labels under binary cross-entropy three."""
    relu, binary = (hessian_of(CASES["relu"], LOSSES[loss])._parts for loss in ("cross-entropy", "binary"))
    both = PooledHessian([*relu, *binary])
    assert both.columns == 3
    dual, primal = signed_eigenvalues(*both.dual()), torch.linalg.eigvalsh(both.primal())
    torch.testing.assert_close(dual[-20:], primal[-20:])
