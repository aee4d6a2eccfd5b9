"""Pulls rows back through a record, and adds up what they contribute to each parameter."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from lightning_flatness.curvature.jacobian.contributions import (
    Layout,
    Structure,
    arranged,
    layer_flatness,
    layer_gradients,
    vector,
)
from lightning_flatness.curvature.jacobian.network import Network
from lightning_flatness.curvature.jacobian.plan import Use
from lightning_flatness.curvature.jacobian.replay import Replay, Tap
from lightning_flatness.errors import GraphError
from lightning_flatness.precision import allclose_for_dtype

_TAPS = 4  # at least so many are differentiated together


def bytes_per_sample(network: Network) -> int:
    """Return an estimate of what the derivatives of one sample take."""
    graph, plan = network.recorded.graph, network.plan
    sizes, together, largest, held = [], 0, 0, 0
    for number in plan.numbers:
        result = graph.operations[number].results[0]
        size = 0 if plan.is_made(result) else graph.tensor_of(result).numel()
        held += size
        if number in plan.uses:
            sizes.append(size)
        largest = max(largest, sum(sizes[together:]))
        if number in plan.ends and len(sizes) >= together + _TAPS:
            together = len(sizes)
    numbers = held + sum(sizes) + 2 * (network.columns + 1) * largest
    factor = 4 * 8 * network.goal.logits.shape[1] ** 2  # while it is made, in float64
    return numbers // len(network.values) * network.values.element_size() + factor


def contributions(network: Network, part: slice, chunk_bytes: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Return what the samples of a part have of the trace and relative flatness of each parameter."""
    replay = _replay(network, part)
    columns, signs = network.factor(part)
    per_column = bytes_per_sample(network) // (network.columns + 1) * columns.shape[1]
    step = max(1, chunk_bytes // max(1, per_column))
    sums: dict[str, tuple[Tensor, Tensor]] = {}
    for start in range(0, len(columns), step):
        group = slice(start, start + step)
        found = _of_columns(network, replay, columns[group])
        for name, values in found.items():
            if signs is not None:
                values = values[0] * signs[group].T, values[1] * signs[group].T
            trace, relative = (value.double().sum(1) for value in values)
            before = sums.get(name)
            sums[name] = (trace, relative) if before is None else (before[0] + trace, before[1] + relative)
    return sums


def gradients(network: Network, part: slice, weight: str) -> tuple[Tensor, Tensor]:
    """Return the gradients of all rows with respect to a weight, shape (n, m, k, d), and the rows' signs (n, m).

    Args:
        network: what the record is made of.
        part: the samples.
        weight: name of the parameter.
    """
    columns, signs = network.factor(part)
    calls = [
        (tap, use, torch.stack(chosen, 1), layout)
        for tap, layout, chosen in _cotangents(_replay(network, part), columns, network.plan.keeps_samples_apart)
        for use in tap.uses
        if (use.parameter, use.role) == (weight, "weight")
    ]
    return layer_gradients(calls), torch.ones_like(columns[..., 0].T) if signs is None else signs.T


def _replay(network: Network, part: slice) -> Replay:
    replay = Replay(network.recorded, network.plan, network.cut, len(network.values), part)
    if not allclose_for_dtype(replay.output.detach(), network.values[part]):
        raise GraphError("repeating the recorded steps does not give the values that the network computed")
    return replay


def _cotangents(replay: Replay, columns: Tensor, is_apart: bool) -> Iterator[tuple[Tap, Layout, list[Tensor]]]:
    """Yield every tap with where the samples are, and the cotangents of all columns at it, shape (n, v, ...).

    Args:
        replay: of the samples.
        columns: to pull back, shape (m, n, j).
        is_apart: see `Plan.keeps_samples_apart`; if not, one column more proves that the samples are not coupled.
    """
    samples, rows = columns.shape[1], [*columns.reshape(-1, *replay.output.shape)]
    structure = None
    if not is_apart:
        generator = torch.Generator().manual_seed(3)
        drawn = (torch.rand(size, generator=generator, dtype=torch.float64) + 0.5 for size in (len(columns), samples))
        weights, factors = (values.to(columns) for values in drawn)
        structure = Structure(weights, factors)
        tested = torch.tensordot(weights, columns, 1) * factors.unsqueeze(1)
        rows.append(tested.reshape(replay.output.shape))
    for tap, cotangents in _pulled_back(replay, rows):
        layout: Layout | None = "major"
        if structure is not None:
            layout = structure.layout(cotangents, tap.has_channels)
            cotangents.pop()
        if layout is None:
            raise GraphError("the logits of one sample depend on another sample")
        yield tap, layout, [arranged(one, samples, layout) for one in cotangents]


def _of_columns(network: Network, replay: Replay, columns: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Return trace and relative flatness that each column contributes to each parameter, shape (n, m)."""
    plan = network.plan
    layers: dict[str, list[tuple[Tap, Use, Tensor, Layout]]] = {}
    vectors: dict[str, Tensor] = {}
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for tap, layout, chosen in _cotangents(replay, columns, plan.keeps_samples_apart):
        for use in tap.uses:
            if use.role == "weight":
                layers.setdefault(use.parameter, []).append((tap, use, torch.stack(chosen, 1), layout))
                continue
            gradients = [vector(tap, use, one, layout) for one in chosen]
            if any(gradient is None for gradient in gradients):
                plan.left_out[use.parameter] = "each sample has numbers of its own in it"
                continue
            gradient = torch.stack([one.flatten(1) for one in gradients if one is not None], 1)
            vectors[use.parameter] = vectors[use.parameter] + gradient if use.parameter in vectors else gradient
        for name in [name for name, calls in layers.items() if len(calls) == len(plan.uses_of(name))]:
            trace, relative = layer_flatness(layers.pop(name), network.grams.get(name))
            found[name] = trace, trace if relative is None else relative
    found |= {name: (gradient.square().sum(2),) * 2 for name, gradient in vectors.items()}
    return {name: values for name, values in found.items() if name not in plan.left_out}


def _pulled_back(replay: Replay, rows: list[Tensor]) -> Iterator[tuple[Tap, list[Tensor]]]:
    """Yield every tap, the last parts of the network first, with the cotangents of all rows at it."""
    ends: list[tuple[int, Tensor | None]] = [(0, None)]
    for count, value in replay.ends:
        if ends[-1][0] + _TAPS <= count < len(replay.taps):
            ends.append((count, value))
    ends.append((len(replay.taps), replay.output))
    for (start, source), (stop, end) in list(pairwise(ends))[::-1]:
        assert end is not None
        taps = replay.taps[start:stop]
        values = [*(tap.value for tap in taps), *([] if source is None else [source])]
        pulled = [torch.autograd.grad(end, values, row, retain_graph=True, materialize_grads=True) for row in rows]
        cotangents = list(map(list, zip(*pulled, strict=True)))
        del pulled
        rows = cotangents.pop() if source is not None else []
        while taps:
            yield taps.pop(), cotangents.pop()
