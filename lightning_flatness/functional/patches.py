"""Input patches of a convolution, their Gram matrix, and that of the gradients with respect to the filters."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

COPY_COST = 20
"""Cost of copying or adding one number, in multiply-adds of a matrix product, as measured on CPUs."""

_FEW_CHANNELS = 64  # below, one product with the patches is faster than one for each weight of the kernel
_LARGE_MAP = 196  # positions from which on, with few channels, oneDNN's convolutions are faster than products


class ConvGeometry(NamedTuple):
    """The geometry of a convolution: which inputs each output position sees.

    Attributes:
        kernel: kernel size, one entry per spatial dimension.
        stride: one entry per spatial dimension.
        padding: before and after the input, one pair per spatial dimension.
        dilation: one entry per spatial dimension.
        groups: number of groups.
        padding_mode: `"zeros"` or another mode of `torch.nn.Conv2d`.

    Example:
        >>> import torch
        >>> from lightning_flatness.functional import ConvGeometry
        >>> ConvGeometry.of(torch.nn.Conv2d(3, 8, 3, stride=2, padding=1)).output_shape(torch.Size([10, 10]))
        torch.Size([4, 4])
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str

    @classmethod
    def of(cls, convolution: nn.Module) -> ConvGeometry:
        """Return the geometry of an `nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d`."""
        conv: Any = convolution
        return cls.of_call(
            conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, padding_mode=conv.padding_mode
        )

    @classmethod
    def of_call(
        cls,
        kernel: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int] | str,
        dilation: Sequence[int],
        groups: int,
        padding_mode: str = "zeros",
    ) -> ConvGeometry:
        """Return the geometry for arguments as torch's convolutions take them; one number counts for all dimensions."""
        dims = len(kernel)

        def each(values: Sequence[int]) -> tuple[int, ...]:
            return tuple(values) if len(values) == dims else tuple(values) * dims

        spans = [d * (k - 1) for d, k in zip(each(dilation), kernel, strict=True)]
        if padding == "same":
            pairs = tuple((span // 2, span - span // 2) for span in spans)
        elif isinstance(padding, str):  # "valid"
            pairs = ((0, 0),) * dims
        else:
            pairs = tuple((side, side) for side in each(padding))
        return cls(tuple(kernel), each(stride), pairs, each(dilation), groups, padding_mode)

    @classmethod
    def linear(cls) -> ConvGeometry:
        """Return the geometry of a linear layer that is applied at each position of one dimension."""
        return cls.of_call((1,), (1,), (0,), (1,), 1)

    @property
    def unpadded(self) -> ConvGeometry:
        """Return the geometry for an input that is already padded."""
        return self._replace(padding=tuple((0, 0) for _ in self.padding), padding_mode="zeros")

    def pad(self, inputs: Tensor) -> Tensor:
        """Return the inputs with the convolution's padding, shape (n, channels, *padded space)."""
        if not any(map(any, self.padding)):
            return inputs
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        # F.pad takes the last dimension first.
        return F.pad(inputs, [side for pair in reversed(self.padding) for side in pair], mode=mode)

    def padded_shape(self, shape: torch.Size) -> torch.Size:
        """Return the spatial shape of the padded input."""
        return torch.Size(size + sum(pair) for size, pair in zip(shape, self.padding, strict=True))

    def output_shape(self, padded: torch.Size) -> torch.Size:
        """Return the spatial shape of the output for the spatial shape of the padded input."""
        return torch.Size(
            (size - d * (k - 1) - 1) // s + 1
            for size, k, s, d in zip(padded, self.kernel, self.stride, self.dilation, strict=True)
        )


def patches(inputs: Float[Tensor, "n i ..."], geometry: ConvGeometry) -> Float[Tensor, "n g s d"]:
    r"""Return the input patch \(P_s\) that each output position sees.

    The convolution is \(z_{ks} = \langle W_k, P_s \rangle + b_k\) with the filters \(W_k\), the biases \(b_k\) and the
    patches of the filter's own group.

    Args:
        inputs: input of the convolution, shape (n, channels, *space).
        geometry: geometry of the convolution.

    Returns:
        The patches by group g and output position s, shape (n, g, s, d). The last axis has the order of the filter's
        weights: input channel, then kernel offsets.

    Example:
        >>> import torch
        >>> from lightning_flatness.functional import ConvGeometry, patches
        >>> patches(torch.arange(4.0).view(1, 1, 4), ConvGeometry.of(torch.nn.Conv1d(1, 1, 3)))
        tensor([[[[0., 1., 2.],
                  [1., 2., 3.]]]])
    """
    windows = geometry.pad(inputs)
    dims = len(geometry.kernel)
    for axis, (k, s, d) in enumerate(zip(geometry.kernel, geometry.stride, geometry.dilation, strict=True)):
        windows = windows.unfold(2 + axis, d * (k - 1) + 1, s)[..., ::d]
    n, channels, *space = windows.shape
    # (n, i, *positions, *offsets) -> (n, i, *offsets, *positions): neighbours in memory are copied together.
    rows = windows.permute(0, 1, *range(2 + dims, 2 + 2 * dims), *range(2, 2 + dims))
    weights = channels // geometry.groups * prod(space[dims:])
    return rows.reshape(n, geometry.groups, weights, prod(space[:dims])).mT


def patch_squared_norm(inputs: Float[Tensor, "n i ..."], geometry: ConvGeometry) -> Float[Tensor, "n g s"]:
    r"""Return the squared norm of each input patch, \(\Vert P_s \Vert^2\).

    Args:
        inputs: input of the convolution, shape (n, channels, *space).
        geometry: geometry of the convolution.

    Returns:
        Squared norms by group and output position, shape (n, g, s).

    Example:
        >>> import torch
        >>> from lightning_flatness.functional import ConvGeometry, patch_squared_norm
        >>> patch_squared_norm(torch.arange(4.0).view(1, 1, 4), ConvGeometry.of(torch.nn.Conv1d(1, 1, 3)))
        tensor([[[ 5., 14.]]])
    """
    n, channels, *space = inputs.shape
    squares = inputs.square().reshape(n, geometry.groups, channels // geometry.groups, *space).sum(2)
    return patches(squares, geometry).sum(-1)


def patch_gram(inputs: Float[Tensor, "n i ..."], geometry: ConvGeometry) -> Float[Tensor, "n s s"]:
    r"""Return the Gram matrix of the patches of a convolution with one group.

    $$T_{ss'} = \langle P_s, P_{s'} \rangle = \sum_o \langle x_{s+o}, x_{s'+o} \rangle$$

    with the patches \(P_s\), the kernel offsets \(o\) and the pixels \(x\) of the padded input. The sum adds shifted
    views of the Gram matrix of the pixels, along one spatial axis after the other, and needs no patch in memory. If
    the stride skips so many pixels that multiplying the patches takes fewer operations, they are multiplied instead.

    Args:
        inputs: input of the convolution, shape (n, channels, *space).
        geometry: geometry of the convolution, with one group.

    Returns:
        The Gram matrices, shape (n, s, s).

    Example:
        >>> import torch
        >>> from lightning_flatness.functional import ConvGeometry, patch_gram
        >>> patch_gram(torch.arange(4.0).view(1, 1, 4), ConvGeometry.of(torch.nn.Conv1d(1, 1, 3)))
        tensor([[[ 5.,  8.],
                 [ 8., 14.]]])
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
    """Return `sum_o gram[s + o, t + o]` along one spatial axis, with zeros outside the input."""
    kernel, stride, dilation = geometry.kernel[axis], geometry.stride[axis], geometry.dilation[axis]
    padding = geometry.padding[axis]
    if kernel == stride == 1 and not any(padding):
        return gram
    both = (1 + axis, 1 + axis + len(geometry.kernel))
    size = gram.shape[both[0]]
    outputs = (size + sum(padding) - dilation * (kernel - 1) - 1) // stride + 1
    views = []  # for each weight of the kernel: the outputs that see a pixel through it, and these pixels
    for offset in range(kernel):
        seen = offset * dilation - padding[0]  # the pixel that output 0 sees
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


def _at(dims: tuple[int, int], part: slice) -> Any:
    """Return an index that takes the part of two dimensions and all of the others."""
    return tuple(part if dim in dims else slice(None) for dim in range(max(dims) + 1))


def gram_factors(
    inputs: Float[Tensor, "n i ..."], jacobian: Float[Tensor, "n k s"], geometry: ConvGeometry
) -> tuple[Float[Tensor, "n k r"], Float[Tensor, "n k r"]]:
    r"""Return two factors of the Gram matrix of the features' gradients with respect to the filters.

    $$R_{kk'} = \langle a_k, a_{k'} \rangle, \qquad a_k = \frac{\partial p_k}{\partial W_k} = \sum_s M_{ks} P_s, \qquad
    R = M T M^\top$$

    with the filters \(W_k\), the feature \(p_k\) that filter \(k\) feeds, the derivatives \(M_{ks}\) of that feature
    with respect to the convolution's output \(z_{ks}\), the patches \(P_s\) and their Gram matrix \(T\). The diagonal,
    any block and the whole of \(R = \mathrm{left}\; \mathrm{right}^\top\) follow from the two factors. They are \(M T\)
    and \(M\), or \(a\) twice where that takes fewer operations: on large maps with few weights per filter. With several
    groups they are always \(a\), as each filter sees the patches of its own group only.

    Source: Taleghani, Mohammadi, Marchetti, arXiv 2603.09016.

    Args:
        inputs: input of the convolution, shape (n, channels, *space).
        jacobian: \(M\), shape (n, k, s).
        geometry: geometry of the convolution.

    Returns:
        Left and right factor, shape (n, k, r), where r counts output positions or weights per filter.

    Example:
        >>> import torch
        >>> from lightning_flatness.functional import ConvGeometry, gram_factors
        >>> inputs, jacobian = torch.arange(4.0).view(1, 1, 4), torch.tensor([[[1.0, 0.0], [1.0, 1.0]]])
        >>> left, right = gram_factors(inputs, jacobian, ConvGeometry.of(torch.nn.Conv1d(1, 2, 3)))
        >>> left @ right.mT
        tensor([[[ 5., 13.],
                 [13., 35.]]])
    """
    if _gram_pays(inputs, jacobian, geometry):
        return jacobian @ patch_gram(inputs, geometry), jacobian
    make = _convolved_rows if _convolving_pays(inputs, jacobian, geometry) else _gradient_rows
    rows = make(inputs, jacobian, geometry)
    return rows, rows


def gradient_rows(
    inputs: Float[Tensor, "n i ..."], jacobian: Float[Tensor, "n k s"], geometry: ConvGeometry
) -> Float[Tensor, "n k d"]:
    r"""Return the gradient with respect to each filter, \(a_k = \sum_s M_{ks} P_s\).

    Args:
        inputs: input of the convolution, shape (n, channels, *space).
        jacobian: \(M\), the derivatives with respect to the convolution's output, shape (n, k, s).
        geometry: geometry of the convolution.

    Returns:
        The gradients, shape (n, k, d); the last axis runs over kernel offsets, then input channels.

    Example:
        >>> import torch
        >>> from lightning_flatness.functional import ConvGeometry, gradient_rows
        >>> geometry = ConvGeometry.of(torch.nn.Conv1d(1, 1, 3))
        >>> gradient_rows(torch.arange(4.0).view(1, 1, 4), torch.ones(1, 1, 2), geometry)
        tensor([[[1., 3., 5.]]])
    """
    rows, channels = _gradient_rows(inputs, jacobian, geometry), inputs.shape[1] // geometry.groups
    return rows.unflatten(2, (channels, -1)).mT.flatten(2) if channels < _FEW_CHANNELS else rows


def _gradient_rows(
    inputs: Float[Tensor, "n i ..."], jacobian: Float[Tensor, "n k s"], geometry: ConvGeometry
) -> Float[Tensor, "n k d"]:
    """Return the gradients; with few channels the last axis runs over input channels, then kernel offsets."""
    n, filters, positions = jacobian.shape
    if inputs.shape[1] // geometry.groups < _FEW_CHANNELS:
        return (jacobian.unflatten(1, (geometry.groups, -1)) @ patches(inputs, geometry)).flatten(1, 2)
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


def _convolved_rows(inputs: Tensor, jacobian: Tensor, geometry: ConvGeometry) -> Float[Tensor, "n k d"]:
    """Return the gradients by one convolution with a group for each sample, which needs no patch in memory."""
    n, filters, _ = jacobian.shape
    padded = geometry.pad(inputs)
    rows = conv2d_weight(
        padded.reshape(1, -1, *padded.shape[2:]),
        (n * filters, inputs.shape[1], *geometry.kernel),
        jacobian.reshape(1, n * filters, *geometry.output_shape(padded.shape[2:])),
        geometry.stride,
        dilation=geometry.dilation,
        groups=n,
    )
    return rows.reshape(n, filters, -1)


def _convolving_pays(inputs: Tensor, jacobian: Tensor, geometry: ConvGeometry) -> bool:
    """Return whether the rows are faster by a convolution: with oneDNN it took half the time of the products."""
    is_large = inputs.shape[1] <= _FEW_CHANNELS and jacobian.shape[2] >= _LARGE_MAP
    is_suited = len(geometry.kernel) == 2 and prod(geometry.kernel) > 1 and geometry.groups == 1
    has_library = inputs.device.type == "cpu" and inputs.dtype == torch.float32 and torch.backends.mkldnn.is_available()
    return is_large and is_suited and has_library


def _patch_gram_operations(inputs: Tensor, geometry: ConvGeometry) -> tuple[int, int]:
    """Return the operations per sample that `T` takes by shifted views and by multiplied patches."""
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
    """Return whether `M T M^T` takes no more operations than `a a^T`."""
    filters, positions = jacobian.shape[1:]
    weights = inputs.shape[1] // geometry.groups * prod(geometry.kernel)
    by_rows = filters * positions * weights + filters**2 * weights + COPY_COST * geometry.groups * positions * weights
    by_gram = min(_patch_gram_operations(inputs, geometry)) + filters * positions**2 + filters**2 * positions
    return geometry.groups == 1 and by_gram <= by_rows
