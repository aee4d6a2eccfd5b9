"""Margins of all samples."""

from __future__ import annotations

import pytest
import torch
from metrics.checks import check, derivatives, quantities, split, value_of

from lightning_flatness.functional import distribution
from lightning_flatness.metrics import MarginBound, MarginStatistics, SoftmaxMargin


@pytest.mark.parametrize(
    ("metric", "higher_is_better"), [(MarginStatistics, None), (SoftmaxMargin, True), (MarginBound, False)]
)
def test_behaves_as_a_metric(metric: type, higher_is_better: bool | None) -> None:
    check(metric)
    assert metric.higher_is_better is higher_is_better


def test_values() -> None:
    whole, of_each = derivatives(), quantities()
    parts = split(whole, [1, 4])
    assert value_of(MarginStatistics(), *parts) == distribution(of_each.output_margin)
    torch.testing.assert_close(value_of(SoftmaxMargin(), *parts), of_each.softmax_margin.mean())
    torch.testing.assert_close(value_of(MarginBound(), *parts), of_each.margin_bound.mean())
    assert (of_each.affine_hessian_trace <= of_each.margin_bound).all()
