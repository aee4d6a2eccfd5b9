"""The curvature of the loss as a product of factors, whose rows are pulled back: all, or some of them."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_flatness.curvature.objective import Objective
from lightning_flatness.errors import Refusal
from lightning_flatness.functional import longest_first, sign_probe, two_pass_cotangents
from lightning_flatness.losses import CrossEntropy, Differentiated, cotangents


def loss_factor(goal: Objective) -> tuple[Tensor, Tensor | None]:
    """Return `F` with `B = F^T diag(signs) F`, the curvature of the loss at the cut, shape (m, n, j), and the signs.

    With more classes than numbers at the cut, the factor has as many rows as there are numbers.

    Args:
        goal: what the loss is as a function of the cut, which is where a curved head ends.

    Returns:
        The factor, and the signs of its rows, shape (m, n); None: all positive.
    """
    rows, signs = _rows(goal)
    if len(rows) > rows.shape[2] and not isinstance(goal.loss, Differentiated):
        rows = torch.linalg.qr(rows.transpose(0, 1), mode="r").R.transpose(0, 1)
    return rows, signs


def _rows(goal: Objective) -> tuple[Tensor, Tensor | None]:
    """Return a factor with a row for each class, or for each but one."""
    rows, signs = cotangents(goal.loss, goal.logits, goal.target)
    return (rows @ goal.head).transpose(0, 1), None if bool((signs > 0).all()) else signs.T


def estimated_factor(goal: Objective, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
    """Return two rows whose curvature is that of all rows in the mean over random signs; see `loss_factor`.

    Under cross-entropy they are the margin, which is exact, and the competitors with random signs. For other losses the
    one has all positive rows with random signs, the other all negative ones.

    Args:
        goal: what the loss is as a function of the cut.
        generator: of the signs.
    """
    loss, logits, target = goal.loss, goal.logits, goal.target
    if isinstance(loss, CrossEntropy) and target is not None and logits.shape[1] > 1:
        scale = loss.label_weight(logits, target).sqrt()[:, None, None]
        rows = scale * two_pass_cotangents(logits, target if target.dim() == 1 else target.argmax(-1), generator)
        return (rows @ goal.head).transpose(0, 1), None
    rows, signs = loss_factor(goal)
    kinds = rows.new_tensor([1.0] if signs is None else [1.0, -1.0])
    positive = rows.new_ones(rows.shape[:2]) if signs is None else signs
    chosen = ((rows * (positive == kind).unsqueeze(-1)).transpose(0, 1) for kind in kinds)
    probes = torch.stack([sign_probe(each, generator) for each in chosen])
    return probes, None if signs is None else kinds.unsqueeze(1).expand(-1, rows.shape[1])


def longest_factor(goal: Objective, count: int) -> tuple[Tensor, None]:
    """Return the longest rows of each sample, whose curvature is a lower bound; see `loss_factor`.

    Args:
        goal: what the loss is as a function of the cut.
        count: how many rows.

    Raises:
        UnsupportedTailError: if some rows have negative signs.
    """
    rows, signs = _rows(goal)
    if signs is not None:
        raise Refusal(
            "A lower bound needs a loss that is convex where the network ends; this one has negative curvature for "
            "some samples. Leave `longest` out."
        ).error()
    return longest_first(rows.transpose(0, 1))[:, :count].transpose(0, 1), None
