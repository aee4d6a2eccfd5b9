"""What cotangents at the taps of a replay contribute to trace and relative flatness of each parameter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lightning_flatness.curvature.jacobian.plan import Use
from lightning_flatness.curvature.jacobian.replay import Tap
from lightning_flatness.functional import ConvGeometry, flatness_of_cotangents, gradients_of_cotangents

Layout = Literal["major", "minor", "second"]


def arranged(tensor: Tensor, samples: int, layout: Layout, lead: int = 0) -> Tensor:
    """Return a tensor with its samples first and what belongs to the same sample second.

    Args:
        tensor: its first dimension has samples, and maybe views or positions of a sample behind or before them.
        samples: n.
        layout: samples before the rest of the first dimension, behind it, or in the second dimension.
        lead: number of dimensions before the first one, which stay.

    Returns:
        The tensor, shape (*lead, n, v, ...).
    """
    if layout == "second":
        return tensor.movedim(lead + 1, lead).unsqueeze(lead + 1)
    if layout == "major":
        return tensor.unflatten(lead, (samples, -1))
    return tensor.unflatten(lead, (-1, samples)).transpose(lead, lead + 1)


class Structure:
    """Where the samples are in a tap; proves that the logits of one do not depend on another.

    The last cotangent is a sum of the others, with a random factor for each sample. Where nothing depends on the logits
    of another sample, what it gives is the same sum of what the others give, times the factor of the own sample. Both
    are compared in a random projection.

    Args:
        weights: of the cotangents in the sum, shape (m,).
        factors: of the samples, shape (n,).
    """

    def __init__(self, weights: Tensor, factors: Tensor) -> None:
        self._weights, self._factors = weights, factors
        self._directions: dict[int, Tensor] = {}

    def layout(self, cotangents: Sequence[Tensor], has_channels: bool) -> Layout | None:
        """Return where the samples are; None if they are coupled.

        Args:
            cotangents: m + 1, of the tap's shape.
            has_channels: whether its second dimension has channels.
        """
        samples, shape = len(self._factors), cotangents[0].shape
        possible: list[Layout] = []
        if shape[0] % samples == 0:
            possible += ["major", "minor"] if shape[0] > samples > 1 else ["major"]
        if samples > 1 and not has_channels and len(shape) > 2 and shape[1] == samples:
            possible.append("second")
        return next((layout for layout in possible if self._fits(cotangents, layout)), None)

    def _fits(self, cotangents: Sequence[Tensor], layout: Layout) -> bool:
        samples, first = len(self._factors), cotangents[0]
        size = first.numel() // samples
        if size not in self._directions:  # any without a pattern will do
            self._directions[size] = torch.arange(1, size + 1, device=first.device).double().square().sin().to(first)
        direction = self._directions[size]
        found = torch.stack([arranged(one, samples, layout).flatten(1) @ direction for one in cotangents])
        difference = found[-1] - (self._weights @ found[:-1]) * self._factors
        return bool((difference.abs() <= 1e4 * torch.finfo(found.dtype).eps * found[-1].abs().max()).all())


def vector(tap: Tap, use: Use, cotangents: Tensor, layout: Layout) -> Tensor | None:
    """Return the gradient with respect to a bias, a scale or a copy of a parameter, shape (n, *shape of it).

    Args:
        tap: where it acts.
        use: how.
        cotangents: arranged, shape (n, v, ...).
        layout: of the tap.
    """
    if use.role == "copy":
        shape = tap.arguments[use.argument].shape
        axis = 1 if layout == "second" else 0
        kept = [1] * (tap.value.dim() - len(shape)) + list(shape)
        if kept[axis] != 1:
            return None  # rows of its own for each sample
        del kept[axis]
        return cotangents.sum(1).sum_to_size(len(cotangents), *kept)
    if use.role == "scale":
        assert tap.inputs is not None
        cotangents = cotangents * arranged(tap.inputs, len(cotangents), layout)
    if tap.has_channels:
        return cotangents.sum((1, *range(3, cotangents.dim())))
    return cotangents.sum(tuple(range(1, cotangents.dim() - (tap.normalized or 1))))


def layer_rows(use: Use, argument: Tensor) -> Tensor:
    """Return the weight of a layer with one row per output, from the argument of its operation."""
    return argument.T if use.argument == "mat2" else argument.flatten(1)


def as_convolution(tap: Tap, use: Use, cotangents: Tensor, layout: Layout) -> tuple[Tensor, Tensor, ConvGeometry]:
    """Return a layer's inputs (n v, i, ...), cotangents (n v, m, k, s) and geometry, from cotangents (n, m, v, ...)."""
    assert tap.inputs is not None
    inputs = arranged(tap.inputs, len(cotangents), layout)
    if not tap.is_convolution:
        return inputs.flatten(1, -2).mT, cotangents.flatten(2, -2).mT, ConvGeometry.linear()
    kernel = tap.arguments[use.argument].shape[2:]
    given = (tap.arguments[name] for name in ("stride", "padding", "dilation", "groups"))
    geometry = ConvGeometry.of_call(kernel, *given)
    return inputs.flatten(0, 1), cotangents.transpose(1, 2).flatten(0, 1).flatten(3), geometry


def layer_flatness(
    calls: list[tuple[Tap, Use, Tensor, Layout]], kernel_gram: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return what the cotangents contribute to trace and relative flatness of a layer, shape (n, m).

    Args:
        calls: of the layer: taps, uses, cotangents (n, m, v, ...) and layouts; gradients of several are added first.
        kernel_gram: of the weight; None: the relative flatness is not wanted.
    """
    samples = len(calls[0][2])
    if len(calls) == 1 and len((single := as_convolution(*calls[0]))[0]) == samples:
        return flatness_of_cotangents(*single, kernel_gram)
    rows = layer_gradients(calls)
    trace = rows.square().sum((2, 3))
    return trace, None if kernel_gram is None else ((kernel_gram @ rows) * rows).sum((2, 3))


def layer_gradients(calls: list[tuple[Tap, Use, Tensor, Layout]]) -> Tensor:
    """Return the gradients of the cotangents with respect to a layer's weight, shape (n, m, k, d).

    Args:
        calls: of the layer, as for `layer_flatness`.
    """
    samples = len(calls[0][2])
    parts = (gradients_of_cotangents(*as_convolution(*call)) for call in calls)
    return torch.stack([part.unflatten(0, (samples, -1)).sum(1) for part in parts]).sum(0)
