"""Which filter each channel of a recorded tensor depends on: found by moving filters, proved by differentiating.

A channel may be a pooled feature or any other number per sample or map on the record. The channels that a filter feeds
are its *slots*: shape (k, channels per filter), -1 where a filter has fewer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lightning_flatness.precision import allclose_at_scale
from lightning_flatness.recording.graph import Cut
from lightning_flatness.recording.operation import Operation
from lightning_flatness.recording.operators import Trait
from lightning_flatness.recording.recorded_pass import RecordedPass

# How far samples are moved, in multiples of the map's spread: units become active at different heights, and may
# become inactive again further up.
_OFFSETS = torch.tensor([1.0, 5.0, 30.0])
# Steps that pass nothing on above or below some value, those that do so between two values only, and further kinks. The
# derivative of a smooth step may round to zero where it saturates.
_HALF_OPEN = frozenset(
    "celu clamp_max clamp_min elu exp expm1 gelu hardshrink hardswish log_sigmoid_forward max maximum min minimum mish "
    "relu selu silu softplus softshrink threshold".split()
)
_WINDOWS = frozenset("clamp erf hardsigmoid hardtanh relu6 sigmoid tanh".split())
_KINKED = frozenset("abs leaky_relu prelu _prelu_kernel rrelu rrelu_with_noise where".split())


def random_points(recorded: RecordedPass, generator: torch.Generator) -> Iterator[dict[int, Tensor]]:
    """Yield values of the maps at which units become active.

    Neighbours are moved up and down in turn, then all above the largest value, then all below the least. What two
    samples or positions share shows only where both are active.
    """
    perturbed = {node: _perturbed(point.detach(), generator) for node, point in recorded.points().items()}
    for points in zip(*perturbed.values(), strict=True):
        yield {node: point.requires_grad_() for node, point in zip(perturbed, points, strict=True)}


def may_hide(operations: Sequence[Operation]) -> bool:
    """Return whether a unit may be inactive at all drawn points, and active for the values of a batch.

    A single ReLU is active at the points above all values or below them, also behind a normalisation. That is not so of
    a window between two values, and a ReLU behind another activation can be one: `relu(1 - abs(z))`.
    """
    names = [operation.name.rstrip("_") for operation in operations]
    bent = [
        Trait.POINTWISE in operation.traits or name in _HALF_OPEN | _KINKED
        for name, operation in zip(names, operations, strict=True)
    ]
    return not _WINDOWS.isdisjoint(names) or (not _HALF_OPEN.isdisjoint(names) and sum(bent) > 1)


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


def owners(recorded: RecordedPass, cut: Cut, at_random_points: bool = True) -> Tensor | None:
    """Find the filter that each channel of a tensor depends on, from which channels move with which filters.

    The filters that have a one at some place of their number, in binary, are moved together; then all others are. A
    channel that moves with both kinds depends on several filters.

    Returns:
        The filters, shape (j,); -1 where a channel moves with none. None if one moves with several.
    """
    points = list(random_points(recorded, torch.Generator().manual_seed(0)))
    start, *others = points if at_random_points else [recorded.points(), *points]

    def value(points: dict[int, Tensor]) -> Tensor:
        points = {node: point.detach() for node, point in points.items()}
        return recorded.graph.replay(points, cut.end)[cut.node].transpose(0, 1).flatten(1)

    def moved(target: dict[int, Tensor], chosen: Tensor) -> Tensor:
        return (value({node: torch.where(chosen, target[node], start[node]) for node in start}) != base).any(1)

    base = value(start)
    owner = torch.full((len(base),), -1, device=base.device)
    shape = (-1, *[1] * (next(iter(start.values())).dim() - 2))
    numbers = torch.arange(recorded.calls[0].weight.shape[0], device=base.device).reshape(shape)
    for target in others:
        fresh = moved(target, numbers >= 0) & (owner < 0)
        if not fresh.any():
            continue
        found = torch.zeros_like(owner)
        for place in range((len(numbers) - 1).bit_length()):
            chosen = (numbers >> place & 1).bool()
            is_one = moved(target, chosen)
            if (is_one == moved(target, ~chosen))[fresh].any():
                return None
            found += is_one.long() << place
        owner = torch.where(fresh, found, owner)
    return owner if int(owner.max()) < len(numbers) else None


def slots_of(owner: Tensor, filters: int) -> Tensor:
    """Return the features of each filter, shape (k, features per filter); -1 where a filter has fewer."""
    features = owner.argsort(stable=True)[int((owner < 0).sum()) :]
    owner = owner[features]
    counts = torch.bincount(owner, minlength=filters)
    rank = torch.arange(len(owner), device=owner.device) - (counts.cumsum(0) - counts)[owner]
    slots = owner.new_full((filters, max(1, int(counts.max()))), -1)
    slots[owner, rank] = features
    return slots


def cotangents_of(slots: Tensor, features: int) -> Tensor:
    """Return a row for each column of the slots, with ones at its features, and a row for all others if there are."""
    rows = torch.zeros(slots.shape[1] + 1, features, device=slots.device)
    for row, column in zip(rows, slots.unbind(1), strict=False):
        row[column[column >= 0]] = 1
    rows[-1] = 1 - rows.sum(0)
    return rows if rows[-1].any() else rows[:-1]


def traced(
    output: Tensor,
    point: Tensor,
    generator: torch.Generator,
    scale: Tensor,
    slots: Tensor | None = None,
    is_recorded: bool = False,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Prove which channels of `output` each channel of `point` feeds.

    Args:
        output: a function of the point, shape (n, j, ...).
        point: the map, shape (n, k, *positions).
        generator: of the random cotangents.
        scale: the largest derivative seen before.
        slots: the channels that each feeds, as `slots_of` returns them; None: one each, found here.
        is_recorded: whether the point is that of a batch. Then each map of each sample has to agree at its own scale.

    Returns:
        The slots, None if an output depends on other channels as well; which of them are inactive; the largest
        derivative, here or before.
    """
    n, channels = output.shape[:2]
    dims = [1] * (output.dim() - 2)
    weight, by_sample = (
        torch.rand(shape, generator=generator, dtype=torch.float64).to(output) + 0.5
        for shape in (output.shape, (n, 1, *dims))
    )
    numbers = torch.randperm(channels, generator=generator)
    code = torch.randn(channels, generator=generator, dtype=torch.float64).to(output)
    spread = _spread(point)  # of derivatives those count alike that move the output alike

    def pulled_back(code: Tensor, factor: Tensor | float = 1.0) -> Tensor:
        cotangent = weight * code.to(output).reshape(1, -1, *dims) * factor
        (gradient,) = torch.autograd.grad(output, point, cotangent, retain_graph=True)
        return gradient.flatten(2) * spread

    if slots is None:
        ones = pulled_back(torch.ones(channels))
        ratio = (pulled_back(numbers + 1) * ones).sum((0, 2))
        ratio = ratio / ones.square().sum((0, 2)).clamp_min(torch.finfo(ones.dtype).tiny)
        position = (ratio.nan_to_num().round().long() - 1).clamp(0, channels - 1)
        slots, parts = numbers.argsort().to(point.device)[position].unsqueeze(1), iter([ones])
    else:
        parts = map(pulled_back, cotangents_of(slots, channels))
    expected, size, reaches = torch.zeros(()).to(output), torch.zeros(()).to(output), []
    for column, part in zip(slots.unbind(1), parts, strict=False):
        own = torch.where(column < 0, 0.0, code[column]).reshape(1, -1, 1)
        share = by_sample.reshape(n, 1, 1) * own * part
        expected, size = expected + share, size + share.abs()
        reaches.append(part.abs().amax((0, 2)))
    reach = torch.stack(reaches, 1)
    scale = torch.maximum(reach.max(), scale)
    inactive = reach <= torch.finfo(reach.dtype).eps * scale
    least = size.amax(2, keepdim=True) if is_recorded else scale
    consistent = allclose_at_scale(pulled_back(code, by_sample), expected, least)
    return (slots if consistent and is_injective(slots, inactive) else None), inactive, scale


def acts_by_position(features: Tensor, point: Tensor, generator: torch.Generator, scale: Tensor) -> tuple[bool, Tensor]:
    """Return whether the second derivative is diagonal over positions, and its largest value, here or before."""
    cotangent = torch.rand(features.shape[1], generator=generator, dtype=torch.float64).to(features) + 0.5
    (jacobian,) = torch.autograd.grad(features, point, cotangent.expand_as(features), create_graph=True)
    if not jacobian.requires_grad:
        return True, scale
    direction = torch.rand(point.shape, generator=generator, dtype=torch.float64).to(point) + 0.5
    (ones,) = torch.autograd.grad(jacobian.sum(), point, retain_graph=True, materialize_grads=True)
    (turned,) = torch.autograd.grad((jacobian * direction).sum(), point, materialize_grads=True)
    scale = torch.maximum(ones.abs().max(), scale)
    return allclose_at_scale(turned, direction * ones, scale), scale


def is_injective(slots: Tensor, inactive: Tensor) -> bool:
    """Return whether no channel is fed by two filters, of those that are active."""
    return slots[~inactive].unique().numel() == int((~inactive).sum())
