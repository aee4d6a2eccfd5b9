"""What is known of the memory of tensors while a network runs; no tensor is kept alive."""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from operator import or_
from typing import Any, TypeAlias

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from lightning_flatness.recording.operation import tensors, written

_Encoded: TypeAlias = tuple[int, Any, list[Tensor]]


class MemoryWatch:
    """Listens to the dispatcher, and has a number for each memory that tensors lie in.

    What an operation returns or changes has the number that its arguments join to. All views of one memory have the
    same number, joined from all that was written there; it is 0 until something else was.

    Attributes:
        failure: the first exception of the watch; the user's forward pass goes on.
    """

    def __init__(self) -> None:
        """Start with every memory at 0."""
        self.failure: Exception | None = None
        # A weak reference keeps the identity of a memory from being given to another one, but not the memory.
        self._numbers: dict[StorageWeakRef, int] = {}

    def of(self, tree: Any) -> int:
        """Return what the numbers of the tensors in nested lists, tuples and dictionaries join to."""
        return self._joined(map(self._number, tensors(tree))) if self._numbers else 0

    def before(self, func: Any, args: Any, kwargs: dict[str, Any]) -> _Encoded:
        """Return what the arguments of an operation join to, what else matters of them, and what it will change."""
        try:
            return self.of((args, kwargs)), self._seen(func, args), list(written(func, args, kwargs))
        except Exception as error:  # the user's forward pass must go on
            self.failure = self.failure or error
            return 0, None, []

    def after(self, func: Any, encoded: _Encoded, result: Any) -> None:
        """Note the number of what an operation returned or changed."""
        number, seen, changed = encoded
        try:
            results = [*tensors(result), *changed]
            self._note(results, number + self._added(seen, results))
        except Exception as error:  # the user's forward pass must go on
            self.failure = self.failure or error

    def _note(self, results: Iterable[Tensor], number: int) -> None:
        for memory in map(_memory, results) if number else ():
            if memory is not None:
                self._numbers[memory] = self._joined((number, self._numbers.get(memory, 0)))

    def _number(self, tensor: Tensor) -> int:
        memory = _memory(tensor)
        return 0 if memory is None else self._numbers.get(memory, 0)

    def _joined(self, numbers: Iterable[int]) -> int:
        """Return what numbers join to; 0 if there are none."""
        return max(numbers, default=0)

    def _seen(self, func: Any, args: Any) -> Any:
        """Return what matters of an operation, besides the numbers of its arguments."""
        return None

    def _added(self, seen: Any, results: list[Tensor]) -> int:
        """Return by how much the operation raises the number."""
        return 0


class DependenceWatch(MemoryWatch):
    """Knows on which sources each tensor depends: through floating numbers, or in steps alone, as an index does.

    Args:
        sources: how many there may be, which are numbered from 0.
    """

    def __init__(self, sources: int) -> None:
        """Start with tensors that depend on nothing."""
        super().__init__()
        self._sources = sources  # a memory's number has a bit for each, and another if all of the way is floating

    def add(self, tensor: Tensor, source: int) -> None:
        """Note that a tensor depends on a source."""
        self._note([tensor], (1 | 1 << self._sources) << source)

    def depends(self, tensor: Tensor, source: int, in_steps: bool = False) -> bool:
        """Return whether a tensor depends on a source through floating numbers; with `in_steps` in any way."""
        return bool(self._number(tensor) >> (source if in_steps else self._sources + source) & 1)

    def _number(self, tensor: Tensor) -> int:
        number = super()._number(tensor)
        is_floating = tensor.is_floating_point() or tensor.is_complex()
        return number if is_floating else number & ~(~0 << self._sources)

    def _joined(self, numbers: Iterable[int]) -> int:
        return reduce(or_, numbers, 0)


def _memory(tensor: Tensor) -> StorageWeakRef | None:
    """Return the identity of the tensor's memory; None if it has none of its own, as a sparse one."""
    try:
        return StorageWeakRef(tensor.untyped_storage())
    except (NotImplementedError, RuntimeError):
        return None
