"""Certifies that the closed form is exact for a recorded pass.

The claim: feature `p_j` depends on the map `z_o(j)` of one filter alone, its owner, and position by position if the
tail is curved. It is proved by differentiating the recorded operations with random cotangents, at random points. What
comes out is a verdict: a `Certificate`, or a `Refusal` with the step that breaks the claim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_flatness.curvature.pooled.mixing import mixing_step
from lightning_flatness.curvature.pooled.owners import (
    acts_by_position,
    cotangents_of,
    is_injective,
    may_hide,
    owners,
    random_points,
    slots_of,
    traced,
)
from lightning_flatness.errors import GraphError, Refusal
from lightning_flatness.precision import is_close_at_scale
from lightning_flatness.recording.first_samples import first_samples
from lightning_flatness.recording.graph import Captures, Cut
from lightning_flatness.recording.operation import Operation
from lightning_flatness.recording.operators import Trait
from lightning_flatness.recording.recorded_pass import RecordedPass

# How many features a filter may have, and how many all filters together if one has several. A filter's features take a
# backward pass each; all together take work that grows with their square, from 2048 in a ResNet-50 to four times that.
_FEATURES_PER_FILTER, _FEATURES = 32, 4096
# So many samples are certified at least, and as many as it takes to draw so many values for each filter.
_FEW, _DRAWS = 8, 256


@dataclass(frozen=True)
class Certificate:
    """What was found to hold for a tail.

    Attributes:
        pooled: the pooled features on the record.
        signature: what must not change for it to stay valid, see `signature_of`.
        captures: of the graph that was certified.
        connections: indices of captured values that could connect filters: they must stay equal.
        call: which call of the convolution reaches the pooled features.
        feature_index: the features that the filters feed, `features_per_filter` for each filter in turn, shape (f,).
        is_fed: which of them are known, shape (f,); a filter may feed fewer than another.
        inactive: indices of those that no filter reached where the tail was certified; they may become active in later
            batches.
        features_per_filter: the largest number of features that a filter feeds.
        cotangents: of the features, each row with one feature of every filter at most, shape (features per filter, j).
            A further row has the features that moved with no filter, which may become active.
        scales: magnitude of the largest first and second derivative.
        has_second_derivative: whether the tail is curved.
        code: a random cotangent of all features, shape (j,), whose gradient has to follow from those of the cotangents
            in every batch; None where every unit was active at some of the points, and where each batch is certified.
        is_value_independent: whether what depends on what is the same for all values; if not, each batch is certified.
    """

    pooled: Cut
    signature: tuple[Any, ...]
    captures: Captures
    connections: tuple[int, ...]
    call: int
    feature_index: Tensor
    is_fed: Tensor
    inactive: Tensor
    features_per_filter: int
    cotangents: Tensor
    scales: tuple[Tensor, Tensor]
    has_second_derivative: bool
    code: Tensor | None
    is_value_independent: bool

    def explains(self, gradient: Tensor, parts: Sequence[Tensor]) -> Tensor:
        """Return whether the gradient of the code is that of the features which the filters feed, a scalar.

        Args:
            gradient: of the code in the map, shape (n, k, *positions).
            parts: those of the cotangents, of the same shape.
        """
        assert self.code is not None
        shares = self.code[self.feature_index].where(self.is_fed, 0.0).unflatten(0, (-1, self.features_per_filter))
        pairs = zip(parts, shares.unbind(1), strict=False)
        terms = torch.stack([part.flatten(2) * share.unsqueeze(1) for part, share in pairs])
        return is_close_at_scale(gradient.flatten(2), terms.sum(0), terms.abs().sum(0).amax(2, keepdim=True))

    def differentiates_as(self, other: Certificate) -> bool:
        """Return whether the derivatives that one certificate asks for are those of the other."""
        same_number = self.features_per_filter == other.features_per_filter
        return same_number and torch.equal(self.cotangents, other.cotangents)


class TooManyFeatures(Refusal):
    """The verdict that features depend on one filter each, but are too many; behind them there may be fewer."""


class _Finding(NamedTuple):
    """What was found at one choice of values for the maps; attributes as in `Certificate`.

    Here `slots` and `inactive` have a row for each filter, shape (k, features per filter).
    """

    call: int
    slots: Tensor
    inactive: Tensor
    scales: tuple[Tensor, Tensor]
    is_curved: bool
    cotangents: Tensor
    holds_elsewhere: bool = True


def certify(recorded: RecordedPass, pooled: Cut, at_random_points: bool = True) -> Certificate | Refusal:
    """Certify that each pooled feature depends on the map of one filter alone, and position by position if curved.

    The recorded operations are differentiated with random cotangents `r`: `d(r p) / dz_k` must equal the sum of
    `r_j dp_j / dz_k` over the features `j` of filter `k`, for every filter, position and sample.

    Args:
        recorded: one pass.
        pooled: the pooled features on its record.
        at_random_points: certify at random points; each unit is active at one of them. False: at the recorded values.

    Returns:
        The certificate, or why there is none, with the path and the step.
    """
    if recorded.weight_is_shared:
        return _refusal(recorded, f"the weight of `{recorded.layer}` is shared with another module")
    try:
        with torch.device("cpu"):  # of the random numbers, whatever the default device is
            few = _found_in_few(recorded, pooled) if at_random_points else None
            verdict = few or _found(recorded, pooled, at_random_points)
            return verdict if isinstance(verdict, Refusal) else _certificate(recorded, pooled, verdict)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # GraphError, or an operation without a derivative
        return _refusal(recorded, str(error), error)


def features_at(recorded: RecordedPass, pooled: Cut, points: dict[int, Tensor]) -> Tensor:
    """Return the pooled features as a function of the convolution's output, shape (n, j).

    Raises:
        GraphError: if the recorded operations cannot be repeated, or the batch is folded on the way.
    """
    features = recorded.graph.replay(points, pooled.end, detach=True)[pooled.node]
    if len(features) != len(next(iter(points.values()))):
        raise GraphError("the batch is folded between the convolution and the pooled features")
    return features.flatten(1)


def signature_of(recorded: RecordedPass, pooled: Cut) -> tuple[Any, ...]:
    """Return the operations up to the pooled features with their arguments and wiring, whatever the batch's size."""
    steps = recorded.encoded(range(pooled.end))
    maps = tuple(tuple(recorded.graph.tensor_of(call.node).shape[1:]) for call in recorded.calls)
    return steps, maps, tuple(recorded.graph.tensor_of(pooled.node).shape[1:])


def connections_of(recorded: RecordedPass, pooled: Cut) -> tuple[int, ...]:
    """Return the indices of captured values that could connect filters: factors, indices, masks, permutations."""
    return tuple(
        captured.index
        for operation in recorded.graph.operations[: pooled.end]
        if Trait.SAME_FOR_EACH_SAMPLE not in operation.traits or Trait.MATRIX_PRODUCT in operation.traits
        for captured in operation.captured
    )


def _refusal(
    recorded: RecordedPass, reason: str, cause: Exception | None = None, kind: type[Refusal] = Refusal
) -> Refusal:
    return kind(
        f"The closed form needs every pooled feature to depend on one filter of `{recorded.layer}` alone "
        f"(normalisation in eval mode, activation, skip, pooling): {reason}.\n"
        f"  path: {recorded.path}\n"
        f"  {recorded.remedy}",
        cause,
    )


def _certificate(recorded: RecordedPass, pooled: Cut, finding: _Finding) -> Certificate:
    """Return the certificate, with what does not depend on the values."""
    features = finding.cotangents.shape[1]
    index, is_fed = _completed(finding.slots, finding.inactive, features)
    operations = recorded.graph.operations[: pooled.end]
    is_watched = may_hide(operations)
    code = torch.randn(features, generator=torch.Generator().manual_seed(2)).to(finding.cotangents)
    return Certificate(
        pooled=pooled,
        signature=signature_of(recorded, pooled),
        captures=recorded.graph.captures,
        connections=connections_of(recorded, pooled),
        call=finding.call,
        feature_index=index.flatten(),
        is_fed=is_fed.flatten(),
        inactive=finding.inactive.flatten().nonzero().flatten(),
        features_per_filter=index.shape[1],
        cotangents=finding.cotangents,
        scales=finding.scales,
        has_second_derivative=finding.is_curved,
        code=code if is_watched and not finding.is_curved else None,
        is_value_independent=finding.holds_elsewhere
        and not (is_watched and finding.is_curved)
        and all(_is_value_independent(recorded, operation) for operation in operations),
    )


def _completed(slots: Tensor, inactive: Tensor, features: int) -> tuple[Tensor, Tensor]:
    """Return the slots, with the features that no active filter feeds given to the inactive filters, and who is fed.

    That is known only where each feature belongs to one of the filters: none comes from a skip connection.
    """
    if slots.shape != (features, 1):
        return slots, ~inactive
    is_free = torch.ones(features, dtype=torch.bool, device=slots.device)
    is_free[slots[~inactive]] = False
    slots = slots.clone()
    slots[inactive] = is_free.nonzero().flatten()
    return slots, torch.ones_like(inactive)


def _found_in_few(recorded: RecordedPass, pooled: Cut) -> _Finding | None:
    """Return what holds for the first samples, if that says all about the others; None: all have to be looked at.

    The values are drawn, so that further samples are further draws. They are needed where a filter reached nothing, and
    for the message of a refusal.
    """
    positions = min(recorded.graph.tensor_of(call.node).shape[2:].numel() for call in recorded.calls)
    few = first_samples(recorded, pooled.end, max(_FEW, -(-_DRAWS // positions)))
    finding = None if few is None else _found(few, pooled, at_random_points=True)
    return finding if isinstance(finding, _Finding) and not finding.inactive.any() else None


def _found(recorded: RecordedPass, pooled: Cut, at_random_points: bool) -> _Finding | Refusal:
    """Return what holds, first with one feature for each filter, then with several, or the step that breaks it."""
    found = _found_with(recorded, pooled, at_random_points)
    if found is None and (owner := owners(recorded, pooled, at_random_points)) is not None:
        slots = slots_of(owner, recorded.calls[0].weight.shape[0])
        if slots.shape[1] > _FEATURES_PER_FILTER or slots.numel() > _FEATURES:
            return _refusal(
                recorded,
                f"it takes up to {_FEATURES_PER_FILTER} features for each filter and {_FEATURES} in all, as its work "
                f"grows with their square; there are {slots.shape[1]} and {slots.numel()}, as in a map that is "
                "flattened; pool it to fewer cells",
                kind=TooManyFeatures,
            )
        found = _found_with(recorded, pooled, at_random_points, slots)
    return _refusal(recorded, _breaking_step(recorded, pooled)) if found is None else found


def _found_with(
    recorded: RecordedPass, pooled: Cut, at_random_points: bool, slots: Tensor | None = None
) -> _Finding | Refusal | None:
    """Return what holds at all points, for known slots or for one feature each; None if a feature is mixed."""
    generator = torch.Generator().manual_seed(0)
    if not at_random_points:
        return _found_at(recorded, pooled, recorded.points(), generator, slots, is_recorded=True)
    findings: list[_Finding] = []
    for points in random_points(recorded, generator):
        # If every unit is inactive at a point, its derivatives are pure rounding error: they are judged against the
        # magnitudes found at the first point.
        scales = findings[0].scales if findings else None
        verdict = _found_at(recorded, pooled, points, generator, slots, scales)
        if not isinstance(verdict, _Finding):
            return verdict
        findings.append(verdict)
    return _merged(recorded, pooled, findings)


def _merged(recorded: RecordedPass, pooled: Cut, findings: list[_Finding]) -> _Finding | Refusal | None:
    """Return what holds at all points: which feature a filter feeds is known from where it is active."""
    first, *others = findings
    slots, inactive = first.slots, first.inactive
    for other in others:
        if (slots != other.slots)[~(inactive | other.inactive)].any():
            return None  # which feature a filter reaches depends on the values
        slots = torch.where(inactive, other.slots, slots)
        inactive = inactive & other.inactive
    if not is_injective(slots, inactive):
        return None  # several filters reach one feature, at different values
    if inactive.all() and _moves(recorded, pooled):
        # All random points may lie where a clamp cuts; the recorded ones need not.
        verdict = _found(recorded, pooled, at_random_points=False)
        if isinstance(verdict, Refusal):
            return verdict
        if not verdict.inactive.all():
            return verdict._replace(holds_elsewhere=False)
        return _refusal(recorded, "no derivative reaches the map; a step may round, or take a gradient of its own")
    return first._replace(slots=slots, inactive=inactive)


def _moves(recorded: RecordedPass, pooled: Cut) -> bool:
    """Return whether the features move with the map, by whatever derivative: dead units do not, rounded ones do."""
    generator = torch.Generator().manual_seed(0)
    first, *others = [features_at(recorded, pooled, points) for points in random_points(recorded, generator)]
    return not all(torch.equal(first, other) for other in others)


def _found_at(
    recorded: RecordedPass,
    pooled: Cut,
    points: dict[int, Tensor],
    generator: torch.Generator,
    slots: Tensor | None,
    scales: tuple[Tensor, Tensor] | None = None,
    is_recorded: bool = False,
) -> _Finding | Refusal | None:
    features = features_at(recorded, pooled, points)
    used = _used(features, points)
    if len(used) != 1:
        reason = f"{len(used)} calls of `{recorded.layer}` reach the loss in one step"
        return _refusal(recorded, reason)
    point = list(points.values())[used[0]]
    first, second = scales or (point.new_zeros(()), point.new_zeros(()))
    found, inactive, first = traced(features, point, generator, first, slots, is_recorded)
    if found is None:
        return None
    is_curved = not all(operation.is_piecewise_linear for operation in recorded.graph.operations[: pooled.end])
    if is_curved:
        by_position, second = acts_by_position(features, point, generator, second)
        if not by_position:
            return _refusal(recorded, "a curved activation acts on several positions of a map at once")
    cotangents = features.new_ones(1, features.shape[1]) if slots is None else cotangents_of(slots, features.shape[1])
    return _Finding(used[0], found, inactive, (first, second), is_curved, cotangents.to(features))


def _used(features: Tensor, points: dict[int, Tensor]) -> list[int]:
    """Return which of the calls reach the features."""
    if len(points) == 1:
        return [0]
    gradients = torch.autograd.grad(features.sum(), list(points.values()), retain_graph=True, allow_unused=True)
    return [i for i, gradient in enumerate(gradients) if gradient is not None]


def _is_value_independent(recorded: RecordedPass, operation: Operation) -> bool:
    """Return whether what the operation connects is the same for all values and samples.

    With two dependent arguments, one may be saturated at a point and hide what the other does elsewhere. A captured
    tensor with a row per sample, such as a mask, may connect filters in one sample and not in another.
    """
    if len(operation.nodes) != 1 and Trait.JOINS not in operation.traits:
        return False
    if not (operation.is_piecewise_linear or Trait.POINTWISE in operation.traits):
        return False
    if Trait.SAME_FOR_EACH_SAMPLE in operation.traits:
        return True
    values = (recorded.graph.captures.value(captured.index) for captured in operation.captured)
    return not any(value.dim() > 1 and len(value) == len(recorded) for value in values)


def _breaking_step(recorded: RecordedPass, pooled: Cut) -> str:
    """Name the first step after which a channel no longer depends on one filter alone."""
    if (step := mixing_step(recorded, pooled.end)) is not None:
        return step
    generator = torch.Generator().manual_seed(1)
    points = next(random_points(recorded, generator))
    point = list(points.values())[_used(features_at(recorded, pooled, points), points)[0]]
    for end, operation in enumerate(recorded.graph.operations[: pooled.end], start=1):
        outputs = recorded.graph.replay(points, end)
        for result in operation.results:
            output = outputs[result]
            if not output.numel() or not output.requires_grad or output.dim() < 2 or len(output) != len(point):
                continue
            if not _is_separate(recorded, Cut(end, result), output, point, generator):
                return f"step {end}, `{operation.name}`, mixes the filters (its output has shape {tuple(output.shape)})"
    return "which filters a feature depends on changes with the values"


def _is_separate(recorded: RecordedPass, cut: Cut, output: Tensor, point: Tensor, generator: torch.Generator) -> bool:
    """Return whether each channel of a tensor on the record depends on one filter alone."""
    scale = output.new_zeros(())
    if traced(output, point, generator, scale)[0] is not None:
        return True
    if (owner := owners(recorded, cut)) is None:
        return False
    slots = slots_of(owner, point.shape[1])
    return slots.shape[1] > _FEATURES_PER_FILTER or traced(output, point, generator, scale, slots)[0] is not None
