"""The matrices against their definition by outer products, and what sums up a spectrum."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_flatness.functional import (
    dual_matrix,
    not_zero,
    participation_ratio,
    patch_second_moments,
    primal_matrix,
    signed_eigenvalues,
    soft_rank,
)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def sorted_by_size(values: Tensor, count: int) -> Tensor:
    return values[values.abs().argsort(descending=True)][:count].sort().values


@pytest.mark.parametrize("shape", [(5, 2, 3, 4), (1, 1, 2, 1), (40, 9, 64, 3)], ids=str)
def test_dual_and_primal_have_the_spectrum_of_the_sum_of_outer_products(shape: tuple[int, ...]) -> None:
    n, columns, filters, weights = shape
    directions, gradients = normal(n, columns, filters), normal(n, filters, weights)
    signs = torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64).repeat(n * columns)[: n * columns]
    rows = torch.einsum("nrk,nkd->nrkd", directions, gradients).reshape(n * columns, -1)
    dual = dual_matrix(directions, gradients)
    torch.testing.assert_close(dual, rows @ rows.mT)
    for sign in (torch.ones_like(signs), signs):
        curvature = torch.einsum("nrk,nr,nrl->nkl", directions, sign.view(n, columns), directions)
        hessian = rows.mT @ (sign.unsqueeze(1) * rows)
        torch.testing.assert_close(primal_matrix(curvature, gradients), hessian)
        count = min(dual.shape[0], hessian.shape[0])
        expected = sorted_by_size(torch.linalg.eigvalsh(hessian), count)
        found = sorted_by_size(signed_eigenvalues(dual, sign), count)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-11 * float(expected.abs().max()))


def test_signs_do_not_couple_what_is_zero() -> None:
    """Two equal rows of opposite sign cancel; the root of their inner products has directions of rounding."""
    rows = torch.cat([torch.ones(1, 6).double(), torch.ones(1, 6).double(), 1e-5 * normal(2, 6)])
    found = signed_eigenvalues(rows @ rows.mT, torch.tensor([1.0, -1.0, 1.0, 1.0]).double())
    expected = sorted_by_size(torch.linalg.eigvalsh(rows[2:].mT @ rows[2:]), 2)
    torch.testing.assert_close(sorted_by_size(found, 2), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("groups", [1, 2])
def test_patch_second_moments(groups: int) -> None:
    weights, patches = normal(3, 4, 5), normal(3, groups, 5, 2)
    own = patches.repeat_interleave(4 // groups, 1)  # the patches that each filter sees
    expected = torch.einsum("nks,nksd,nkse->kde", weights, own, own)
    torch.testing.assert_close(patch_second_moments(weights, patches), expected)


def test_ranks_count() -> None:
    values = torch.cat([torch.ones(7), torch.zeros(5)]).double()
    trace, norm = values.sum(), values.square().sum().sqrt()
    assert int(not_zero(values).sum()) == 7
    torch.testing.assert_close(participation_ratio(trace, norm), torch.tensor(7.0).double())
    torch.testing.assert_close(soft_rank(values), torch.tensor(7 / 1.001).double())


@pytest.mark.parametrize("seed", range(50))
def test_the_ranks_are_ordered(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(30, generator=generator, dtype=torch.float64).mul(4).exp()
    values[torch.randint(30, (20,), generator=generator)] = 0
    rank = int(not_zero(values).sum())
    assert soft_rank(values) <= rank
    assert participation_ratio(values.sum(), values.square().sum().sqrt()) <= rank * (1 + 1e-12)
    assert rank <= int(values.count_nonzero())


def test_the_rank_does_not_count_rounding() -> None:
    factor = normal(40, 3)
    values = torch.linalg.eigvalsh(factor @ factor.mT)
    assert (int(not_zero(values).sum()), int(not_zero(-values).sum())) == (3, 3)


def test_nothing_has_rank_zero() -> None:
    for values in (torch.zeros(3), torch.zeros(0)):
        assert (int(not_zero(values).sum()), float(soft_rank(values))) == (0, 0)
    assert participation_ratio(torch.tensor(0.0), torch.tensor(0.0)) == 0
