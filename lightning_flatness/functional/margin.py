"""Margins between the true class and its strongest rival."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def output_margin(logits: Float[Tensor, "n c"], target: Int[Tensor, " n"], signed: bool = True) -> Float[Tensor, " n"]:
    r"""Return `gamma = phi_y - max_{j != y} phi_j`, the margin of the true class in the logits.

    Source: "On flat minima, large margins and generalizability" (its definition is the absolute value).

    Args:
        logits: unnormalised scores, shape (n, c), c >= 2.
        target: class indices, shape (n,).
        signed: negative where the sample is misclassified; False gives the absolute value.

    Returns:
        Margins, shape (n,); unit of the logits; higher is better; 0 for a tie; infinite where either of the two
        classes is masked by a logit of minus infinity.

    Example:
        >>> import torch
        >>> output_margin(torch.tensor([[3.0, 1.0], [3.0, 1.0]]), torch.tensor([0, 1]))
        tensor([ 2., -2.])
    """
    true, rival = _true_and_rival(logits, target)
    margin = (true - rival).squeeze(-1)
    return margin if signed else margin.abs()


def softmax_margin(logits: Float[Tensor, "n c"], target: Int[Tensor, " n"], signed: bool = True) -> Float[Tensor, " n"]:
    r"""Return `gamma = S_y - max_{j != y} S_j`, the margin of the true class in the softmax `S`.

    Source: "On flat minima, large margins and generalizability" (its definition is the absolute value).

    Args:
        logits: unnormalised scores, shape (n, c), c >= 2.
        target: class indices, shape (n,).
        signed: negative where the sample is misclassified; False gives the absolute value.

    Returns:
        Margins in [-1, 1], shape (n,); no unit; higher is better.

    Example:
        >>> import torch
        >>> softmax_margin(torch.tensor([[3.0, 3.0, 0.0]]), torch.tensor([1]))
        tensor([0.])
    """
    return output_margin(logits.softmax(-1), target, signed)


def margin_gap(logits: Float[Tensor, "n c"], target: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    r"""Return `1 - gamma^2` for the softmax margin `gamma`, precise at any confidence.

    The product of `1 - gamma = sum_{c != y} S_c + S_j` and `1 + gamma = sum_{c != j} S_c + S_y`, with `j` the
    strongest rival: sums of positive numbers, without the rounding of `1 - (S_y - S_j)`.

    Args:
        logits: unnormalised scores, shape (n, c), c >= 2.
        target: class indices, shape (n,).

    Returns:
        Values in [0, 1], shape (n,); no unit; lower is better for a correctly classified sample.

    Example:
        >>> import torch
        >>> margin_gap(torch.tensor([[40.0, 0.0]]), torch.tensor([0]))
        tensor([1.6993e-17])
    """
    probabilities = logits.softmax(-1)
    index = target.unsqueeze(-1)
    rival = probabilities.scatter(-1, index, -1.0).argmax(-1, keepdim=True)
    without_true = probabilities.scatter(-1, index, 0.0).sum(-1, keepdim=True)
    without_rival = probabilities.scatter(-1, rival, 0.0).sum(-1, keepdim=True)
    below = without_true + probabilities.gather(-1, rival)
    above = without_rival + probabilities.gather(-1, index)
    return (below * above).squeeze(-1)


def margin_bound(
    features: Float[Tensor, "n j"], logits: Float[Tensor, "n c"], target: Int[Tensor, " n"]
) -> Float[Tensor, " n"]:
    r"""Return `(|x|^2 + 1) (1 - gamma^2)`, a bound of the affine classifier's Hessian trace by the softmax margin.

    It follows from `1 - |S|^2 <= 1 - S_top^2 <= 1 - gamma^2`, see `affine_hessian_trace`.

    Source: "On flat minima, large margins and generalizability".

    Args:
        features: `x`, the input of the affine classifier, shape (n, j).
        logits: unnormalised scores, shape (n, c), c >= 2.
        target: class indices, shape (n,).

    Returns:
        Bounds, shape (n,); loss per squared weight; lower is flatter.

    Example:
        >>> import torch
        >>> margin_bound(torch.tensor([[2.0]]), torch.tensor([[1.0, 1.0]]), torch.tensor([0]))
        tensor([5.])
    """
    return affine_squared_norm(features) * margin_gap(logits, target)


def affine_squared_norm(features: Float[Tensor, "n j"]) -> Float[Tensor, " n"]:
    """Return `|x|^2 + 1`, the squared norm of an affine classifier's input with the 1 that its bias sees."""
    return features.square().sum(-1) + 1


def binary_margin(logits: Float[Tensor, "n c"], labels: Float[Tensor, "n c"]) -> Float[Tensor, " n"]:
    r"""Return `min_c (2 y_c - 1) phi_c`, the margin of several binary decisions.

    The smallest of the decisions' own margins: positive where all of them are right. For one logit it is the
    output margin of the two classes whose logits are 0 and `phi`.

    Args:
        logits: one logit per label, shape (n, c).
        labels: 1 where the label holds, 0 where not; above 1/2 counts as 1, shape (n, c).

    Returns:
        Margins, shape (n,); unit of the logits; higher is better.

    Example:
        >>> import torch
        >>> binary_margin(torch.tensor([[3.0, -1.0]]), torch.tensor([[1.0, 0.0]]))
        tensor([1.])
    """
    return torch.where(labels > 0.5, logits, -logits).amin(-1)


def _true_and_rival(scores: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return the true class's score and the largest of the others, shapes (n, 1)."""
    index = target.unsqueeze(-1)
    return scores.gather(-1, index), scores.scatter(-1, index, -torch.inf).amax(-1, keepdim=True)
