"""Curvature of the cross-entropy with respect to the logits, and its pull-back through the linear classifier."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lightning_flatness.functional.gram import block_numel


def without_subnormals(probabilities: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return the probabilities with subnormal float32 and float64 values set to zero.

    Subnormal values have lost digits, and they slow products down tenfold on CPUs.
    """
    if probabilities.element_size() < 4:
        return probabilities
    return F.threshold(probabilities, torch.finfo(probabilities.dtype).tiny, 0.0)


def probabilities_at(logits: Float[Tensor, "n c t"]) -> Float[Tensor, "n c t"]:
    """Return the softmax over classes at each temperature, without subnormal values.

    On a CUDA device it is taken along the last axis, where its kernel is thirty times as fast. On a CPU it is taken as
    it lies in memory.
    """
    if logits.is_cuda:
        return without_subnormals(logits.mT.softmax(-1)).mT
    return without_subnormals(logits.softmax(1))


def confidence(logits: Float[Tensor, "n c"]) -> Float[Tensor, " n"]:
    r"""Return the uncertainty of each prediction, the trace of the softmax curvature.

    $$\operatorname{Tr} \bigl(\operatorname{diag}(S) - S S^\top\bigr) = 1 - \Vert S \Vert^2
    = e\,(1 + S_{\text{top}}) - \sum_{c \ne \text{top}} S_c^2$$

    with the softmax \(S\), its largest entry \(S_{\text{top}}\) and \(e = \sum_{c \ne \text{top}} S_c\). The value is
    computed in the last form, which keeps full relative precision. The form \(1 - \Vert S \Vert^2\) is rounding noise
    once \(1 - S_{\text{top}}\) is near machine epsilon.

    Args:
        logits: unnormalised scores, shape (n, c).

    Returns:
        Values in [0, 1 - 1/C] for C classes, shape (n,); no unit; higher is less sure, lower is flatter.

    Example:
        >>> import torch
        >>> from lightning_flatness.functional import confidence
        >>> confidence(torch.tensor([[0.0, 0.0]]))
        tensor([0.5000])
    """
    probabilities = logits.softmax(-1)
    top = logits.argmax(-1, keepdim=True)
    others = probabilities.scatter(-1, top, 0.0)
    rest = others.sum(-1)
    return rest * (1 + probabilities.gather(-1, top).squeeze(-1)) - others.square().sum(-1)


def curvature_diagonal(logits: Float[Tensor, "n c"], head: Float[Tensor, "*n c j"]) -> Float[Tensor, "n j"]:
    r"""Return the diagonal of the softmax curvature, pulled back through the linear classifier.

    $$Q_{jj} = \sum_c S_c U_{cj}^2 - \left(\sum_c S_c U_{cj}\right)^2, \qquad
    Q = V^\top \bigl(\operatorname{diag}(S) - S S^\top\bigr) V$$

    with the softmax \(S\), the classifier's weight \(V\) and its rows relative to that of the predicted class,
    \(U_{cj} = V_{cj} - V_{\text{top},j}\). Every term is of the order of \(1 - S_{\text{top}}\), so no precision is
    lost when a prediction is sure. The diagonal does not depend on the label.

    Args:
        logits: unnormalised scores, shape (n, c).
        head: weight \(V\) of the classifier, one column per feature, shape (c, j).

    Returns:
        The diagonal, shape (n, j); loss per squared feature.

    Example:
        >>> import torch
        >>> from lightning_flatness.functional import curvature_diagonal
        >>> curvature_diagonal(torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 1.0], [0.0, 1.0]]))
        tensor([[1., 0.]])
    """
    others = logits.softmax(-1).scatter(-1, logits.argmax(-1, keepdim=True), 0.0).unsqueeze(1)
    step, parts = max(1, block_numel(head) // max(1, head.shape[-2:].numel())), []
    for start in range(0, max(1, len(logits)), step):
        samples = slice(start, start + step)
        rows = centred_rows(logits[samples], head if head.dim() == 2 else head[samples])
        mean = others[samples] @ rows
        parts.append((others[samples] @ rows.square() - mean.square()).squeeze(1))
    return torch.cat(parts).clamp_min(0)


def centred_rows(logits: Float[Tensor, "n c"], head: Float[Tensor, "*n c j"]) -> Float[Tensor, "n c j"]:
    r"""Return the classifier's rows relative to that of the predicted class, \(U_{cj} = V_{cj} - V_{\text{top},j}\).

    The softmax curvature annihilates a shift that all classes share. After this one, sums over classes lose no
    precision when a prediction is sure.

    Args:
        logits: unnormalised scores, shape (n, c).
        head: weight \(V\) of the classifier, or some of its columns, shape (c, j).

    Returns:
        The rows, shape (n, c, j), in the unit of the weight; the row of the predicted class is zero.

    Example:
        >>> import torch
        >>> from lightning_flatness.functional import centred_rows
        >>> centred_rows(torch.tensor([[0.0, 1.0]]), torch.tensor([[5.0], [3.0]]))
        tensor([[[2.],
                 [0.]]])
    """
    top = logits.argmax(-1)
    if head.dim() == 2:
        return head - head[top].unsqueeze(1)
    return head - head.gather(1, top[:, None, None].expand(-1, 1, head.shape[2]))


def curvature_factor(logits: Float[Tensor, "n c"]) -> Float[Tensor, "n r c"]:
    r"""Return one factor of the softmax curvature, with one row less than there are classes.

    $$F^\top F = \operatorname{diag}(S) - S S^\top, \qquad
    F_{jc} = \sqrt{S_j} \bigl([j = c] - v_c\bigr), \qquad
    v_c = \frac{S_c}{1 + \sqrt{S_t}} \text{ for } c \ne t, \quad v_t = \sqrt{S_t}$$

    with the softmax \(S\) and the predicted class \(t\); \(j\) runs over the other classes. No entry is a difference
    of nearly equal numbers, so no precision is lost when a prediction is sure.

    Args:
        logits: unnormalised scores, shape (n, c).

    Returns:
        The factor, shape (n, c - 1, c), in the unit of the square root of the loss per logit.

    Example:
        >>> import torch
        >>> from lightning_flatness.functional import curvature_factor
        >>> factor = curvature_factor(torch.tensor([[0.0, 0.0]]))
        >>> factor.mT @ factor
        tensor([[[ 0.2500, -0.2500],
                 [-0.2500,  0.2500]]])
    """
    probabilities, classes = without_subnormals(logits.softmax(-1)), logits.shape[-1]
    top = logits.argmax(-1, keepdim=True)
    others = torch.arange(classes - 1, device=logits.device).expand(len(logits), -1)
    others = others + (others >= top)
    root = probabilities.gather(-1, top).sqrt()
    shares = (probabilities / (1 + root)).scatter(-1, top, root)
    unit = F.one_hot(others, classes).to(logits)
    return probabilities.gather(-1, others).sqrt().unsqueeze(-1) * (unit - shares.unsqueeze(1))
