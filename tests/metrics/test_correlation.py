"""Pearson's r between each sample's flatness and cheaper quantities."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from metrics.checks import check, derivatives, quantities, value_of
from sklearn.neighbors import LocalOutlierFactor

from lightning_flatness.functional import pearson
from lightning_flatness.metrics import FlatnessMarginCorrelation

QUANTITIES = {"aceht": "affine_hessian_trace", "margin_bound": "margin_bound", "output_margin": "output_margin"}


def test_behaves_as_a_metric() -> None:
    check(FlatnessMarginCorrelation)
    assert FlatnessMarginCorrelation.higher_is_better is None


@pytest.mark.parametrize("remove_outliers", [False, True])
def test_values(remove_outliers: bool) -> None:
    whole, of_each = derivatives("relu6"), quantities("relu6")
    wrong = of_each.output_margin < 0
    assert 0 < wrong.sum() < len(whole)
    values = value_of(FlatnessMarginCorrelation(remove_outliers), whole)
    assert len(values) == 9
    for name, quantity in QUANTITIES.items():
        for group, chosen in {"all": wrong | True, "correct": ~wrong, "wrong": wrong}.items():
            pairs = torch.stack([of_each.hessian_trace[chosen], getattr(of_each, quantity)[chosen]], 1)
            if remove_outliers and len(pairs) > 2:
                inside = LocalOutlierFactor(min(20, len(pairs) - 1)).fit_predict(pairs.numpy())
                pairs = pairs[torch.as_tensor(inside > 0)]
            assert values[f"{name}/{group}"] == pytest.approx(pearson(*pairs.unbind(1)).item())


@pytest.mark.parametrize("correct", [True, False])
def test_empty_groups_and_single_samples_have_no_correlation(correct: bool) -> None:
    whole = derivatives()
    order = whole.logits.argsort(1)
    whole = replace(whole, target=order[:, -1 if correct else 0])
    values = value_of(FlatnessMarginCorrelation(), whole)
    empty, full = ("wrong", "correct") if correct else ("correct", "wrong")
    for name in QUANTITIES:
        assert values[f"{name}/{empty}"] == 0
        assert values[f"{name}/{full}"] == values[f"{name}/all"] != 0
    single = value_of(FlatnessMarginCorrelation(), whole.select(slice(1)))
    assert all(value == 0 for value in single.values())


def test_outliers_need_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.neighbors", None)
    FlatnessMarginCorrelation()
    with pytest.raises(ModuleNotFoundError, match=r"pip install .*\[examples\]"):
        FlatnessMarginCorrelation(remove_outliers=True)
