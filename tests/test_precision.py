"""Half precision is upcast, products are exact whatever the user set, results are compared up to rounding."""

from __future__ import annotations

import pytest
import torch

from lightning_flatness.precision import (
    allclose_at_scale,
    allclose_for_dtype,
    full_precision,
    is_low_precision,
    upcast,
)


@pytest.mark.parametrize(
    ("dtype", "low", "after"),
    [
        (torch.float16, True, torch.float32),
        (torch.bfloat16, True, torch.float32),
        (torch.float32, False, torch.float32),
        (torch.float64, False, torch.float64),
        (torch.int64, False, torch.int64),
        (torch.bool, False, torch.bool),
    ],
)
def test_half_precision_is_raised_and_nothing_else(dtype: torch.dtype, low: bool, after: torch.dtype) -> None:
    tensor = torch.ones(3, dtype=dtype)
    assert is_low_precision(tensor) == low
    assert upcast(tensor).dtype == after
    assert (upcast(tensor) is tensor) != low


@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.float64, 1e-9), (torch.float32, 1e-3), (torch.bfloat16, 0.05), (torch.float16, 0.05)]
)
def test_results_agree_up_to_the_rounding_of_their_dtype(dtype: torch.dtype, error: float) -> None:
    observed = torch.tensor([1.0, -8.0, torch.inf], dtype=dtype)
    computed = observed.double().where(observed.isfinite(), 0.0)
    for factor, agrees in ((0.5, True), (2.0, False)):
        off = computed + torch.tensor([8 * error * factor, 0, 0])  # relative to the largest finite number
        assert allclose_for_dtype(off.to(torch.promote_types(dtype, torch.float32)), observed) == agrees
    assert allclose_for_dtype(observed, torch.full_like(observed, torch.nan))


def test_columns_are_compared_on_their_own() -> None:
    """A change of a half in one is seen beside another that is 1e5 times as large."""
    observed = torch.tensor([[1e5, 1.0], [2e5, -1.0]])
    assert allclose_for_dtype(observed * torch.tensor([1.0, 1.0001]), observed)
    assert not allclose_for_dtype(observed * torch.tensor([1.0, 1.5]), observed)
    assert allclose_for_dtype(observed[:0], observed[:0])


def test_rounding_is_that_of_the_largest_number_seen() -> None:
    expected = torch.tensor([1e-9, 1.0])
    computed = expected + torch.tensor([1e-5, 0.0])
    assert allclose_at_scale(computed, expected, torch.tensor(0.0))
    assert not allclose_at_scale(computed[:1], expected[:1], torch.tensor(0.0))
    assert allclose_at_scale(computed[:1], expected[:1], torch.tensor(1.0))


BACKENDS = (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None))


@pytest.mark.skipif(not all(hasattr(part, "fp32_precision") for part in BACKENDS), reason="this torch has one switch")
@pytest.mark.parametrize("precisions", [("tf32", "none"), ("none", "bf16"), ("tf32", "bf16"), ("none", "none")])
def test_full_precision_whatever_the_user_set(precisions: tuple[str, str]) -> None:
    before = [part.fp32_precision for part in BACKENDS]
    try:
        for part, precision in zip(BACKENDS, precisions, strict=True):
            part.fp32_precision = precision
        with full_precision(torch.device("cpu")):
            assert [part.fp32_precision for part in BACKENDS] == ["ieee", "ieee"]
        assert tuple(part.fp32_precision for part in BACKENDS) == precisions
        with pytest.raises(ZeroDivisionError), full_precision(torch.device("cpu")):
            _ = 1 / 0
        assert tuple(part.fp32_precision for part in BACKENDS) == precisions
    finally:
        for part, precision in zip(BACKENDS, before, strict=True):
            part.fp32_precision = precision
