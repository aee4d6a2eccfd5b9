r"""Training losses whose curvature with respect to the logits has a closed form, and checks of their targets.

`CrossEntropy` and `BinaryCrossEntropy` have the same methods, which share their arguments:

- `logits`: \(\phi\), shape (n, c); for values "at each temperature", shape (n, c, t).
- `target`: as `checked_targets` returns it; None if unknown, which raises a `ValueError` where the value depends on it.
- `head`: weight \(V\) of the linear classifier, shape (c, j); for relative flatness its columns in the order of the
  filters that feed them, shape (c, k).
- `gram`: \(G\), see `functional.HadamardGram`.

\(B\) is the curvature of the loss of one sample with respect to its logits, \(\partial^2 \ell / \partial \phi^2\). In
this module \(a\), \(w\), \(p\) and \(m\) are weights of classes or labels, as the two losses define them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lightning_flatness.functional.curvature import (
    centred_rows,
    confidence,
    curvature_diagonal,
    curvature_factor,
    probabilities_at,
    without_subnormals,
)
from lightning_flatness.functional.flatness import relative_flatness
from lightning_flatness.functional.gram import HadamardGram
from lightning_flatness.functional.margin import binary_margin, margin_gap, output_margin, softmax_margin

Targets: TypeAlias = Int[Tensor, " n"] | Float[Tensor, "n c"]
"""Class indices, shape (n,), or probabilities of the classes or labels in [0, 1], shape (n, c)."""
IGNORED = -100
"""The class index of samples that torch's cross-entropy leaves out."""


@dataclass(frozen=True, eq=False)
class CrossEntropy:
    r"""Cross-entropy with class weights, label smoothing and soft targets.

    $$\ell = -\sum_c a_c \log S_c, \qquad a_c = w_c \Bigl((1 - \epsilon)\, q_c + \frac{\epsilon}{C}\Bigr)$$

    with the softmax \(S\), class weights \(w\), label smoothing \(\epsilon\), the number of classes \(C\) and the
    distribution \(q\) of the label: one-hot for a class index, or given as probabilities. Gradient and curvature with
    respect to the logits are

    $$\nabla \ell = \Vert a \Vert_1 S - a, \qquad
    B = \Vert a \Vert_1 \bigl(\operatorname{diag}(S) - S S^\top\bigr)$$

    The loss of several samples is their mean. Unlike `nn.CrossEntropyLoss` with its default reduction, it is not
    divided by the mean class weight.

    Attributes:
        weight: \(w\), shape (c,); None: 1 for each class.
        label_smoothing: \(\epsilon\), in [0, 1].

    Example:
        >>> import torch
        >>> CrossEntropy().curvature_trace(torch.tensor([[0.0, 0.0]]), torch.tensor([0]))
        tensor([0.5000])
    """

    weight: Float[Tensor, "*c"] | None = None
    label_smoothing: float = 0.0

    def label_weight(self, logits: Float[Tensor, "n c"], target: Targets | None) -> Float[Tensor, " n"]:
        r"""Return \(\Vert a \Vert_1\), the factor of the sample's curvature, shape (n,).

        It is 1 unless class weights, or probabilities that do not add up to 1, change it.
        """
        if self.weight is None and (target is None or target.dim() == 1):
            return logits.new_ones(len(logits))
        return self._weighted_target(logits, _required(target)).sum(-1)

    def curvature_trace(self, logits: Float[Tensor, "n c"], target: Targets | None) -> Float[Tensor, " n"]:
        r"""Return \(\operatorname{Tr} B = \Vert a \Vert_1 (1 - \Vert S \Vert^2)\), shape (n,)."""
        return self.label_weight(logits, target) * confidence(logits)

    def curvature_diagonal(
        self, logits: Float[Tensor, "n c"], head: Float[Tensor, "*n c j"], target: Targets | None
    ) -> Float[Tensor, "n j"]:
        r"""Return \(Q_{jj}\) with \(Q = V^\top B V\), shape (n, j)."""
        return self.label_weight(logits, target).unsqueeze(1) * curvature_diagonal(logits, head)

    def relative_flatness(
        self, logits: Float[Tensor, "n c t"], head: Float[Tensor, "*n c k"], gram: HadamardGram, target: Targets | None
    ) -> Float[Tensor, "n t"]:
        r"""Return \(\operatorname{Tr}(B V G V^\top)\) at each temperature, shape (n, t)."""
        flatness = relative_flatness(logits, centred_rows(logits[..., 0], head), gram)
        return self.label_weight(logits[..., 0], target).unsqueeze(1) * flatness

    def logit_gradient(self, logits: Float[Tensor, "n c t"], target: Targets | None) -> Float[Tensor, "n c t"]:
        r"""Return \(\nabla \ell\) at each temperature, without cancellation where a prediction is sure.

        The entry of the label's likeliest class is minus the sum of the others.
        """
        weighted = self._weighted_target(logits[..., 0], _required(target)).unsqueeze(-1)
        gradient = weighted.sum(1, keepdim=True) * probabilities_at(logits) - weighted
        likeliest = weighted.argmax(1, keepdim=True).expand_as(gradient[:, :1])
        others = gradient.scatter(1, likeliest, 0.0)
        return others.scatter(1, likeliest, -others.sum(1, keepdim=True))

    def logit_gradient_product(
        self, logits: Float[Tensor, "n c t"], values: Float[Tensor, "n c"], target: Targets | None
    ) -> Float[Tensor, "n t"]:
        r"""Return \(\langle \nabla \ell, u \rangle\) at each temperature for values \(u\), shape (n, t).

        The values are taken relative to one class, which avoids cancellation and changes nothing: the gradient adds up
        to 0.
        """
        label = self._weighted_target(logits[..., 0], _required(target)).argmax(-1, keepdim=True)
        return torch.einsum("nct,nc->nt", self.logit_gradient(logits, target), values - values.gather(-1, label))

    def logit_mean_square(self, logits: Float[Tensor, "n c"]) -> Float[Tensor, " n"]:
        """Return the mean square of the logits about their mean over classes, shape (n,).

        Masked classes, whose logit is minus infinity, are left out.
        """
        seen = logits.isfinite()
        count = seen.sum(-1).clamp_min(1)
        centred = logits - logits.where(seen, 0.0).sum(-1, keepdim=True) / count.unsqueeze(-1)
        return centred.where(seen, 0.0).square().sum(-1) / count

    def output_margin(self, logits: Float[Tensor, "n c"], target: Targets | None) -> Float[Tensor, " n"]:
        """Return the signed margin of the true class in the logits, see `functional.output_margin`, shape (n,).

        The likeliest class of a soft target counts as the true class.
        """
        return output_margin(logits, _true_class(target))

    def hard_label(self, target: Targets | None) -> Int[Tensor, " n"] | None:
        """Return the true classes, shape (n,); None where a label has more than one class, or there are no labels."""
        if target is None or self.label_smoothing or (target.dim() > 1 and bool((target.count_nonzero(-1) != 1).any())):
            return None
        return _true_class(target)

    def prediction(self, logits: Float[Tensor, "n c"]) -> Int[Tensor, "n 1"]:
        """Return the predicted class, shape (n, 1)."""
        return logits.argmax(-1, keepdim=True)

    def softmax_margin(self, logits: Float[Tensor, "n c"], target: Targets | None) -> Float[Tensor, " n"]:
        """Return the signed margin of the true class in the softmax, see `functional.softmax_margin`, shape (n,)."""
        return softmax_margin(logits, _true_class(target))

    def trace_bound(self, logits: Float[Tensor, "n c"], target: Targets | None) -> Float[Tensor, " n"]:
        r"""Return \(\Vert a \Vert_1 (1 - \gamma^2) \ge \operatorname{Tr} B\), shape (n,).

        Here \(\gamma\) is the softmax margin.
        """
        return self.label_weight(logits, target) * margin_gap(logits, _true_class(target))

    def value(self, logits: Float[Tensor, "n c"], target: Targets) -> Float[Tensor, ""]:
        """Return the mean over the samples that count; those with the label -100 do not, as in torch."""
        weight = None if self.weight is None else self.weight.to(logits)
        losses = F.cross_entropy(logits, target, weight, reduction="none", label_smoothing=self.label_smoothing)
        return losses.sum() / ((target != IGNORED).sum() if target.dim() == 1 else len(target))

    def select(self, samples: slice | Tensor) -> CrossEntropy:
        """Return the loss of some of the samples."""
        return self

    def _weighted_target(self, logits: Float[Tensor, "n c"], target: Targets) -> Float[Tensor, "n c"]:
        """Return `a`: the label's distribution, smoothed, times the class weights."""
        classes = logits.shape[-1]
        distribution = (F.one_hot(target, classes) if target.dim() == 1 else target).to(logits)
        smoothed = (1 - self.label_smoothing) * distribution + self.label_smoothing / classes
        return smoothed if self.weight is None else smoothed * self.weight.to(logits)


@dataclass(frozen=True, eq=False)
class BinaryCrossEntropy:
    r"""Binary cross-entropy with logits: one independent binary decision per label.

    $$\ell = -\sum_c w_c \bigl(p_c\, y_c \log s_c + (1 - y_c) \log (1 - s_c)\bigr)$$

    with \(s = \operatorname{sigmoid}(\phi)\), labels \(y_c\) in [0, 1] and their weights \(w\) and \(p\). Gradient
    and curvature with respect to the logits are

    $$\nabla_c \ell = w_c \bigl((1 - y_c)\, s_c - p_c\, y_c\, (1 - s_c)\bigr), \qquad
    B = \operatorname{diag}\bigl(m\, s\, (1 - s)\bigr), \qquad m_c = w_c (p_c\, y_c + 1 - y_c)$$

    The loss of a sample is the sum over its labels. `nn.BCEWithLogitsLoss` with its default reduction divides the loss,
    and so its curvature, by the number of labels.

    Attributes:
        weight: \(w\), shape (c,); None: 1 for each label.
        pos_weight: \(p\), weight of the positive part of each label, shape (c,); None: 1.

    Example:
        >>> import torch
        >>> BinaryCrossEntropy().curvature_trace(torch.zeros(1, 3), None)
        tensor([0.7500])
    """

    weight: Float[Tensor, "..."] | None = None
    pos_weight: Float[Tensor, "*c"] | None = None

    def label_weight(self, logits: Float[Tensor, "n c"], target: Targets | None) -> Float[Tensor, "n c"]:
        r"""Return \(m\), shape (n, c); it depends on the labels only through `pos_weight`."""
        weights = torch.ones_like(logits)
        if self.pos_weight is not None:
            weights = weights + (self.pos_weight.to(logits) - 1) * _required(target).to(logits)
        return weights if self.weight is None else weights * self.weight.to(logits)

    def curvature_trace(self, logits: Float[Tensor, "n c"], target: Targets | None) -> Float[Tensor, " n"]:
        r"""Return \(\operatorname{Tr} B = \sum_c m_c s_c (1 - s_c)\), shape (n,)."""
        return (self.label_weight(logits, target) * _variance(logits)).sum(-1)

    def curvature_diagonal(
        self, logits: Float[Tensor, "n c"], head: Float[Tensor, "*n c j"], target: Targets | None
    ) -> Float[Tensor, "n j"]:
        r"""Return \(Q_{jj}\) with \(Q = V^\top B V\), shape (n, j)."""
        weight = self.label_weight(logits, target) * _variance(logits)
        return (weight.unsqueeze(1) @ head.square()).squeeze(1)

    def relative_flatness(
        self, logits: Float[Tensor, "n c t"], head: Float[Tensor, "*n c k"], gram: HadamardGram, target: Targets | None
    ) -> Float[Tensor, "n t"]:
        r"""Return \(\operatorname{Tr}(B V G V^\top)\) at each temperature, shape (n, t)."""
        squares = gram.quadratic_forms(head.expand(len(logits), -1, -1))
        return torch.einsum("nct,nc->nt", _variance(logits), self.label_weight(logits[..., 0], target) * squares)

    def logit_gradient(self, logits: Float[Tensor, "n c t"], target: Targets | None) -> Float[Tensor, "n c t"]:
        r"""Return \(\nabla \ell\) at each temperature."""
        labels = _required(target).to(logits)
        positive = labels if self.pos_weight is None else self.pos_weight.to(logits) * labels
        weight = torch.ones_like(labels) if self.weight is None else self.weight.to(logits).expand_as(labels)
        rising, falling = (weight * (1 - labels)).unsqueeze(-1), (weight * positive).unsqueeze(-1)
        return rising * logits.sigmoid() - falling * (-logits).sigmoid()

    def logit_gradient_product(
        self, logits: Float[Tensor, "n c t"], values: Float[Tensor, "n c"], target: Targets | None
    ) -> Float[Tensor, "n t"]:
        r"""Return \(\langle \nabla \ell, u \rangle\) at each temperature for values \(u\), shape (n, t)."""
        return torch.einsum("nct,nc->nt", self.logit_gradient(logits, target), values)

    def logit_mean_square(self, logits: Float[Tensor, "n c"]) -> Float[Tensor, " n"]:
        """Return the mean square of the logits, shape (n,); masked labels, whose logit is infinite, are left out."""
        seen = logits.isfinite()
        return logits.where(seen, 0.0).square().sum(-1) / seen.sum(-1).clamp_min(1)

    def output_margin(self, logits: Float[Tensor, "n c"], target: Targets | None) -> Float[Tensor, " n"]:
        """Return the smallest signed margin of the labels, see `functional.binary_margin`, shape (n,)."""
        return binary_margin(logits, _required(target).to(logits))

    def prediction(self, logits: Float[Tensor, "n c"]) -> Bool[Tensor, "n c"]:
        """Return the labels that are predicted to hold, shape (n, c)."""
        return logits > 0

    def softmax_margin(self, logits: Float[Tensor, "n c"], target: Targets | None) -> Float[Tensor, " n"]:
        r"""Return the same margin in probabilities, \(\min_c (2 y_c - 1)(2 s_c - 1)\), shape (n,)."""
        return (self.output_margin(logits, target) / 2).tanh()

    def trace_bound(self, logits: Float[Tensor, "n c"], target: Targets | None) -> Float[Tensor, " n"]:
        r"""Return \(\frac14 \Vert m \Vert_1 (1 - \gamma^2) \ge \operatorname{Tr} B\), shape (n,).

        Here \(\gamma = \min_c \lvert 2 s_c - 1 \rvert\) belongs to the least sure label.
        """
        return self.label_weight(logits, target).sum(-1) * _variance(logits.abs().amin(-1))

    def value(self, logits: Float[Tensor, "n c"], target: Targets) -> Float[Tensor, ""]:
        """Return the mean over samples of the sum over labels."""
        weight, pos_weight = (None if w is None else w.to(logits) for w in (self.weight, self.pos_weight))
        losses = F.binary_cross_entropy_with_logits(logits, target.to(logits), weight, None, None, "none", pos_weight)
        return losses.sum(-1).mean()

    def select(self, samples: slice | Tensor) -> BinaryCrossEntropy:
        """Return the loss of some of the samples."""
        if self.weight is None or self.weight.dim() < 2:
            return self
        return BinaryCrossEntropy(self.weight[samples], self.pos_weight)


@dataclass(frozen=True, eq=False)
class Differentiated:
    r"""Any other loss, by its gradient and its curvature in the logits of each sample.

    Attributes:
        gradient: \(\nabla \ell\), shape (n, c).
        curvature: \(B\), shape (n, c, c); it may have negative eigenvalues.

    Example:
        >>> import torch
        >>> Differentiated(torch.zeros(1, 2), 2 * torch.eye(2)[None]).curvature_trace(torch.zeros(1, 2), None)
        tensor([4.])
    """

    gradient: Float[Tensor, "n c"]
    curvature: Float[Tensor, "n c c"]

    def curvature_trace(self, logits: Float[Tensor, "n c"], target: Targets | None) -> Float[Tensor, " n"]:
        r"""Return \(\operatorname{Tr} B\), shape (n,)."""
        return self.curvature.diagonal(dim1=1, dim2=2).sum(-1).to(logits)

    def curvature_diagonal(self, logits: Tensor, head: Tensor, target: Targets | None) -> Float[Tensor, "n k"]:
        r"""Return \(Q_{kk}\) with \(Q = V^\top B V\), shape (n, k)."""
        return ((self.curvature.to(logits) @ head) * head).sum(1)

    def relative_flatness(
        self, logits: Tensor, head: Tensor, gram: HadamardGram, target: Targets | None
    ) -> Float[Tensor, "n t"]:
        r"""Return \(\operatorname{Tr}(B V G V^\top)\), shape (n, 1)."""
        products = gram.inner_products(head.expand(len(logits), -1, -1))
        return (self.curvature.to(logits) * products).sum((1, 2)).unsqueeze(1)

    def logit_gradient(self, logits: Tensor, target: Targets | None) -> Float[Tensor, "n c t"]:
        r"""Return \(\nabla \ell\), shape (n, c, 1)."""
        return self.gradient.to(logits).unsqueeze(-1)

    def logit_gradient_product(
        self, logits: Tensor, values: Float[Tensor, "n c"], target: Targets | None
    ) -> Float[Tensor, "n t"]:
        r"""Return \(\langle \nabla \ell, u \rangle\), shape (n, 1)."""
        return (self.gradient.to(values) * values).sum(-1, keepdim=True)

    def select(self, samples: slice | Tensor) -> Differentiated:
        """Return the loss of some of the samples."""
        return Differentiated(self.gradient[samples], self.curvature[samples])


Loss: TypeAlias = CrossEntropy | BinaryCrossEntropy
Form: TypeAlias = CrossEntropy | BinaryCrossEntropy | Differentiated
"""What a recorded loss can be proved to be."""


def cotangents(
    loss: Form, logits: Float[Tensor, "n c"], target: Targets | None
) -> tuple[Float[Tensor, "n r c"], Float[Tensor, "n r"]]:
    r"""Return a factor of the curvature and the signs of its rows: \(F^\top \operatorname{diag}(\sigma) F = B\).

    Under cross-entropy it is the factor of `functional.curvature_factor`, under binary cross-entropy the root of the
    diagonal. Of other losses the rows are eigenvectors, and only these have negative signs.

    Args:
        loss: of each sample in its logits.
        logits: \(\phi\), shape (n, c).
        target: as the loss reads it.

    Returns:
        \(F\), shape (n, r, c), in the square root of the loss per logit, and \(\sigma\), shape (n, r).

    Example:
        >>> import torch
        >>> cotangents(BinaryCrossEntropy(), torch.zeros(1, 2), None)
        (tensor([[[0.5000, 0.0000],
                  [0.0000, 0.5000]]]), tensor([[1., 1.]]))
    """
    if isinstance(loss, Differentiated):
        values, vectors = torch.linalg.eigh(loss.curvature)
        return (vectors * values.abs().sqrt().unsqueeze(1)).mT.to(logits), values.sign().to(logits)
    weight = loss.label_weight(logits, target)
    if isinstance(loss, CrossEntropy):
        factor = curvature_factor(logits) * weight.sqrt()[:, None, None]
    else:
        factor = torch.diag_embed((weight * _variance(logits)).sqrt())
    return factor, factor.new_ones(factor.shape[:2])


_NAMES: dict[str, Loss] = {"cross_entropy": CrossEntropy(), "bce_with_logits": BinaryCrossEntropy()}


def as_loss(loss: str | nn.Module | Loss | Callable[..., Tensor]) -> Loss | Callable[..., Tensor]:
    """Return the loss that a name or a torch module stands for.

    Args:
        loss: `"cross_entropy"`, `"bce_with_logits"`, an `nn.CrossEntropyLoss` (its `weight` and `label_smoothing` are
            read), an `nn.BCEWithLogitsLoss` (its `weight` and `pos_weight`, per label, are read), or a loss as this
            function returns it. The `reduction` is not read: the mean over samples is measured.

    Returns:
        The loss as an immutable value.

    Raises:
        ValueError: if the loss is another one, its `ignore_index` is a class, or a weight is not one non-negative
            number per class.

    Example:
        >>> import torch
        >>> as_loss(torch.nn.CrossEntropyLoss(label_smoothing=0.1)).label_smoothing
        0.1
    """
    if isinstance(loss, (CrossEntropy, BinaryCrossEntropy)):
        return loss
    if isinstance(loss, str) and loss in _NAMES:
        return _NAMES[loss]
    # A subclass may compute another loss, so the type must match exactly.
    if type(loss) is nn.CrossEntropyLoss:
        if loss.ignore_index >= 0:
            raise ValueError(
                f"`loss` must count every class; got `ignore_index={loss.ignore_index}`. Remove these samples from "
                "the batches, and pass the loss without `ignore_index`."
            )
        return CrossEntropy(_class_weights("weight", loss.weight), loss.label_smoothing)
    if type(loss) is nn.BCEWithLogitsLoss:
        weights = (_class_weights(name, getattr(loss, name)) for name in ("weight", "pos_weight"))
        return BinaryCrossEntropy(*weights)
    if callable(loss):
        return loss
    raise ValueError(
        f"`loss` must be one of {list(_NAMES)}, a loss module of torch, or a function of the outputs and the targets; "
        f"got {loss!r}. Pass the loss of the training."
    )


def _class_weights(name: str, weights: Tensor | None) -> Float[Tensor, "*c"] | None:
    if weights is None:
        return None
    if weights.dim() > 1 or not bool((weights >= 0).all()):
        raise ValueError(
            f"`loss.{name}` must hold one non-negative number per class, shape (c,); got shape {tuple(weights.shape)}"
            f" with values from {float(weights.min()):g} to {float(weights.max()):g}. Pass a loss with such weights."
        )
    return weights.detach()


def _variance(logits: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return `s (1 - s)` for the sigmoid `s`, without the rounding error of `1 - s`."""
    return without_subnormals(logits.sigmoid() * (-logits).sigmoid())


def _true_class(target: Targets | None) -> Int[Tensor, " n"]:
    target = _required(target)
    return target if target.dim() == 1 else target.argmax(-1)


def _required(target: Targets | None) -> Targets:
    """Return the targets, or raise an error if they are unknown."""
    if target is None:
        raise ValueError("This quantity depends on the targets; got no target. Pass `target`.")
    return target


def checked_targets(target: Any, samples: int, classes: int, loss: Loss, check_values: bool = True) -> Targets:
    """Return the targets in the form that the loss reads, after checking them.

    Cross-entropy takes class indices, shape (n,), or floating-point probabilities of the classes, shape (n, c). Binary
    cross-entropy takes labels in [0, 1], shape (n, c), or shape (n,) if there is one logit.

    Args:
        target: the targets of the batch, of any type.
        samples: n, the number of samples that the network saw.
        classes: c, the number of logits.
        loss: loss of the training.
        check_values: whether to check the range of the values too; on an accelerator this waits for the device.

    Returns:
        Class indices as int64, shape (n,), or probabilities or labels as floating-point numbers, shape (n, c).

    Raises:
        ValueError: if the targets have another form or values outside their range, or the number of logits does not
            fit the loss.

    Example:
        >>> import torch
        >>> checked_targets(torch.tensor([1, 0], dtype=torch.uint8), samples=2, classes=3, loss=CrossEntropy())
        tensor([1, 0])
    """
    _check_logits(loss, classes)
    if not isinstance(target, Tensor) or target.layout != torch.strided:
        given = getattr(target, "layout", type(target).__name__)
        raise ValueError(f"Targets must be a dense tensor; got {given}. Select them with `target=lambda batch: ...`.")
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
            f"Targets must be {wanted}; got {target.dtype} of shape {tuple(target.shape)}. Select them with "
            "`target=lambda batch: ...`, or name the loss with `loss=...` if it is not cross-entropy."
        )
    target = target.long() if indices else target if target.is_floating_point() else target.float()
    if check_values and samples:
        _check_range(target[target != IGNORED] if indices else target, classes if indices else None)
    return target


def _check_logits(loss: Loss, classes: int) -> None:
    """Check that the loss and its weights fit the number of logits."""
    if classes == 1 and not isinstance(loss, BinaryCrossEntropy):
        raise ValueError('Cross-entropy needs two logits or more; got one. Pass `loss="bce_with_logits"`.')
    for name in ("weight", "pos_weight"):
        weights = getattr(loss, name, None)
        if weights is not None and weights.numel() not in (1, classes):
            raise ValueError(
                f"`loss.{name}` must have one entry per logit, ({classes},); got {tuple(weights.shape)}. Pass the loss "
                "that the training uses."
            )


def _check_range(target: Tensor, classes: int | None) -> None:
    """Check that class indices lie in [0, c), or other targets in [0, 1]."""
    if not target.numel():
        return
    low, high = (bound.item() for bound in torch.aminmax(target))
    if not (low >= 0 and (high <= 1 if classes is None else high < classes)):
        span = "[0, 1]" if classes is None else f"[0, {classes}) for {classes} logits"
        raise ValueError(
            f"Targets must lie in {span}; got values from {low} to {high}. Correct the data, or select the targets "
            "with `target=lambda batch: ...`."
        )
