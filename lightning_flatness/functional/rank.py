"""Upper bounds of the rank of a layer's Hessian."""

from __future__ import annotations


def rank_bound(filters: int, weights: int, samples: int, classes: int) -> int:
    r"""Return an upper bound of the rank of a layer's mean Hessian under cross-entropy.

    $$\operatorname{rank} H \le \min\bigl(K D,\; N (C - 1)\bigr)$$

    Each sample adds \(J^\top B J\), where \(J\) is the Jacobian of the logits with respect to the weights and the
    curvature \(B\) of the loss has rank \(C - 1\) at most. The bound holds where the network is piecewise linear after
    the layer; the label term of a curved activation may add to the rank.

    Args:
        filters: \(K\), output channels of the layer.
        weights: \(D\), weights per output channel.
        samples: \(N\).
        classes: \(C\).

    Returns:
        The bound; the rest of the \(K D\) eigenvalues are zero.

    Example:
        >>> from lightning_flatness.functional import rank_bound
        >>> rank_bound(filters=64, weights=576, samples=100, classes=10)
        900
    """
    return min(filters * weights, samples * (classes - 1))


def head_rank_bound(features: int, classes: int) -> int:
    r"""Return an upper bound of the rank of an affine classifier's Hessian under cross-entropy.

    $$\operatorname{rank} H \le (C - 1)(F + 1)$$

    Adding the same affine function to all logits changes no prediction. So \(F + 1\) of the \(C (F + 1)\) directions
    in the space of weights and biases are flat.

    Args:
        features: \(F\), inputs of the classifier.
        classes: \(C\).

    Returns:
        The bound for weights and biases together.

    Example:
        >>> from lightning_flatness.functional import head_rank_bound
        >>> head_rank_bound(features=512, classes=10)
        4617
    """
    return (classes - 1) * (features + 1)
