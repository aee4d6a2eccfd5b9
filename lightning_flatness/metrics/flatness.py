"""Flatness metrics: means over samples of what `functional.flatness` defines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.plot import _AX_TYPE, _PLOT_OUT_TYPE

from lightning_flatness.factors import TailFactors


class SampleMean(Metric):
    """Mean over samples of one per-sample quantity of `TailFactors`; exact for any split into batches and ranks.

    The sums are float64 where the device has it, whatever the dtype of the model.
    """

    is_differentiable = False
    higher_is_better: bool | None = False
    full_state_update = False
    quantity: str

    total: Tensor
    samples: Tensor

    def __init__(self, **kwargs: Any) -> None:
        """Start with no samples."""
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("samples", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, factors: TailFactors) -> None:
        """Add the samples of one batch."""
        self.total += getattr(factors, self.quantity).sum(dtype=self.total.dtype)
        self.samples += len(factors)

    def compute(self) -> Tensor:
        """Return the mean over all samples so far; NaN if there were none."""
        return self.total / self.samples

    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: _AX_TYPE | None = None) -> _PLOT_OUT_TYPE:
        """Plot one value or several, as every torchmetric does; needs matplotlib."""
        return self._plot(val, ax)


class HessianTrace(SampleMean):
    """Mean Hessian trace of the monitored convolution, see `functional.hessian_trace`; lower is flatter."""

    quantity = "hessian_trace"


class RelativeFlatness(SampleMean):
    """Mean relative flatness of the monitored convolution, see `functional.relative_flatness`; lower is flatter."""

    quantity = "relative_flatness"


class Confidence(SampleMean):
    """Mean of `1 - |S|^2`, see `functional.confidence`; lower is more confident, and flatter."""

    quantity = "confidence"
