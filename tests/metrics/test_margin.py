"""Margins of all samples."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from cases import Case
from metrics.checks import CASES, check, derivatives, quantities, split, value_of
from torch import Tensor

from lightning_flatness.functional import distribution
from lightning_flatness.losses import BinaryCrossEntropy, CrossEntropy
from lightning_flatness.metrics import (
    HessianTrace,
    MarginBound,
    MarginShare,
    MarginStatistics,
    ScaleFreeMargin,
    SoftmaxMargin,
)


@pytest.mark.parametrize(
    ("metric", "higher_is_better"),
    [
        (MarginStatistics, None),
        (SoftmaxMargin, True),
        (MarginBound, False),
        (ScaleFreeMargin, True),
        (MarginShare, None),
    ],
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


@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
def test_scale_free_margin_does_not_see_the_scale(scale: float) -> None:
    whole = derivatives()
    centred = whole.logits - whole.logits.mean(1, keepdim=True)
    expected = quantities().output_margin.mean() / centred.square().mean().sqrt()
    scaled = replace(whole, logits=whole.logits * scale)
    torch.testing.assert_close(value_of(ScaleFreeMargin(), *split(scaled, [1, 4])), expected, rtol=1e-12, atol=0)
    assert value_of(ScaleFreeMargin(), replace(whole, logits=torch.zeros_like(whole.logits))) == 0


def of_the_margin(case: Case) -> Tensor:
    """The odds times the squared gradient of each sample's loss in the filters, by autograd."""
    model, (x, y) = case.model().eval(), case.data()
    weight = model.get_submodule(case.layer).weight
    values = []
    for x_n, y_n in zip(x, y, strict=True):
        loss = F.cross_entropy(model(x_n[None]), y_n[None])
        (gradient,) = torch.autograd.grad(loss, weight)
        values.append(gradient.square().sum() / loss.detach().expm1())  # the odds are 1 / (e^loss - 1)
    return torch.stack(values)


SOME = (
    "relu, silu, dense block, groups, channel shuffle, conv is classifier, layer norm and gelu, cosine classifier, "
    "average and max, average and cells silu, layer norm on two poolings"
)


@pytest.mark.parametrize("name", SOME.split(", "))
def test_margin_share_is_that_of_the_odds_times_the_squared_gradient(name: str) -> None:
    whole, of_each = derivatives(name), quantities(name)
    part = of_the_margin(CASES[name])
    torch.testing.assert_close(of_each.margin_trace, part, rtol=1e-9, atol=1e-14)
    assert (of_each.margin_trace <= of_each.gauss_newton_trace * (1 + 1e-12)).all()
    share = value_of(MarginShare(), *split(whole, [2, 3]))
    torch.testing.assert_close(share, part.sum() / of_each.gauss_newton_trace.sum(), rtol=1e-9, atol=0)
    if name == "relu":  # the Gauss-Newton part is all
        torch.testing.assert_close(share * value_of(HessianTrace(), whole), part.mean(), rtol=1e-9, atol=0)


def test_margin_share_needs_labels_of_one_class() -> None:
    whole = derivatives()
    expected = value_of(MarginShare(), whole)
    indices, weights = whole.target.argmax(1), torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)
    for target in (indices, F.one_hot(indices, 3).double()):
        assert value_of(MarginShare(), replace(whole, target=target)) == pytest.approx(float(expected), rel=1e-12)
    one = whole.select(slice(1))
    weighted = replace(one, loss=CrossEntropy(weights))  # the weight of a sample is that of both parts
    assert value_of(MarginShare(), weighted) == pytest.approx(float(value_of(MarginShare(), one)), rel=1e-12)
    soft = torch.full_like(whole.logits, 1 / 3)
    unknown = (
        replace(whole, target=soft),
        replace(whole, loss=CrossEntropy(label_smoothing=0.1)),
        replace(whole, loss=BinaryCrossEntropy(), target=soft),
    )
    for derivative in unknown:
        metric = MarginShare()
        value_of(metric, derivative)
        assert metric.is_absent
    nothing = replace(whole, logits=torch.zeros_like(whole.logits), head=torch.zeros_like(whole.head))
    assert value_of(MarginShare(), nothing) == 0
