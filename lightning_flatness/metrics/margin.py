"""Margin metrics: what `functional.margin` defines, over all samples."""

from __future__ import annotations

from typing import Any

from torch import Tensor

import lightning_flatness.functional as LF
from lightning_flatness.curvature.quantities import SampleQuantities, given
from lightning_flatness.metrics.flatness import SampleMean, SampleMetric


class MarginStatistics(SampleMetric):
    """Statistics of the signed output margins, see `functional.output_margin` and `functional.distribution`.

    Keeps one number per sample, so that the quantiles are exact; higher margins are better.
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
        return LF.distribution(self._values("margins"))


class SoftmaxMargin(SampleMean):
    """Mean signed softmax margin, see `functional.softmax_margin`; higher is better."""

    requires = ("softmax_margin",)

    higher_is_better = True

    def _quantity(self, quantities: SampleQuantities) -> Tensor:
        return given(quantities.softmax_margin, "softmax_margin")


class MarginBound(SampleMean):
    """Mean bound of `AffineHessianTrace` by the margin, see `functional.margin_bound`; lower is flatter."""

    requires = ("margin_bound",)

    def _quantity(self, quantities: SampleQuantities) -> Tensor:
        return given(quantities.margin_bound, "margin_bound")
