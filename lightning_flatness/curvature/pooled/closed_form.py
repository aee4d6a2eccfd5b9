"""The closed form: from the derivatives of a pooled convolution to the quantities of each sample."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations_with_replacement
from math import isqrt, prod
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

import lightning_flatness.functional as LF
from lightning_flatness.curvature.chunks import chunk_bytes_on
from lightning_flatness.curvature.pooled.derivatives import PooledDerivatives
from lightning_flatness.curvature.quantities import SampleQuantities
from lightning_flatness.functional.flatness import pairs_pay
from lightning_flatness.functional.gram import BLOCK_ROWS
from lightning_flatness.functional.temperature import temperatures_for
from lightning_flatness.losses import CrossEntropy, Differentiated
from lightning_flatness.precision import full_precision


class _Flatness(NamedTuple):
    """What one pass over the samples yields; the first dimension of every entry is that of the samples."""

    products: Tensor  # of the gradients of each filter's features, see `HadamardGram.pairs_of_a_filter`
    relative: Tensor
    scaled: Tensor


class _Bent(NamedTuple):
    """What the curvature of the head adds, each entry of shape (n,)."""

    trace: Tensor
    relative: Tensor
    own_trace: Tensor  # in the features


def sample_quantities(derivatives: PooledDerivatives, scale_free: bool = True) -> SampleQuantities:
    """Return every quantity that the closed form gives for this head and loss.

    Margins need labels, scale-free flatness a softmax or a sigmoid behind a piecewise linear head, the factors and the
    quantities of the classifier a linear head.

    Args:
        derivatives: of one batch.
        scale_free: whether scale-free flatness is wanted, which takes relative flatness at all temperatures.
    """
    loss, logits, target = derivatives.loss, derivatives.logits, derivatives.target
    flatness = _flatness(derivatives, scale_free)
    diagonal = _curvature_diagonal(derivatives, derivatives.head)
    uncertainty = loss.curvature_trace(logits, target)
    trace, relative = _hessian_trace(derivatives, flatness.products, diagonal), flatness.relative
    if (bent := _bent(derivatives)) is not None:
        trace, relative = trace + bent.trace, relative + bent.relative
        uncertainty = bent.own_trace if derivatives.is_own_logit else uncertainty
    return SampleQuantities(
        hessian_trace=trace,
        relative_flatness=relative,
        confidence=uncertainty,
        curvature="ggn" if derivatives.is_gauss_newton else "hessian",
        **_scale_free(derivatives, flatness),
        **_of_a_linear_head(derivatives, flatness, diagonal, uncertainty),
        **_margins(derivatives),
        **_margin_part(derivatives, flatness, diagonal),
    )


def is_ill_conditioned(derivatives: PooledDerivatives, quantities: SampleQuantities) -> bool:
    """Return whether float32 is not enough: filters of very different scale, squares that vanish, terms that cancel.

    Relative flatness is compared with its terms of each filter with itself, `sum_k |W_k|^2 |Tr H_kk|`.

    Args:
        derivatives: of one batch.
        quantities: that follow from them.
    """
    if derivatives.logits.dtype == torch.float64:
        return False
    squares = derivatives.kernel_gram.diagonal()
    own = squares.mean() * quantities.hessian_trace.abs().mean()
    doubts = (
        squares.min() < 1e-30,
        squares.max() > 1e8 * squares.min(),
        quantities.relative_flatness.abs().mean() < 1e-3 * own,
    )
    return bool(torch.stack(doubts).any())


def _scale_free(derivatives: PooledDerivatives, flatness: _Flatness) -> dict[str, Any]:
    if isinstance(derivatives.loss, Differentiated):
        return {}
    scaled = {"scaled_flatness": flatness.scaled} if flatness.scaled.shape[1] else {}
    return {**scaled, "logit_mean_square": derivatives.loss.logit_mean_square(derivatives.logits)}


def _of_a_linear_head(
    derivatives: PooledDerivatives, flatness: _Flatness, diagonal: Tensor, uncertainty: Tensor
) -> dict[str, Any]:
    if not derivatives.is_linear:
        return {}
    pairs = combinations_with_replacement(range(derivatives.features_per_filter), 2)
    squares = (products for products, (i, j) in zip(flatness.products.unbind(-1), pairs, strict=True) if i == j)
    return {
        "feature_squared_norm": sum(each.sum(1) for each in squares),
        "head_squared_norm": derivatives.used_head.square().sum(),
        "kernel_squared_norm": derivatives.kernel_gram.diagonal().sum(),
        "affine_hessian_trace": LF.affine_trace(derivatives.features, uncertainty),
        "head_relative_flatness": LF.linear_relative_flatness(derivatives.features, diagonal),
    }


def _margins(derivatives: PooledDerivatives) -> dict[str, Any]:
    loss, logits, target = derivatives.loss, derivatives.logits, derivatives.target
    if target is None or isinstance(loss, Differentiated):
        return {}
    values = {
        "prediction": loss.prediction(logits),
        "output_margin": loss.output_margin(logits, target),
        "softmax_margin": loss.softmax_margin(logits, target),
    }
    if derivatives.is_linear:
        values["margin_bound"] = LF.affine_trace(derivatives.features, loss.trace_bound(logits, target))
    return values


def _margin_part(derivatives: PooledDerivatives, flatness: _Flatness, diagonal: Tensor) -> dict[str, Any]:
    """Return the Gauss-Newton trace, and its part of the true class against the others where labels have one class."""
    loss, logits = derivatives.loss, derivatives.logits
    values = {"gauss_newton_trace": _gauss_newton_trace(derivatives, flatness.products, diagonal)}
    if isinstance(loss, CrossEntropy) and (label := loss.hard_label(derivatives.target)) is not None:
        with full_precision(logits.device):
            row = LF.margin_row(logits, label, derivatives.used_head)
        weight = loss.label_weight(logits, derivatives.target)
        margin = _sum_over_filters(flatness.products, lambda first, second: row[:, first] * row[:, second])
        values["margin_trace"] = weight * margin
    return values


def hessian_trace(derivatives: PooledDerivatives) -> Float[Tensor, " n"]:
    """Return the Hessian trace of each sample alone, from diagonals; far cheaper than all quantities.

    See `functional.hessian_trace`; a curved activation adds its label term.

    Args:
        derivatives: of one batch.
    """
    (products,) = _by_chunks(derivatives, lambda chunk: (_gram(chunk).pairs_of_a_filter(),))
    trace = _hessian_trace(derivatives, products, _curvature_diagonal(derivatives, derivatives.head))
    return trace if (bent := _bent(derivatives)) is None else trace + bent.trace


def relative_flatness(derivatives: PooledDerivatives) -> Float[Tensor, "n u"]:
    """Return the relative flatness of each sample, of the predictor itself and at all temperatures.

    See `functional.relative_flatness`; a curved activation adds its label term.

    Args:
        derivatives: of one batch.

    Returns:
        The value of the predictor itself, then those at `functional.TEMPERATURES`, shape (n, 1 + t).
    """
    flatness, bent = _flatness(derivatives), _bent(derivatives)
    relative = flatness.relative if bent is None else flatness.relative + bent.relative
    return torch.cat([relative.unsqueeze(1), flatness.scaled], 1)


def _bent(derivatives: PooledDerivatives) -> _Bent | None:
    """Return what the curvature of the head adds; its columns come in groups for all samples."""
    curvature = derivatives.head_curvature
    if curvature is None:
        return None
    factors = _by_chunks(derivatives, lambda chunk: _gram(chunk)[1:])
    gram, index = LF.HadamardGram(derivatives.kernel_gram, *factors), derivatives.feature_index
    fed, is_in_order = derivatives.is_fed, torch.equal(index, torch.arange(derivatives.features.shape[1]).to(index))
    total = _Bent(*derivatives.logits.new_zeros(3, len(derivatives)))
    at_once = chunk_bytes_on(derivatives.logits.device, derivatives.chunk_bytes)
    for columns, rows in curvature.columns(at_once // 4):  # which are copied
        own = rows[:, :, columns].diagonal(dim1=1, dim2=2).sum(-1)
        features = ((columns.start <= index) & (index < columns.stop) & fed).nonzero().squeeze(1)
        if not (is_in_order and fed.all()):
            rows = rows[:, index[features] - columns.start][..., index] * fed
        with full_precision(derivatives.logits.device):
            sums = *gram.contraction(rows, features), own
        total = _Bent(*(whole + part for whole, part in zip(total, sums, strict=True)))
    return total


def _hessian_trace(
    derivatives: PooledDerivatives, products: Float[Tensor, "n k p"], diagonal: Float[Tensor, "n j"]
) -> Float[Tensor, " n"]:
    """Return the trace without what the curvature of the head adds."""
    trace = _gauss_newton_trace(derivatives, products, diagonal)
    if derivatives.second_derivative is None:
        return trace
    with full_precision(derivatives.logits.device):
        return trace + _label_term(
            derivatives, derivatives.logits.unsqueeze(-1), _activation_curvature(derivatives)
        ).squeeze(1)


def _gauss_newton_trace(
    derivatives: PooledDerivatives, products: Float[Tensor, "n k p"], diagonal: Float[Tensor, "n j"]
) -> Float[Tensor, " n"]:
    head, own = derivatives.used_head, diagonal[:, derivatives.feature_index] * derivatives.is_fed

    def curvature(first: slice, second: slice) -> Float[Tensor, "n k"]:
        if first == second:
            return own[:, first]
        # What is off the diagonal of `Q` follows from that of the sum of two columns of the head.
        both = _curvature_diagonal(derivatives, head[..., first] + head[..., second])
        return (both - own[:, first] - own[:, second]) / 2

    return _sum_over_filters(products, curvature)


def _sum_over_filters(
    products: Float[Tensor, "n k p"], curvature: Callable[[slice, slice], Float[Tensor, "n k"]]
) -> Float[Tensor, " n"]:
    """Return the sum of `R_ff' C_ff'` over all pairs of features of the same filter.

    Args:
        products: `R` of each pair, see `HadamardGram.pairs_of_a_filter`.
        curvature: `C` of two features of every filter, which the slices take of all features.
    """
    count = (isqrt(8 * products.shape[-1] + 1) - 1) // 2
    parts = [slice(i, None, count) for i in range(count)]
    total = products.new_zeros(len(products))
    for product, (first, second) in zip(products.unbind(-1), combinations_with_replacement(parts, 2), strict=True):
        total = total + (1 + (first != second)) * LF.hessian_trace(product, curvature(first, second))
    return total


def _flatness(derivatives: PooledDerivatives, scale_free: bool = True) -> _Flatness:
    return _Flatness(*_by_chunks(derivatives, lambda chunk: _chunk_flatness(chunk, scale_free)))


def _chunk_flatness(derivatives: PooledDerivatives, scale_free: bool) -> _Flatness:
    gram, logits = _gram(derivatives), derivatives.logits
    taus = temperatures_for(logits, scale_free and derivatives.has_temperatures)
    scaled = logits.unsqueeze(-1) / taus
    loss, target = derivatives.loss, derivatives.target
    flatness = loss.relative_flatness(scaled, derivatives.used_head, gram, target) / taus.square()
    if derivatives.second_derivative is not None:
        squares = derivatives.kernel_gram.diagonal().repeat_interleave(derivatives.features_per_filter)
        added = _activation_curvature(derivatives) * squares
        flatness = flatness + _label_term(derivatives, scaled, added) / taus
    return _Flatness(gram.pairs_of_a_filter(), flatness[:, 0], flatness[:, 1:])


def _curvature_diagonal(derivatives: PooledDerivatives, head: Float[Tensor, "*n c j"]) -> Float[Tensor, "n j"]:
    """Return `Q_jj` for columns of the head."""
    with full_precision(derivatives.logits.device):
        return derivatives.loss.curvature_diagonal(derivatives.logits, head, derivatives.target)


def _gram(derivatives: PooledDerivatives) -> LF.HadamardGram:
    factors = LF.gram_factors(derivatives.inputs, derivatives.jacobian, derivatives.geometry)
    return LF.HadamardGram(derivatives.kernel_gram, *factors)


def _activation_curvature(derivatives: PooledDerivatives) -> Float[Tensor, "n f"]:
    """Return `sum_s (d2 p_f / d z_fs^2) |P_s|^2`, the trace of feature f's own Hessian in its filter."""
    geometry, second = derivatives.geometry, derivatives.second_derivative
    assert second is not None
    grouped = second.unflatten(1, (geometry.groups, -1))
    squared_norm = LF.patch_squared_norm(derivatives.inputs, geometry).unsqueeze(2)
    return (grouped * squared_norm).sum(-1).flatten(1)


def _label_term(
    derivatives: PooledDerivatives, logits: Float[Tensor, "n c t"], added: Float[Tensor, "n f"]
) -> Float[Tensor, "n t"]:
    """Return `sum_f t_f`: what the curvature of the activation adds through the gradient of the loss in the logits."""
    return derivatives.loss.logit_gradient_product(logits, _pushed(added, derivatives.used_head), derivatives.target)


def _pushed(vectors: Float[Tensor, "n f"], head: Float[Tensor, "*n c f"]) -> Float[Tensor, "n c"]:
    return (head @ vectors.unsqueeze(-1)).squeeze(-1)


def _by_chunks(
    derivatives: PooledDerivatives, function: Callable[[PooledDerivatives], tuple[Tensor, ...]]
) -> list[Tensor]:
    """Return what the function does, by chunks of samples under `chunk_bytes`, or smaller ones if memory is short."""
    step = max(1, chunk_bytes_on(derivatives.logits.device, derivatives.chunk_bytes) // _bytes_per_sample(derivatives))
    with full_precision(derivatives.logits.device):
        while True:
            starts = range(0, max(1, len(derivatives)), step)
            try:
                parts = [function(derivatives.select(slice(start, start + step))) for start in starts]
                return list(map(torch.cat, zip(*parts, strict=True)))
            except torch.OutOfMemoryError:
                if step == 1:
                    raise
                step = (min(step, len(derivatives)) + 1) // 2


def _bytes_per_sample(derivatives: PooledDerivatives) -> int:
    """Return an estimate of what temporary tensors take for one sample."""
    classes, filters, temperatures = derivatives.head.shape[-2], derivatives.jacobian.shape[1], 1 + len(LF.TEMPERATURES)
    pixels = prod(derivatives.geometry.padded_shape(derivatives.inputs.shape[2:]))
    weights = derivatives.inputs.shape[1] * prod(derivatives.geometry.kernel)
    rows = classes if pairs_pay(classes, filters, temperatures) else classes + temperatures
    numbers = 3 * rows * filters + 3 * temperatures * classes
    numbers += pixels * min(2 * pixels, weights) + 2 * filters * min(pixels, weights)
    if derivatives.features_per_filter > 1:
        numbers += 3 * rows * len(derivatives.kernel_gram) * min(pixels, weights)
    if derivatives.logits.is_cuda:  # where a block of the Gram matrix holds all samples of a chunk
        numbers += min(BLOCK_ROWS, filters) * filters
    return numbers * derivatives.jacobian.element_size()
