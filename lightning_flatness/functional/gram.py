"""The Hadamard Gram matrix: the inner product in which relative flatness compares rows of the classifier."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
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
    given by the two factors of `gram_factors`. The matrix is never in memory as a whole. If each filter feeds several
    features, \(G\) has a row for each feature, and \(W W^\top\) counts with the filters that feed the two features.

    Attributes:
        kernel_gram: \(W W^\top\), shape (k, k).
        left: first factor of \(R\), shape (n, f, r), the same number of features for each filter in turn.
        right: second factor of \(R\), shape (n, f, r).

    Example:
        >>> import torch
        >>> from lightning_flatness.functional import HadamardGram
        >>> gram = HadamardGram(torch.tensor([[3.0]]), left=torch.ones(1, 1, 4), right=torch.ones(1, 1, 4))
        >>> gram.squared_norms(), gram.quadratic_forms(torch.tensor([[[10.0]]]))
        (tensor([[4.]]), tensor([[1200.]]))
    """

    kernel_gram: Float[Tensor, "k k"]
    left: Float[Tensor, "n f r"]
    right: Float[Tensor, "n f r"]

    @property
    def features_per_filter(self) -> int:
        """How many features each filter feeds."""
        return self.left.shape[1] // len(self.kernel_gram)

    def squared_norms(self) -> Float[Tensor, "n f"]:
        r"""Return \(R_{ff}\), the squared norm of each feature's gradient with respect to its filter, shape (n, f)."""
        return (self.left * self.right).sum(-1)

    def pairs_of_a_filter(self) -> Float[Tensor, "n k p"]:
        r"""Return \(R_{ff'}\) for every pair of features \(f \le f'\) of one filter.

        Returns:
            The products, shape (n, k, p), with the pairs p in the order of
            `itertools.combinations_with_replacement(range(features_per_filter), 2)`.

        Example:
            >>> import torch
            >>> factor = torch.tensor([[[1.0], [2.0]]])  # one filter with two features
            >>> HadamardGram(torch.ones(1, 1), factor, factor).pairs_of_a_filter()
            tensor([[[1., 2., 4.]]])
        """
        count = self.features_per_filter
        if count == 1:
            return self.squared_norms().unsqueeze(-1)
        left, right = (factor.unflatten(1, (-1, count)) for factor in (self.left, self.right))
        rows, columns = torch.triu_indices(count, count, device=self.left.device)
        return (left @ right.mT)[..., rows, columns]

    def inner_products(self, vectors: Float[Tensor, "n c f"]) -> Float[Tensor, "n c c"]:
        r"""Return \(v_c^\top G\, v_{c'}\) for every pair of vectors, shape (n, c, c)."""
        if self._adding_pays(vectors.shape[1]):
            left, right = (product.movedim(2, 1).flatten(2) for product in self._added(vectors))
            return left @ right.mT
        total = vectors.new_zeros(*vectors.shape[:2], vectors.shape[1])
        for samples, rows, columns, block in self._half(_SMALL_BLOCK_ROWS):
            chosen = vectors[samples]
            total[samples] += chosen[..., rows] @ block @ chosen[..., columns].mT
        return (total + total.mT) / 2

    def quadratic_forms(self, vectors: Float[Tensor, "n c f"]) -> Float[Tensor, "n c"]:
        r"""Return \(v_c^\top G\, v_c\) for every vector, shape (n, c)."""
        if self._adding_pays(vectors.shape[1]):
            left, right = self._added(vectors)
            return (left * right).sum((1, 3))
        total = vectors.new_zeros(vectors.shape[:2])
        for samples, rows, columns, block in self._half(BLOCK_ROWS):
            chosen = vectors[samples]
            total[samples] += (chosen[..., rows] @ block).mul_(chosen[..., columns]).sum(-1)
        return total

    def contraction(
        self, rows: Float[Tensor, "n b f"], features: Int[Tensor, " b"]
    ) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        r"""Return what some rows of a matrix \(C\) add to two sums, the trace and relative flatness of a curvature.

        $$\sum_{f, f' \text{ of one filter}} R_{ff'} C_{ff'}, \qquad \sum_{f, f'} G_{ff'} C_{ff'}$$

        Args:
            rows: \(C_{ff'}\) for the features \(f\) at hand and all \(f'\), shape (n, b, f).
            features: which \(f\) they belong to, shape (b,).

        Returns:
            The sums over these \(f\), each of shape (n,).

        Example:
            >>> import torch
            >>> factor = torch.tensor([[[1.0], [2.0]]])  # one filter with two features
            >>> gram = HadamardGram(torch.tensor([[3.0]]), factor, factor)
            >>> gram.contraction(torch.tensor([[[1.0, 1.0]]]), torch.tensor([1]))
            (tensor([6.]), tensor([18.]))
        """
        owner = torch.arange(self.left.shape[1], device=self.left.device) // self.features_per_filter
        products = (self.left[:, features] @ self.right.mT).mul_(rows)
        is_same = (owner[features].unsqueeze(1) == owner).to(products)
        kernels = self.kernel_gram[owner[features]][:, owner]
        flat = products.flatten(1)
        return flat @ is_same.flatten(), flat @ kernels.flatten()

    def _adding_pays(self, vectors: int) -> bool:
        """Return whether adding the features of each filter first takes fewer multiply-adds than all pairs of features.

        With one feature for each filter there is nothing to add.
        """
        filters, (features, inner) = len(self.kernel_gram), self.left.shape[1:]
        added = vectors * inner * (2 * features + filters * (filters + vectors))
        return self.features_per_filter > 1 and 2 * added < features**2 * (inner + vectors)

    def _added(self, vectors: Float[Tensor, "n c f"]) -> tuple[Float[Tensor, "n k c r"], Float[Tensor, "n k c r"]]:
        """Return the gradients of `v_c . p` with respect to each filter, weighted by `W W^T`, and as they are."""
        shape = (len(self.kernel_gram), self.features_per_filter)
        by_filter = vectors.unflatten(2, shape).movedim(1, 2)
        left, right = by_filter @ self.left.unflatten(1, shape), by_filter @ self.right.unflatten(1, shape)
        return (self.kernel_gram @ left.flatten(2)).view_as(left), right

    def _half(self, size: int) -> Iterator[tuple[slice, slice, slice, Tensor]]:
        """Yield the upper triangle of `G` in blocks of rows; entries right of the diagonal block are doubled.

        Each block comes as its samples, rows, columns and values. The next block may overwrite the values, because
        allocating memory costs more than writing to it.
        """
        count, filters = self.left.shape[:2]
        owner = torch.arange(filters, device=self.left.device) // self.features_per_filter
        largest = min(size, filters) * filters
        store = self.left.new_empty(min(count * largest, max(block_numel(self.left), largest)))
        for start in range(0, filters, size):
            rows, columns = slice(start, start + size), slice(start, filters)
            if self.features_per_filter == 1:
                kernels = self.kernel_gram[rows, columns].clone()
            else:
                kernels = self.kernel_gram[owner[rows]][:, owner[columns]]
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
