"""Means of flatness, its factors, and what scaling the logits does to them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from metrics.checks import CASES, check, derivatives, quantities, split, value_of

from lightning_flatness.curvature.pooled.closed_form import sample_quantities
from lightning_flatness.losses import as_loss
from lightning_flatness.metrics import (
    AffineHessianTrace,
    FlatnessFactors,
    HessianTrace,
    RelativeFlatness,
    ScaleFreeFlatness,
)
from lightning_flatness.metrics.flatness import SampleMean

MEANS = {
    AffineHessianTrace: "affine_hessian_trace",
    HessianTrace: "hessian_trace",
    RelativeFlatness: "relative_flatness",
}


@pytest.mark.parametrize("metric", [*MEANS, FlatnessFactors, ScaleFreeFlatness])
def test_behaves_as_a_metric(metric: type) -> None:
    check(metric)
    assert metric.higher_is_better is (None if metric is FlatnessFactors else False)


@pytest.mark.parametrize("metric", MEANS)
def test_is_the_mean_over_samples(metric: type[SampleMean]) -> None:
    whole = derivatives("silu")
    expected = getattr(quantities("silu"), MEANS[metric]).mean()
    torch.testing.assert_close(value_of(metric(), *split(whole, [4, 1])), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["relu", "silu", "dense block", "groups", "conv is classifier", "average and max"])
def test_factors_multiply_to_relative_flatness(name: str) -> None:
    whole = derivatives(name)
    parts = value_of(FlatnessFactors(), *split(whole, [2, 3]))
    assert math.prod(parts.values()) == pytest.approx(value_of(RelativeFlatness(), whole).item(), rel=1e-12)
    assert parts["head"] == pytest.approx(whole.head[:, whole.feature_index].square().sum().item())
    weight = CASES[name].model().get_submodule(CASES[name].layer).weight
    assert parts["kernel"] == pytest.approx(weight.square().sum().item())


@pytest.mark.parametrize("name", ["relu", "silu"])
@pytest.mark.parametrize("loss", ["cross_entropy", "bce_with_logits"])
def test_scale_free_flatness_equals_two_passes(name: str, loss: str) -> None:
    """With the temperature of the whole set known beforehand: divide logits and classifier by it, measure again."""
    whole = derivatives(name)
    labels = whole.target if loss == "cross_entropy" else torch.rand(whole.logits.shape, dtype=torch.float64)
    whole = replace(whole, loss=as_loss(loss), target=labels)
    centred = whole.logits - (whole.logits.mean(1, keepdim=True) if loss == "cross_entropy" else 0)
    tau = centred.square().mean().sqrt()
    scaled = replace(whole, logits=whole.logits / tau, head=whole.head / tau)
    value = value_of(ScaleFreeFlatness(), *split(whole, [1, 4]))
    torch.testing.assert_close(value, sample_quantities(scaled).relative_flatness.mean(), rtol=1e-8, atol=0)


@pytest.mark.parametrize("scale", [1e-3, 0.1, 10.0, 100.0])
@pytest.mark.parametrize("name", ["relu", "silu"])
def test_scale_free_flatness_does_not_see_the_scale(name: str, scale: float) -> None:
    whole = derivatives(name)
    scaled = replace(whole, logits=whole.logits * scale, head=whole.head * scale)
    expected = value_of(ScaleFreeFlatness(), whole)
    torch.testing.assert_close(value_of(ScaleFreeFlatness(), scaled), expected, rtol=1e-7, atol=0)


def test_a_classifier_of_zeros_is_flat() -> None:
    whole = derivatives()
    nothing = replace(whole, logits=torch.zeros_like(whole.logits), head=torch.zeros_like(whole.head))
    assert value_of(ScaleFreeFlatness(), nothing) == 0
    assert value_of(FlatnessFactors(), nothing)["alignment"] == 0
