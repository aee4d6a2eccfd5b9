"""Certifies that the closed form is exact for a recorded pass.

The claim: feature `p_pi(k)` depends on the map `z_k` of one filter alone, and position by position if the tail is
curved. It is proved by differentiating the recorded operations with random cotangents, at random points. What comes out
is a verdict: a `Certificate`, or a `Refusal` with the step that breaks the claim.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_flatness.errors import NonFiniteError, Refusal
from lightning_flatness.functional import ConvGeometry, patches
from lightning_flatness.precision import allclose_at_scale, allclose_for_dtype, upcast
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
        signature: of the recorded pass, see `RecordedPass.signature`.
        call: which call of the convolution reaches the classifier.
        feature_index: `pi`, the feature that each filter feeds, shape (k,).
        inactive: filters that reached no feature where the tail was certified, shape (k,).
        any_inactive: whether there are some, known to the host; they may become active in later batches.
        scales: magnitude of the largest first and second derivative.
        has_second_derivative: whether the tail is curved.
        is_value_independent: whether what depends on what is the same for all values; if not, each batch is certified.
    """

    signature: tuple[Any, ...]
    call: int
    feature_index: Tensor
    inactive: Tensor
    any_inactive: bool
    scales: tuple[Tensor, Tensor]
    has_second_derivative: bool
    is_value_independent: bool


def certify(recorded: RecordedPass, at_random_points: bool = True) -> Certificate | Refusal:
    """Certify that each feature depends on the map of one filter alone, and position by position if curved.

    The recorded operations are differentiated with random cotangents `r`: `d(r p) / dz_k` must equal
    `r_pi(k) dp / dz_k` for every filter, position and sample. The weights are checked against what the modules really
    computed.

    Args:
        recorded: one forward pass.
        at_random_points: certify at random points; each unit is active at one of them. False: at the recorded values.

    Returns:
        The certificate, or why there is none, with the path and the step.

    Raises:
        NonFiniteError: if the convolution's output or the logits hold NaN.
    """
    try:
        with torch.device("cpu"):  # of the random numbers, whatever the default device is
            verdict = _refused_module(recorded) or _certificate(recorded, at_random_points)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # GraphError, or an operation without a derivative
        return _refusal(recorded, str(error), error)
    if isinstance(verdict, Refusal):
        return verdict
    return replace(verdict, feature_index=_completed(verdict, recorded.classifier.inputs.shape[1]))


def _refusal(recorded: RecordedPass, reason: str, cause: Exception | None = None) -> Refusal:
    return Refusal(
        f"The closed form needs every filter of `{recorded.layer}` to reach one input of a linear classifier "
        f"on its own (normalisation in eval mode, activation, skip, pooling): {reason}.\n"
        f"  path: {recorded.path}\n"
        f"  Name another convolution (`layer=...`) or the classifier (`classifier=...`).",
        cause,
    )


def _completed(certificate: Certificate, features: int) -> Tensor:
    """Return the feature index with the features that no active filter feeds given to the inactive filters.

    Each of the classifier's columns is then counted once; an inactive filter adds nothing else.
    """
    index, inactive = certificate.feature_index.clone(), certificate.inactive.nonzero().flatten()
    is_free = torch.ones(features, dtype=torch.bool, device=index.device)
    is_free[index[~certificate.inactive]] = False
    free = is_free.nonzero().flatten()[: len(inactive)]
    index[inactive[: len(free)]] = free
    return index


def _certificate(recorded: RecordedPass, at_random_points: bool) -> Certificate | Refusal:
    generator = torch.Generator().manual_seed(0)
    if not at_random_points:
        return _certified_at(recorded, recorded.points(), generator)
    certificates: list[Certificate] = []
    for points in _random_points(recorded, generator):
        # If every unit is inactive at a point, its derivatives are pure rounding error: they are judged against the
        # magnitudes found at the first point.
        scales = certificates[0].scales if certificates else None
        verdict = _certified_at(recorded, points, generator, scales)
        if isinstance(verdict, Refusal):
            return verdict
        certificates.append(verdict)
    return _merged(recorded, certificates)


def _merged(recorded: RecordedPass, certificates: list[Certificate]) -> Certificate | Refusal:
    """Return what holds at all points: which feature a filter feeds is known from where it is active."""
    first, *others = certificates
    index, inactive = first.feature_index, first.inactive
    for other in others:
        if (index != other.feature_index)[~(inactive | other.inactive)].any():
            return _refusal(recorded, "which feature a filter reaches depends on the values")
        index = torch.where(inactive, other.feature_index, index)
        inactive = inactive & other.inactive
    if not _is_injective(index, inactive):
        return _refusal(recorded, "several filters reach one feature, at different values")
    return replace(first, feature_index=index, inactive=inactive, any_inactive=bool(inactive.any()))


def _is_injective(index: Tensor, inactive: Tensor) -> bool:
    return index[~inactive].unique().numel() == int((~inactive).sum())


def _certified_at(
    recorded: RecordedPass,
    points: dict[int, Tensor],
    generator: torch.Generator,
    scales: tuple[Tensor, Tensor] | None = None,
) -> Certificate | Refusal:
    features = recorded.features_at(points)
    used = [0]
    if len(points) > 1:
        gradients = torch.autograd.grad(features.sum(), list(points.values()), retain_graph=True, allow_unused=True)
        used = [i for i, gradient in enumerate(gradients) if gradient is not None]
    if len(used) != 1:
        reason = f"{len(used)} calls of `{recorded.layer}` reach the classifier in one forward pass"
        return _refusal(recorded, reason)
    point = list(points.values())[used[0]]
    first, second = scales or (point.new_zeros(()), point.new_zeros(()))
    index, inactive, first = _feature_index(features, point, generator, first)
    if index is None:
        return _refusal(recorded, _breaking_step(recorded, used[0]))
    operations = recorded.graph.operations[: recorded.classifier.end]
    is_curved = not all(operation.is_piecewise_linear for operation in operations)
    if is_curved:
        by_position, second = _acts_by_position(features, point, generator, second)
        if not by_position:
            return _refusal(recorded, "a curved activation acts on several positions of a map at once")
    return Certificate(
        signature=recorded.signature,
        call=used[0],
        feature_index=index,
        inactive=inactive,
        any_inactive=bool(inactive.any()),
        scales=(first, second),
        has_second_derivative=is_curved,
        is_value_independent=all(_is_value_independent(recorded, operation) for operation in operations),
    )


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


def _perturbed(value: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield `value` moved by several of its spreads: up and down in turn, up from the largest, down from the least."""
    flat, n = value.flatten(2), len(value)
    spread = (flat - flat.mean((0, 2), keepdim=True)).abs().mean()
    spread = torch.where(spread > 0, spread, 1.0)
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

    def pulled_back(code: Tensor) -> Tensor:
        (gradient,) = torch.autograd.grad(output, point, weight * code, retain_graph=True)
        return gradient.flatten(2)

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


def _breaking_step(recorded: RecordedPass, used: int) -> str:
    """Name the first step after which a channel no longer depends on one filter alone."""
    generator = torch.Generator().manual_seed(1)
    node, points = recorded.calls[used].node, next(_random_points(recorded, generator))
    for end, operation in enumerate(recorded.graph.operations[: recorded.classifier.end], start=1):
        outputs = recorded.graph.replay(points, end)
        for result in operation.results:
            output = outputs[result]
            if not output.numel() or not output.requires_grad or output.dim() < 2 or len(output) != len(points[node]):
                continue
            if _feature_index(output, points[node], generator, output.new_zeros(()))[0] is None:
                return f"step {end}, `{operation.name}`, mixes them (its output has shape {tuple(output.shape)})"
    return "the steps after it mix filters"


def _refused_module(recorded: RecordedPass) -> Refusal | None:
    """Return why the convolution or the classifier did not compute what their weights say; None if they did."""
    values, call = recorded.graph.captures, recorded.classifier
    if recorded.weight_is_shared:
        return _refusal(recorded, f"the weight of `{recorded.layer}` is shared with another module")
    z, inputs = values.value(recorded.calls[0].output), values.value(recorded.calls[0].inputs)
    for what, value in ((f"the output of `{recorded.layer}`", z), ("the logits", call.output)):
        if broken := int(value.flatten(1).isnan().any(1).sum()):
            raise NonFiniteError(f"A measurement needs numbers; {what} is NaN in {broken} of {len(value)} samples.")
    geometry = ConvGeometry.of(recorded.convolution)
    rows = patches(upcast(inputs[:2]), geometry).to(recorded.weight.dtype)
    filters = recorded.weight.unflatten(0, (geometry.groups, -1))
    computed = (filters @ rows.mT).flatten(1, 2) + recorded.bias.unsqueeze(-1)
    if not allclose_for_dtype(computed, z[:2].flatten(2)):
        return _refusal(recorded, f"`{recorded.layer}` does more than convolve with its `weight`")
    if call.weights is not None:
        weight, bias = call.weights
        if not allclose_for_dtype(upcast(call.inputs.detach()).flatten(1) @ weight.mT + bias, call.output):
            return _refusal(recorded, f"`{call.name}` does more than multiply by its `weight`")
    return None
