"""Weights as they were while a module ran."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from lightning_flatness.errors import UnsupportedTailError
from lightning_flatness.precision import upcast


class WeightCopies:
    """Copies of weights, made while a module runs: a moving average may swap the weights around the pass."""

    def __init__(self) -> None:
        """Start with none."""
        self._known: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def of(self, module: nn.Module) -> tuple[Tensor, Tensor]:
        """Return the weight of a linear module or a convolution, one row per output, and its bias (zeros without one).

        As long as the values stay the same, the same tensors are returned.

        Raises:
            UnsupportedTailError: if the weight is sharded over processes.
        """
        weight, bias = cast(Tensor, module.weight).detach(), cast("Tensor | None", module.bias)
        if hasattr(weight, "full_tensor") or weight.numel() == 0:
            raise UnsupportedTailError(
                f"A weight must be whole on every process; that of {module} is sharded (FSDP). Keep this layer out of "
                "the sharding, or measure a gathered copy of the model with `measure`."
            )
        with torch.inference_mode(False):
            bias = weight.new_zeros(len(weight)) if bias is None else bias.detach()
            rows, known = weight.flatten(1), self._known.get(module)
            # Comparing values would make the host wait for an accelerator, which copies in no time.
            if known is None or weight.is_cuda or not all(map(_equal, known, (rows, bias))):
                known = self._known[module] = upcast(rows.clone()), upcast(bias.clone())
        return known


def _equal(copy: Tensor, value: Tensor) -> bool:
    return copy.shape == value.shape and copy.device == value.device and torch.equal(copy, upcast(value))
