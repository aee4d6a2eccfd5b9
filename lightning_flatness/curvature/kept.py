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
