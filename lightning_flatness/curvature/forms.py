"""The form of a recorded loss: proved to be cross-entropy of a softmax or a sigmoid, with its labels read from it.

The loss as a function of the logits is repeated at random points, in float64. Its gradients there decide which form it
has, and hold the labels and weights of every sample.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_flatness.losses import BinaryCrossEntropy, CrossEntropy
from lightning_flatness.recording.graph import Cut, OperationGraph
from lightning_flatness.recording.operation import Captured, Operation, named_arguments
from lightning_flatness.recording.recorded_pass import RecordedLoss

EXACT = 1e-8
"""Relative error of a derivative in float64 that is still taken for rounding."""

_CACHED = 2**18  # numbers of one random point that are kept, 2 MB


class RecordedFunction:
    """A part of the record as a function of one node, in float64 and with `detach` as a constant."""

    def __init__(self, recorded: RecordedLoss, source: Cut, target: Cut) -> None:
        self._graph, self._source, self._target = recorded.graph, source, target
        self._only = recorded.ancestry
        value = recorded.graph.tensor_of(source.node)
        self.shape, self.device = value.shape, value.device

    def gradient(self, *rows: Tensor) -> Tensor:
        """Return the derivative of a scalar target at each of several points, shape (m, n, j)."""
        points = [each.detach().requires_grad_() for each in rows]
        return torch.stack(torch.autograd.grad([self(point) for point in points], points, materialize_grads=True))

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


class Candidate(NamedTuple):
    """A form that the loss may have.

    Attributes:
        form: the form.
        target: the labels, as it reads them.
        holds: whether the loss has it, a scalar.
    """

    form: CrossEntropy | BinaryCrossEntropy
    target: Tensor
    holds: Tensor


def proved_form(tail: RecordedFunction, samples: int) -> tuple[CrossEntropy | BinaryCrossEntropy, Tensor] | None:
    """Return the form of the loss with its labels; None if it is another one, or takes probabilities, not logits.

    Args:
        tail: the loss as a function of the logits.
        samples: n.
    """
    found = (candidate for candidate in candidates(tail, samples) if bool(candidate.holds))
    return next(((form, target) for form, target, _ in found), None)


def candidates(tail: RecordedFunction, samples: int) -> Iterator[Candidate]:
    """Yield the forms that the loss may have; arguments are those of `proved_form`.

    The gradient of one sample is `w S - a` for cross-entropy, with the softmax `S` and the label `a`, whose entries add
    up to `w`; for binary cross-entropy the same holds for each label, with the sigmoid. Two points, `phi` and `-phi`,
    give `w` and `a`, and all three must agree on them. A loss in which samples compete fails: who is ahead at `phi` is
    behind at `-phi`.
    """
    probe = _made(_probe, tail, samples)
    try:
        gradients = tail.gradient(*probe.points)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # at a random point, where probabilities must lie in [0, 1]
        return
    if gradients.shape[-1] > 1:
        yield _cross_entropy(tail, probe, gradients)
    yield _sigmoid(tail, probe, gradients)


def drawn_points(tail: RecordedFunction, samples: int) -> tuple[Tensor, Tensor]:
    """Return two random points of moderate size: nothing depends on the recorded values."""
    return _made(_drawn, tail, samples)


def _made(make: Any, tail: RecordedFunction, samples: int) -> Any:
    """Return what was made for a batch of this size before, unless it is too large to be kept."""
    size = tail.shape.numel() // samples
    return (make if samples * size <= _CACHED else make.__wrapped__)(samples, size, tail.device)


@lru_cache(maxsize=2)  # all batches have the same size but the last one
def _drawn(samples: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode(False):
        drawn = torch.randn(2, samples, size, generator=generator, dtype=torch.float64, device="cpu").to(device)
        return drawn[0], drawn[1]


class _Probe(NamedTuple):
    """The points at which a loss is differentiated, and what cross-entropy has there.

    Attributes:
        points: `phi`, `-phi` and another one, shape (3, n, c).
        softmax: of the points.
        change: of the softmax from the second to the first, shape (n, c).
        size: `|change|^2`, shape (n, 1).
    """

    points: Tensor
    softmax: Tensor
    change: Tensor
    size: Tensor


@lru_cache(maxsize=2)
def _probe(samples: int, size: int, device: torch.device) -> _Probe:
    first, other = _drawn.__wrapped__(samples, size, device)
    with torch.inference_mode(False):
        points = torch.stack((first, -first, other))
        softmax = points.softmax(-1)
        change = softmax[0] - softmax[1]
        return _Probe(points, softmax, change, change.square().sum(-1, keepdim=True))


def count_factor(tail: RecordedFunction, weight: Tensor) -> Tensor:
    """Return what makes the contribution of a sample to the step's loss the loss of the sample.

    It is the number of samples that count; 1 for a loss that was summed, whose contributions are losses already.
    """
    counted = (weight > 0).sum().double()
    return torch.ones_like(counted) if tail.is_sum else counted


def _cross_entropy(tail: RecordedFunction, probe: _Probe, gradients: Tensor) -> Candidate:
    """Return the form `sum_n w_n CE(q_n, phi_n) + const` with its labels and weights."""
    weight = ((gradients[0] - gradients[1]) * probe.change).sum(-1, keepdim=True) / probe.size
    labels = weight * probe.softmax - gradients
    label = labels[0]
    holds = _hold([labels[1:] - label, label.sum(-1, keepdim=True) - weight], [label], weight)
    label = _snapped(label)
    return Candidate(CrossEntropy(), label * count_factor(tail, label.sum(-1)), holds)


def _sigmoid(tail: RecordedFunction, probe: _Probe, gradients: Tensor) -> Candidate:
    """Return the form `-sum_nc [pos log s + neg log(1 - s)]`, `s` the sigmoid."""
    sigmoids = probe.points.sigmoid()
    weight = (gradients[0] - gradients[1]) / (sigmoids[0] - sigmoids[1])
    positives = weight * sigmoids - gradients
    positive = positives[0]
    holds = _hold([positives[1:] - positive], [positive, weight - positive], weight)
    positive = _snapped(torch.stack([positive, weight - positive], -1))[..., 0]
    labels = torch.where(weight > 0, positive / weight, 0.0)
    return Candidate(BinaryCrossEntropy(weight * count_factor(tail, weight.sum(-1))), labels, holds)


def _hold(zeros: list[Tensor], non_negative: list[Tensor], weight: Tensor) -> Tensor:
    """Return whether all this is so up to the rounding of float64, and some weight is not zero. NaN is not."""
    scale = weight.abs().max()
    errors = torch.stack([zero.abs().max() for zero in zeros] + [-least.min() for least in non_negative])
    return (errors <= EXACT * scale).all() & (scale > 0)


def _snapped(values: Tensor) -> Tensor:
    """Return the values without rounding where they are nothing, or all of their row."""
    total = values.sum(-1, keepdim=True)
    values = values.where(values.abs() > EXACT * values.abs().max(), 0.0)
    is_all = values >= (1 - EXACT) * total
    return values.where(~is_all, total)
