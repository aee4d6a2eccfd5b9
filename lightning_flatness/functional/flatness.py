"""Hessian trace and relative flatness, per sample, in closed form; and what they are made of."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_flatness.functional.curvature import confidence, curvature_diagonal, without_subnormals
from lightning_flatness.functional.gram import HadamardGram
from lightning_flatness.functional.margin import affine_squared_norm


def hessian_trace(
    filter_squared_norm: Float[Tensor, "n k"], curvature_diagonal: Float[Tensor, "n k"]
) -> Float[Tensor, " n"]:
    r"""Return `Tr H = sum_k R_kk Q_kk`, the trace of the loss's Hessian in the filters.

    A curved activation adds `sum_k t_k`, which is linear in the label, see `TailFactors`.

    Source: Taleghani, Mohammadi, Marchetti, arXiv 2603.09016.

    Args:
        filter_squared_norm: `R_kk`, the diagonal of `filter_gram`, shape (n, k).
        curvature_diagonal: `Q_kk` with `Q = V^T B V`, see `curvature_diagonal`, shape (n, k).

    Returns:
        The trace per sample, shape (n,); loss per squared weight; lower is flatter.
    """
    return (filter_squared_norm * curvature_diagonal).sum(-1)


def relative_flatness(
    logits: Float[Tensor, "n c t"], rows: Float[Tensor, "n c k"], gram: HadamardGram
) -> Float[Tensor, "n t"]:
    r"""Return `kappa = sum_{k,k'} <W_k, W_k'> Tr H_{kk'}`, relative flatness of the filters.

    With `Tr H_{kk'} = R_kk' Q_kk'` it is `Tr(B V G V^T)`, `G = (W W^T) * R` entry by entry: for the softmax
    curvature the variance of the classifier's row of a class drawn from `S`, under the metric `G`. By counted
    multiply-adds it is taken from the distances between all pairs of rows, or from the squares of the rows and
    of their mean at every temperature. Unlike the trace it does not change when a filter is rescaled and the
    next layer undoes it.

    Source: Petzka et al., NeurIPS 2021; for convolutions under global average pooling arXiv 2603.09016.

    Args:
        logits: unnormalised scores at one or several temperatures, shape (n, c, t).
        rows: of the classifier, see `centred_rows`, shape (n, c, k).
        gram: `G`.

    Returns:
        Relative flatness per sample, shape (n, t); unit of the loss; lower is flatter.
    """
    probabilities = without_subnormals(logits.softmax(1))
    (classes, temperatures), filters = probabilities.shape[1:], rows.shape[-1]
    if pairs_pay(classes, filters, temperatures):
        products = gram.inner_products(rows)
        squares = products.diagonal(dim1=1, dim2=2)
        distances = squares.unsqueeze(2) + squares.unsqueeze(1) - 2 * products
        return (distances @ probabilities).mul_(probabilities).sum(1) / 2
    squares = gram.quadratic_forms(torch.cat([rows, probabilities.mT @ rows], 1))
    return (probabilities * squares[:, :classes, None]).sum(1) - squares[:, classes:]


def pairs_pay(classes: int, filters: int, temperatures: int) -> bool:
    """Return whether `relative_flatness` takes fewer operations from pairs of rows than from their means."""
    return classes**2 * (filters + temperatures) < temperatures * filters * (classes + filters)


def affine_hessian_trace(features: Float[Tensor, "n j"], logits: Float[Tensor, "n c"]) -> Float[Tensor, " n"]:
    r"""Return `(|x|^2 + 1) (1 - |S|^2)`, the Hessian trace of an affine classifier under cross-entropy (ACEHT).

    The trace over weight and bias; the 1 belongs to the bias. In a network `x` is the classifier's own input.

    Source: "On flat minima, large margins and generalizability".

    Args:
        features: `x`, the input of the classifier, shape (n, j).
        logits: its output, shape (n, c).

    Returns:
        The trace per sample, shape (n,); loss per squared weight; lower is flatter.

    Example:
        >>> import torch
        >>> affine_hessian_trace(torch.tensor([[2.0]]), torch.tensor([[1.0, 1.0]]))
        tensor([2.5000])
    """
    return affine_squared_norm(features) * confidence(logits)


def head_relative_flatness(
    features: Float[Tensor, "n j"], logits: Float[Tensor, "n c"], weight: Float[Tensor, "c j"]
) -> Float[Tensor, " n"]:
    r"""Return `|x|^2 (sum_c S_c |V_c|^2 - |V^T S|^2)`, relative flatness of the linear classifier.

    Its bias has no part in it. Computed without cancellation, see `curvature_diagonal`.

    Source: Petzka et al., NeurIPS 2021; "On flat minima, large margins and generalizability".

    Args:
        features: `x`, the input of the classifier, shape (n, j).
        logits: its output, shape (n, c).
        weight: `V`, shape (c, j).

    Returns:
        Relative flatness per sample, shape (n,); unit of the loss; lower is flatter.

    Example:
        >>> import torch
        >>> head_relative_flatness(torch.ones(1, 2), torch.zeros(1, 2), torch.tensor([[3.0, 0.0], [0.0, 0.0]]))
        tensor([4.5000])
    """
    return features.square().sum(-1) * curvature_diagonal(logits, weight).sum(-1)


def attribution(
    relative: Tensor, confidence: Tensor, head: Tensor, kernel: Tensor, features: Tensor
) -> dict[str, Tensor]:
    r"""Return the five factors of relative flatness, `kappa = c v w r g`: their product is `kappa`.

    The change of `log kappa` since a reference is the sum of the changes of the five logarithms. Where a curved
    activation adds its label term, it is in `kappa` and so in `g`, which may then be negative: it has no
    logarithm there, and the product holds all the same.

    Args:
        relative: mean relative flatness `kappa`.
        confidence: `c`, mean trace of the loss's curvature in the logits.
        head: `v = |V|_F^2`.
        kernel: `w = |W|_F^2`.
        features: `r`, mean of `Tr R`.

    Returns:
        The four given factors and `alignment`, `g = kappa / (c v w r)`; 0 where one of the others is 0.
    """
    size = confidence * head * kernel * features
    alignment = torch.where(size == 0, 0.0, relative / size)
    return {
        "confidence": confidence,
        "head": head,
        "kernel": kernel,
        "features": features,
        "alignment": alignment,
    }
