"""Everything that one evaluation of a network yields, by the keys under which it is logged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_flatness.curvature.quantities import GAUSS_NEWTON, SampleQuantities
from lightning_flatness.keys import (
    ACEHT,
    CHURN,
    CONFIDENCE,
    LABELLED,
    MARGIN,
    MARGIN_BOUND,
    MARGIN_CORRELATION,
    MARGIN_SHARE,
    RELATIVE,
    RELATIVE_GGN,
    SCALE_FREE,
    SCALE_FREE_MARGIN,
    SOFTMAX_MARGIN,
    TRACE,
    TRACE_GGN,
    keys_of,
)
from lightning_flatness.metrics.correlation import FlatnessMarginCorrelation
from lightning_flatness.metrics.flatness import (
    AffineHessianTrace,
    FlatnessFactors,
    HessianTrace,
    RelativeFlatness,
    SampleMean,
    SampleMetric,
    ScaleFreeFlatness,
    Uncertainty,
)
from lightning_flatness.metrics.margin import MarginBound, MarginShare, MarginStatistics, ScaleFreeMargin, SoftmaxMargin

_LOGGED_CORRELATION = f"{MARGIN_CORRELATION}/margin_bound/correct"


def _metrics(**options: Any) -> dict[str, SampleMetric]:
    """Return new metrics by key; one with several values names them below its own key.

    Args:
        options: of torchmetrics.
    """
    return {
        RELATIVE: RelativeFlatness(curvature="hessian", **options),
        TRACE: HessianTrace(curvature="hessian", **options),
        RELATIVE_GGN: RelativeFlatness(curvature="ggn", **options),
        TRACE_GGN: HessianTrace(curvature="ggn", **options),
        SCALE_FREE: ScaleFreeFlatness(**options),
        CONFIDENCE: Uncertainty(**options),
        "flatness": FlatnessFactors(**options),
        ACEHT: AffineHessianTrace(**options),
        MARGIN_CORRELATION: FlatnessMarginCorrelation(quantities=["margin_bound"], **options),
        MARGIN_SHARE: MarginShare(**options),
        "margin": MarginStatistics(**options),
        SOFTMAX_MARGIN: SoftmaxMargin(**options),
        MARGIN_BOUND: MarginBound(**options),
        SCALE_FREE_MARGIN: ScaleFreeMargin(**options),
    }


class _SampleFlatness(SampleMetric):
    """Keeps the relative flatness of every sample."""

    requires = ("relative_flatness",)

    values: list[Tensor]

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._add_values("values")

    def _add(self, quantities: SampleQuantities) -> None:
        self.values.append(quantities.relative_flatness.double())

    def _value(self) -> Tensor:
        return self._values("values")


class _MeanMargin(SampleMean):
    """Mean margin alone, where nothing else is asked of the margins: it keeps no number per sample."""

    requires = ("output_margin",)


class Evaluation:
    """All quantities over the samples of one data set; exact for any split into batches and processes.

    This is not a `torchmetrics.MetricCollection`. For a metric that returns several values, a collection uses the
    metric's own names (`mean`) and drops the prefix (`margin/mean`).

    Args:
        device: device of the model; the sums are kept on it, and processes exchange them over it.
        method: name of the method that gives the quantities, or "auto"; only the keys that it gives are evaluated.
        is_shared: whether the samples of all processes count together; False: those of this process alone.
        keys: the keys to evaluate; None: all that the method gives, with either label.

    Example:
        >>> evaluation = Evaluation(torch.device("cpu"))
        >>> for quantities in ():  # of every batch
        ...     evaluation.update(quantities)
        >>> evaluation.samples
        0
    """

    def __init__(
        self, device: torch.device, method: str = "pooled", is_shared: bool = True, keys: Sequence[str] | None = None
    ) -> None:
        """Start with no samples."""
        device = torch.device("cpu") if device.type == "mps" else device
        self.samples = 0
        """Number of samples so far, of this process."""
        self.label = ""
        """What of the Hessian was measured, in words; empty: all."""
        asked = keys_of(method) if keys is None else keys
        self._keys = (*asked, *(LABELLED[key] for key in asked if key in LABELLED))
        metrics = _metrics(sync_on_compute=is_shared)
        if [key for key in self._keys if key.startswith("margin/") and key not in metrics and key != CHURN] == [MARGIN]:
            metrics[MARGIN] = _MeanMargin(sync_on_compute=is_shared)
            del metrics["margin"]
        self._metrics = {key: metric.to(device) for key, metric in metrics.items() if self._asks_for(key)}
        self._flatness = _SampleFlatness("hessian", sync_on_compute=is_shared).to(device)
        self.distributions: dict[str, Tensor] = {}
        """The values of all samples of all processes by name, shape (n,), after `compute`."""

    def update(self, quantities: SampleQuantities) -> None:
        """Add the samples of a batch, or of several."""
        if quantities.hessian_trace.device.type == "mps":  # which has no float64
            quantities = quantities.cpu()
        for metric in (*self._metrics.values(), self._flatness):
            metric.update(quantities)
        self.samples += len(quantities)
        if quantities.curvature == "ggn":
            self.label = f": {GAUSS_NEWTON}"

    def compute(self) -> dict[str, Tensor]:
        """Return the value of every key over all samples; if these are shared, every process has to call it.

        `docs/keys.md` says what they mean.
        """
        values: dict[str, Tensor] = {}
        for key, metric in self._metrics.items():
            value = metric.compute()
            if metric.is_absent:
                continue
            values.update(
                {f"{key}/{name}": part for name, part in value.items()} if isinstance(value, dict) else {key: value}
            )
        flatness = self._flatness.compute()
        self.distributions = {} if self._flatness.is_absent else {"relative_flatness": flatness}
        margins = self._metrics.get("margin")
        if isinstance(margins, MarginStatistics) and not margins.is_absent:
            self.distributions["margin"] = margins.all_values
        if _LOGGED_CORRELATION in values:
            values[MARGIN_CORRELATION] = values[_LOGGED_CORRELATION]
        return {key: values[key] for key in self._keys if key in values}

    def _asks_for(self, key: str) -> bool:
        return any(f"{asked}/".startswith(f"{key}/") for asked in self._keys)
