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
