"""The second derivative of a curved head, column by column: proved to be simple, or differentiated."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_flatness.losses import Differentiated, Form

_EXACT = 1e-9
"""Relative error of a Hessian-vector product in float64 that is still taken for rounding."""


@dataclass(frozen=True)
class _Structure:
    r"""A matrix of each sample, \(\operatorname{diag}(d) + Q M Q^\top\).

    Attributes:
        diagonal: \(d\), shape (n, j).
        basis: \(Q\), shape (n, j, q).
        core: \(M\), shape (n, q, q).
    """

    diagonal: Tensor
    basis: Tensor
    core: Tensor

    def select(self, samples: slice | Tensor) -> _Structure:
        return _Structure(self.diagonal[samples], self.basis[samples], self.core[samples])

    def columns(self, features: slice) -> Tensor:
        rows = self.basis[:, features] @ self.core @ self.basis.mT
        rows[:, :, features] += torch.diag_embed(self.diagonal[:, features])
        return rows

    def product(self, vector: Tensor) -> Tensor:
        pushed = self.basis @ (self.core @ (self.basis.mT @ vector.unsqueeze(-1)))
        return self.diagonal * vector + pushed.squeeze(-1)


class HeadCurvature:
    r"""What the curvature of a head adds to that of the loss, a symmetric matrix for each sample.

    $$C = \sum_c \frac{\partial \ell}{\partial \phi_c} \frac{\partial^2 \phi_c}{\partial p^2}$$

    The matrices of all samples are never in memory together. Their columns are products with unit vectors, a backward
    pass each for all samples, unless the matrices are proved to be simple: diagonal, as for functions of each feature
    alone, or a multiple of the identity plus a matrix in the space of \(p\), the gradient and the constant vector, as
    for layer norm, root mean square norm and cosine heads. The proof is made anew for the samples at hand: products
    with a few vectors leave one candidate, and two matrices whose products with a random vector are equal are equal.

    Args:
        gradient: \(\sum_c (\partial \ell / \partial \phi_c) (\partial \phi_c / \partial p)\), with its graph and with
            the first factor held constant, shape (n, j).
        point: \(p\), float64, shape (n, j).
        weights: how many numbers the head's matrices have.

    Attributes:
        dtype: of the columns; they are computed in float64.
        size: the number of features times `weights`, to which the time of all columns is proportional; 0 if the
            matrices are simple.
    """

    def __init__(self, gradient: Float[Tensor, "n j"], point: Float[Tensor, "n j"], weights: int = 0) -> None:
        """Look for a simple form."""
        self._gradient, self._point = gradient, point
        self._structure = self._proved(gradient.detach(), point.detach())
        self._kept = torch.arange(len(point), device=point.device)
        self._unused = torch.zeros(len(point), dtype=torch.bool, device=point.device)
        self.dtype = point.dtype
        self.size = 0 if self._structure is not None else point.shape[1] * weights

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self._kept)

    def select(self, samples: slice | Tensor) -> HeadCurvature:
        """Return the matrices of some of the samples."""
        return self._changed(_kept=self._kept[samples])

    def without(self, samples: Tensor) -> HeadCurvature:
        """Return the matrices with zeros for some samples, a mask of all: those whose features no filter moves.

        There the curvature may not be defined, as that of a cosine head where all features are zero.
        """
        return self._changed(_unused=samples)

    def to(self, dtype: torch.dtype) -> HeadCurvature:
        """Return the same matrices in another dtype."""
        return self._changed(dtype=dtype)

    def columns(self, chunk_bytes: int) -> Iterator[tuple[slice, Float[Tensor, "n b j"]]]:
        """Yield the columns in groups.

        Args:
            chunk_bytes: how much memory a group may take; a single column may take more.

        Yields:
            Which columns, and their values.
        """
        features = self._point.shape[1]
        step = max(1, chunk_bytes // max(1, len(self) * features * self._point.element_size()))
        for start in range(0, features, step):
            chosen = slice(start, min(start + step, features))
            yield chosen, self._columns(chosen)

    def dense(self) -> Float[Tensor, "n j j"]:
        """Return the matrices as a whole."""
        return self._columns(slice(0, self._point.shape[1]))

    def _columns(self, chosen: slice) -> Tensor:
        if self._structure is not None:
            columns = self._structure.select(self._kept).columns(chosen).to(self.dtype)
        else:
            units = torch.eye(self._point.shape[1]).to(self._point)[chosen]
            products = [self._product(unit.expand_as(self._point))[self._kept].to(self.dtype) for unit in units]
            columns = torch.stack(products, 1)
        return columns.masked_fill(self._unused[self._kept, None, None], 0.0)

    def _product(self, vectors: Tensor) -> Tensor:
        """Return the matrix of each sample times a vector of it; what is no part of the graph has no curvature."""
        if not self._gradient.requires_grad:
            return torch.zeros_like(vectors)
        options = {"retain_graph": True, "materialize_grads": True}
        return torch.autograd.grad(self._gradient, self._point, vectors, **options)[0]

    def _proved(self, gradient: Tensor, point: Tensor) -> _Structure | None:
        """Return the simple form of the matrices, if they have one."""
        generator = torch.Generator().manual_seed(4)
        drawn = torch.rand((2, *point.shape), generator=generator, dtype=torch.float64).to(point) + 0.5
        moved, expected = map(self._product, drawn)
        diagonal = _Structure(moved / drawn[0], point.new_zeros(*point.shape, 0), point.new_zeros(len(point), 0, 0))
        if _agree(diagonal.product(drawn[1]), expected):
            return diagonal
        basis = torch.linalg.qr(torch.stack([point, gradient, torch.ones_like(point)], -1)).Q
        rest = drawn[0] - (basis @ (basis.mT @ drawn[0].unsqueeze(-1))).squeeze(-1)
        factor = (rest * moved).sum(1) / rest.square().sum(1)
        images = torch.stack([self._product(column) for column in basis.unbind(-1)], -1)
        core = basis.mT @ images - torch.diag_embed(factor.unsqueeze(1).expand(-1, basis.shape[2]))
        structure = _Structure(factor.unsqueeze(1).expand_as(point), basis, core)
        return structure if _agree(structure.product(drawn[1]), expected) else None

    def _changed(self, **changes: Any) -> HeadCurvature:
        other = copy(self)
        vars(other).update(changes)
        return other


def is_own_logit(loss: Form, logits: Tensor, curvature: HeadCurvature | None) -> bool:
    """Return whether a loss is taken for its only logit, so that the head has all of its curvature.

    Args:
        loss: its form in the logits.
        logits: shape (n, c).
        curvature: of the head.
    """
    return isinstance(loss, Differentiated) and logits.shape[1] == 1 and curvature is not None


def _agree(product: Tensor, expected: Tensor) -> bool:
    """Return whether two products are equal for each sample, up to rounding; NaN is not."""
    error, size = (product - expected).abs().amax(1), expected.abs().amax(1)
    return bool((error <= _EXACT * size).all())
