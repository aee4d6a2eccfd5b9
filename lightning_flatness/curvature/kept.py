"""What follows from a tensor that seldom changes between two batches, as a weight does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


class Kept:
    """Keeps the last value of a function of a tensor; the same tensor is taken to hold the same numbers.

    Args:
        function: of a tensor and other arguments.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        """Start with no value."""
        self._function = function
        self._known: tuple[Tensor, tuple[Any, ...], Any] | None = None

    def of(self, tensor: Tensor, *arguments: Any) -> Any:
        """Return the value for a tensor: the very same object for the same tensor and equal arguments."""
        if self._known is None or self._known[0] is not tensor or self._known[1] != arguments:
            self._known = tensor, arguments, self._function(tensor, *arguments)
        return self._known[2]


class LastWeight:
    """The weight of the batch before; a copy of it may hold the same numbers."""

    def __init__(self) -> None:
        """Start with none."""
        self._weight: Tensor | None = None

    def differs(self, weight: Tensor) -> Tensor | bool:
        """Return whether a weight is another one; where a device knows that, a tensor that holds the answer."""
        last = self._weight
        if last is None or last is weight:
            return last is None
        is_like = last.shape == weight.shape and last.dtype == weight.dtype and last.device == weight.device
        return (last != weight).any() if is_like else True

    def of(self, weight: Tensor, differs: bool) -> Tensor:
        """Return the last weight, unless the one that came differs and takes its place."""
        if self._weight is None or differs:
            self._weight = weight
        return self._weight
