"""What every metric must do; each test file applies it to its own."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

import matplotlib as mpl
import pytest
import torch
from cases import SUPPORTED
from recorded import Measured
from torchmetrics import Metric

from lightning_flatness import SampleQuantities
from lightning_flatness.curvature.pooled.closed_form import sample_quantities
from lightning_flatness.curvature.pooled.derivatives import PooledDerivatives

CASES = {case.name: case for case in SUPPORTED}
SPLITS = {"whole": [5], "uneven": [1, 3, 1], "single": [1] * 5, "with an empty one": [2, 0, 3]}


@cache
def derivatives(name: str = "relu") -> PooledDerivatives:
    """Derivatives of the five samples of a case, some of them wrongly classified."""
    model, (x, y) = CASES[name].model().eval(), CASES[name].data()
    with torch.no_grad(), Measured(model) as recorder:
        model(x)
        return recorder.derivatives(y)


def quantities(name: str = "relu") -> SampleQuantities:
    return sample_quantities(derivatives(name))


def split(whole: PooledDerivatives, sizes: list[int]) -> list[PooledDerivatives]:
    bounds = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    return [whole.select(slice(start, stop)) for start, stop in pairwise(bounds)]


def value_of(metric: Metric, *batches: PooledDerivatives) -> Any:
    for batch in batches:
        metric.update(sample_quantities(batch))
    return metric.compute()


def assert_equal(value: Any, expected: Any, rtol: float = 1e-12) -> None:
    torch.testing.assert_close(value, expected, rtol=rtol, atol=1e-14)


def check(new: Callable[[], Metric]) -> None:
    """Forward, reset, clone, pickle, empty state, dtype, any split, plot; what the class says of itself."""
    whole = derivatives()
    first, second = split(whole, [3, 2])
    expected = value_of(new(), whole)
    metric = new()
    assert_equal(metric(sample_quantities(first)), value_of(new(), first))
    assert_equal(metric(sample_quantities(second)), value_of(new(), second))
    assert_equal(metric.compute(), expected)
    for other in (metric.clone(), copy.deepcopy(metric), pickle.loads(pickle.dumps(metric))):
        assert_equal(other.compute(), expected)
    assert metric.state_dict() == {}
    metric.reset()
    assert_equal(value_of(metric, whole), expected)
    for sizes in SPLITS.values():
        assert_equal(value_of(new(), *split(whole, sizes)), expected)
    for cast in (Metric.half, Metric.float, Metric.double):  # the sums stay as precise as they were
        assert_equal(value_of(cast(new()), whole), expected)
    assert_equal(value_of(new(), whole.to(torch.float32)), expected, rtol=1e-4)
    with mpl.rc_context({"backend": "agg"}):
        figure, axes = metric.plot()
    assert figure is not None
    assert axes is not None
    assert metric.is_differentiable is False
    assert not any(value.requires_grad for value in (expected.values() if isinstance(expected, dict) else [expected]))
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        new().compute()
