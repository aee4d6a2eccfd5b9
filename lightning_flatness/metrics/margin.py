"""Margin metrics: what `functional.margin` defines, over all samples."""

from __future__ import annotations

from lightning_flatness.metrics.flatness import SampleMean


class OutputMargin(SampleMean):
    """Mean signed output margin, see `functional.output_margin`; higher is better."""

    higher_is_better = True
    quantity = "output_margin"
