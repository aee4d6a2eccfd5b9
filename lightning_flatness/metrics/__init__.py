"""Torchmetrics that add up per-sample values over batches and processes."""

from lightning_flatness.metrics.correlation import FlatnessMarginCorrelation
from lightning_flatness.metrics.flatness import (
    AffineHessianTrace,
    FlatnessFactors,
    HessianTrace,
    RelativeFlatness,
    ScaleFreeFlatness,
    Uncertainty,
)
from lightning_flatness.metrics.margin import MarginBound, MarginShare, MarginStatistics, ScaleFreeMargin, SoftmaxMargin

__all__ = [
    "AffineHessianTrace",
    "FlatnessFactors",
    "FlatnessMarginCorrelation",
    "HessianTrace",
    "MarginBound",
    "MarginShare",
    "MarginStatistics",
    "RelativeFlatness",
    "ScaleFreeFlatness",
    "ScaleFreeMargin",
    "SoftmaxMargin",
    "Uncertainty",
]
