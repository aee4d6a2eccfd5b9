"""Flatness metrics: means over samples of what `functional` defines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.plot import _AX_TYPE, _PLOT_OUT_TYPE

import lightning_flatness.functional as LF
from lightning_flatness.curvature.quantities import SampleQuantities, given


class SampleMetric(Metric):
    """A metric of the `SampleQuantities` of batches; exact for any split of the samples into batches and processes.

    The sums are float64, whatever the dtype of the model.

    Args:
        curvature: which label the quantities must have, see `SampleQuantities`; None: any. If a batch has another one,
            there is no value.
        **kwargs: of torchmetrics.
    """

    is_differentiable = False
    higher_is_better: bool | None = None
    full_state_update = False

    requires: tuple[str, ...] = ()

    samples: Tensor
    missing: Tensor

    def __init__(self, curvature: Literal["hessian", "ggn"] | None = None, **kwargs: Any) -> None:
        """Start with no samples."""
        super().__init__(**kwargs)
        self._curvature = curvature
        self.add_state("samples", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("missing", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.is_absent = False

    def update(self, quantities: SampleQuantities) -> None:
        """Add the samples of one batch; without the quantities that the metric needs it has no value."""
        is_other = self._curvature not in (None, quantities.curvature)
        if is_other or any(getattr(quantities, name) is None for name in self.requires):
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
    r"""Mean over samples of the one quantity that it requires, \(\frac{1}{N} \sum_n v_n\)."""

    higher_is_better: bool | None = False

    total: Tensor

    def __init__(self, **kwargs: Any) -> None:
        """Start with no samples."""
        super().__init__(**kwargs)
        self._add_sum("total")

    def _add(self, quantities: SampleQuantities) -> None:
        (name,) = self.requires
        self.total += given(getattr(quantities, name), name).sum(dtype=self.total.dtype)

    def _value(self) -> Tensor:
        """Return the mean over all samples so far; NaN if there were none."""
        return self.total / self.samples


class HessianTrace(SampleMean):
    r"""Mean Hessian trace of the layer over \(N\) samples.

    $$\frac{1}{N} \sum_n \operatorname{Tr} H_n$$

    with the trace \(\operatorname{Tr} H_n\) of sample n, see `functional.hessian_trace`. The value is a scalar; loss
    per squared weight; lower is flatter. It needs `hessian_trace`, shape (n,).

    Example:
        >>> import torch
        >>> from lightning_flatness import SampleQuantities
        >>> from lightning_flatness.metrics import HessianTrace
        >>> trace, other = torch.tensor([1.0, 3.0]), torch.zeros(2)
        >>> metric = HessianTrace()
        >>> metric.update(SampleQuantities(hessian_trace=trace, relative_flatness=other, confidence=other))
        >>> metric.compute()
        tensor(2., dtype=torch.float64)
    """

    requires = ("hessian_trace",)


class RelativeFlatness(SampleMean):
    r"""Mean relative flatness of the layer over \(N\) samples.

    $$\frac{1}{N} \sum_n \kappa_n$$

    with the relative flatness \(\kappa_n\) of sample n, see `functional.relative_flatness`. The value is a scalar; unit
    of the loss; lower is flatter. It needs `relative_flatness`, shape (n,).

    Example:
        >>> import torch
        >>> from lightning_flatness import SampleQuantities
        >>> from lightning_flatness.metrics import RelativeFlatness
        >>> kappa, other = torch.tensor([2.0, 6.0]), torch.zeros(2)
        >>> metric = RelativeFlatness()
        >>> metric.update(SampleQuantities(hessian_trace=other, relative_flatness=kappa, confidence=other))
        >>> metric.compute()
        tensor(4., dtype=torch.float64)
    """

    requires = ("relative_flatness",)


class Uncertainty(SampleMean):
    """Mean trace of the loss's curvature in the logits, see `functional.confidence`; lower is more confident."""

    requires = ("confidence",)


class AffineHessianTrace(SampleMean):
    r"""Mean Hessian trace of the affine classifier alone (ACEHT) over \(N\) samples.

    $$\frac{1}{N} \sum_n (\Vert x_n \Vert^2 + 1)(1 - \Vert S_n \Vert^2)$$

    with the classifier's input \(x_n\) and the softmax \(S_n\) of sample n, see `functional.affine_hessian_trace`. The
    value is a scalar; loss per squared weight; lower is flatter. It needs `affine_hessian_trace`, shape (n,).

    Example:
        >>> import torch
        >>> from lightning_flatness import SampleQuantities
        >>> from lightning_flatness.metrics import AffineHessianTrace
        >>> aceht, other = torch.tensor([0.5, 1.5]), torch.zeros(2)
        >>> metric = AffineHessianTrace()
        >>> metric.update(SampleQuantities(other, other, other, affine_hessian_trace=aceht))
        >>> metric.compute()
        tensor(1., dtype=torch.float64)
    """

    requires = ("affine_hessian_trace",)


class ScaleFreeFlatness(SampleMetric):
    r"""Mean relative flatness of the predictor \(\phi / \tau\), which does not change when the logits are scaled.

    $$\frac{1}{N} \sum_n \kappa_n(\tau), \qquad \tau^2 = \frac{1}{N C} \sum_{n,c} (\phi_{nc} - \bar\phi_n)^2$$

    with relative flatness \(\kappa_n(\tau)\) of sample n at temperature \(\tau\), where the softmax is that of
    \(\phi / \tau\) and the classifier is \(V / \tau\), and the mean \(\bar\phi_n\) of the sample's logits (0 for binary
    cross-entropy). \(\tau\) is a constant to the Hessian and known only after the last batch. The sums are therefore
    kept at every temperature of `functional.TEMPERATURES` and read at \(\tau\) by `functional.at_temperature`, to a
    relative 1e-7. There is no value for a \(\tau\) outside of [2^-12, 2^12].

    The value is a scalar; unit of the loss; lower is flatter. It needs `scaled_flatness`, shape (n, t), and
    `logit_mean_square`, shape (n,).

    Example:
        >>> import torch
        >>> from lightning_flatness import SampleQuantities
        >>> from lightning_flatness.metrics import ScaleFreeFlatness
        >>> from lightning_flatness.functional import TEMPERATURES
        >>> scaled, square, other = TEMPERATURES.pow(-2).repeat(2, 1), torch.tensor([3.0, 5.0]), torch.zeros(2)
        >>> metric = ScaleFreeFlatness()
        >>> metric.update(SampleQuantities(other, other, other, scaled_flatness=scaled, logit_mean_square=square))
        >>> metric.compute()  # 1 / tau^2 at tau = 2
        tensor(0.2500, dtype=torch.float64)
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
    r"""The five factors of mean relative flatness; their product is that mean.

    $$\frac{1}{N} \sum_n \kappa_n = c\, v\, w\, r\, g$$

    with the factors that `functional.attribution` defines. `compute` returns scalars under the names `confidence` (no
    unit), `head` (squared weight), `kernel` (squared weight), `features` (squared feature per squared weight) and
    `alignment` (no unit). Lower `confidence` and `alignment` are flatter; the others have no direction of their own.

    It needs `relative_flatness`, `confidence` and `feature_squared_norm`, shape (n,), and the scalar
    `head_squared_norm`; without the scalar `kernel_squared_norm` there is no factor `kernel`.

    Example:
        >>> import torch
        >>> from lightning_flatness import SampleQuantities
        >>> from lightning_flatness.metrics import FlatnessFactors
        >>> metric = FlatnessFactors()
        >>> metric.update(
        ...     SampleQuantities(
        ...         hessian_trace=torch.zeros(1),
        ...         relative_flatness=torch.tensor([6.0]),
        ...         confidence=torch.tensor([0.5]),
        ...         feature_squared_norm=torch.tensor([4.0]),
        ...         head_squared_norm=torch.tensor(2.0),
        ...         kernel_squared_norm=torch.tensor(3.0),
        ...     )
        ... )
        >>> metric.compute()["alignment"]
        tensor(0.5000, dtype=torch.float64)
    """

    requires = ("feature_squared_norm", "head_squared_norm")

    totals: Tensor
    without_kernel: Tensor

    def __init__(self, **kwargs: Any) -> None:
        """Start with no samples."""
        super().__init__(**kwargs)
        self._add_sum("totals", 5)
        self._add_sum("without_kernel")

    def _add(self, quantities: SampleQuantities) -> None:
        features = given(quantities.feature_squared_norm, "feature_squared_norm")
        head = given(quantities.head_squared_norm, "head_squared_norm")
        self.without_kernel += quantities.kernel_squared_norm is None
        kernel = torch.ones_like(head) if quantities.kernel_squared_norm is None else quantities.kernel_squared_norm
        constants = head, kernel
        per_sample = (quantities.relative_flatness, quantities.confidence, features)
        sums = [quantity.sum(dtype=self.totals.dtype) for quantity in per_sample]
        self.totals += torch.stack([*sums, *(len(quantities) * constant.to(self.totals) for constant in constants)])

    def _value(self) -> dict[str, Tensor]:
        """Return the factors over all samples so far; NaN if there were none."""
        relative, confidence, features, head, kernel = self.totals / self.samples
        factors = LF.attribution(relative, confidence, head, kernel, features)
        return {name: value for name, value in factors.items() if name != "kernel" or not self.without_kernel}
