"""The Hadamard Gram matrix: the inner product in which relative flatness compares rows of the classifier."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

# Rows of one block of the matrix. Smaller blocks skip more of the redundant half; larger ones suit many vectors.
_SMALL_BLOCK_ROWS, BLOCK_ROWS = 128, 256
_CPU_BLOCK_NUMEL = 2**19  # small enough for the processor's cache, from which a block is read again
_CUDA_BLOCK_NUMEL = 2**26  # a GPU prefers few large steps


def block_numel(tensor: Tensor) -> int:
    """Return how many elements a temporary tensor should have at most on the device of this tensor."""
    return _CUDA_BLOCK_NUMEL if tensor.is_cuda else _CPU_BLOCK_NUMEL


class HadamardGram(NamedTuple):
    r"""The symmetric matrix of each sample that weights relative flatness, computed block by block.

    $$G = (W W^\top) \circ R, \qquad R = \mathrm{left}\; \mathrm{right}^\top$$

    with the filters \(W\), the entrywise product \(\circ\) and the Gram matrix \(R\) of the features' gradients,
    given by the two factors of `gram_factors`. The matrix is never in memory as a whole.

    Attributes:
        kernel_gram: \(W W^\top\), shape (k, k).
        left: first factor of \(R\), shape (n, k, r).
        right: second factor of \(R\), shape (n, k, r).

    Example:
        >>> import torch
        >>> from lightning_flatness.functional import HadamardGram
        >>> gram = HadamardGram(torch.tensor([[3.0]]), left=torch.ones(1, 1, 4), right=torch.ones(1, 1, 4))
        >>> gram.squared_norms(), gram.quadratic_forms(torch.tensor([[[10.0]]]))
        (tensor([[4.]]), tensor([[1200.]]))
    """

    kernel_gram: Float[Tensor, "k k"]
    left: Float[Tensor, "n k r"]
    right: Float[Tensor, "n k r"]

    def squared_norms(self) -> Float[Tensor, "n k"]:
        r"""Return \(R_{kk}\), the squared norm of each feature's gradient with respect to its filter, shape (n, k)."""
        return (self.left * self.right).sum(-1)

    def inner_products(self, vectors: Float[Tensor, "n c k"]) -> Float[Tensor, "n c c"]:
        r"""Return \(v_c^\top G\, v_{c'}\) for every pair of vectors, shape (n, c, c)."""
        total = vectors.new_zeros(*vectors.shape[:2], vectors.shape[1])
        for samples, rows, columns, block in self._half(_SMALL_BLOCK_ROWS):
            chosen = vectors[samples]
            total[samples] += chosen[..., rows] @ block @ chosen[..., columns].mT
        return (total + total.mT) / 2

    def quadratic_forms(self, vectors: Float[Tensor, "n c k"]) -> Float[Tensor, "n c"]:
        r"""Return \(v_c^\top G\, v_c\) for every vector, shape (n, c)."""
        total = vectors.new_zeros(vectors.shape[:2])
        for samples, rows, columns, block in self._half(BLOCK_ROWS):
            chosen = vectors[samples]
            total[samples] += (chosen[..., rows] @ block).mul_(chosen[..., columns]).sum(-1)
        return total

    def contraction(self, weights: Float[Tensor, "n k k"]) -> Float[Tensor, " n"]:
        r"""Return \(\sum_{k,k'} G_{kk'} C_{kk'}\) for symmetric matrices \(C\), shape (n,)."""
        total = weights.new_zeros(len(weights))
        for samples, rows, columns, block in self._half(BLOCK_ROWS):
            total[samples] += (block * weights[samples, rows, columns]).sum((1, 2))
        return total

    def _half(self, size: int) -> Iterator[tuple[slice, slice, slice, Tensor]]:
        """Yield the upper triangle of `G` in blocks of rows; entries right of the diagonal block are doubled.

        Each block comes as its samples, rows, columns and values. The next block may overwrite the values, because
        allocating memory costs more than writing to it.
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
                if torch.is_grad_enabled():  # the autograd graph keeps every block, so each needs its own memory
                    yield samples, rows, columns, left @ right * kernels
                    continue
                block = store[: len(left) * kernels.numel()].view(-1, *kernels.shape)
                torch.bmm(left, right, out=block)
                yield samples, rows, columns, block.mul_(kernels)
