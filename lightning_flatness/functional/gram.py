"""The metric in which relative flatness measures how far classes are apart."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

# Rows of a block of the metric: few leave out more of its other half; large ones suit many vectors.
_SMALL_BLOCK_ROWS, BLOCK_ROWS = 128, 256
_CACHE_NUMBERS = 2**19  # what is written is read again while it is in the processor's cache
_CUDA_NUMBERS = 2**26  # a device wants few large steps


def block_numel(tensor: Tensor) -> int:
    """Return how many numbers of a temporary tensor there should be at once."""
    return _CUDA_NUMBERS if tensor.is_cuda else _CACHE_NUMBERS


class HadamardGram(NamedTuple):
    """`G = (W W^T) * R`, entry by entry, a symmetric (k, k) matrix per sample.

    Attributes:
        kernel_gram: `W W^T`, shape (k, k).
        left: first factor of `R`, see `gram_factors`, shape (n, k, r).
        right: second factor of `R`, shape (n, k, r).
    """

    kernel_gram: Float[Tensor, "k k"]
    left: Float[Tensor, "n k r"]
    right: Float[Tensor, "n k r"]

    def squared_norms(self) -> Float[Tensor, "n k"]:
        """Return `R_kk`, the squared norm of each feature's gradient in its filter, shape (n, k)."""
        return (self.left * self.right).sum(-1)

    def inner_products(self, vectors: Float[Tensor, "n c k"]) -> Float[Tensor, "n c c"]:
        """Return `v_c^T G v_c'` for every pair of vectors, shape (n, c, c)."""
        total = vectors.new_zeros(*vectors.shape[:2], vectors.shape[1])
        for samples, rows, columns, block in self._half(_SMALL_BLOCK_ROWS):
            chosen = vectors[samples]
            total[samples] += chosen[..., rows] @ block @ chosen[..., columns].mT
        return (total + total.mT) / 2

    def quadratic_forms(self, vectors: Float[Tensor, "n c k"]) -> Float[Tensor, "n c"]:
        """Return `v_c^T G v_c` for every vector, shape (n, c)."""
        total = vectors.new_zeros(vectors.shape[:2])
        for samples, rows, columns, block in self._half(BLOCK_ROWS):
            chosen = vectors[samples]
            total[samples] += (chosen[..., rows] @ block).mul_(chosen[..., columns]).sum(-1)
        return total

    def _half(self, size: int) -> Iterator[tuple[slice, slice, slice, Tensor]]:
        """Yield one half of the symmetric `G`, off its diagonal twice: samples, rows, columns, block of values.

        The next block may overwrite the one before: fresh memory costs more than what is written into it.
        """
        count, filters = self.left.shape[:2]
        largest = min(size, filters) * filters
        store = self.left.new_empty(min(count * largest, max(block_numel(self.left), largest)))
        for start in range(0, filters, size):
            rows, columns = slice(start, start + size), slice(start, filters)
            kernels = self.kernel_gram[rows, columns].clone()
            kernels[:, len(kernels) :] *= 2
            step = max(1, len(store) // kernels.numel())
            for first in range(0, count, step):
                samples = slice(first, min(first + step, count))
                left, right = self.left[samples, rows], self.right[samples, columns].mT
                if torch.is_grad_enabled():  # a graph has to keep every block
                    yield samples, rows, columns, left @ right * kernels
                    continue
                block = store[: len(left) * kernels.numel()].view(-1, *kernels.shape)
                torch.bmm(left, right, out=block)
                yield samples, rows, columns, block.mul_(kernels)
