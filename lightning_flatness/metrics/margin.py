"""Margin metrics: what `functional.margin` defines, over all samples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import lightning_flatness.functional as LF
from lightning_flatness.curvature.quantities import SampleQuantities, given
from lightning_flatness.metrics.flatness import SampleMean, SampleMetric


class MarginStatistics(SampleMetric):
    r"""Statistics of the signed output margins \(\gamma_n\) of all samples.

    \(\gamma_n\) is the margin of `functional.output_margin`. `compute` returns the scalars of
    `functional.distribution`: `mean`, `std`, `min` and the quantiles `q01` ... `q99` in the unit of the logits,
    `skewness` and the share `negative` without unit. Higher margins are better. One number per sample is kept, so that
    the quantiles are exact. It needs `output_margin`, shape (n,).

    Example:
        >>> import torch
        >>> from lightning_flatness import SampleQuantities
        >>> from lightning_flatness.metrics import MarginStatistics
        >>> margins, other = torch.tensor([-1.0, 0.0, 4.0]), torch.zeros(3)
        >>> metric = MarginStatistics()
        >>> metric.update(SampleQuantities(other, other, other, output_margin=margins))
        >>> metric.compute()["negative"]
        tensor(0.3333, dtype=torch.float64)
    """

    requires = ("output_margin",)

    margins: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        """Start with no samples."""
        super().__init__(**kwargs)
        self._add_values("margins")

    def _add(self, quantities: SampleQuantities) -> None:
        self.margins.append(given(quantities.output_margin, "output_margin").double())

    def _value(self) -> dict[str, Tensor]:
        """Return mean, std, skewness, min, quantiles and the share of negative margins of all samples so far."""
        self.all_values = self._values("margins")
        return LF.distribution(self.all_values)


class _TwoMeans(SampleMetric):
    """A function of the means of the two quantities that it requires."""

    totals: Tensor

    def __init__(self, **kwargs: Any) -> None:
        """Start with no samples."""
        super().__init__(**kwargs)
        self._add_sum("totals", 2)

    def _add(self, quantities: SampleQuantities) -> None:
        self.totals += torch.stack(
            [given(getattr(quantities, name), name).sum(dtype=torch.float64) for name in self.requires]
        )


class ScaleFreeMargin(_TwoMeans):
    r"""Mean signed output margin in units of the spread of the logits, which does not change when they are scaled.

    $$\frac{1}{\tau N} \sum_n \gamma_n$$

    with the margins \(\gamma_n\) of `functional.output_margin` and the temperature \(\tau\) of `ScaleFreeFlatness`, the
    root mean square of the logits about the mean of their sample. The value is a scalar; no unit; higher is better; 0
    where all logits of all samples are equal. It needs `output_margin` and `logit_mean_square`, shape (n,).

    Example:
        >>> import torch
        >>> from lightning_flatness import SampleQuantities
        >>> from lightning_flatness.metrics import ScaleFreeMargin
        >>> margins, square, other = torch.tensor([1.0, 3.0]), torch.tensor([3.0, 5.0]), torch.zeros(2)
        >>> metric = ScaleFreeMargin()
        >>> metric.update(SampleQuantities(other, other, other, output_margin=margins, logit_mean_square=square))
        >>> metric.compute()
        tensor(1., dtype=torch.float64)
    """

    requires = ("output_margin", "logit_mean_square")

    higher_is_better = True

    def _value(self) -> Tensor:
        """Return the value over all samples so far; NaN if there were none."""
        margin, mean_square = self.totals / self.samples
        return torch.where(mean_square == 0, 0.0, margin / mean_square.sqrt())


class MarginShare(_TwoMeans):
    r"""Share of the curvature that compares the true class with all others.

    $$\frac{\sum_n \sum_k R_{n,kk}\, r_{nk}^2}{\sum_n \sum_k R_{n,kk}\, Q_{n,kk}}$$

    with \(r\) of `functional.margin_row`, and \(R\) and \(Q\) of `functional.hessian_trace`. The denominator is the
    trace of the Gauss-Newton part of the layer's Hessian, which is the Hessian where the network behind the layer is
    piecewise linear. The rest of it compares the other classes among themselves. The value is a scalar in [0, 1]; no
    unit; 0 where there is no curvature. It needs `margin_trace` and `gauss_newton_trace`, shape (n,).

    Example:
        >>> import torch
        >>> from lightning_flatness import SampleQuantities
        >>> from lightning_flatness.metrics import MarginShare
        >>> part, trace = torch.tensor([1.0, 2.0]), torch.tensor([2.0, 4.0])
        >>> metric = MarginShare()
        >>> metric.update(SampleQuantities(trace, trace, trace, gauss_newton_trace=trace, margin_trace=part))
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)
    """

    requires = ("margin_trace", "gauss_newton_trace")

    def _value(self) -> Tensor:
        """Return the share over all samples so far; NaN if there were none."""
        part, whole = self.totals / self.samples
        return torch.where(whole == 0, 0.0, part / whole)


class SoftmaxMargin(SampleMean):
    r"""Mean signed softmax margin over \(N\) samples.

    $$\frac{1}{N} \sum_n \Bigl(S_{n y} - \max_{c \ne y} S_{n c}\Bigr)$$

    with the softmax \(S_n\) and the true class \(y\) of sample n, see `functional.softmax_margin`. The value is a
    scalar in [-1, 1]; no unit; higher is better. It needs `softmax_margin`, shape (n,).

    Example:
        >>> import torch
        >>> from lightning_flatness import SampleQuantities
        >>> from lightning_flatness.metrics import SoftmaxMargin
        >>> margins, other = torch.tensor([-0.5, 1.0]), torch.zeros(2)
        >>> metric = SoftmaxMargin()
        >>> metric.update(SampleQuantities(other, other, other, softmax_margin=margins))
        >>> metric.compute()
        tensor(0.2500, dtype=torch.float64)
    """

    requires = ("softmax_margin",)

    higher_is_better = True


class MarginBound(SampleMean):
    r"""Mean upper bound of the classifier's Hessian trace by the softmax margin, over \(N\) samples.

    $$\frac{1}{N} \sum_n (\Vert x_n \Vert^2 + 1)(1 - \gamma_n^2)$$

    with the classifier's input \(x_n\) and the softmax margin \(\gamma_n\) of sample n, see `functional.margin_bound`.
    It is at least the value of `AffineHessianTrace`. The value is a scalar; loss per squared weight; lower is flatter.
    It needs `margin_bound`, shape (n,).

    Example:
        >>> import torch
        >>> from lightning_flatness import SampleQuantities
        >>> from lightning_flatness.metrics import MarginBound
        >>> bounds, other = torch.tensor([1.0, 2.0]), torch.zeros(2)
        >>> metric = MarginBound()
        >>> metric.update(SampleQuantities(other, other, other, margin_bound=bounds))
        >>> metric.compute()
        tensor(1.5000, dtype=torch.float64)
    """

    requires = ("margin_bound",)
