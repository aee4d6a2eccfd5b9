"""Input patches of a convolution, and the Gram matrices that they make."""

from __future__ import annotations

from itertools import product
from math import prod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


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
        conv = convolution
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

    def pad(self, inputs: Tensor) -> Tensor:
        """Return the inputs with the convolution's own padding applied."""
        if not any(map(any, self.padding)):
            return inputs
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        # F.pad counts from the last dimension backwards.
        return F.pad(inputs, [side for pair in reversed(self.padding) for side in pair], mode=mode)

    def output_shape(self, padded: tuple[int, ...]) -> tuple[int, ...]:
        """Return the map's shape for a padded input's spatial shape."""
        return tuple(
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
    return grouped.reshape(n, geometry.groups, prod(space[:dims]), -1)


def patch_energy(inputs: Float[Tensor, "n i ..."], geometry: ConvGeometry) -> Float[Tensor, "n g s"]:
    """Return `|P_s|^2`, the squared norm of every patch, by group, shape (n, g, s)."""
    n, channels, *space = inputs.shape
    energy = inputs.square().reshape(n, geometry.groups, channels // geometry.groups, *space).sum(2)
    return patches(energy, geometry).sum(-1)


def patch_gram(inputs: Float[Tensor, "n i ..."], geometry: ConvGeometry) -> Float[Tensor, "n s s"]:
    r"""Return `T = P P^T`, the Gram matrix of an ungrouped convolution's patches.

    Two exact ways, the cheaper one by counted multiply-adds: multiply the unfolded patches, or add up, over
    the kernel's offsets, shifted views of the Gram matrix of the padded input's pixels,
    `T_{s,t} = sum_o <x_{s+o}, x_{t+o}>`, which needs no patches in memory.

    Args:
        inputs: the convolution's input, shape (n, channels, *space).
        geometry: of the convolution, with one group.

    Returns:
        The Gram matrices, shape (n, s, s).
    """
    padded = geometry.pad(inputs)
    n, channels, *space = padded.shape
    shape = geometry.output_shape(tuple(space))
    positions, offsets, pixels = prod(shape), prod(geometry.kernel), prod(space)
    if positions**2 * channels * offsets < pixels**2 * channels + positions**2 * offsets:
        rows = patches(inputs, geometry).squeeze(1)
        return rows @ rows.mT
    flat = padded.reshape(n, channels, pixels)
    gram = (flat.mT @ flat).reshape(n, *space, *space)
    if offsets == 1 and positions == pixels:
        return gram.reshape(n, positions, positions)
    total = torch.zeros(n, *shape, *shape, dtype=gram.dtype, device=gram.device)
    for offset in product(*(range(k) for k in geometry.kernel)):
        window = tuple(
            slice(o * d, o * d + (size - 1) * s + 1, s)
            for o, d, s, size in zip(offset, geometry.dilation, geometry.stride, shape, strict=True)
        )
        total += gram[(slice(None), *window, *window)]
    return total.reshape(n, positions, positions)


def filter_gram(
    inputs: Float[Tensor, "n i ..."], jacobian: Float[Tensor, "n k s"], geometry: ConvGeometry
) -> Float[Tensor, "n k k"]:
    r"""Return `R = a a^T`, `a_k = sum_s M_ks P_s`: inner products of the features' gradients in the filters.

    `a_k` is the gradient of feature `k` in the weights of filter `k`. With one group `R = M T M^T` from the
    patch Gram matrix `T`, or from `a` itself where that takes fewer multiply-adds (large maps, few weights
    per filter); with several groups every filter has the patches of its own group.

    Source: Taleghani, Mohammadi, Marchetti, arXiv 2603.09016.

    Args:
        inputs: the convolution's input `A`, shape (n, channels, *space).
        jacobian: `M = d p_k / d z_ks`, shape (n, k, s).
        geometry: of the convolution.

    Returns:
        The Gram matrices, shape (n, k, k).
    """
    filters, positions = jacobian.shape[1:]
    weights = inputs.shape[1] // geometry.groups * prod(geometry.kernel)
    by_rows = filters * positions * weights + filters**2 * weights
    by_gram = positions**2 * weights + filters * positions**2 + filters**2 * positions
    if geometry.groups == 1 and by_gram <= by_rows:
        return jacobian @ patch_gram(inputs, geometry) @ jacobian.mT
    grouped = jacobian.reshape(len(jacobian), geometry.groups, -1, positions)
    rows = (grouped @ patches(inputs, geometry)).flatten(1, 2)
    return rows @ rows.mT
