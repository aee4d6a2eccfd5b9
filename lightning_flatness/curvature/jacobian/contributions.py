"""What cotangents at the taps of a replay contribute to trace and relative flatness of each parameter."""

from __future__ import annotations

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


def layout_of(cotangents: Tensor, weights: Tensor, factors: Tensor, has_channels: bool) -> Layout | None:
    """Return where the samples are in the cotangents of a tap; None if they are coupled.

    The last cotangent is that of a sum of the others, with a random factor for each sample. Where nothing depends on
    the logits of another sample, it is the sum of the others times the factor of the own sample.

    Args:
        cotangents: shape (m + 1, *shape of the tap).
        weights: of the others in the sum, shape (m,).
        factors: of the samples, shape (n,).
        has_channels: whether the second dimension has channels.
    """
    samples, shape = len(factors), cotangents.shape[1:]
    total = torch.tensordot(weights, cotangents[:-1], 1)
    bound = 1e4 * torch.finfo(total.dtype).eps * cotangents[-1].abs().max()
    possible: list[Layout] = []
    if shape[0] % samples == 0:
        possible += ["major", "minor"] if shape[0] > samples > 1 else ["major"]
    if samples > 1 and not has_channels and len(shape) > 2 and shape[1] == samples:
        possible.append("second")
    for layout in possible:
        expected = arranged(total, samples, layout)
        expected = expected * factors.reshape(-1, *[1] * (expected.dim() - 1))
        if bool(((arranged(cotangents[-1], samples, layout) - expected).abs() <= bound).all()):
            return layout
    return None


def vector(tap: Tap, use: Use, cotangents: Tensor, layout: Layout, shape: torch.Size) -> Tensor | None:
    """Return the gradients with respect to a bias, a scale or a copy of a parameter, shape (m, n, *shape).

    Args:
        tap: where it acts.
        use: how.
        cotangents: arranged, shape (m, n, v, ...).
        layout: of the tap.
        shape: of the argument.
    """
    if use.role == "copy":
        axis = 1 if layout == "second" else 0
        kept = [1] * (tap.value.dim() - len(shape)) + list(shape)
        if kept[axis] != 1:
            return None  # rows of its own for each sample
        del kept[axis]
        return cotangents.sum(2).sum_to_size(*cotangents.shape[:2], *kept)
    if use.role == "scale":
        assert tap.inputs is not None
        cotangents = cotangents * arranged(tap.inputs, cotangents.shape[1], layout)
    if tap.has_channels:
        return cotangents.sum((2, *range(4, cotangents.dim())))
    spanned = tap.normalized or 1
    return cotangents.sum(tuple(range(2, cotangents.dim() - spanned)))


def layer_rows(use: Use, argument: Tensor) -> Tensor:
    """Return the weight of a layer with one row per output, from the argument of its operation."""
    return argument.T if use.argument == "mat2" else argument.flatten(1)


def as_convolution(tap: Tap, use: Use, cotangents: Tensor, layout: Layout) -> tuple[Tensor, Tensor, ConvGeometry]:
    """Return a layer's inputs (n v, i, ...), cotangents (n v, m, k, s) and geometry."""
    assert tap.inputs is not None
    inputs = arranged(tap.inputs, cotangents.shape[1], layout)
    if not tap.is_convolution:
        rows = cotangents.flatten(2, -2)  # (m, n, s, k)
        return inputs.flatten(1, -2).mT, rows.permute(1, 0, 3, 2), ConvGeometry.linear()
    kernel = tap.arguments[use.argument].shape[2:]
    geometry = ConvGeometry.of_call(kernel, *(tap.arguments[name] for name in ("stride", "padding", "dilation", "groups")))
    return inputs.flatten(0, 1), cotangents.flatten(1, 2).flatten(3).transpose(0, 1), geometry


def layer_flatness(
    calls: list[tuple[Tap, Use, Tensor, Layout]], kernel_gram: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return what the cotangents contribute to trace and relative flatness of a layer, shape (n, m).

    Args:
        calls: of the layer: taps, uses, arranged cotangents and layouts; gradients of several are added, then squared.
        kernel_gram: of the weight; None: the relative flatness is not wanted.
    """
    samples = calls[0][2].shape[1]
    parts = [as_convolution(*call) for call in calls]
    if len(parts) == 1 and len(parts[0][0]) == samples:
        return flatness_of_cotangents(*parts[0], kernel_gram)
    rows = sum(gradients_of_cotangents(*part).unflatten(0, (samples, -1)).sum(1) for part in parts)
    assert isinstance(rows, Tensor)
    trace = rows.square().sum((2, 3))
    return trace, None if kernel_gram is None else ((kernel_gram @ rows) * rows).sum((2, 3))
