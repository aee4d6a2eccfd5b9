"""Certifies that the closed form is exact for a recorded pass.

The claim: feature `p_pi(k)` depends on the map `z_k` of one filter alone, and position by position if the tail is
curved. It is proved by differentiating the recorded operations with random cotangents, at random points. What comes out
is a verdict: a `Certificate`, or a `Refusal` with the step that breaks the claim.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_flatness.curvature.pooled.mixing import mixing_step
from lightning_flatness.errors import GraphError, Refusal
from lightning_flatness.precision import allclose_at_scale
from lightning_flatness.recording.graph import Captures, Cut
from lightning_flatness.recording.operation import Operation
from lightning_flatness.recording.operators import Trait
from lightning_flatness.recording.recorded_pass import RecordedPass

# How far samples are moved, in multiples of the map's spread: units become active at different heights, and may
# become inactive again further up.
_OFFSETS = torch.tensor([1.0, 5.0, 30.0])


@dataclass(frozen=True)
class Certificate:
    """What was found to hold for a tail.

    Attributes:
        signature: what must not change for it to stay valid, see `signature_of`.
        captures: of the graph that was certified.
        connections: indices of captured values that could connect filters: they must stay equal.
        call: which call of the convolution reaches the pooled features.
        feature_index: `pi`, the feature that each filter feeds, shape (k,).
        inactive: filters that reached no feature where the tail was certified, shape (k,).
        is_fed: filters whose feature is known, shape (k,).
        any_inactive: whether there are some, known to the host; they may become active in later batches.
        scales: magnitude of the largest first and second derivative.
        has_second_derivative: whether the tail is curved.
        is_value_independent: whether what depends on what is the same for all values; if not, each batch is certified.
    """

    signature: tuple[Any, ...]
    captures: Captures
    connections: tuple[int, ...]
    call: int
    feature_index: Tensor
    inactive: Tensor
    is_fed: Tensor
    any_inactive: bool
    scales: tuple[Tensor, Tensor]
    has_second_derivative: bool
    is_value_independent: bool


class _Finding(NamedTuple):
    """What was found at one choice of values for the maps; attributes as in `Certificate`."""

    call: int
    feature_index: Tensor
    inactive: Tensor
    scales: tuple[Tensor, Tensor]
    is_curved: bool
    holds_elsewhere: bool = True


def certify(recorded: RecordedPass, pooled: Cut, at_random_points: bool = True) -> Certificate | Refusal:
    """Certify that each pooled feature depends on the map of one filter alone, and position by position if curved.

    The recorded operations are differentiated with random cotangents `r`: `d(r p) / dz_k` must equal
    `r_pi(k) dp / dz_k` for every filter, position and sample.

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
            verdict = _found(recorded, pooled, at_random_points)
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


def _width(recorded: RecordedPass, pooled: Cut) -> int:
    return recorded.graph.tensor_of(pooled.node).shape[1:].numel()


def _refusal(recorded: RecordedPass, reason: str, cause: Exception | None = None) -> Refusal:
    return Refusal(
        f"The closed form needs every filter of `{recorded.layer}` to reach one pooled feature "
        f"on its own (normalisation in eval mode, activation, skip, pooling): {reason}.\n"
        f"  path: {recorded.path}\n"
        f"  {recorded.remedy}",
        cause,
    )


def _certificate(recorded: RecordedPass, pooled: Cut, finding: _Finding) -> Certificate:
    """Return the certificate, with what does not depend on the values."""
    index, is_fed = _completed(finding.feature_index, finding.inactive, _width(recorded, pooled))
    operations = recorded.graph.operations[: pooled.end]
    return Certificate(
        signature=signature_of(recorded, pooled),
        captures=recorded.graph.captures,
        connections=connections_of(recorded, pooled),
        call=finding.call,
        feature_index=index,
        inactive=finding.inactive,
        is_fed=is_fed,
        any_inactive=bool(finding.inactive.any()),
        scales=finding.scales,
        has_second_derivative=finding.is_curved,
        is_value_independent=finding.holds_elsewhere
        and all(_is_value_independent(recorded, operation) for operation in operations),
    )


def _completed(index: Tensor, inactive: Tensor, features: int) -> tuple[Tensor, Tensor]:
    """Return the index, with the features that no active filter feeds given to the inactive filters, and who is fed.

    That is known only where each feature belongs to one of the filters: none comes from a skip connection.
    """
    if len(index) != features:
        return index, ~inactive
    is_free = torch.ones(features, dtype=torch.bool, device=index.device)
    is_free[index[~inactive]] = False
    index = index.clone()
    index[inactive.nonzero().flatten()] = is_free.nonzero().flatten()
    return index, torch.ones_like(inactive)


def _found(recorded: RecordedPass, pooled: Cut, at_random_points: bool) -> _Finding | Refusal:
    generator = torch.Generator().manual_seed(0)
    if not at_random_points:
        return _found_at(recorded, pooled, recorded.points(), generator)
    findings: list[_Finding] = []
    for points in _random_points(recorded, generator):
        # If every unit is inactive at a point, its derivatives are pure rounding error: they are judged against the
        # magnitudes found at the first point.
        verdict = _found_at(recorded, pooled, points, generator, findings[0].scales if findings else None)
        if isinstance(verdict, Refusal):
            return verdict
        findings.append(verdict)
    return _merged(recorded, pooled, findings)


def _merged(recorded: RecordedPass, pooled: Cut, findings: list[_Finding]) -> _Finding | Refusal:
    """Return what holds at all points: which feature a filter feeds is known from where it is active."""
    first, *others = findings
    index, inactive = first.feature_index, first.inactive
    for other in others:
        if (index != other.feature_index)[~(inactive | other.inactive)].any():
            return _refusal(recorded, "which feature a filter reaches depends on the values")
        index = torch.where(inactive, other.feature_index, index)
        inactive = inactive & other.inactive
    if not _is_injective(index, inactive):
        return _refusal(recorded, "several filters reach one feature, at different values")
    if inactive.all() and _moves(recorded, pooled):
        # All random points may lie where a clamp cuts; the recorded ones need not.
        verdict = _found(recorded, pooled, at_random_points=False)
        if isinstance(verdict, Refusal):
            return verdict
        if not verdict.inactive.all():
            return verdict._replace(holds_elsewhere=False)
        return _refusal(recorded, "no derivative reaches the map; a step may round, or take a gradient of its own")
    return first._replace(feature_index=index, inactive=inactive)


def _moves(recorded: RecordedPass, pooled: Cut) -> bool:
    """Return whether the features move with the map, by whatever derivative: dead units do not, rounded ones do."""
    generator = torch.Generator().manual_seed(0)
    first, *others = [features_at(recorded, pooled, points) for points in _random_points(recorded, generator)]
    return not all(torch.equal(first, other) for other in others)


def _is_injective(index: Tensor, inactive: Tensor) -> bool:
    return index[~inactive].unique().numel() == int((~inactive).sum())


def _found_at(
    recorded: RecordedPass,
    pooled: Cut,
    points: dict[int, Tensor],
    generator: torch.Generator,
    scales: tuple[Tensor, Tensor] | None = None,
) -> _Finding | Refusal:
    features = features_at(recorded, pooled, points)
    used = [0]
    if len(points) > 1:
        gradients = torch.autograd.grad(features.sum(), list(points.values()), retain_graph=True, allow_unused=True)
        used = [i for i, gradient in enumerate(gradients) if gradient is not None]
    if len(used) != 1:
        reason = f"{len(used)} calls of `{recorded.layer}` reach the loss in one step"
        return _refusal(recorded, reason)
    point = list(points.values())[used[0]]
    first, second = scales or (point.new_zeros(()), point.new_zeros(()))
    index, inactive, first = _feature_index(features, point, generator, first)
    if index is None:
        return _refusal(recorded, _breaking_step(recorded, pooled, used[0]))
    is_curved = not all(operation.is_piecewise_linear for operation in recorded.graph.operations[: pooled.end])
    if is_curved:
        by_position, second = _acts_by_position(features, point, generator, second)
        if not by_position:
            return _refusal(recorded, "a curved activation acts on several positions of a map at once")
    return _Finding(used[0], index, inactive, (first, second), is_curved)


def _is_value_independent(recorded: RecordedPass, operation: Operation) -> bool:
    """Return whether what the operation connects is the same for all values and samples.

    With two dependent arguments, one may be saturated at a point and hide what the other does elsewhere. A captured
    tensor with a row per sample, such as a mask, may connect filters in one sample and not in another.
    """
    if len(operation.nodes) != 1:
        return False
    if not (operation.is_piecewise_linear or Trait.POINTWISE in operation.traits):
        return False
    if Trait.SAME_FOR_EACH_SAMPLE in operation.traits:
        return True
    values = (recorded.graph.captures.value(captured.index) for captured in operation.captured)
    return not any(value.dim() > 1 and len(value) == len(recorded) for value in values)


def _random_points(recorded: RecordedPass, generator: torch.Generator) -> Iterator[dict[int, Tensor]]:
    """Yield values of the maps at which units become active.

    Neighbours are moved up and down in turn, then all above the largest value, then all below the least. What two
    samples or positions share shows only where both are active.
    """
    perturbed = {node: _perturbed(point.detach(), generator) for node, point in recorded.points().items()}
    for points in zip(*perturbed.values(), strict=True):
        yield {node: point.requires_grad_() for node, point in zip(perturbed, points, strict=True)}


def _spread(value: Tensor) -> Tensor:
    """Return the mean deviation of each channel from its mean, shape (1, k, 1): filters may differ by orders."""
    flat = value.detach().flatten(2)
    spread = (flat - flat.mean((0, 2), keepdim=True)).abs().mean((0, 2), keepdim=True)
    overall = spread.mean()
    return torch.where(spread > 0, spread, torch.where(overall > 0, overall, 1.0))


def _perturbed(value: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield `value` moved by several of its spreads: up and down in turn, up from the largest, down from the least."""
    flat, n = value.flatten(2), len(value)
    spread = _spread(value)
    samples = torch.arange(n).reshape(-1, 1, 1)
    flip = torch.rand((1, flat.shape[1], 1), generator=generator) - 0.5
    turn = (flip.sign() * (1 - 2 * ((samples + torch.arange(flat.shape[2])) % 2))).to(value)
    drawn = torch.rand(flat.shape, generator=generator)
    yield (flat + turn * spread * 10 ** (2.5 * drawn - 1).to(value)).reshape(value.shape)
    for shift in range(len(_OFFSETS) if n < 2 * len(_OFFSETS) else 1):  # two samples for each offset
        offset = _OFFSETS[(samples // 2 + shift) % len(_OFFSETS)].to(value)
        rise = spread * offset * (1 + drawn / 2).to(value)
        yield (flat.amax((0, 2), keepdim=True) + rise).reshape(value.shape)
        yield (flat.amin((0, 2), keepdim=True) - rise).reshape(value.shape)


def _feature_index(
    output: Tensor, point: Tensor, generator: torch.Generator, scale: Tensor
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Find which channel of `output` each channel of `point` feeds.

    Args:
        output: a function of the point, shape (n, j, ...).
        point: the map, shape (n, k, *positions).
        generator: of the random cotangents.
        scale: the largest derivative seen before.

    Returns:
        The index, shape (k,), None if a channel does not feed one alone; the inactive channels, shape (k,); the
        largest derivative, here or before.
    """
    n, channels = output.shape[:2]
    dims = [1] * (output.dim() - 2)
    weight, by_sample = (
        torch.rand(shape, generator=generator, dtype=torch.float64).to(output) + 0.5
        for shape in (output.shape, (n, 1, *dims))
    )

    spread = _spread(point)  # of derivatives those count alike that move the output alike

    def pulled_back(code: Tensor) -> Tensor:
        (gradient,) = torch.autograd.grad(output, point, weight * code, retain_graph=True)
        return gradient.flatten(2) * spread

    ones = pulled_back(torch.ones_like(output))
    reach = ones.abs().amax((0, 2))
    scale = torch.maximum(reach.max(), scale)
    inactive = reach <= torch.finfo(ones.dtype).eps * scale
    numbers = torch.randperm(channels, generator=generator)
    coded = pulled_back((numbers + 1).to(output).reshape(1, -1, *dims))
    ratio = (coded * ones).sum((0, 2)) / ones.square().sum((0, 2)).clamp_min(torch.finfo(ones.dtype).tiny)
    position = (ratio.nan_to_num().round().long() - 1).clamp(0, channels - 1)
    index = numbers.argsort().to(point.device)[position]
    code = torch.randn(channels, generator=generator, dtype=torch.float64).to(output)
    expected = by_sample.reshape(n, 1, 1) * code[index].reshape(1, -1, 1) * ones
    consistent = allclose_at_scale(pulled_back(code.reshape(1, -1, *dims) * by_sample), expected, scale)
    return (index if consistent and _is_injective(index, inactive) else None), inactive, scale


def _acts_by_position(
    features: Tensor, point: Tensor, generator: torch.Generator, scale: Tensor
) -> tuple[bool, Tensor]:
    """Return whether the second derivative is diagonal over positions, and its largest value, here or before."""
    (jacobian,) = torch.autograd.grad(features.sum(), point, create_graph=True)
    if not jacobian.requires_grad:
        return True, scale
    direction = torch.rand(point.shape, generator=generator, dtype=torch.float64).to(point) + 0.5
    (ones,) = torch.autograd.grad(jacobian.sum(), point, retain_graph=True, materialize_grads=True)
    (turned,) = torch.autograd.grad((jacobian * direction).sum(), point, materialize_grads=True)
    scale = torch.maximum(ones.abs().max(), scale)
    return allclose_at_scale(turned, direction * ones, scale), scale


def _breaking_step(recorded: RecordedPass, pooled: Cut, used: int) -> str:
    """Name the first step after which a channel no longer depends on one filter alone."""
    if (step := mixing_step(recorded, pooled.end)) is not None:
        return step
    generator = torch.Generator().manual_seed(1)
    node, points = recorded.calls[used].node, next(_random_points(recorded, generator))
    for end, operation in enumerate(recorded.graph.operations[: pooled.end], start=1):
        outputs = recorded.graph.replay(points, end)
        for result in operation.results:
            output = outputs[result]
            if not output.numel() or not output.requires_grad or output.dim() < 2 or len(output) != len(points[node]):
                continue
            if _feature_index(output, points[node], generator, output.new_zeros(()))[0] is None:
                return f"step {end}, `{operation.name}`, mixes the filters (its output has shape {tuple(output.shape)})"
    return "the steps after it mix filters"
