"""Input patches of a convolution, and the Gram matrices that they make."""

from __future__ import annotations

from itertools import product
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

COPY_COST = 20
"""Multiply-adds of a matrix product in the time of copying or adding one number, measured on CPUs."""


class ConvGeometry(NamedTuple):
    """How a convolution's output positions see its input; one entry per spatial dimension."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str

    @classmethod
    def of(cls, convolution: nn.Module) -> ConvGeometry:
        """Read the geometry of an `nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d`."""
        conv: Any = convolution
        span = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        if conv.padding == "same":
            padding = [(total // 2, total - total // 2) for total in span]
        elif conv.padding == "valid":
            padding = [(0, 0) for _ in span]
        else:
            padding = [(p, p) for p in conv.padding]
        return cls(
            tuple(conv.kernel_size),
            tuple(conv.stride),
            tuple(padding),
            tuple(conv.dilation),
            conv.groups,
            conv.padding_mode,
        )

    @property
    def unpadded(self) -> ConvGeometry:
        """Return the same geometry for an input that has been padded."""
        return self._replace(padding=tuple((0, 0) for _ in self.padding), padding_mode="zeros")

    def pad(self, inputs: Tensor) -> Tensor:
        """Return the inputs with the convolution's own padding applied."""
        if not any(map(any, self.padding)):
            return inputs
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        # F.pad counts from the last dimension backwards.
        return F.pad(inputs, [side for pair in reversed(self.padding) for side in pair], mode=mode)

    def padded_shape(self, shape: torch.Size) -> torch.Size:
        """Return the padded input's spatial shape."""
        return torch.Size(size + sum(pair) for size, pair in zip(shape, self.padding, strict=True))

    def output_shape(self, padded: torch.Size) -> torch.Size:
        """Return the map's shape for a padded input's spatial shape."""
        return torch.Size(
            (size - d * (k - 1) - 1) // s + 1
            for size, k, s, d in zip(padded, self.kernel, self.stride, self.dilation, strict=True)
        )


def patches(inputs: Float[Tensor, "n i ..."], geometry: ConvGeometry) -> Float[Tensor, "n g s d"]:
    """Return the input patch that each output position sees.

    Args:
        inputs: the convolution's input, shape (n, channels, *space).
        geometry: of the convolution.

    Returns:
        Patches by group `g` and output position `s`, flattened in the order of the kernel's own weights
        (input channel, then kernel offsets), shape (n, g, s, d).
    """
    windows = geometry.pad(inputs)
    dims = len(geometry.kernel)
    for axis, (k, s, d) in enumerate(zip(geometry.kernel, geometry.stride, geometry.dilation, strict=True)):
        windows = windows.unfold(2 + axis, d * (k - 1) + 1, s)[..., ::d]
    n, channels, *space = windows.shape
    grouped = windows.reshape(n, geometry.groups, channels // geometry.groups, *space)
    # (n, g, i, *positions, *offsets) -> (n, g, *positions, i, *offsets)
    grouped = grouped.movedim(2, 2 + dims)
    return grouped.reshape(n, geometry.groups, prod(space[:dims]), channels // geometry.groups * prod(space[dims:]))


def patch_squared_norm(inputs: Float[Tensor, "n i ..."], geometry: ConvGeometry) -> Float[Tensor, "n g s"]:
    """Return `|P_s|^2`, the squared norm of every patch, by group, shape (n, g, s)."""
    n, channels, *space = inputs.shape
    energy = inputs.square().reshape(n, geometry.groups, channels // geometry.groups, *space).sum(2)
    return patches(energy, geometry).sum(-1)


def patch_gram(inputs: Float[Tensor, "n i ..."], geometry: ConvGeometry) -> Float[Tensor, "n s s"]:
    r"""Return `T = P P^T`, the Gram matrix of an ungrouped convolution's patches.

    `T_{s,t} = sum_o <x_{s+o}, x_{t+o}>` over the kernel's offsets `o`: shifted views of the Gram matrix of the
    input's pixels, added up along one axis after the other, without any patch in memory. Where a stride skips so
    many pixels that it takes fewer operations, the patches themselves are multiplied.

    Args:
        inputs: the convolution's input, shape (n, channels, *space).
        geometry: of the convolution, with one group.

    Returns:
        The Gram matrices, shape (n, s, s).
    """
    by_views, by_patches = _patch_gram_operations(inputs, geometry)
    if by_patches < by_views:
        rows = patches(inputs, geometry).squeeze(1)
        return rows @ rows.mT
    if geometry.padding_mode != "zeros":
        inputs, geometry = geometry.pad(inputs), geometry.unpadded
    pixels, space = inputs.flatten(2), inputs.shape[2:]
    gram = (pixels.mT @ pixels).reshape(len(inputs), *space, *space)
    for axis in range(len(space)):
        gram = _sum_along_diagonal(gram, axis, geometry)
    positions = prod(gram.shape[1 : 1 + len(space)])
    return gram.reshape(len(inputs), positions, positions)


def _sum_along_diagonal(gram: Tensor, axis: int, geometry: ConvGeometry) -> Tensor:
    """Return `sum_o gram[s + o, t + o]` along one spatial axis; what lies outside of the input is zero."""
    kernel, stride, dilation = geometry.kernel[axis], geometry.stride[axis], geometry.dilation[axis]
    padding = geometry.padding[axis]
    if kernel == stride == 1 and not any(padding):
        return gram
    both = (1 + axis, 1 + axis + len(geometry.kernel))
    size = gram.shape[both[0]]
    outputs = (size + sum(padding) - dilation * (kernel - 1) - 1) // stride + 1
    views = []  # outputs, and the pixels that they see through one weight
    for offset in range(kernel):
        seen = offset * dilation - padding[0]  # by output 0
        first, last = max(0, -(seen // stride)), min(outputs - 1, (size - 1 - seen) // stride)
        if first <= last:
            source = slice(seen + first * stride, seen + last * stride + 1, stride)
            views.append((_at(both, slice(first, last + 1)), gram[_at(both, source)]))
    shape = [outputs if dim in both else length for dim, length in enumerate(gram.shape)]
    whole = next((pixels for _, pixels in views if list(pixels.shape) == shape), None)
    total = gram.new_zeros(shape) if whole is None else whole.clone(memory_format=torch.contiguous_format)
    for target, pixels in views:
        if pixels is not whole:
            total[target] += pixels
    return total


def _at(dims: tuple[int, int], part: slice) -> Any:  # an index
    return tuple(part if dim in dims else slice(None) for dim in range(max(dims) + 1))


def filter_gram(
    inputs: Float[Tensor, "n i ..."], jacobian: Float[Tensor, "n k s"], geometry: ConvGeometry
) -> Float[Tensor, "n k k"]:
    r"""Return `R = a a^T`, `a_k = sum_s M_ks P_s`: inner products of the features' gradients in the filters.

    `a_k` is the gradient of feature `k` in the weights of filter `k`.

    Source: Taleghani, Mohammadi, Marchetti, arXiv 2603.09016.

    Args:
        inputs: the convolution's input `A`, shape (n, channels, *space).
        jacobian: `M = d p_k / d z_ks`, shape (n, k, s).
        geometry: of the convolution.

    Returns:
        The Gram matrices, shape (n, k, k).
    """
    left, right = gram_factors(inputs, jacobian, geometry)
    return left @ right.mT


def gram_factors(
    inputs: Float[Tensor, "n i ..."], jacobian: Float[Tensor, "n k s"], geometry: ConvGeometry
) -> tuple[Float[Tensor, "n k r"], Float[Tensor, "n k r"]]:
    r"""Return two matrices whose product `left right^T` is `R`, see `filter_gram`.

    From them follow the diagonal, blocks and the whole of `R`. With one group they are `M T` and `M`, from the patch
    Gram matrix `T`, or twice `a` where that takes fewer operations (large maps, few weights per filter);
    with several groups every filter has the patches of its own group.

    Args:
        inputs: the convolution's input `A`, shape (n, channels, *space).
        jacobian: `M = d p_k / d z_ks`, shape (n, k, s).
        geometry: of the convolution.

    Returns:
        Left and right factor, shape (n, k, r) with r positions or weights per filter.
    """
    if _gram_pays(inputs, jacobian, geometry):
        return jacobian @ patch_gram(inputs, geometry), jacobian
    rows = _gradient_rows(inputs, jacobian, geometry)
    return rows, rows


def _gradient_rows(inputs: Tensor, jacobian: Tensor, geometry: ConvGeometry) -> Tensor:
    """Return `a`, one kernel offset after the other, shape (n, k, d)."""
    n, filters, positions = jacobian.shape
    padded = geometry.pad(inputs).unflatten(1, (geometry.groups, -1))
    grouped = jacobian.reshape(n, geometry.groups, filters // geometry.groups, positions)
    shape = geometry.output_shape(padded.shape[3:])
    columns = []
    for offset in product(*map(range, geometry.kernel)):
        window = (
            slice(o * d, o * d + (size - 1) * s + 1, s)
            for o, d, s, size in zip(offset, geometry.dilation, geometry.stride, shape, strict=True)
        )
        columns.append(grouped @ padded[(..., *window)].flatten(3).mT)
    return torch.cat(columns, -1).flatten(1, 2)


def _patch_gram_operations(inputs: Tensor, geometry: ConvGeometry) -> tuple[int, int]:
    """Return the operations per sample of the two ways to `T`: shifted views, multiplied patches."""
    channels, *space = inputs.shape[1:]
    padded = geometry.padded_shape(torch.Size(space))
    seen = space if geometry.padding_mode == "zeros" else padded
    outputs = geometry.output_shape(padded)
    weights, positions, numbers = channels * prod(geometry.kernel), prod(outputs), prod(seen) ** 2
    by_views = numbers * channels
    for kernel, before, after in zip(geometry.kernel, seen, outputs, strict=True):
        numbers = numbers // before**2 * after**2
        by_views += COPY_COST * kernel * numbers
    return by_views, positions**2 * weights + COPY_COST * positions * weights


def _gram_pays(inputs: Tensor, jacobian: Tensor, geometry: ConvGeometry) -> bool:
    """Return whether `M T M^T` takes fewer operations than `a a^T`."""
    filters, positions = jacobian.shape[1:]
    weights = inputs.shape[1] // geometry.groups * prod(geometry.kernel)
    by_rows = filters * positions * weights + filters**2 * weights + COPY_COST * geometry.groups * positions * weights
    by_gram = min(_patch_gram_operations(inputs, geometry)) + filters * positions**2 + filters**2 * positions
    return geometry.groups == 1 and by_gram <= by_rows
