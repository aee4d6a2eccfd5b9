"""Curvature of the cross-entropy in the logits, and its pull-back through the classifier."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def confidence(logits: Float[Tensor, "n c"]) -> Float[Tensor, " n"]:
    r"""Return `1 - |S|^2`, the trace of the softmax curvature `diag(S) - S S^T`.

    With `e` the probability outside the top class it is computed as
    `e (1 + S_top) - sum_{c != top} S_c^2`, which keeps full relative precision however confident the
    prediction is; `1 - |S|^2` as written would be rounding noise as soon as `1 - S_top` is near the
    machine epsilon.

    Args:
        logits: unnormalised scores, shape (n, c).

    Returns:
        Values in [0, 1 - 1/c], shape (n,); no unit; lower is more confident, and flatter.

    Example:
        >>> import torch
        >>> confidence(torch.tensor([[0.0, 0.0]]))
        tensor([0.5000])
    """
    probabilities = logits.softmax(-1)
    top = logits.argmax(-1, keepdim=True)
    others = probabilities.scatter(-1, top, 0.0)
    rest = others.sum(-1)
    return rest * (1 + probabilities.gather(-1, top).squeeze(-1)) - others.square().sum(-1)


def curvature_root(logits: Float[Tensor, "n c"], head: Float[Tensor, "c k"]) -> Float[Tensor, "n c k"]:
    r"""Return `X = L^T V`, a root of the softmax curvature pulled back to the classifier's input.

    `L L^T = diag(S) - S S^T` is the Hessian of the cross-entropy in the logits (it does not depend on the
    label), so `X^T X = V^T (diag(S) - S S^T) V`. The rows are `X_c = sqrt(S_c) (V_c - V^T S)`. The
    classifier is first centred on the predicted class: the curvature is blind to a shift of all its rows,
    and the centred form has no cancellation when `1 - S_top` is tiny.

    Args:
        logits: unnormalised scores, shape (n, c).
        head: weight `V` of the classifier, one column per feature, shape (c, k).

    Returns:
        The root, shape (n, c, k), in the unit of the classifier's weights.
    """
    probabilities = logits.softmax(-1)
    centred = head - head[logits.argmax(-1)].unsqueeze(1)
    mean = torch.einsum("nc,nck->nk", probabilities, centred)
    return probabilities.sqrt().unsqueeze(-1) * (centred - mean.unsqueeze(1))


def class_distances(
    logits: Float[Tensor, "n c"], head: Float[Tensor, "c k"], metric: Float[Tensor, "n k k"]
) -> Float[Tensor, "n c c"]:
    r"""Return `D_cc' = (V_c - V_c')^T G (V_c - V_c')`, squared distances between the classifier's rows.

    What the softmax curvature `B = diag(S) - S S^T` needs to know of `V G V^T`: for every `S`,
    `Tr(B V G V^T) = 1/2 sum_cc' S_c S_c' D_cc'`, a sum without cancellation. Distances from the predicted class
    keep their relative precision, because `V` is centred on it.

    Args:
        logits: unnormalised scores; they only say which class is predicted, shape (n, c).
        head: weight `V` of the classifier, shape (c, k).
        metric: symmetric matrices `G`, shape (n, k, k).

    Returns:
        Squared distances with zeros on the diagonal, shape (n, c, c).
    """
    rows = head - head[logits.argmax(-1)].unsqueeze(1)
    gram = rows @ metric @ rows.mT
    squares = gram.diagonal(dim1=1, dim2=2)
    return squares.unsqueeze(2) + squares.unsqueeze(1) - gram - gram.mT
