"""Flatness metrics: means over samples of what `functional` defines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.plot import _AX_TYPE, _PLOT_OUT_TYPE

import lightning_flatness.functional as LF
from lightning_flatness.curvature.pooled.derivatives import TailFactors


class FactorsMetric(Metric):
    """A metric of the `TailFactors` of batches; exact for any split of the samples into batches and processes.

    The sums are float64 where the device has it, whatever the dtype of the model.
    """

    is_differentiable = False
    higher_is_better: bool | None = None
    full_state_update = False

    samples: Tensor

    def __init__(self, **kwargs: Any) -> None:
        """Start with no samples."""
        super().__init__(**kwargs)
        self.add_state("samples", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    @property
    def dtype(self) -> torch.dtype:
        """Float64, the dtype in which a process without samples sends its nothing: that of the others' values."""
        return torch.float64

    def _add_sum(self, name: str, *shape: int) -> None:
        self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def _add_values(self, name: str) -> None:
        self.add_state(name, [], dist_reduce_fx="cat")

    def _values(self, name: str) -> Tensor:
        """Return a per-sample state of all batches (and of all processes, where they have been synchronised)."""
        values: Tensor | list[Tensor] = getattr(self, name)
        return (
            values if isinstance(values, Tensor) else torch.cat([self.samples.new_zeros(0, dtype=self.dtype), *values])
        )

    def plot(
        self, val: Tensor | dict[str, Tensor] | Sequence[Any] | None = None, ax: _AX_TYPE | None = None
    ) -> _PLOT_OUT_TYPE:
        """Plot one value or several, as every torchmetric does; needs matplotlib."""
        return self._plot(val, ax)


class SampleMean(FactorsMetric):
    """Mean over samples of one per-sample quantity of `TailFactors`."""

    higher_is_better: bool | None = False
    quantity: str

    total: Tensor

    def __init__(self, **kwargs: Any) -> None:
        """Start with no samples."""
        super().__init__(**kwargs)
        self._add_sum("total")

    def update(self, factors: TailFactors) -> None:
        """Add the samples of one batch."""
        self.total += getattr(factors, self.quantity).sum(dtype=self.total.dtype)
        self.samples += len(factors)

    def compute(self) -> Tensor:
        """Return the mean over all samples so far; NaN if there were none."""
        return self.total / self.samples


class HessianTrace(SampleMean):
    """Mean Hessian trace of the monitored convolution, see `functional.hessian_trace`; lower is flatter."""

    quantity = "hessian_trace"


class RelativeFlatness(SampleMean):
    """Mean relative flatness of the monitored convolution, see `functional.relative_flatness`; lower is flatter."""

    quantity = "relative_flatness"


class AffineHessianTrace(SampleMean):
    """Mean Hessian trace of the affine classifier (ACEHT), see `functional.affine_hessian_trace`; lower is flatter."""

    quantity = "affine_hessian_trace"


class ScaleFreeFlatness(FactorsMetric):
    r"""Mean relative flatness of the predictor `phi / tau`; scaling the logits does not change it; lower is flatter.

    `tau` is the root mean square of `phi - mean_c phi` over all samples and classes of the evaluation, a constant to
    the Hessian: `S = softmax(phi / tau)`, classifier `V / tau`. As `tau` is known only at the end, the sums are kept
    at every temperature of `functional.TEMPERATURES` and read at `tau` by `functional.at_temperature`: one pass,
    without memory of earlier evaluations, to a relative 1e-7 of the value with `tau` known beforehand. A `tau` outside
    of [2^-12, 2^12] counts as the nearer end.
    """

    higher_is_better = False

    curve: Tensor
    energy: Tensor

    def __init__(self, **kwargs: Any) -> None:
        """Start with no samples."""
        super().__init__(**kwargs)
        self._add_sum("curve", len(LF.TEMPERATURES))
        self._add_sum("energy")

    def update(self, factors: TailFactors) -> None:
        """Add the samples of one batch."""
        self.curve += factors.scaled_flatness.sum(0, dtype=self.curve.dtype)
        self.energy += factors.logit_mean_square.sum(dtype=self.energy.dtype)
        self.samples += len(factors)

    def compute(self) -> Tensor:
        """Return the value over all samples so far; NaN if there were none."""
        return LF.at_temperature(self.curve / self.samples, (self.energy / self.samples).sqrt())


class FlatnessFactors(FactorsMetric):
    """The five factors of mean relative flatness, see `functional.attribution`; their product is that mean."""

    totals: Tensor

    def __init__(self, **kwargs: Any) -> None:
        """Start with no samples."""
        super().__init__(**kwargs)
        self._add_sum("totals", 5)

    def update(self, factors: TailFactors) -> None:
        """Add the samples of one batch."""
        quantities = (factors.relative_flatness, factors.confidence, factors.feature_energy)
        constants = (factors.head_energy, factors.kernel_energy)
        sums = [quantity.sum(dtype=self.totals.dtype) for quantity in quantities]
        self.totals += torch.stack([*sums, *(len(factors) * constant.to(self.totals) for constant in constants)])
        self.samples += len(factors)

    def compute(self) -> dict[str, Tensor]:
        """Return the factors over all samples so far; NaN if there were none."""
        relative, confidence, features, head, kernel = self.totals / self.samples
        return LF.attribution(relative, confidence, head, kernel, features)
