"""Bounds of the rank of a layer's Hessian."""

from __future__ import annotations


def rank_bound(filters: int, weights: int, samples: int, classes: int) -> int:
    r"""Return `min(K D, N (C - 1))`, which the rank of a layer's mean Hessian under cross-entropy cannot exceed.

    Each sample adds `J^T B J` with a curvature `B` of rank C - 1 at most. It holds where the network is piecewise
    linear after the layer; the label term of a curved activation may add to the rank.

    Args:
        filters: `K`, output channels of the layer.
        weights: `D`, weights per output channel.
        samples: `N`.
        classes: `C`.

    Returns:
        The bound; out of `K D` eigenvalues at least the others are zero.

    Example:
        >>> rank_bound(filters=64, weights=576, samples=100, classes=10)
        900
    """
    return min(filters * weights, samples * (classes - 1))


def head_rank_bound(features: int, classes: int) -> int:
    r"""Return `(C - 1)(d + 1)`, which the rank of an affine classifier's Hessian under cross-entropy cannot exceed.

    Adding the same affine function to all logits changes no prediction, so `d + 1` directions of the `C (d + 1)`
    weights and biases are flat.

    Args:
        features: `d`, inputs of the classifier.
        classes: `C`.

    Returns:
        The bound, weights and biases together.

    Example:
        >>> head_rank_bound(features=512, classes=10)
        4617
    """
    return (classes - 1) * (features + 1)
