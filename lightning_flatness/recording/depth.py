"""Which convolution is measured if none is named: the one at the greatest depth, found while the network runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod
from typing import Any, cast

from torch import Tensor, nn

from lightning_flatness.recording.memories import MemoryWatch
from lightning_flatness.recording.operators import CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS

_COUNTED = CONVOLUTIONS | TRANSPOSED_CONVOLUTIONS


class DepthWatch(MemoryWatch):
    """Knows of each tensor how deep it lies.

    The depth of a tensor is the number of convolutions on the longest path to it, see `is_counted`. Transposed ones
    count. All views of one memory have the same depth, the greatest of what was written there.
    """

    def _seen(self, func: Any, args: Any) -> tuple[Sequence[int], Sequence[int]] | None:
        """Return the sizes of a convolution's input and kernel."""
        is_convolution = func.overloadpacket.__name__ in _COUNTED
        return (args[0].shape[2:], args[1].shape[2:]) if is_convolution else None

    def _added(self, seen: tuple[Sequence[int], Sequence[int]] | None, results: list[Tensor]) -> int:
        return 0 if seen is None else is_counted(*seen, results[0].shape[2:])


class LayerChoice:
    """Ranks the convolutions that run: by depth, then by the number of weights, then by their order in the model.

    A convolution that runs several times has the depth of its deepest call.

    Args:
        names: of the modules, in the order of the model.

    Attributes:
        watch: knows the depths.
    """

    def __init__(self, names: Iterable[str]) -> None:
        """Start with none."""
        self.watch = DepthWatch()
        self._order = {name: index for index, name in enumerate(names)}
        self._ranks: dict[str, tuple[int, int, int]] = {}

    def add(self, name: str, module: nn.Module, depth: int) -> bool:
        """Note a call of a convolution at this depth; return whether it ranks first from now on."""
        convolution = cast(nn.Conv2d, module)  # or another number of dimensions
        weights = convolution.out_channels * convolution.in_channels // convolution.groups
        weights *= prod(convolution.kernel_size)
        rank = (depth, weights, -self._order.get(name, len(self._order)))
        self._ranks[name] = max(rank, self._ranks.get(name, rank))
        return self.deepest == name

    @property
    def deepest(self) -> str | None:
        """The name of the convolution that ranks first; None if none has run."""
        return next(iter(self.ranking), None)

    @property
    def ranking(self) -> list[str]:
        """The names of the convolutions that have run, the deepest first."""
        return sorted(self._ranks, key=self._ranks.__getitem__, reverse=True)


def is_counted(inputs: Sequence[int], kernel: Sequence[int], output: Sequence[int]) -> bool:
    """Return whether a convolution counts as one: if it sees all of its input from one position, it is a linear layer.

    Args:
        inputs: the size of the input's map.
        kernel: that of the kernel.
        output: that of the output's map.
    """
    return prod(output) > 1 or tuple(inputs) != tuple(kernel)
