"""The curvature of the loss as a product of factors, whose rows are pulled back through the network."""

from __future__ import annotations

from torch import Tensor

from lightning_flatness.curvature.objective import Objective
from lightning_flatness.losses import cotangents


def loss_factor(goal: Objective) -> tuple[Tensor, Tensor | None]:
    """Return `F` with `B = F^T diag(signs) F`, the curvature of the loss at the cut, shape (m, n, j), and the signs.

    Args:
        goal: what the loss is as a function of the cut, which is where a curved head ends.

    Returns:
        The factor, and the signs of its rows, shape (m, n); None: all positive.
    """
    rows, signs = cotangents(goal.loss, goal.logits, goal.target)
    rows = rows @ goal.head
    return rows.transpose(0, 1), None if bool((signs > 0).all()) else signs.T
