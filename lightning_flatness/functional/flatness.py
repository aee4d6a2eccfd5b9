"""Hessian trace and relative flatness of one convolution, per sample, in closed form."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def hessian_trace(
    filter_gram: Float[Tensor, "n k k"],
    curvature: Float[Tensor, "n k k"],
    label_term: Float[Tensor, "n k"] | None = None,
) -> Float[Tensor, " n"]:
    r"""Return `Tr H = sum_k (R_kk Q_kk + t_k)`, the trace of the loss's Hessian in the filters.

    Source: Taleghani, Mohammadi, Marchetti, arXiv 2603.09016.

    Args:
        filter_gram: `R`, see `patches.filter_gram`, shape (n, k, k).
        curvature: `Q = V^T (diag(S) - S S^T) V`, shape (n, k, k).
        label_term: `t`, the part that a curved activation adds; None where it is piecewise linear, shape (n, k).

    Returns:
        The trace per sample, shape (n,); loss per squared weight; lower is flatter.
    """
    trace = (filter_gram.diagonal(dim1=1, dim2=2) * curvature.diagonal(dim1=1, dim2=2)).sum(-1)
    return trace if label_term is None else trace + label_term.sum(-1)


def relative_flatness(
    kernel_gram: Float[Tensor, "k k"],
    filter_gram: Float[Tensor, "n k k"],
    curvature: Float[Tensor, "n k k"],
    label_term: Float[Tensor, "n k"] | None = None,
) -> Float[Tensor, " n"]:
    r"""Return `kappa = sum_{k,k'} <W_k, W_k'> Tr H_{kk'}`, relative flatness of the filters.

    With `Tr H_{kk'} = R_kk' Q_kk'` plus `t_k` on the diagonal. Unlike the trace it does not change when a
    filter is rescaled and the next layer undoes it.

    Source: Petzka et al., NeurIPS 2021; for convolutions under global average pooling arXiv 2603.09016.

    Args:
        kernel_gram: `W W^T`, shape (k, k).
        filter_gram: `R`, see `patches.filter_gram`, shape (n, k, k).
        curvature: `Q = V^T (diag(S) - S S^T) V`, shape (n, k, k).
        label_term: `t`, see `hessian_trace`, shape (n, k).

    Returns:
        Relative flatness per sample, shape (n,); unit of the loss; lower is flatter.
    """
    value = (filter_gram * curvature * kernel_gram).flatten(1).sum(-1)
    return value if label_term is None else value + label_term @ kernel_gram.diagonal()
