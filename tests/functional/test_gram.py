"""The Hadamard Gram matrix in blocks of its upper triangle, against the whole matrix."""

from __future__ import annotations

import sys
from unittest import mock

import pytest
import torch

from lightning_flatness.functional import HadamardGram

MODULE = sys.modules[HadamardGram.__module__]


@pytest.mark.parametrize("block", [1, 3, 7, 64])
@pytest.mark.parametrize("numel", [1, 40])
@pytest.mark.parametrize("gradients", [True, False])
def test_products_in_blocks(block: int, numel: int, gradients: bool) -> None:
    kernels, factor = torch.randn(7, 9, dtype=torch.float64), torch.randn(5, 7, 4, dtype=torch.float64)
    vectors = torch.randn(5, 6, 7, dtype=torch.float64)
    gram = HadamardGram(kernels @ kernels.mT, factor, factor)
    whole = vectors @ (kernels @ kernels.mT * (factor @ factor.mT)) @ vectors.mT
    with (
        torch.set_grad_enabled(gradients),
        mock.patch.multiple(MODULE, _SMALL_BLOCK_ROWS=block, BLOCK_ROWS=block, _CPU_BLOCK_NUMEL=numel),
    ):
        torch.testing.assert_close(gram.inner_products(vectors), whole)
        torch.testing.assert_close(gram.quadratic_forms(vectors), whole.diagonal(dim1=1, dim2=2))
    torch.testing.assert_close(gram.squared_norms(), (factor @ factor.mT).diagonal(dim1=1, dim2=2))


@pytest.mark.parametrize("features", [1, 2, 3])
def test_pairs_of_a_filter(features: int) -> None:
    factor = torch.randn(5, 6, 4, dtype=torch.float64)
    pairs = HadamardGram(torch.eye(6 // features), factor, factor).pairs_of_a_filter()
    filters = (factor @ factor.mT).unflatten(1, (-1, features)).unflatten(-1, (-1, features))
    own = filters.diagonal(dim1=1, dim2=3).movedim(-1, 1)  # (n, k, features, features)
    rows, columns = torch.triu_indices(features, features)
    torch.testing.assert_close(pairs, own[:, :, rows, columns])


@pytest.mark.parametrize("adding", [True, False])
@pytest.mark.parametrize("gradients", [True, False])
def test_several_features_of_each_filter(adding: bool, gradients: bool) -> None:
    """Features that are added first and pairs of features give the same, that of the matrix with repeated filters."""
    kernels, factor = torch.randn(3, 9, dtype=torch.float64), torch.randn(5, 6, 4, dtype=torch.float64)
    vectors = torch.randn(5, 7, 6, dtype=torch.float64)
    gram = HadamardGram(kernels @ kernels.mT, factor @ torch.diag(torch.arange(4.0).double()), factor)
    repeated = kernels.repeat_interleave(2, 0)
    matrix = repeated @ repeated.mT * (gram.left @ factor.mT)
    whole = vectors @ matrix @ vectors.mT
    with (
        torch.set_grad_enabled(gradients),
        mock.patch.object(HadamardGram, "_adding_pays", return_value=adding),
        mock.patch.multiple(MODULE, _SMALL_BLOCK_ROWS=3, BLOCK_ROWS=4),
    ):
        torch.testing.assert_close(gram.inner_products(vectors), whole)
        torch.testing.assert_close(gram.quadratic_forms(vectors), whole.diagonal(dim1=1, dim2=2))
    _, contracted = gram.contraction(whole.new_ones(5, 6, 6), torch.arange(6))
    torch.testing.assert_close(contracted, matrix.sum((1, 2)))


def test_features_are_added_first_where_that_is_less_work() -> None:
    def pays(filters: int, features: int, inner: int, vectors: int) -> bool:
        factor = torch.zeros(1, filters * features, inner)
        return HadamardGram(torch.eye(filters), factor, factor)._adding_pays(vectors)

    assert pays(filters=64, features=21, inner=64, vectors=10)
    assert not pays(filters=64, features=2, inner=64, vectors=1000)
    assert not pays(filters=64, features=1, inner=1, vectors=1)
