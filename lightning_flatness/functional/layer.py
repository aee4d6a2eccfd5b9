"""Trace and relative flatness that cotangents at the output of a layer contribute, without a gradient per sample."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_flatness.functional.patches import ConvGeometry, gradient_rows, gram_factors


def flatness_of_cotangents(
    inputs: Float[Tensor, "n i ..."],
    cotangents: Float[Tensor, "n m k s"],
    geometry: ConvGeometry,
    kernel_gram: Float[Tensor, "k k"] | None = None,
) -> tuple[Float[Tensor, "n m"], Float[Tensor, "n m"] | None]:
    r"""Return what each cotangent contributes to the trace and to the relative flatness of a layer.

    $$t_m = \Vert \delta_m P \Vert^2 = \operatorname{Tr}(\delta_m T \delta_m^\top), \qquad
    \kappa_m = \operatorname{Tr}(W W^\top \delta_m T \delta_m^\top), \qquad T = P P^\top$$

    with the patches \(P\), the filters \(W\) and the cotangents \(\delta_m\) at the layer's output. For cotangents
    \(\delta_m = J^\top F_m\) with \(F^\top F = B\), the curvature of the loss with respect to the logits, and the
    Jacobian \(J\) of the logits with respect to the output, their sums over \(m\) are the layer's trace and relative
    flatness. A linear layer is a convolution of kernel 1 over the positions at which it is applied.

    Args:
        inputs: input of the layer, shape (n, channels, *space).
        cotangents: \(\delta\), shape (n, m, k, s).
        geometry: geometry of the layer as a convolution.
        kernel_gram: \(W W^\top\), shape (k, k); None: the relative flatness is not wanted.

    Returns:
        Contributions to the trace and to relative flatness, each of shape (n, m).

    Example:
        >>> import torch
        >>> from lightning_flatness.functional import ConvGeometry, flatness_of_cotangents
        >>> inputs, cotangents = torch.tensor([[[3.0], [4.0]]]), torch.tensor([[[[1.0], [2.0]]]])
        >>> flatness_of_cotangents(inputs, cotangents, ConvGeometry.linear(), torch.eye(2))  # |x|^2 |delta|^2
        (tensor([[125.]]), tensor([[125.]]))
    """
    count, groups = cotangents.shape[1], geometry.groups
    factors = gram_factors(inputs, _by_group(cotangents, groups), geometry)
    left, right = (_by_cotangent(factor, count, groups) for factor in factors)
    if kernel_gram is None or left.shape[2] > left.shape[3]:
        trace = (left * right).sum((2, 3))
        if kernel_gram is None:
            return trace, None
        return trace, (torch.tensordot(left, kernel_gram, ([2], [0])) * right.mT).sum((2, 3))  # one product for all
    gram = left @ right.mT  # smaller than its factors
    return gram.diagonal(dim1=2, dim2=3).sum(2), (gram * kernel_gram).sum((2, 3))


def gradients_of_cotangents(
    inputs: Float[Tensor, "n i ..."], cotangents: Float[Tensor, "n m k s"], geometry: ConvGeometry
) -> Float[Tensor, "n m k d"]:
    r"""Return the gradients \(\delta_m P\) themselves, for a layer that runs several times: they add up.

    Args:
        inputs: input of the layer, shape (n, channels, *space).
        cotangents: \(\delta\), shape (n, m, k, s).
        geometry: geometry of the layer as a convolution.

    Returns:
        The gradients, shape (n, m, k, d); the last axis as `gradient_rows` has it.

    Example:
        >>> import torch
        >>> from lightning_flatness.functional import ConvGeometry, gradients_of_cotangents
        >>> inputs, cotangents = torch.tensor([[[3.0], [4.0]]]), torch.tensor([[[[1.0], [2.0]]]])
        >>> gradients_of_cotangents(inputs, cotangents, ConvGeometry.linear())
        tensor([[[[3., 4.],
                  [6., 8.]]]])
    """
    count, groups = cotangents.shape[1], geometry.groups
    return _by_cotangent(gradient_rows(inputs, _by_group(cotangents, groups), geometry), count, groups)


def _by_group(cotangents: Float[Tensor, "n m k s"], groups: int) -> Float[Tensor, "n mk s"]:
    """Return the cotangents as those of more filters; the filters of a group stand together."""
    return cotangents.unflatten(2, (groups, -1)).transpose(1, 2).flatten(1, 3)


def _by_cotangent(rows: Float[Tensor, "n mk r"], count: int, groups: int) -> Float[Tensor, "n m k r"]:
    return rows.unflatten(1, (groups, count, -1)).transpose(1, 2).flatten(2, 3)
