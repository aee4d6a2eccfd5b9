"""The loss as a function of the pooled features: proved to be cross-entropy, or differentiated as recorded.

What lies behind the pooled features p is one recorded function: the head, p to the logits phi, and the loss, phi to the
number that the step computed. It is repeated in float64 under autograd, which says what its curvature is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from lightning_flatness.errors import Refusal
from lightning_flatness.losses import BinaryCrossEntropy, CrossEntropy, Differentiated, Form
from lightning_flatness.recording.graph import Cut, OperationGraph
from lightning_flatness.recording.operation import Captured, Operation, named_arguments
from lightning_flatness.recording.recorded_pass import RecordedPass

_Probe: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor]
"""A random point and direction; the gradient at the point, and the Hessian times the direction."""
_EXACT = 1e-8  # relative error of a derivative in float64 that is still taken for rounding


@dataclass(frozen=True)
class Objective:
    """What follows the pooled features, for each sample that counts.

    Attributes:
        counted: whether the loss depends on the sample, shape (n,).
        logits: `phi`, float64, shape (n, c).
        head: `d phi / d p`, shape (c, j) if it is the same for all samples, else (n, c, j); float64.
        loss: its form in the logits.
        target: labels with their weights, as the form reads them; None if they are in it.
        head_curvature: `sum_c (d l / d phi_c) (d2 phi_c / d p2)`, shape (n, j, j); None for a piecewise linear head.
    """

    counted: Tensor
    logits: Tensor
    head: Tensor
    loss: Form
    target: Tensor | None = None
    head_curvature: Tensor | None = None


class _Recorded:
    """A part of the record as a function of one node, in float64 and with `detach` as a constant."""

    def __init__(self, recorded: RecordedPass, source: Cut, target: Cut) -> None:
        self._graph, self._source, self._target = recorded.graph, source, target
        self._only = recorded.ancestry
        self.shape = recorded.graph.tensor_of(source.node).shape

    @property
    def is_sum(self) -> bool:
        """Whether the loss is a plain sum over samples: it averages nothing and is not scaled by a number."""
        operations = [self._graph.operations[number] for number in sorted(self._only) if number >= self._source.end]
        return not any(_averages(self._graph, operation) for operation in operations) and any(
            operation.name == "sum" or _reduction(operation) == 2 for operation in operations
        )

    def __call__(self, rows: Tensor) -> Tensor:
        """Return the target for values of the source of shape (n, j), as (n, c) or a scalar."""
        if self._source == self._target:
            return rows
        value = self._graph.replay(
            {self._source.node: rows.reshape(self.shape)},
            self._target.end,
            start=self._source.end,
            only=self._only,
            dtype=torch.float64,
            detach=True,
        )[self._target.node]
        return value.reshape(len(rows), -1) if value.numel() > 1 or value.dim() else value.reshape(())


def _averages(graph: OperationGraph, operation: Operation) -> bool:
    """Return whether an operation takes a mean or scales by a number, as the division by a count does."""
    if operation.name.startswith("mean") or _reduction(operation) == 1:
        return True
    if operation.name.rstrip("_") not in ("mul", "div") or len(operation.args) < 2:
        return False
    factor = operation.args[1]
    return isinstance(factor, (int, float)) or (
        isinstance(factor, Captured) and graph.captures.peek(factor.index).numel() == 1
    )


def _reduction(operation: Operation) -> int | None:
    """Return how an operation reduces losses, in torch's numbers: 0 not at all, 1 to the mean, 2 to the sum."""
    return named_arguments(operation.function, operation.args, operation.kwargs).get("reduction")


def objective(recorded: RecordedPass, pooled: Cut, features: Tensor) -> Objective | Refusal:
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
        if (form := _proved_form(_Recorded(recorded, cut, loss), len(features))) is None:
            continue
        goal = _with_head(recorded, pooled, cut, features, form)
        if isinstance(goal, Objective) and goal.head_curvature is None:
            return goal
        found = found or goal  # an earlier tensor may be the logits as well, behind a straight head
    return found or _differentiated(recorded, pooled, candidates, features)


def _refusal(recorded: RecordedPass, reason: str) -> Refusal:
    return Refusal(
        f"The loss must be a sum over samples, each with features of its own; got one where {reason}. Such a loss has "
        f"no curvature of each sample: measure another one with `loss=lambda output, targets: ...`.\n"
        f"  path: {recorded.path}"
    )


def _proved_form(tail: _Recorded, samples: int) -> tuple[CrossEntropy | BinaryCrossEntropy, Tensor] | None:
    """Return the form of the loss with its labels; None if it is another one, or takes probabilities, not logits."""
    try:
        probes = [(*drawn, *_derivatives(tail, *drawn)) for drawn in _drawn(tail, samples)]
        return _cross_entropy(tail, probes) or _sigmoid(tail, probes)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # at a random point, where probabilities must lie in [0, 1]
        return None


def _is_by_sample(recorded: RecordedPass, cut: Cut, samples: int) -> bool:
    shape = recorded.graph.tensor_of(cut.node).shape
    return len(shape) > 0 and shape[0] == samples and sum(size > 1 for size in shape[1:]) <= 1


def _derivatives(function: Callable[[Tensor], Tensor], point: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """Return gradient and Hessian-vector product of a scalar function."""
    point = point.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(function(point), point, create_graph=True, materialize_grads=True)
    if not gradient.requires_grad:
        return gradient, torch.zeros_like(gradient)
    (product,) = torch.autograd.grad((gradient * direction).sum(), point, materialize_grads=True)
    return gradient.detach(), product


def _drawn(tail: _Recorded, samples: int) -> list[tuple[Tensor, Tensor]]:
    """Return two moderate points and directions: nothing depends on the recorded values."""
    generator = torch.Generator().manual_seed(0)
    size = tail.shape.numel() // samples
    device = tail._graph.tensor_of(tail._source.node).device

    def drawn() -> Tensor:
        return torch.randn(samples, size, generator=generator, dtype=torch.float64).to(device)

    return [(drawn(), drawn()) for _ in range(2)]


def _cross_entropy(tail: _Recorded, probes: list[_Probe]) -> tuple[CrossEntropy, Tensor] | None:
    """Return the form `sum_n w_n CE(q_n, phi_n) + const` with its labels and weights if the loss is one."""
    found: list[Tensor] = []
    for point, direction, gradient, product in probes:
        if point.shape[1] == 1:  # one logit
            return None
        probabilities = point.softmax(-1)
        expected = probabilities * (direction - (probabilities * direction).sum(-1, keepdim=True))
        weight = (product * expected).sum(-1, keepdim=True) / expected.square().sum(-1, keepdim=True)
        label = weight * probabilities - gradient
        scale = weight.abs().max().clamp_min(1e-300)
        if (product - weight * expected).abs().max() > _EXACT * scale or label.min() < -_EXACT * scale:
            return None
        if (label.sum(-1, keepdim=True) - weight).abs().max() > _EXACT * scale or not weight.any():
            return None
        found.append(label)
    if not _agree(*found):
        return None
    label = _snapped(found[0])
    return CrossEntropy(), label * _count_factor(tail, label.sum(-1))


def _sigmoid(tail: _Recorded, probes: list[_Probe]) -> tuple[BinaryCrossEntropy, Tensor] | None:
    """Return the form `-sum_nc [pos log s + neg log(1 - s)]`, `s` the sigmoid, if the loss is one."""
    found: list[Tensor] = []
    for point, direction, gradient, product in probes:
        sigmoid = point.sigmoid()
        weight = product / (sigmoid * (1 - sigmoid) * direction)
        negative = gradient + weight * (1 - sigmoid)
        both = torch.stack([weight - negative, negative])
        scale = weight.abs().max()
        if not weight.any() or both.min() < -_EXACT * scale:
            return None
        found.append(both)
    if not _agree(*found):
        return None
    positive, negative = found[0]
    weight = positive + negative
    positive = _snapped(torch.stack([positive, negative], -1))[..., 0]
    labels = torch.where(weight > 0, positive / weight, 0.0)
    return BinaryCrossEntropy(weight * _count_factor(tail, weight.sum(-1))), labels


def _agree(first: Tensor, second: Tensor) -> bool:
    """Return whether two tensors are equal up to the rounding of float64; not if there are NaN in them."""
    return bool(((first - second).abs() <= _EXACT * second.abs().max()).all())


def _snapped(values: Tensor) -> Tensor:
    """Return the values without rounding where they are nothing, or all of their row."""
    total = values.sum(-1, keepdim=True)
    values = values.where(values.abs() > _EXACT * values.abs().max(), 0.0)
    is_all = values >= (1 - _EXACT) * total
    return values.where(~is_all, total)


def _count_factor(tail: _Recorded, weight: Tensor) -> float:
    """Return what makes the contribution of a sample to the step's loss the loss of the sample.

    It is the number of samples that count; 1 for a loss that was summed, whose contributions are losses already.
    """
    return 1.0 if tail.is_sum else float((weight > 0).sum())


def _with_head(
    recorded: RecordedPass,
    pooled: Cut,
    cut: Cut,
    features: Tensor,
    form: tuple[CrossEntropy | BinaryCrossEntropy, Tensor],
) -> Objective | Refusal:
    """Return the objective for a form that was proved at a cut: the derivative of the head remains to be taken."""
    loss, target = form
    weights = target if isinstance(loss, CrossEntropy) else loss.label_weight(target, target)
    counted = weights.sum(-1) > 0
    if pooled == cut:
        identity = torch.eye(features.shape[1], dtype=torch.float64, device=features.device)
        return Objective(counted, features, identity, loss, target)
    point = features.requires_grad_()
    logits = _Recorded(recorded, pooled, cut)(point)
    if _couples(logits, point):
        return _refusal(recorded, "the logits of one sample depend on the features of another")
    jacobian, is_curved = _jacobian(recorded, logits, point)
    curvature = None
    if is_curved:
        phi = logits.detach()
        ones = torch.eye(phi.shape[1]).to(phi)
        gradient = torch.stack(
            [loss.logit_gradient_product(phi.unsqueeze(-1), one.expand_as(phi), target)[:, 0] for one in ones], 1
        )
        (first,) = torch.autograd.grad((logits * gradient).sum(), point, create_graph=True)
        curvature = torch.stack([_row(first, point, j) for j in range(point.shape[1])], 1)
    return Objective(counted, logits.detach(), jacobian, loss, target, curvature)


def _jacobian(recorded: RecordedPass, logits: Tensor, point: Tensor) -> tuple[Tensor, bool]:
    """Return `d phi / d p`, (c, j) if it is the same for all samples, and whether the head is curved."""
    generator = torch.Generator().manual_seed(1)
    cotangent = torch.randn(logits.shape[1], generator=generator, dtype=torch.float64).to(logits)
    direction = torch.randn(point.shape, generator=generator, dtype=torch.float64).to(logits)
    (rows,) = torch.autograd.grad((logits @ cotangent).sum(), point, create_graph=True)
    is_curved = False
    if rows.requires_grad:
        (bent,) = torch.autograd.grad((rows * direction).sum(), point, retain_graph=True, materialize_grads=True)
        is_curved = bool(bent.abs().max() > 1e-12 * rows.abs().max())
    rows = rows.detach()
    if not is_curved and torch.allclose(
        rows, rows[:1].expand_as(rows), rtol=_EXACT, atol=float(_EXACT * rows.abs().max())
    ):
        for call in recorded.linear_calls:  # the weight itself, if that is the head
            if len(call.weight) == len(cotangent) and call.weight.shape[1] == point.shape[1]:
                weight = call.weight.double()
                if torch.allclose(cotangent @ weight, rows[0], rtol=1e-12, atol=float(1e-12 * rows.abs().max())):
                    return weight, False
        return torch.stack([_row(logits, point, c)[0] for c in range(logits.shape[1])]), False
    return torch.stack([_row(logits, point, c) for c in range(logits.shape[1])], 1), is_curved


def _row(logits: Tensor, point: Tensor, c: int) -> Tensor:
    (gradient,) = torch.autograd.grad(logits[:, c].sum(), point, retain_graph=True, materialize_grads=True)
    return gradient


def _has_gradient(tail: _Recorded, samples: int) -> Tensor:
    """Return whether each sample has a gradient somewhere: a hinge may be satisfied at the recorded values."""
    points = [point for pair in _drawn(tail, samples) for point in pair]
    found = torch.zeros(samples, dtype=torch.bool, device=points[0].device)
    for point in [*points, *(-point for point in points)]:
        try:
            (gradient,) = torch.autograd.grad(tail(point.requires_grad_()), point, materialize_grads=True)
            found |= gradient.abs().sum(-1) > 0  # NaN is no gradient
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # where the loss takes no such values, as a probability of 2
            pass
    return found


def _couples(values: Tensor, point: Tensor) -> bool:
    """Return whether the values of one sample depend on the point of another."""
    samples = torch.arange(len(point), device=point.device)
    generator = torch.Generator().manual_seed(2)
    cotangent = torch.randn(values.shape, generator=generator, dtype=torch.float64).to(values)
    bits = [((samples >> bit) & 1).bool() for bit in range((len(point) - 1).bit_length())]
    for half in (half for bit in bits for half in (bit, ~bit)):  # an influence may have one direction
        rows = cotangent * half.unsqueeze(1)
        (gradient,) = torch.autograd.grad(values, point, rows, retain_graph=True, materialize_grads=True)
        if gradient[~half].any() and gradient[~half].abs().max() > _EXACT * gradient.abs().max():
            return True
    return False


def _differentiated(
    recorded: RecordedPass, pooled: Cut, candidates: list[Cut], features: Tensor
) -> Objective | Refusal:
    """Return the objective of another loss: its second derivatives are taken where an affine head ends, or at p."""
    loss = recorded.cuts[-1]
    point = features.requires_grad_()
    for cut in candidates[::-1]:
        logits = _Recorded(recorded, pooled, cut)(point)
        if cut == pooled or not logits.requires_grad or logits.shape[1] > features.shape[1] or _couples(logits, point):
            continue
        jacobian, is_curved = _jacobian(recorded, logits, point)
        if not is_curved:
            break
    else:
        cut, logits = pooled, point
        jacobian = torch.eye(features.shape[1], dtype=torch.float64, device=features.device)
    tail = _Recorded(recorded, cut, loss)
    phi = logits.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(tail(phi), phi, create_graph=True, materialize_grads=True)
    if not gradient.requires_grad:
        curvature = phi.new_zeros(*phi.shape, phi.shape[1])
    else:
        if _couples(gradient, phi):
            return _refusal(recorded, "the loss couples the samples of a batch: it is no sum over samples")
        curvature = torch.stack([_row(gradient, phi, c) for c in range(phi.shape[1])], 1)
    counted = (gradient.detach().abs().sum(-1) > 0) | _has_gradient(tail, len(phi))
    count = _count_factor(tail, counted)
    form = Differentiated(gradient.detach() * count, curvature.detach() * count)
    return Objective(counted, logits.detach(), jacobian, form)
