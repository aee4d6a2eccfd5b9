"""The loss as a function of the pooled features: proved to be cross-entropy, or differentiated as recorded.

What lies behind the pooled features p is one recorded function: the head, p to the logits phi, and the loss, phi to the
number that the step computed. It is repeated in float64 under autograd, which says what its curvature is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from lightning_flatness.curvature.forms import EXACT, RecordedFunction, count_factor, drawn_points, proved_form
from lightning_flatness.curvature.head import HeadCurvature, is_own_logit
from lightning_flatness.errors import Refusal
from lightning_flatness.losses import BinaryCrossEntropy, CrossEntropy, Differentiated, Form
from lightning_flatness.recording.graph import Cut
from lightning_flatness.recording.operators import Trait
from lightning_flatness.recording.recorded_pass import RecordedLoss

LabelledForm: TypeAlias = tuple[CrossEntropy | BinaryCrossEntropy, Tensor]


@dataclass(frozen=True)
class Objective:
    """What follows the pooled features, for each sample that counts.

    Attributes:
        cut: where the logits are on the record.
        counted: whether the loss depends on the sample, shape (n,).
        logits: `phi`, float64, shape (n, c).
        head: `d phi / d p`, shape (c, j) if it is the same for all samples, else (n, c, j); float64.
        loss: its form in the logits.
        target: labels with their weights, as the form reads them; None if they are in it.
        head_curvature: what the curvature of the head adds; None for a piecewise linear head.
    """

    cut: Cut
    counted: Tensor
    logits: Tensor
    head: Tensor
    loss: Form
    target: Tensor | None = None
    head_curvature: HeadCurvature | None = None

    @property
    def is_own_logit(self) -> bool:
        """Whether the loss itself is taken for the logit, and all curvature is that of the head."""
        return is_own_logit(self.loss, self.logits, self.head_curvature)

    def kept(self, samples: slice) -> Tensor:
        """Return which samples are to be measured, shape (n,): those of a slice on which the loss depends."""
        if samples == slice(None):
            return self.counted
        chosen = torch.zeros_like(self.counted)
        chosen[samples] = True
        return chosen & self.counted


def objective(recorded: RecordedLoss, pooled: Cut, features: Tensor) -> Objective | Refusal:
    """Return what the loss is as a function of the pooled features, or why that cannot be said.

    Args:
        recorded: one pass.
        pooled: the pooled features on the record.
        features: their values, shape (n, j).
    """
    features = features.detach().double()
    loss = recorded.cuts[-1]
    candidates = [cut for cut in recorded.cuts if cut.end >= pooled.end and _is_by_sample(recorded, cut, len(features))]
    found: Objective | Refusal | None = None
    for cut in candidates[::-1]:
        if (form := proved_form(RecordedFunction(recorded, cut, loss), len(features))) is None:
            continue
        goal = _with_head(recorded, pooled, cut, features, form)
        if isinstance(goal, Objective) and goal.head_curvature is None:
            return goal
        found = found or goal  # an earlier tensor may be the logits as well, behind a straight head
    return found or _differentiated(recorded, pooled, candidates, features)


def _refusal(recorded: RecordedLoss, reason: str) -> Refusal:
    return Refusal(
        f"The loss must be a sum over samples, each with features of its own; got one where {reason}. Such a loss has "
        f"no curvature of each sample: measure another one with `loss=lambda output, targets: ...`.\n"
        f"  path: {recorded.path}"
    )


def counted_by(form: LabelledForm) -> Tensor:
    """Return whether the loss depends on each sample, shape (n,)."""
    loss, target = form
    weights = target if isinstance(loss, CrossEntropy) else loss.label_weight(target, target)
    return weights.sum(-1) > 0


def _is_by_sample(recorded: RecordedLoss, cut: Cut, samples: int) -> bool:
    shape = recorded.graph.tensor_of(cut.node).shape
    return len(shape) > 0 and shape[0] == samples and sum(size > 1 for size in shape[1:]) <= 1


def _with_head(
    recorded: RecordedLoss,
    pooled: Cut,
    cut: Cut,
    features: Tensor,
    form: LabelledForm,
) -> Objective | Refusal:
    """Return the objective for a form that was proved at a cut: the derivative of the head remains to be taken."""
    loss, target = form
    counted = counted_by(form)
    if pooled == cut:
        return Objective(cut, counted, features, _identity(features), loss, target)
    point = features.requires_grad_()
    logits = RecordedFunction(recorded, pooled, cut)(point)
    if _couples(logits, point):
        return _refusal(recorded, "the logits of one sample depend on the features of another")
    gradient = loss.logit_gradient(logits.detach().unsqueeze(-1), target).squeeze(-1)
    jacobian, curvature = _head(recorded, (pooled, cut), logits, point, gradient)
    return Objective(cut, counted, logits.detach(), jacobian, loss, target, curvature)


def _head(
    recorded: RecordedLoss, between: tuple[Cut, Cut], logits: Tensor, point: Tensor, gradient: Tensor
) -> tuple[Tensor, HeadCurvature | None]:
    """Return `d phi / d p` of a head, (c, j) if it is the same for all samples, and what its curvature adds.

    Args:
        recorded: the pass.
        between: the cuts of the features and of the logits.
        logits: the head's output, a function of the point.
        point: the features.
        gradient: of the loss in the logits.
    """
    classes = range(logits.shape[1])
    if _is_curved(logits, point):
        jacobian = torch.stack([_row(logits, point, c) for c in classes], 1)
        (pulled,) = torch.autograd.grad(logits, point, gradient, create_graph=True)
        return jacobian, HeadCurvature(pulled, point, _weights(recorded, *between))
    cotangent = _drawn(logits[0], 1)
    (rows,) = torch.autograd.grad((logits @ cotangent).sum(), point, retain_graph=True)
    if not bool(((rows - rows[:1]).abs() <= EXACT * rows.abs().amax(0)).all()):
        return torch.stack([_row(logits, point, c) for c in classes], 1), None
    for call in recorded.linear_calls:  # the weight itself, if that is the head
        if call.weight.shape == (len(classes), point.shape[1]):
            weight = call.weight.double()
            rounding = 1e-12 * (cotangent.abs() @ weight.abs())
            if bool(((cotangent @ weight - rows[0]).abs() <= rounding).all()):
                return weight, None
    return torch.stack([_row(logits, point, c)[0] for c in classes]), None


def _is_curved(logits: Tensor, point: Tensor) -> bool:
    """Return whether the logits have a second derivative at the point."""
    (rows,) = torch.autograd.grad((logits @ _drawn(logits[0], 1)).sum(), point, create_graph=True)
    if not rows.requires_grad:
        return False
    (bent,) = torch.autograd.grad((rows * _drawn(point, 3)).sum(), point, retain_graph=True, materialize_grads=True)
    # Sample by sample: a cosine head has a slope of 1e12 where all features are zero, and no number for a curvature.
    return not bool((bent.abs().amax(-1) <= 1e-12 * rows.abs().amax(-1)).all())


def _drawn(like: Tensor, seed: int) -> Tensor:
    """Return random numbers of this shape."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(like.shape, generator=generator, dtype=torch.float64, device="cpu").to(like)


def _weights(recorded: RecordedLoss, source: Cut, target: Cut) -> int:
    """Return how many numbers the matrices have that the steps between two cuts multiply with."""
    steps = (recorded.graph.operations[n] for n in recorded.ancestry if source.end <= n < target.end)
    products = (operation for operation in steps if Trait.MATRIX_PRODUCT in operation.traits)
    captured = (each.index for operation in products for each in operation.captured)
    return sum(value.numel() for value in map(recorded.graph.captures.peek, captured) if value.dim() > 1)


def _identity(features: Tensor) -> Tensor:
    return torch.eye(features.shape[1], dtype=torch.float64, device=features.device)


def _width(recorded: RecordedLoss, cut: Cut) -> int:
    return recorded.graph.tensor_of(cut.node).shape[1:].numel()


def _row(logits: Tensor, point: Tensor, c: int) -> Tensor:
    (gradient,) = torch.autograd.grad(logits[:, c].sum(), point, retain_graph=True, materialize_grads=True)
    return gradient


def _couples(values: Tensor, point: Tensor) -> bool:
    """Return whether the values of one sample depend on the point of another."""
    samples = torch.arange(len(point), device=point.device)
    cotangent = _drawn(values, 2)
    bits = [((samples >> bit) & 1).bool() for bit in range((len(point) - 1).bit_length())]
    halves = [half for bit in bits for half in (bit, ~bit)]  # an influence may have one direction

    def slope(rows: Tensor) -> Tensor:
        (gradient,) = torch.autograd.grad(values, point, rows, retain_graph=True, materialize_grads=True)
        return gradient.abs().amax(-1)

    foreign = [slope(cotangent * half.unsqueeze(1)).where(~half, 0.0) for half in halves]
    if not any(bool(each.any()) for each in foreign):
        return False
    size = slope(cotangent)  # of each sample: beside a huge one, the others' influence would seem to be nothing
    return any(bool((each > EXACT * size).any()) for each in foreign)  # NaN is no influence


def _has_gradient(tail: RecordedFunction, samples: int, unless_linear: bool = False) -> Tensor:
    """Return whether each sample has a gradient somewhere: a hinge may be satisfied at the recorded values.

    With `unless_linear`, none has if the gradient is the same everywhere, as that of a mean over losses of samples is.
    """
    found = torch.zeros(samples, dtype=torch.bool, device=tail.device)
    gradients: list[Tensor] = []
    for point in drawn_points(tail, samples):
        for signed in (point, -point):
            try:
                gradients += tail.gradient(signed)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:  # where the loss takes no such values, as a probability of 2
                continue
            found |= gradients[-1].abs().sum(-1) > 0  # NaN is no gradient
    if unless_linear and all(torch.equal(gradient, gradients[0]) for gradient in gradients):
        return torch.zeros_like(found)
    return found


def _differentiated(
    recorded: RecordedLoss, pooled: Cut, candidates: list[Cut], features: Tensor
) -> Objective | Refusal:
    """Return the objective of another loss: its second derivatives are taken at the logits.

    These are the last tensor that is narrower than the features and piecewise linear in them, else the first of the
    narrowest. If none is narrower, they are the features themselves; but if the last tensor with several numbers per
    sample is wider than these, the loss itself is taken for the only logit.
    """
    point, count = features.requires_grad_(), features.shape[1]
    wide = [width for cut in candidates if (width := _width(recorded, cut)) > 1]
    least, classes = min(wide, default=count), wide[-1] if wide else count
    curved: tuple[Cut, Tensor] | None = None
    for cut in candidates[::-1]:
        logits = RecordedFunction(recorded, pooled, cut)(point)
        width = logits.shape[1]
        if cut == pooled or not logits.requires_grad or width > count or _couples(logits, point):
            continue
        if not _is_curved(logits, point):
            if width < count or classes == count:
                return _twice_differentiated(recorded, pooled, cut, candidates, logits, point)
        elif width == least < count:
            curved = cut, logits
    if curved is not None:
        return _twice_differentiated(recorded, pooled, curved[0], candidates, curved[1], point)
    return _twice_differentiated(recorded, pooled, pooled, candidates, point, point, is_whole=classes > count)


def _loss_as_logit(recorded: RecordedLoss, counted: Tensor, gradient: Tensor, point: Tensor) -> Objective:
    """Return the objective of a loss that is its own single logit, to first order: the head has all the curvature."""
    head, size = gradient.detach().unsqueeze(1), len(point)
    logits = (head @ point.detach().unsqueeze(-1)).squeeze(-1)
    form = Differentiated(torch.ones_like(logits), logits.new_zeros(size, 1, 1))
    return Objective(recorded.cuts[-1], counted, logits, head, form, None, HeadCurvature(gradient, point))


def _twice_differentiated(
    recorded: RecordedLoss,
    pooled: Cut,
    cut: Cut,
    candidates: list[Cut],
    logits: Tensor,
    point: Tensor,
    is_whole: bool = False,
) -> Objective | Refusal:
    """Return the objective of a loss with given logits; `is_whole`: all that follows them is taken for the head."""
    loss = recorded.cuts[-1]
    tail = RecordedFunction(recorded, cut, loss)
    phi = logits.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(tail(phi), phi, create_graph=True, materialize_grads=True)
    if gradient.requires_grad and _couples(gradient, phi):
        return _refusal(recorded, "the loss couples the samples of a batch: it is no sum over samples")
    counted = gradient.detach().abs().sum(-1) > 0
    if not counted.all():
        counted |= _has_gradient(tail, len(phi))
    for later in candidates:  # a mask may cut a sample off from the filters: the loss still counts it
        if later.end > cut.end and not counted.all():
            counted |= _has_gradient(RecordedFunction(recorded, later, loss), len(phi), unless_linear=True)
    gradient = gradient * count_factor(tail, counted)
    if is_whole:
        return _loss_as_logit(recorded, counted, gradient, phi)
    if not gradient.requires_grad:
        curvature = phi.new_zeros(*phi.shape, phi.shape[1])
    else:
        curvature = torch.stack([_row(gradient, phi, c) for c in range(phi.shape[1])], 1)
    form = Differentiated(gradient.detach(), curvature)
    if cut == pooled:
        return Objective(cut, counted, phi.detach(), _identity(phi), form)
    jacobian, bent = _head(recorded, (pooled, cut), logits, point, gradient.detach())
    return Objective(cut, counted, phi.detach(), jacobian, form, None, bent)
