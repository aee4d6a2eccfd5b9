"""Flatness metrics: means over samples of what `functional` defines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.plot import _AX_TYPE, _PLOT_OUT_TYPE

import lightning_flatness.functional as LF
from lightning_flatness.curvature.quantities import SampleQuantities, given


class SampleMetric(Metric):
    """A metric of the `SampleQuantities` of batches; exact for any split of the samples into batches and processes.

    The sums are float64, whatever the dtype of the model.
    """

    is_differentiable = False
    higher_is_better: bool | None = None
    full_state_update = False

    requires: tuple[str, ...] = ()

    samples: Tensor
    missing: Tensor

    def __init__(self, **kwargs: Any) -> None:
        """Start with no samples."""
        super().__init__(**kwargs)
        self.add_state("samples", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("missing", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.is_absent = False

    def update(self, quantities: SampleQuantities) -> None:
        """Add the samples of one batch; without the quantities that the metric needs it has no value."""
        if any(getattr(quantities, name) is None for name in self.requires):
            self.missing += 1
            return
        self._add(quantities)
        self.samples += len(quantities)

    def compute(self) -> Any:
        """Return the value over all samples so far, of all processes; NaN if there is none."""
        self.is_absent = bool(self.missing)
        return self._value()

    def _add(self, quantities: SampleQuantities) -> None:
        raise NotImplementedError

    def _value(self) -> Any:
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        """Float64: a process without samples then sends an empty tensor of the dtype that the others send."""
        return torch.float64

    def _add_sum(self, name: str, *shape: int) -> None:
        self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def _add_values(self, name: str) -> None:
        self.add_state(name, [], dist_reduce_fx="cat")

    def _values(self, name: str) -> Tensor:
        """Return a per-sample state of all batches (and of all processes, where they have been synchronised)."""
        values: Tensor | list[Tensor] = getattr(self, name)
        if isinstance(values, Tensor):
            return values
        return torch.cat([self.samples.new_zeros(0, dtype=self.dtype), *values])

    def plot(
        self, val: Tensor | dict[str, Tensor] | Sequence[Any] | None = None, ax: _AX_TYPE | None = None
    ) -> _PLOT_OUT_TYPE:
        """Plot one value or several, as every torchmetric does; needs matplotlib."""
        return self._plot(val, ax)


class SampleMean(SampleMetric):
    """Mean over samples of one quantity."""

    higher_is_better: bool | None = False

    total: Tensor

    def __init__(self, **kwargs: Any) -> None:
        """Start with no samples."""
        super().__init__(**kwargs)
        self._add_sum("total")

    def _add(self, quantities: SampleQuantities) -> None:
        self.total += self._quantity(quantities).sum(dtype=self.total.dtype)

    def _value(self) -> Tensor:
        """Return the mean over all samples so far; NaN if there were none."""
        return self.total / self.samples

    def _quantity(self, quantities: SampleQuantities) -> Tensor:
        raise NotImplementedError


class HessianTrace(SampleMean):
    """Mean Hessian trace of the layer, see `functional.hessian_trace`; lower is flatter."""

    def _quantity(self, quantities: SampleQuantities) -> Tensor:
        return quantities.hessian_trace


class RelativeFlatness(SampleMean):
    """Mean relative flatness of the layer, see `functional.relative_flatness`; lower is flatter."""

    def _quantity(self, quantities: SampleQuantities) -> Tensor:
        return quantities.relative_flatness


class Uncertainty(SampleMean):
    """Mean trace of the loss's curvature in the logits, see `functional.confidence`; lower is more confident."""

    def _quantity(self, quantities: SampleQuantities) -> Tensor:
        return quantities.confidence


class AffineHessianTrace(SampleMean):
    """Mean Hessian trace of the affine classifier (ACEHT), see `functional.affine_hessian_trace`; lower is flatter."""

    requires = ("affine_hessian_trace",)

    def _quantity(self, quantities: SampleQuantities) -> Tensor:
        return given(quantities.affine_hessian_trace, "affine_hessian_trace")


class ScaleFreeFlatness(SampleMetric):
    r"""Mean relative flatness of the predictor `phi / tau`; scaling the logits does not change it; lower is flatter.

    `tau` is the root mean square of `phi - mean_c phi` over all samples and classes of the evaluation, a constant to
    the Hessian: `S = softmax(phi / tau)`, classifier `V / tau`. It is known only at the end. The sums are therefore
    kept at every temperature of `functional.TEMPERATURES` and read at `tau` by `functional.at_temperature`: one pass,
    without memory of earlier evaluations, to a relative 1e-7 of the value with `tau` known beforehand. There is
    no value for a `tau` outside of [2^-12, 2^12].
    """

    requires = ("scaled_flatness", "logit_mean_square")

    higher_is_better = False

    curve: Tensor
    logit_mean_square: Tensor

    def __init__(self, **kwargs: Any) -> None:
        """Start with no samples."""
        super().__init__(**kwargs)
        self._add_sum("curve", len(LF.TEMPERATURES))
        self._add_sum("logit_mean_square")

    def _add(self, quantities: SampleQuantities) -> None:
        mean_square = given(quantities.logit_mean_square, "logit_mean_square")
        self.curve += given(quantities.scaled_flatness, "scaled_flatness").sum(0, dtype=self.curve.dtype)
        self.logit_mean_square += mean_square.sum(dtype=self.logit_mean_square.dtype)

    def _value(self) -> Tensor:
        """Return the value over all samples so far; NaN if there were none."""
        tau = (self.logit_mean_square / self.samples).sqrt()
        inside = (LF.TEMPERATURES[0] <= tau) & (tau <= LF.TEMPERATURES[-1])
        self.is_absent = self.is_absent or bool(tau > 0 and not inside)
        return LF.at_temperature(self.curve / self.samples, tau)


class FlatnessFactors(SampleMetric):
    """The five factors of mean relative flatness, see `functional.attribution`; their product is that mean."""

    requires = ("feature_squared_norm", "head_squared_norm", "kernel_squared_norm")

    totals: Tensor

    def __init__(self, **kwargs: Any) -> None:
        """Start with no samples."""
        super().__init__(**kwargs)
        self._add_sum("totals", 5)

    def _add(self, quantities: SampleQuantities) -> None:
        features = given(quantities.feature_squared_norm, "feature_squared_norm")
        constants = (
            given(quantities.head_squared_norm, "head_squared_norm"),
            given(quantities.kernel_squared_norm, "kernel_squared_norm"),
        )
        per_sample = (quantities.relative_flatness, quantities.confidence, features)
        sums = [quantity.sum(dtype=self.totals.dtype) for quantity in per_sample]
        self.totals += torch.stack([*sums, *(len(quantities) * constant.to(self.totals) for constant in constants)])

    def _value(self) -> dict[str, Tensor]:
        """Return the factors over all samples so far; NaN if there were none."""
        relative, confidence, features, head, kernel = self.totals / self.samples
        return LF.attribution(relative, confidence, head, kernel, features)
