"""The training losses whose curvature in the logits is known in closed form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_flatness.functional.curvature import centred_rows, confidence, curvature_diagonal, without_subnormals
from lightning_flatness.functional.flatness import relative_flatness
from lightning_flatness.functional.gram import HadamardGram
from lightning_flatness.functional.margin import binary_margin, margin_gap, output_margin, softmax_margin


@dataclass(frozen=True, eq=False)
class CrossEntropy:
    r"""Cross-entropy `sum_c a_c (-log S_c)` with `a_c = w_c q_c`: `w` class weights, `q` the label's distribution.

    `q` is a one-hot vector or given as probabilities, smoothed to `(1 - e) q + e / C`. For every such label the
    curvature in the logits is `B = |a|_1 (diag(S) - S S^T)` and the slope `|a|_1 S - a`. With several samples
    the mean is over samples, not divided by the mean class weight.

    Attributes:
        weight: of each class, shape (c,); None: 1.
        label_smoothing: `e`, in [0, 1].
    """

    weight: Tensor | None = None
    label_smoothing: float = 0.0

    def label_weight(self, logits: Tensor, target: Tensor | None) -> Tensor:
        """Return `|a|_1`, shape (n,); it is 1 where neither class weights nor given probabilities change it."""
        if self.weight is None and (target is None or target.dim() == 1):
            return logits.new_ones(len(logits))
        return self._weighted_target(logits, _known(target)).sum(-1)

    def curvature_trace(self, logits: Tensor, target: Tensor | None) -> Tensor:
        """Return `Tr B`, shape (n,)."""
        return self.label_weight(logits, target) * confidence(logits)

    def curvature_diagonal(self, logits: Tensor, head: Tensor, target: Tensor | None) -> Tensor:
        """Return `Q_kk` with `Q = V^T B V`, shape (n, k)."""
        return self.label_weight(logits, target).unsqueeze(1) * curvature_diagonal(logits, head)

    def relative_flatness(self, logits: Tensor, head: Tensor, gram: HadamardGram, target: Tensor | None) -> Tensor:
        """Return `Tr(B V G V^T)` for logits of shape (n, c, t), shape (n, t)."""
        flatness = relative_flatness(logits, centred_rows(logits[..., 0], head), gram)
        return self.label_weight(logits[..., 0], target).unsqueeze(1) * flatness

    def logit_gradient_product(self, logits: Tensor, values: Tensor, target: Tensor | None) -> Tensor:
        """Return `sum_c (|a|_1 S - a)_c u_c` for logits (n, c, t) and values `u` of shape (n, c), shape (n, t).

        The values are taken relative to the likeliest class of the label: no cancellation when it is sure.
        """
        shares = self._weighted_target(logits[..., 0], _known(target))
        values = values - values.gather(-1, shares.argmax(-1, keepdim=True))
        expected = torch.einsum("nct,nc->nt", without_subnormals(logits.softmax(1)), values)
        return shares.sum(-1, keepdim=True) * expected - (shares * values).sum(-1, keepdim=True)

    def logit_mean_square(self, logits: Tensor) -> Tensor:
        """Return the mean square of the logits about the mean of their sample, shape (n,).

        Masked classes (logits of minus infinity) do not count.
        """
        seen = logits.isfinite()
        count = seen.sum(-1).clamp_min(1)
        centred = logits - logits.where(seen, 0.0).sum(-1, keepdim=True) / count.unsqueeze(-1)
        return centred.where(seen, 0.0).square().sum(-1) / count

    def output_margin(self, logits: Tensor, target: Tensor | None) -> Tensor:
        """Return the signed margin of the true class in the logits, shape (n,)."""
        return output_margin(logits, self._class(target))

    def softmax_margin(self, logits: Tensor, target: Tensor | None) -> Tensor:
        """Return the signed margin of the true class in the softmax, shape (n,)."""
        return softmax_margin(logits, self._class(target))

    def trace_bound(self, logits: Tensor, target: Tensor | None) -> Tensor:
        """Return `|a|_1 (1 - gamma^2) >= Tr B`, shape (n,)."""
        return self.label_weight(logits, target) * margin_gap(logits, self._class(target))

    def _class(self, target: Tensor | None) -> Tensor:
        target = _known(target)
        return target if target.dim() == 1 else target.argmax(-1)

    def _weighted_target(self, logits: Tensor, target: Tensor) -> Tensor:
        classes = logits.shape[-1]
        shares = (F.one_hot(target, classes) if target.dim() == 1 else target).to(logits)
        shares = (1 - self.label_smoothing) * shares + self.label_smoothing / classes
        return shares if self.weight is None else shares * self.weight.to(logits)


@dataclass(frozen=True, eq=False)
class BinaryCrossEntropy:
    r"""Binary cross-entropy with logits, `sum_c -w_c [p_c y_c log s_c + (1 - y_c) log(1 - s_c)]`, `s = sigmoid(phi)`.

    Its curvature is `B = diag(m s (1 - s))` with `m_c = w_c (p_c y_c + 1 - y_c)`. The loss of a sample is the sum over
    its labels: `nn.BCEWithLogitsLoss` with its default reduction divides it, and all its curvature, by their number.

    Attributes:
        weight: `w` of each label, shape (c,); None: 1.
        pos_weight: `p`, of each label's positive samples, shape (c,); None: 1.
    """

    weight: Tensor | None = None
    pos_weight: Tensor | None = None

    def label_weight(self, logits: Tensor, target: Tensor | None) -> Tensor:
        """Return `m`, shape (n, c); it depends on the labels only through `pos_weight`."""
        label_weight = torch.ones_like(logits)
        if self.pos_weight is not None:
            label_weight = label_weight + (self.pos_weight.to(logits) - 1) * _known(target).to(logits)
        return label_weight if self.weight is None else label_weight * self.weight.to(logits)

    def curvature_trace(self, logits: Tensor, target: Tensor | None) -> Tensor:
        """Return `Tr B`, shape (n,)."""
        return (self.label_weight(logits, target) * _variance(logits)).sum(-1)

    def curvature_diagonal(self, logits: Tensor, head: Tensor, target: Tensor | None) -> Tensor:
        """Return `Q_kk` with `Q = V^T B V`, shape (n, k)."""
        return (self.label_weight(logits, target) * _variance(logits)) @ head.square()

    def relative_flatness(self, logits: Tensor, head: Tensor, gram: HadamardGram, target: Tensor | None) -> Tensor:
        """Return `Tr(B V G V^T)` for logits of shape (n, c, t), shape (n, t)."""
        squares = gram.quadratic_forms(head.expand(len(logits), -1, -1))
        return torch.einsum("nct,nc->nt", _variance(logits), self.label_weight(logits[..., 0], target) * squares)

    def logit_gradient_product(self, logits: Tensor, values: Tensor, target: Tensor | None) -> Tensor:
        """Return `sum_c (d loss / d phi_c) u_c` for logits (n, c, t) and values `u` of shape (n, c), shape (n, t)."""
        labels = _known(target).to(logits)
        positive = labels if self.pos_weight is None else self.pos_weight.to(logits) * labels
        values = values if self.weight is None else values * self.weight.to(logits)
        rising = torch.einsum("nct,nc->nt", logits.sigmoid(), (1 - labels) * values)
        return rising - torch.einsum("nct,nc->nt", (-logits).sigmoid(), positive * values)

    def logit_mean_square(self, logits: Tensor) -> Tensor:
        """Return the mean square of the logits, shape (n,); masked labels (infinite logits) do not count."""
        seen = logits.isfinite()
        return logits.where(seen, 0.0).square().sum(-1) / seen.sum(-1).clamp_min(1)

    def output_margin(self, logits: Tensor, target: Tensor | None) -> Tensor:
        """Return the smallest signed margin of the labels, see `functional.binary_margin`, shape (n,)."""
        return binary_margin(logits, _known(target).to(logits))

    def softmax_margin(self, logits: Tensor, target: Tensor | None) -> Tensor:
        """Return the same in probabilities, `min_c (2 y_c - 1)(2 s_c - 1)`, shape (n,)."""
        return (self.output_margin(logits, target) / 2).tanh()

    def trace_bound(self, logits: Tensor, target: Tensor | None) -> Tensor:
        """Return `|m|_1 / 4 (1 - gamma^2) >= Tr B` with the least sure label's `gamma = |2 s - 1|`, shape (n,)."""
        return self.label_weight(logits, target).sum(-1) * _variance(logits.abs().amin(-1))


Loss = CrossEntropy | BinaryCrossEntropy
_NAMES: dict[str, Loss] = {"cross_entropy": CrossEntropy(), "bce_with_logits": BinaryCrossEntropy()}


def as_loss(loss: str | nn.Module | Loss) -> Loss:
    """Return the loss that a name or a torch module stands for.

    Args:
        loss: `"cross_entropy"`, `"bce_with_logits"`, an `nn.CrossEntropyLoss` (its `weight` and `label_smoothing` are
            read) or an `nn.BCEWithLogitsLoss` (its `weight` and `pos_weight`, per label). Their `reduction` is
            not read: what is measured is a mean over samples.

    Returns:
        The loss as a value.

    Raises:
        ValueError: if it is another one, or its `ignore_index` is a class, or a weight is not one number per class.

    Example:
        >>> as_loss(nn.CrossEntropyLoss(label_smoothing=0.1)).label_smoothing
        0.1
    """
    if isinstance(loss, (CrossEntropy, BinaryCrossEntropy)):
        return loss
    if isinstance(loss, str) and loss in _NAMES:
        return _NAMES[loss]
    # A subclass may compute something else.
    if type(loss) is nn.CrossEntropyLoss:
        if loss.ignore_index >= 0:
            raise ValueError(
                f"`loss` must count every class; got `ignore_index={loss.ignore_index}`. Leave these samples out of "
                "the batches that are measured."
            )
        return CrossEntropy(_class_weights("weight", loss.weight), loss.label_smoothing)
    if type(loss) is nn.BCEWithLogitsLoss:
        weights = (_class_weights(name, getattr(loss, name)) for name in ("weight", "pos_weight"))
        return BinaryCrossEntropy(*weights)
    raise ValueError(
        f"`loss` must be one of {list(_NAMES)}, an `nn.CrossEntropyLoss` or an `nn.BCEWithLogitsLoss`, whose "
        f"curvature is known in closed form; got {loss!r}."
    )


def _class_weights(name: str, weights: Tensor | None) -> Tensor | None:
    if weights is None:
        return None
    if weights.dim() > 1 or not bool((weights >= 0).all()):
        raise ValueError(
            f"`loss.{name}` must hold one non-negative number per class, shape (c,); got shape {tuple(weights.shape)}"
            f" from {float(weights.min()):g} to {float(weights.max()):g}."
        )
    return weights.detach()


def _variance(logits: Tensor) -> Tensor:
    """Return `s (1 - s)` without the rounding of `1 - s`."""
    return without_subnormals(logits.sigmoid() * (-logits).sigmoid())


def _known(target: Tensor | None) -> Tensor:
    if target is None:
        raise ValueError("This quantity needs the true classes: got no target. Pass `target`.")
    return target


def checked_targets(target: Any, samples: int, classes: int, loss: Loss, look: bool = True) -> Tensor:
    """Return the targets in the form that the loss reads, after checking them.

    Cross-entropy reads class indices, shape (n,), or probabilities of the classes, floating, shape (n, c). Binary
    cross-entropy reads labels in [0, 1] of shape (n, c), for one logit also of shape (n,).

    Args:
        target: what the batch holds as targets.
        samples: number of samples `n` that the network saw.
        classes: number of logits `c`.
        loss: of the training.
        look: also compare the values with their range; on an accelerator this waits for the device.

    Raises:
        ValueError: if they are none of these or outside of their range, or the number of logits does not fit the loss.
    """
    _check_weights(loss, classes)
    if not isinstance(target, Tensor) or target.layout != torch.strided:
        came = getattr(target, "layout", type(target).__name__)
        raise ValueError(f"Targets must be a dense tensor; got {came}. Say how to get it: `target=...`.")
    binary = isinstance(loss, BinaryCrossEntropy)
    if binary and target.shape == (samples,) and classes == 1:
        target = target.unsqueeze(1)
    indices = not binary and not target.is_floating_point()
    shape = (samples,) if indices else (samples, classes)
    either = (
        f"integer class indices of shape {(samples,)} or probabilities of the classes of shape {(samples, classes)}"
    )
    wanted = f"labels in [0, 1] of shape {shape}" if binary else either
    if target.shape != shape or target.is_complex() or (indices and target.dtype == torch.bool):
        raise ValueError(
            f"Targets must be {wanted}; got {target.dtype} of shape {tuple(target.shape)}. "
            "Say how to get them: `target=lambda batch: ...`; for another loss than cross-entropy: `loss=...`."
        )
    target = target.long() if indices else target if target.is_floating_point() else target.float()
    if look and samples:
        _check_range(target, classes if indices else None)
    return target


def _check_weights(loss: Loss, classes: int) -> None:
    """Check that the loss is one for so many logits."""
    if classes == 1 and not isinstance(loss, BinaryCrossEntropy):
        raise ValueError('Cross-entropy needs two logits or more; got one. Pass `loss="bce_with_logits"`.')
    for name in ("weight", "pos_weight"):
        weights = getattr(loss, name, None)
        if weights is not None and weights.numel() not in (1, classes):
            raise ValueError(f"`loss.{name}` must have one entry per logit, ({classes},); got {tuple(weights.shape)}.")


def _check_range(target: Tensor, classes: int | None) -> None:
    """Check that class indices lie in [0, c), anything else in [0, 1]."""
    low, high = (bound.item() for bound in torch.aminmax(target))
    if not (low >= 0 and (high <= 1 if classes is None else high < classes)):
        span = "[0, 1]" if classes is None else f"[0, {classes}) for {classes} logits"
        raise ValueError(f"Targets must lie in {span}; got values from {low} to {high}.")
