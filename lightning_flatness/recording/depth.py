"""Which convolution is measured if none is named: the one at the greatest depth, found while the network runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod
from typing import Any, TypeAlias, cast

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from lightning_flatness.recording.operation import tensors, written
from lightning_flatness.recording.operators import CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS

_Encoded: TypeAlias = tuple[int, tuple[Sequence[int], Sequence[int]] | None, list[Tensor]]


class DepthWatch:
    """Listens to the dispatcher, and knows of each tensor how deep it lies.

    The depth of a tensor is the number of convolutions on the longest path to it, see `is_counted`. Transposed ones
    count. All views of one memory have the same depth, the greatest of what was written there. No tensor is kept alive.

    Attributes:
        failure: the first exception of the watch; the user's forward pass goes on.
    """

    def __init__(self) -> None:
        """Start with every tensor at depth 0."""
        self.failure: Exception | None = None
        # A weak reference keeps the identity of a memory from being given to another one, but not the memory.
        self._depths: dict[StorageWeakRef, int] = {}

    def of(self, tree: Any) -> int:
        """Return the greatest depth of the tensors in nested lists, tuples and dictionaries; 0 if there are none."""
        memories = map(_memory, tensors(tree)) if self._depths else ()
        return max((self._depths.get(memory, 0) for memory in memories if memory is not None), default=0)

    def before(self, func: Any, args: Any, kwargs: dict[str, Any]) -> _Encoded:
        """Return how deep the arguments of an operation lie, what a convolution sees, and what it will change."""
        try:
            is_convolution = func.overloadpacket.__name__ in CONVOLUTIONS | TRANSPOSED_CONVOLUTIONS
            seen = (args[0].shape[2:], args[1].shape[2:]) if is_convolution else None
            return self.of((args, kwargs)), seen, list(written(func, args, kwargs))
        except Exception as error:  # the user's forward pass must go on
            self.failure = self.failure or error
            return 0, None, []

    def after(self, func: Any, encoded: _Encoded, result: Any) -> None:
        """Note how deep lies what an operation returned or changed."""
        depth, seen, changed = encoded
        try:
            results = [*tensors(result), *changed]
            if seen is not None:
                depth += is_counted(*seen, results[0].shape[2:])
            for memory in map(_memory, results) if depth else ():
                if memory is not None:
                    self._depths[memory] = max(depth, self._depths.get(memory, 0))
        except Exception as error:  # the user's forward pass must go on
            self.failure = self.failure or error


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


def _memory(tensor: Tensor) -> StorageWeakRef | None:
    """Return the identity of the tensor's memory; None if it has none of its own, as a sparse one."""
    try:
        return StorageWeakRef(tensor.untyped_storage())
    except (NotImplementedError, RuntimeError):
        return None
