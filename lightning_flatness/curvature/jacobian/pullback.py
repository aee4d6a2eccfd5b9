"""Pulls rows back through a record, and adds up what they contribute to each parameter."""

from __future__ import annotations

from collections.abc import Iterator

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


def bytes_per_sample(network: Network) -> int:
    """Return an estimate of what the derivatives of one sample take."""
    graph = network.recorded.graph
    taps = sum(graph.tensor_of(graph.operations[number].results[0]).numel() for number in network.plan.uses)
    return 2 * (len(network.factor) + 1) * taps // len(network.values) * network.values.element_size()


def contributions(network: Network, part: slice, chunk_bytes: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Return what the samples of a part have of the trace and relative flatness of each parameter."""
    replay = _replay(network, part)
    columns = network.factor[:, part]
    signs = None if network.signs is None else network.signs[:, part]
    per_column = bytes_per_sample(network) // (len(network.factor) + 1) * columns.shape[1]
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


def gradients(network: Network, part: slice, weight: str) -> Tensor:
    """Return the gradients of all rows with respect to a weight, for the samples of a part, shape (n, m, k, d)."""
    calls = [
        (tap, use, torch.stack(chosen, 1), layout)
        for tap, layout, chosen in _cotangents(_replay(network, part), network.factor[:, part])
        for use in tap.uses
        if (use.parameter, use.role) == (weight, "weight")
    ]
    return layer_gradients(calls)


def _replay(network: Network, part: slice) -> Replay:
    replay = Replay(network.recorded, network.plan, network.cut, len(network.values), part)
    if not allclose_for_dtype(replay.output.detach(), network.values[part]):
        raise GraphError("repeating the recorded steps does not give the values that the network computed")
    return replay


def _cotangents(replay: Replay, columns: Tensor) -> Iterator[tuple[Tap, Layout, list[Tensor]]]:
    """Yield every tap with where the samples are, and the cotangents of all columns at it, shape (n, v, ...)."""
    samples = columns.shape[1]
    generator = torch.Generator().manual_seed(3)
    drawn = (torch.rand(size, generator=generator, dtype=torch.float64) + 0.5 for size in (len(columns), samples))
    weights, factors = (values.to(columns) for values in drawn)
    structure = Structure(weights, factors)
    tested = (torch.tensordot(weights, columns, 1) * factors.unsqueeze(1)).unsqueeze(0)
    pulled = _pulled_back(replay, torch.cat([columns, tested]).reshape(-1, *replay.output.shape))
    for tap in replay.taps:
        cotangents = pulled.pop(0)
        if (layout := structure.layout(cotangents, tap.has_channels)) is None:
            raise GraphError("the logits of one sample depend on another sample")
        yield tap, layout, [arranged(one, samples, layout) for one in cotangents[:-1]]


def _of_columns(network: Network, replay: Replay, columns: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Return trace and relative flatness that each column contributes to each parameter, shape (n, m)."""
    plan, graph = network.plan, network.recorded.graph
    layers: dict[str, list[tuple[Tap, Use, Tensor, Layout]]] = {}
    vectors: dict[str, Tensor] = {}
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for tap, layout, chosen in _cotangents(replay, columns):
        for use in tap.uses:
            if use.role == "weight":
                layers.setdefault(use.parameter, []).append((tap, use, torch.stack(chosen, 1), layout))
                continue
            shape = graph.tensor_of(use.node).shape
            gradients = [vector(tap, use, one, layout, shape) for one in chosen]
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


def _pulled_back(replay: Replay, outputs: Tensor) -> list[list[Tensor]]:
    """Return the cotangents at every tap, one of its shape for each output."""
    values = [tap.value for tap in replay.taps]
    rows = (
        torch.autograd.grad(replay.output, values, row, retain_graph=True, materialize_grads=True) for row in outputs
    )
    return list(map(list, zip(*rows, strict=True)))
