"""Torchmetrics that add up per-sample values over batches and processes."""

from lightning_flatness.metrics.flatness import Confidence, HessianTrace, RelativeFlatness
from lightning_flatness.metrics.margin import OutputMargin

__all__ = ["Confidence", "HessianTrace", "OutputMargin", "RelativeFlatness"]
