"""Names the step of a record that mixes the filters of a convolution."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_flatness.recording.recorded_pass import RecordedPass


def mixing_step(recorded: RecordedPass, end: int) -> str | None:
    """Return the first step after which a number depends on several filters; None if none is found.

    A random half of the filters is moved, and then the other half. A number that moves both times depends on filters of
    both kinds, wherever it stands in its tensor: a transposed map is no mixture.

    Args:
        recorded: one pass.
        end: look at the operations before this number.
    """
    moves = list(_moves(recorded))
    for number, operation in enumerate(recorded.graph.operations[:end], start=1):
        for start, *halves in moves:
            base, first, second = (recorded.graph.replay(points, number) for points in (start, *halves))
            for result in operation.results:
                before = base[result]
                mixed = (first[result] != before) & (second[result] != before) & (before == before)  # no NaN
                if bool(mixed.any()):
                    shape = tuple(before.shape)
                    return f"step {number}, `{operation.name}`, mixes the filters (its output has shape {shape})"
    return None


def _moves(recorded: RecordedPass) -> Iterator[list[dict[int, Tensor]]]:
    """Yield values of the maps, as they are and where units are active; with half of the filters moved; with others."""
    generator = torch.Generator().manual_seed(2)
    filters = len(recorded.calls[0].weight)
    for is_raised in (False, True):
        chosen = torch.randperm(filters, generator=generator) < filters / 2
        points: list[dict[int, Tensor]] = [{}, {}, {}]
        for node, value in recorded.points().items():
            value = value.detach()
            spread = value.std().clamp_min(1e-3)
            start = value.abs().amax() + value if is_raised else value
            drawn = 0.5 + torch.rand(value.shape, generator=generator).to(value)
            half = chosen.to(value.device).reshape(-1, *[1] * (value.dim() - 2))
            points[0][node] = start
            points[1][node] = torch.where(half, start + drawn * spread, start)
            points[2][node] = torch.where(half, start, start + drawn * spread)
        yield points
