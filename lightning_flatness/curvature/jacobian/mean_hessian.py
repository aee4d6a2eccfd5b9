"""The mean curvature of any layer, from the gradients of every sample and cotangent."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

import lightning_flatness.functional as LF

_CHUNK_NUMEL = 2**25


@dataclass(frozen=True)
class LayerGradients:
    """The rows of one batch whose outer products are the curvature of a layer.

    Attributes:
        rows: gradients of the cotangents with respect to the weight, shape (n, r, k, d).
        signs: of the rows, shape (n, r).
        curvature: whether they make the Hessian or its Gauss-Newton part.
    """

    rows: Float[Tensor, "n r k d"]
    signs: Float[Tensor, "n r"]
    curvature: Literal["hessian", "ggn"]

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.rows)


class GradientHessian:
    r"""The mean over samples of a layer's curvature, in float64.

    $$H = \frac1N \sum_{n,r} \sigma_{nr} f_{nr} f_{nr}^\top$$

    with the gradients \(f_{nr}\) of the cotangents of `LayerGradients` and their signs \(\sigma\).

    Args:
        parts: the gradients of each batch.

    Attributes:
        samples: \(N\).
    """

    def __init__(self, parts: Sequence[LayerGradients]) -> None:
        """Put the rows of all batches below each other."""
        self._rows = torch.cat([part.rows.flatten(0, 1).flatten(1) for part in parts])
        self._signs = torch.cat([part.signs.flatten() for part in parts]).double()
        self._filters, self._weights = parts[0].rows.shape[2:]
        self._columns = max(part.rows.shape[1] for part in parts)
        self.samples = sum(map(len, parts))

    @property
    def size(self) -> int:
        """Number of weights."""
        return self._filters * self._weights

    @property
    def dual_size(self) -> int:
        """Number of all rows."""
        return len(self._rows)

    @property
    def device(self) -> torch.device:
        """Where the gradients are."""
        return self._rows.device

    @property
    def rank_bound(self) -> int:
        """An upper bound of the rank, see `functional.rank_bound`."""
        return LF.rank_bound(self._filters, self._weights, self.samples, classes=self._columns + 1)

    @property
    def trace(self) -> float:
        """Mean of the samples' traces, the squared norms of their rows."""
        return float((self._rows.square().sum(1, dtype=torch.float64) * self._signs).sum() / self.samples)

    def gauss_newton(self) -> GradientHessian:
        """Return the matrix itself, which is no more than that."""
        return self

    def dual(self) -> tuple[Float[Tensor, "m m"], Float[Tensor, " m"]]:
        """Return the inner products of the rows, and their signs."""
        total = torch.zeros(len(self._rows), len(self._rows), dtype=torch.float64, device=self.device)
        for columns in self._rows.split(max(1, _CHUNK_NUMEL // len(self._rows)), 1):
            part = columns.double()
            total.addmm_(part, part.mT)
        return total / self.samples, self._signs

    def primal(self) -> Float[Tensor, "p p"]:
        """Return the matrix."""
        total = torch.zeros(self.size, self.size, dtype=torch.float64, device=self.device)
        for rows, signs in self._chunks():
            total.addmm_(rows.mT, signs.unsqueeze(1) * rows)
        return total / self.samples

    def product(self, vector: Float[Tensor, " p"]) -> Float[Tensor, " p"]:
        """Return the matrix times a vector."""
        total = torch.zeros_like(vector)
        for rows, signs in self._chunks():
            total += rows.mT @ (signs * (rows @ vector))
        return total / self.samples

    def _chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        step = max(1, _CHUNK_NUMEL // self.size)
        pairs = zip(self._rows.split(step), self._signs.split(step), strict=True)
        yield from ((rows.double(), signs) for rows, signs in pairs)
