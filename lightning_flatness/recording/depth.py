"""Which convolution is measured if none is named: the one at the greatest depth, found while the network runs."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import Any, cast

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from lightning_flatness.recording.operation import tensors, written
from lightning_flatness.recording.operators import CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS


class DepthWatch:
    """Listens to the dispatcher, and knows of each tensor how deep it lies.

    The depth of a tensor is the number of convolutions on the longest path to it. Transposed ones count; those whose
    output is a single position do not, as they are linear layers. All views of one memory have the same depth, the
    greatest of what was written there. No tensor is kept alive.

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

    def before(self, func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[int, list[Tensor]]:
        """Return how deep the arguments of an operation lie, and those that it will change."""
        try:
            return self.of((args, kwargs)), list(written(func, args, kwargs))
        except Exception as error:  # the user's forward pass must go on
            self.failure = self.failure or error
            return 0, []

    def after(self, func: Any, encoded: tuple[int, list[Tensor]], result: Any) -> None:
        """Note how deep lies what an operation returned or changed."""
        depth, changed = encoded
        try:
            results = [*tensors(result), *changed]
            if func.overloadpacket.__name__ in CONVOLUTIONS | TRANSPOSED_CONVOLUTIONS:
                depth += has_several_positions(results[0])
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


def has_several_positions(output: Tensor) -> bool:
    """Return whether the output of a convolution is a map larger than 1 x 1."""
    return output.shape[2:].numel() > 1


def _memory(tensor: Tensor) -> StorageWeakRef | None:
    """Return the identity of the tensor's memory; None if it has none of its own, as a sparse one."""
    try:
        return StorageWeakRef(tensor.untyped_storage())
    except (NotImplementedError, RuntimeError):
        return None
