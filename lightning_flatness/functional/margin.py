"""Margins between the true class and its strongest rival."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lightning_flatness.functional.cotangents import margin_cotangent
from lightning_flatness.functional.flatness import affine_trace


def output_margin(logits: Float[Tensor, "n c"], target: Int[Tensor, " n"], signed: bool = True) -> Float[Tensor, " n"]:
    r"""Return the margin of the true class in the logits.

    $$\gamma = \phi_y - \max_{c \ne y} \phi_c$$

    with the logits \(\phi\) and the true class \(y\).

    Source: "On flat minima, large margins and generalizability", submission to ICLR 2021, which takes the absolute
    value.

    Args:
        logits: \(\phi\), shape (n, c) with c >= 2.
        target: class indices \(y\), shape (n,).
        signed: if True, the margin is negative where the sample is misclassified; if False, its absolute value.

    Returns:
        Margins, shape (n,); unit of the logits; higher is better. A tie has margin 0. The margin is infinite where one
        of the two classes is masked by a logit of minus infinity.

    Example:
        >>> import torch
        >>> from lightning_flatness.functional import output_margin
        >>> output_margin(torch.tensor([[3.0, 1.0], [3.0, 1.0]]), torch.tensor([0, 1]))
        tensor([ 2., -2.])
    """
    true, rival = _true_and_rival(logits, target)
    margin = (true - rival).squeeze(-1)
    return margin if signed else margin.abs()


def softmax_margin(logits: Float[Tensor, "n c"], target: Int[Tensor, " n"], signed: bool = True) -> Float[Tensor, " n"]:
    r"""Return the margin of the true class in the softmax.

    $$\gamma = S_y - \max_{c \ne y} S_c$$

    with the softmax \(S\) of the logits and the true class \(y\).

    Source: "On flat minima, large margins and generalizability", submission to ICLR 2021, which takes the absolute
    value.

    Args:
        logits: unnormalised scores, shape (n, c) with c >= 2.
        target: class indices \(y\), shape (n,).
        signed: if True, the margin is negative where the sample is misclassified; if False, its absolute value.

    Returns:
        Margins in [-1, 1], shape (n,); no unit; higher is better.

    Example:
        >>> import torch
        >>> from lightning_flatness.functional import softmax_margin
        >>> softmax_margin(torch.tensor([[3.0, 3.0, 0.0]]), torch.tensor([1]))
        tensor([0.])
    """
    return output_margin(logits.softmax(-1), target, signed)


def margin_gap(logits: Float[Tensor, "n c"], target: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    r"""Return one minus the squared softmax margin, without cancellation.

    $$1 - \gamma^2 = \Bigl(\sum_{c \ne y} S_c + S_{y'}\Bigr) \Bigl(\sum_{c \ne y'} S_c + S_y\Bigr)$$

    with the softmax \(S\), the true class \(y\), its strongest rival \(y'\) and \(\gamma = S_y - S_{y'}\). The two
    factors are \(1 - \gamma\) and \(1 + \gamma\) as sums of positive numbers, so they keep full relative precision
    however sure the prediction is.

    Args:
        logits: unnormalised scores, shape (n, c) with c >= 2.
        target: class indices \(y\), shape (n,).

    Returns:
        Values in [0, 1], shape (n,); no unit; lower is better for a correctly classified sample.

    Example:
        >>> import torch
        >>> from lightning_flatness.functional import margin_gap
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
    r"""Return an upper bound of the affine classifier's Hessian trace by the softmax margin.

    $$(\Vert x \Vert^2 + 1)(1 - \gamma^2)$$

    with the classifier's own input \(x\) and the softmax margin \(\gamma\): `affine_trace` with the bound
    \(1 - \gamma^2 \ge 1 - S_{\text{top}}^2 \ge 1 - \Vert S \Vert^2\) of the curvature's trace, where \(S_{\text{top}}\)
    is the largest entry of the softmax \(S\). It bounds `affine_hessian_trace`.

    Source: "On flat minima, large margins and generalizability", submission to ICLR 2021.

    Args:
        features: \(x\), shape (n, j).
        logits: output of the classifier, shape (n, c) with c >= 2.
        target: class indices, shape (n,).

    Returns:
        Bounds, shape (n,); loss per squared weight; lower is flatter.

    Example:
        >>> import torch
        >>> from lightning_flatness.functional import margin_bound
        >>> margin_bound(torch.tensor([[2.0]]), torch.tensor([[1.0, 1.0]]), torch.tensor([0]))
        tensor([5.])
    """
    return affine_trace(features, margin_gap(logits, target))


def margin_row(
    logits: Float[Tensor, "n c"], target: Int[Tensor, " n"], head: Float[Tensor, "*n c j"]
) -> Float[Tensor, "n j"]:
    r"""Return the row in which the true class is compared with all others: the margin part of the curvature.

    $$r = V^\top v$$

    with the classifier's weight \(V\) and the cotangent \(v\) of `margin_cotangent`: the part of the cross-entropy's
    curvature that compares the true class with the others, pulled back through the classifier, is \(r r^\top\).

    Args:
        logits: unnormalised scores, shape (n, c) with c >= 2.
        target: class indices, shape (n,).
        head: weight \(V\) of the classifier, shape (c, j), or one of each sample.

    Returns:
        The rows, shape (n, j), in the unit of the weight; zero where the prediction has no doubt left.

    Example:
        >>> import torch
        >>> from lightning_flatness.functional import margin_row
        >>> margin_row(torch.tensor([[0.0, 0.0]]), torch.tensor([0]), torch.tensor([[3.0], [1.0]]))
        tensor([[1.]])
    """
    centred = head - head.mean(-2, keepdim=True)  # the cotangent sees no shift that all rows share
    return (margin_cotangent(logits, target).unsqueeze(1) @ centred).squeeze(1)


def binary_margin(logits: Float[Tensor, "n c"], labels: Float[Tensor, "n c"]) -> Float[Tensor, " n"]:
    r"""Return the smallest margin of several binary decisions.

    $$\gamma = \min_c\, (2 y_c - 1)\, \phi_c$$

    with one logit \(\phi_c\) and one label \(y_c\) per decision. It is positive where all decisions are right. With
    a single logit it is the output margin of two classes whose logits are 0 and \(\phi\).

    Args:
        logits: \(\phi\), shape (n, c).
        labels: 1 where the label holds, 0 where it does not, shape (n, c); soft labels above 1/2 count as 1.

    Returns:
        Margins, shape (n,); unit of the logits; higher is better.

    Example:
        >>> import torch
        >>> from lightning_flatness.functional import binary_margin
        >>> binary_margin(torch.tensor([[3.0, -1.0]]), torch.tensor([[1.0, 0.0]]))
        tensor([1.])
    """
    return torch.where(labels > 0.5, logits, -logits).amin(-1)


def _true_and_rival(
    scores: Float[Tensor, "n c"], target: Int[Tensor, " n"]
) -> tuple[Float[Tensor, "n 1"], Float[Tensor, "n 1"]]:
    """Return the score of the true class and the largest other score."""
    index = target.unsqueeze(-1)
    return scores.gather(-1, index), scores.scatter(-1, index, -torch.inf).amax(-1, keepdim=True)
