"""The mean Hessian of a convolution under global pooling: as a matrix, as its dual, and as products with vectors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.nn import grad

import lightning_flatness.functional as LF
from lightning_flatness.curvature.pooled.derivatives import PooledDerivatives
from lightning_flatness.losses import cotangents

_CHUNK_BYTES = 256 * 2**20


class PooledHessian:
    r"""The mean over samples of a convolution's Hessian, with everything in float64.

    $$H_{kk'} = \frac1N \sum_n \Bigl( h_{nkk'}\, a_{nk} a_{nk'}^\top
    + [k = k'] \sum_s g_{nk} M^{(2)}_{nks} P_{ns} P_{ns}^\top \Bigr)$$

    with the curvature \(h_n\) and the gradient \(g_n\) of a sample's loss in the pooled features, in the order of the
    filters; the other symbols are those of `docs/mathematics.md`. The second sum is zero for piecewise linear maps.
    For them the matrix has a dual: with \(h_n = \sum_r \sigma_{nr} u_{nr} u_{nr}^\top\) it is a sum of outer products.

    If filters feed several features each, \(k\) and \(k'\) run over the features, and what belongs to one filter is
    added.

    Args:
        parts: the derivatives of each batch.

    Attributes:
        samples: \(N\).
        columns: number of the directions \(u_{nr}\) of each sample.
        filters: number of filters.
        weights: number of weights of each.
        is_curved: whether the map has a second derivative.
    """

    def __init__(self, parts: Sequence[PooledDerivatives]) -> None:
        """Factorise the curvature of every sample."""
        self._parts = list(parts)
        factors = [_directions(part.to(torch.float64)) for part in self._parts]
        self.columns = max(directions.shape[1] for directions, _ in factors)
        self._directions = [F.pad(u, (0, 0, 0, self.columns - u.shape[1])) for u, _ in factors]
        self._signs = [F.pad(signs, (0, self.columns - signs.shape[1]), value=1.0) for _, signs in factors]
        self.samples = sum(map(len, parts))
        first = parts[0]
        self.filters = len(first.kernel_gram)
        self._per_filter = first.jacobian.shape[1] // self.filters
        self.weights = first.inputs.shape[1] // first.geometry.groups * prod(first.geometry.kernel)
        self.is_curved = any(part.second_derivative is not None for part in parts)

    @property
    def size(self) -> int:
        """Number of weights."""
        return self.filters * self.weights

    @property
    def dual_size(self) -> int | None:
        """Samples times columns of each; None for a curved map."""
        return None if self.is_curved else self.samples * self.columns

    @property
    def device(self) -> torch.device:
        """Where the derivatives are."""
        return self._parts[0].logits.device

    @property
    def rank_bound(self) -> int:
        """An upper bound of the rank, see `functional.rank_bound`; all weights for a curved map."""
        if self.is_curved:
            return self.size
        columns = min(self.columns, self.filters * self._per_filter)
        return LF.rank_bound(self.filters, self.weights, self.samples, classes=columns + 1)

    def gauss_newton(self) -> PooledHessian:
        """Return the part that the curvature of the loss makes, without that of the head and of the map."""
        return PooledHessian([part.gauss_newton for part in self._parts])

    def dual(self) -> tuple[Float[Tensor, "m m"], Float[Tensor, " m"]]:
        """Return the inner products of the columns of all samples, and their signs; see `functional.dual_matrix`."""
        directions = torch.cat(self._directions)
        size = self.samples * self.columns
        total = directions.new_zeros(size, size)
        for filters in self._filters():
            features = slice(filters.start * self._per_filter, filters.stop * self._per_filter)
            gradients = torch.cat([_gradients(part, features) for part in self._parts])
            chosen = directions[..., features]
            if self._per_filter == 1:
                total += LF.dual_matrix(chosen, gradients)
            else:
                shape = (-1, self._per_filter)
                rows = torch.einsum("nrkm,nkmd->nrkd", chosen.unflatten(-1, shape), gradients.unflatten(1, shape))
                rows = rows.reshape(size, -1)
                total.addmm_(rows, rows.mT)
        return total / self.samples, torch.cat(self._signs).flatten()

    def primal(self) -> Float[Tensor, "p p"]:
        """Return the matrix by filters, offsets in the kernel and input channels; see `functional.primal_matrix`."""
        shape = (self.filters, self._per_filter, self.weights)
        total = torch.zeros(self.size, self.size, dtype=torch.float64, device=self.device)
        blocks = total.view(self.filters, self.weights, self.filters, self.weights).diagonal(dim1=0, dim2=2)
        for part, directions, signs in self._chunks():
            curvature = (directions * signs.unsqueeze(-1)).mT @ directions
            matrix = LF.primal_matrix(curvature, LF.gradient_rows(part.inputs, part.jacobian, part.geometry))
            total += matrix.view(*shape, *shape).sum((1, 4)).view(total.shape)
            if part.second_derivative is not None:
                patches = LF.patches(part.inputs, part.geometry).unflatten(-1, (-1, prod(part.geometry.kernel)))
                added = LF.patch_second_moments(_bend(part), patches.mT.flatten(-2))
                blocks += added.unflatten(0, shape[:2]).sum(1).permute(1, 2, 0)
        return total / self.samples

    def product(self, vector: Float[Tensor, " p"]) -> Float[Tensor, " p"]:
        r"""Return \(H v\): \(v\) convolves the input, and the result is pulled back like the gradient of a filter."""
        total = torch.zeros_like(vector)
        for part, directions, signs in self._chunks():
            inputs, options = part.geometry.pad(part.inputs), _options(part)
            kernels = vector.reshape(self.filters, -1, *part.geometry.kernel)
            dims = len(part.geometry.kernel)
            maps = getattr(F, f"conv{dims}d")(inputs, kernels, **options)
            each = maps.flatten(2).repeat_interleave(self._per_filter, 1)
            moved = (part.jacobian * each).sum(-1, keepdim=True)  # <a_k, v_k>
            pulled = directions.mT @ (signs.unsqueeze(-1) * (directions @ moved)) * part.jacobian
            if part.second_derivative is not None:
                pulled = pulled + _bend(part) * each
            pulled = pulled.unflatten(1, (-1, self._per_filter)).sum(2).reshape(maps.shape)
            total += getattr(grad, f"conv{dims}d_weight")(inputs, kernels.shape, pulled, **options).flatten()
        return total / self.samples

    def _filters(self) -> Iterator[slice]:
        """Yield groups of filters whose gradients of all samples fit into memory; each sees one group's inputs."""
        groups = self._parts[0].geometry.groups
        step = max(1, _CHUNK_BYTES // (8 * self.samples * self.weights))
        together = self.filters // groups
        for first in range(0, self.filters, together):
            for start in range(first, first + together, step):
                yield slice(start, min(start + step, first + together))

    def _chunks(self) -> Iterator[tuple[PooledDerivatives, Tensor, Tensor]]:
        """Yield groups of samples in float64 with directions and signs."""
        for part, directions, signs in zip(self._parts, self._directions, self._signs, strict=True):
            patches = part.jacobian.shape[2] * part.geometry.groups * self.weights
            step = max(1, _CHUNK_BYTES // (8 * max(self.size, patches)))
            for start in range(0, len(part), step):
                chunk = slice(start, start + step)
                yield part.select(chunk).to(torch.float64), directions[chunk], signs[chunk]


def _directions(part: PooledDerivatives) -> tuple[Float[Tensor, "n r k"], Float[Tensor, "n r"]]:
    """Return factors of the curvature in the pooled features, in the order of the filters, and their signs."""
    factor, signs = cotangents(part.loss, part.logits, part.target)
    directions = factor @ part.used_head
    if part.head_curvature is None:
        return directions, signs
    bent = part.head_curvature.dense()[:, part.feature_index][:, :, part.feature_index]
    bent = bent * part.is_fed * part.is_fed.unsqueeze(-1)
    values, vectors = torch.linalg.eigh((directions * signs.unsqueeze(-1)).mT @ directions + bent)
    return vectors.mT * values.abs().sqrt().unsqueeze(-1), values.sign()


def _bend(part: PooledDerivatives) -> Float[Tensor, "n k s"]:
    """Return the gradient of the loss in each feature times the feature's second derivatives."""
    assert part.second_derivative is not None
    gradient = part.loss.logit_gradient(part.logits.unsqueeze(-1), part.target).mT
    return (gradient @ part.used_head).mT * part.second_derivative


def _gradients(part: PooledDerivatives, filters: slice) -> Float[Tensor, "n k d"]:
    """Return the gradients of some filters of one group."""
    group = filters.start * part.geometry.groups // part.jacobian.shape[1]
    inputs = part.inputs.unflatten(1, (part.geometry.groups, -1))[:, group].double()
    return LF.gradient_rows(inputs, part.jacobian[:, filters].double(), part.geometry._replace(groups=1))


def _options(part: PooledDerivatives) -> dict[str, Any]:
    geometry = part.geometry
    return {"stride": geometry.stride, "dilation": geometry.dilation, "groups": geometry.groups}
