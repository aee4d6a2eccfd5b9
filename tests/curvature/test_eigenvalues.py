"""Which matrix the eigenvalues come from, and that all of them give the same."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

from lightning_flatness.curvature.eigenvalues import eigenvalues


class Rows:
    """The Hessian `F^T diag(signs) F`."""

    device = torch.device("cpu")

    def __init__(self, rows: Tensor, signs: Tensor, has_dual: bool = True) -> None:
        self.rows, self.signs = rows, signs
        self.size = rows.shape[1]
        self.dual_size = len(rows) if has_dual else None

    def __str__(self) -> str:
        return f"{len(self.rows)} rows of {self.size}, {'with' if self.dual_size else 'without'} dual"

    def dual(self) -> tuple[Tensor, Tensor]:
        return self.rows @ self.rows.mT, self.signs

    def primal(self) -> Tensor:
        return self.rows.mT @ (self.signs.unsqueeze(1) * self.rows)

    def product(self, vector: Tensor) -> Tensor:
        return self.rows.mT @ (self.signs * (self.rows @ vector))


def drawn(count: int, size: int, has_dual: bool = True) -> Rows:
    rows = torch.randn(count, size, dtype=torch.float64) * torch.arange(1, count + 1).unsqueeze(1)
    return Rows(rows, torch.tensor([1.0, -1.0]).double().repeat(count)[:count], has_dual)


CHOICES = [
    (drawn(10, 40), 100, "dual"),
    (drawn(40, 10), 100, "primal"),
    (drawn(10, 40, has_dual=False), 100, "primal"),
    (drawn(10, 200), 10, "dual"),
    (drawn(200, 10), 10, "primal"),
    (drawn(60, 50), 49, "leading"),
    (drawn(10, 200, has_dual=False), 100, "leading"),
]


@pytest.mark.parametrize(("hessian", "dense_size", "matrix"), CHOICES, ids=str)
def test_the_smaller_matrix_is_taken_and_has_the_eigenvalues(hessian: Rows, dense_size: int, matrix: str) -> None:
    found = eigenvalues(hessian, dense_size, leading=8)
    assert found.matrix == matrix
    assert (found.values.diff() <= 0).all()
    expected = torch.linalg.eigvalsh(hessian.primal())
    largest = expected[expected.abs().argsort(descending=True)][: len(found.values)].sort(descending=True).values
    assert matrix != "leading" or len(found.values) == 8
    torch.testing.assert_close(found.values, largest, rtol=0, atol=1e-10 * float(largest.abs().max()))


def test_leading_ones_are_the_same_each_time_and_leave_the_random_state() -> None:
    hessian, state = drawn(60, 50), torch.get_rng_state()
    first, second = (eigenvalues(hessian, 10, leading=3).values for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(state, torch.get_rng_state())


def test_without_scipy_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.sparse.linalg", None)
    with pytest.raises(ModuleNotFoundError, match="pip install scipy"):
        eigenvalues(drawn(60, 50), 10, leading=3)
