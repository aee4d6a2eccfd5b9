"""Curvature of the cross-entropy in the logits, and its pull-back through the classifier."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lightning_flatness.functional.gram import block_numel


def without_subnormals(probabilities: Tensor) -> Tensor:
    """Return zero for float32 and float64 numbers that have lost digits: they make products ten times as slow."""
    if probabilities.element_size() < 4:
        return probabilities
    return F.threshold(probabilities, torch.finfo(probabilities.dtype).tiny, 0.0)


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


def curvature_diagonal(logits: Float[Tensor, "n c"], head: Float[Tensor, "c k"]) -> Float[Tensor, "n k"]:
    r"""Return `Q_kk`, the diagonal of the softmax curvature pulled back, `Q = V^T (diag(S) - S S^T) V`.

    It does not depend on the label. With `t` the row of the predicted class and sums over the others,
    `Q_kk = sum_c S_c (V_ck - t_k)^2 - (sum_c S_c (V_ck - t_k))^2`: every term is of the order of `1 - S_t`, however
    small that is, and no precision is lost when a prediction is confident, or when its row is near another.

    Args:
        logits: unnormalised scores, shape (n, c).
        head: weight `V` of the classifier, one column per feature, shape (c, k).

    Returns:
        The diagonal, shape (n, k), in the squared unit of the classifier's weights.
    """
    others = logits.softmax(-1).scatter(-1, logits.argmax(-1, keepdim=True), 0.0).unsqueeze(1)
    step, parts = max(1, block_numel(head) // max(1, head.numel())), []
    for start in range(0, max(1, len(logits)), step):
        samples = slice(start, start + step)
        rows = centred_rows(logits[samples], head)
        mean = others[samples] @ rows
        parts.append((others[samples] @ rows.square() - mean.square()).squeeze(1))
    return torch.cat(parts).clamp_min(0)


def centred_rows(logits: Float[Tensor, "n c"], head: Float[Tensor, "c k"]) -> Float[Tensor, "n c k"]:
    """Return the classifier's rows relative to that of the predicted class, shape (n, c, k).

    The softmax curvature is blind to the shift, and sums over classes lose no precision when a prediction is
    confident.
    """
    return head - head[logits.argmax(-1)].unsqueeze(1)
