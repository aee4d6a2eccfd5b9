"""Everything that one evaluation of a network yields, by the keys under which users watch it."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_flatness.curvature.pooled.derivatives import TailFactors
from lightning_flatness.metrics import (
    AffineHessianTrace,
    FlatnessFactors,
    FlatnessMarginCorrelation,
    HessianTrace,
    MarginBound,
    MarginStatistics,
    RelativeFlatness,
    ScaleFreeFlatness,
    SoftmaxMargin,
)

KEYS = tuple(
    [f"flatness/{name}" for name in ("relative", "trace", "scale_free", "confidence", "head", "kernel", "features")]
    + [f"flatness/{name}" for name in ("alignment", "aceht", "margin_correlation")]
    + [f"margin/{name}" for name in ("mean", "std", "skewness", "min", "negative", "softmax_mean", "bound")]
    + [f"margin/q{percent:02}" for percent in (1, 5, 25, 50, 75, 95, 99)]
)
"""Every key of `Evaluation.compute`."""


class Evaluation:
    """All quantities over the samples of one data set; exact for any split into batches and processes.

    Args:
        device: where the sums are kept: that of the model, over which processes exchange them.

    Example:
        >>> evaluation = Evaluation(torch.device("cpu"))
        >>> for factors in ():  # of every batch
        ...     evaluation.update(factors)
        >>> evaluation.samples
        0
    """

    def __init__(self, device: torch.device) -> None:
        """Start with no samples."""
        device = torch.device("cpu") if device.type == "mps" else device
        # A metric with several values names them below its own key.
        metrics: dict[str, Metric] = {
            "flatness/relative": RelativeFlatness(),
            "flatness/trace": HessianTrace(),
            "flatness/scale_free": ScaleFreeFlatness(),
            "flatness": FlatnessFactors(),
            "flatness/aceht": AffineHessianTrace(),
            "margin": MarginStatistics(),
            "margin/softmax_mean": SoftmaxMargin(),
            "margin/bound": MarginBound(),
        }
        self.samples = 0
        """Number of samples so far, of this process."""
        self._metrics = {key: metric.to(device) for key, metric in metrics.items()}
        self._correlation = FlatnessMarginCorrelation().to(device)

    def update(self, factors: TailFactors) -> None:
        """Add the samples of one batch."""
        if factors.logits.device.type == "mps":  # which has no float64
            factors = factors.cpu()
        for metric in (*self._metrics.values(), self._correlation):
            metric.update(factors)
        self.samples += len(factors)

    def compute(self) -> dict[str, Tensor]:
        """Return the value of every key over all samples of all processes; every process has to call it.

        `docs/keys.md` says what they mean.
        """
        values: dict[str, Tensor] = {}
        for key, metric in self._metrics.items():
            value = metric.compute()
            parts = {f"{key}/{name}": part for name, part in value.items()} if isinstance(value, dict) else {key: value}
            values.update(parts)
        values["flatness/margin_correlation"] = self._correlation.compute()["margin_bound/correct"]
        return values
