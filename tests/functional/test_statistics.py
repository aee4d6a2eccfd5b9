"""Statistics of margins against SciPy and torch."""

from __future__ import annotations

import math

import pytest
import scipy.stats
import torch

from lightning_flatness.functional import distribution, pearson

VALUES = {
    "normal": torch.randn(1000, dtype=torch.float64),
    "two": torch.tensor([3.0, -1.0]),
    "one": torch.tensor([0.7]),
    "equal": torch.full((7,), 0.1),
    "infinite": torch.tensor([torch.inf, 1.0, 2.0, torch.inf]),
}


@pytest.mark.parametrize("name", VALUES)
def test_distribution(name: str) -> None:
    values = VALUES[name]
    found = {key: value.item() for key, value in distribution(values).items()}
    assert found["min"] == values.min().item()
    assert found["negative"] == pytest.approx((values < 0).double().mean().item())
    for key in ("q01", "q05", "q25", "q50", "q75", "q95", "q99"):
        expected = torch.quantile(values[values.isfinite()], int(key[1:]) / 100).item()
        assert name == "infinite" or found[key] == pytest.approx(expected, rel=1e-6)
    if name == "infinite":
        assert (found["mean"], found["q99"]) == (math.inf, math.inf)
        return
    assert found["mean"] == pytest.approx(values.mean().item())
    assert found["std"] == pytest.approx(0 if len(set(values.tolist())) == 1 else values.std(correction=0).item())
    skewness = scipy.stats.skew(values.numpy()) if found["std"] else 0
    assert found["skewness"] == pytest.approx(skewness)


def test_no_values() -> None:
    assert all(value.isnan() for value in distribution(torch.zeros(0)).values())
    assert list(distribution(torch.zeros(0))) == list(distribution(torch.zeros(1)))


@pytest.mark.parametrize("scale", [1.0, 1e-300, 1e300])
def test_pearson(scale: float) -> None:
    x = torch.randn(50, dtype=torch.float64)
    y = x + torch.randn(50, dtype=torch.float64)
    expected = scipy.stats.pearsonr(x.numpy(), y.numpy()).statistic
    assert pearson(x, scale * y).item() == pytest.approx(expected, rel=1e-9)
    for few in (x[:0], x[:1], torch.full((50,), 0.1, dtype=torch.float64)):
        assert pearson(few, y[: len(few)]) == 0
        assert pearson(y[: len(few)], few) == 0
