"""Counts multiply-adds: of a network's forward pass, or of what is measured on top of it."""

from __future__ import annotations

from collections.abc import Callable

from torch.utils.flop_counter import FlopCounterMode


def multiply_adds(run: Callable[[], object]) -> int:
    """Return how many multiply-adds the matrix products and convolutions in one call take.

    They are counted while `run` runs; everything else (activations, sums, copies) is left out.

    Args:
        run: a function without arguments.

    Returns:
        The number of multiply-adds.

    Example:
        >>> import torch
        >>> multiply_adds(lambda: torch.ones(2, 3) @ torch.ones(3, 4))
        24
    """
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops()) // 2  # it counts the multiplication and the addition apart
