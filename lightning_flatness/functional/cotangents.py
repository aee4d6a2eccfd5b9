"""The softmax curvature as two parts: the true class against the rest, and the wrong classes among themselves."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lightning_flatness.functional.curvature import curvature_factor, without_subnormals


def margin_cotangent(logits: Float[Tensor, "n c"], target: Int[Tensor, " n"]) -> Float[Tensor, "n c"]:
    r"""Return the part of the softmax curvature's factor that sets the true class against the rest.

    $$B = v v^\top + \text{competitors}, \qquad v = \sqrt{S_y (1 - S_y)}\; (e_y - q)$$

    with the softmax \(S\), the true class \(y\), its unit vector \(e_y\) and the softmax \(q\) of the other classes
    alone. The gradient of the cross-entropy is \(-(1 - S_y)(e_y - q)\). So with the Jacobian \(J\) of the logits,
    \(\Vert J^\top v \Vert^2\), the margin's part of a Gauss-Newton trace, is the odds \(S_y / (1 - S_y)\) times the
    squared gradient. `competitor_cotangents` has the other part; both are positive semidefinite. The identity holds for
    any class in the place of the true one.

    Args:
        logits: unnormalised scores, shape (n, c) with c >= 2.
        target: class indices \(y\), shape (n,).

    Returns:
        \(v\), shape (n, c); square root of the loss per logit.

    Example:
        >>> import torch
        >>> from lightning_flatness.functional import margin_cotangent
        >>> margin_cotangent(torch.tensor([[0.0, 0.0]]), torch.tensor([1]))
        tensor([[-0.5000,  0.5000]])
    """
    true = target.unsqueeze(1)
    rivals = logits.scatter(-1, true, -torch.inf)
    log_odds = logits.gather(-1, true) - rivals.logsumexp(-1, keepdim=True)
    variance = without_subnormals(log_odds.sigmoid() * (-log_odds).sigmoid())  # S_y (1 - S_y), in full precision
    against = rivals.softmax(-1).neg().scatter(-1, true, 1.0)
    # If all rivals are masked, their softmax is not a number.
    return torch.where(variance > 0, variance.sqrt() * against, 0.0)


def competitor_cotangents(logits: Float[Tensor, "n c"], target: Int[Tensor, " n"]) -> Float[Tensor, "n r c"]:
    r"""Return the part of the softmax curvature's factor that sets the wrong classes against each other.

    $$B = v v^\top + (1 - S_y) \bigl(\operatorname{diag}(q) - q q^\top\bigr) = v v^\top + M^\top M, \qquad
    M = \sqrt{1 - S_y}\; F(q)$$

    with \(v\) and the symbols of `margin_cotangent`, and the factor \(F\) of `curvature_factor` for the wrong classes
    alone. The entries of the true class are zero. Together with \(v\) there are as many rows as in the factor of all
    classes.

    Args:
        logits: unnormalised scores, shape (n, c) with c >= 2.
        target: class indices \(y\), shape (n,).

    Returns:
        \(M\), shape (n, r, c) with r = c - 2; square root of the loss per logit.

    Example:
        >>> import torch
        >>> from lightning_flatness.functional import competitor_cotangents
        >>> competitor_cotangents(torch.zeros(1, 3), torch.tensor([0])).square()
        tensor([[[0.0000, 0.1667, 0.1667]]])
    """
    true = target.unsqueeze(1)
    rest = _without(without_subnormals(logits.softmax(-1)), true).sum(-1)[:, None, None]
    factor = curvature_factor(_without(logits, true))
    rows = torch.where(rest > 0, rest.sqrt() * factor, 0.0)
    return _with(rows, true.unsqueeze(1).expand(-1, rows.shape[1], -1), torch.zeros_like(rows[..., :1]))


def _others(index: Int[Tensor, "... one"], classes: int) -> Int[Tensor, "... r"]:
    """Return all classes but the one given."""
    rest = torch.arange(classes - 1, device=index.device)
    return rest + (rest >= index)


def _without(values: Float[Tensor, "n c"], index: Int[Tensor, "n one"]) -> Float[Tensor, "n r"]:
    return values.gather(-1, _others(index, values.shape[-1]))


def _with(
    values: Float[Tensor, "... r"], index: Int[Tensor, "... one"], value: Float[Tensor, "... one"]
) -> Float[Tensor, "... c"]:
    """Return the values with one more, inserted at the index."""
    position = torch.cat([_others(index, values.shape[-1] + 1), index], -1)
    both = torch.cat([values, value], -1)
    return torch.empty_like(both).scatter(-1, position, both)
