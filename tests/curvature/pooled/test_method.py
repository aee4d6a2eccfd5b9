"""The method: one certificate for many passes, a refusal raised once, precision that the network did not have."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from cases import SUPPORTED, UNSUPPORTED, Case
from recorded import recorded

from lightning_flatness import PooledMethod, RecordedPass, UnsupportedTailError, oracle
from lightning_flatness.curvature.pooled.certificate import certify

CASES = {case.name: case for case in (*SUPPORTED, *UNSUPPORTED)}


def one_pass(case: Case) -> RecordedPass:
    model, (x, y) = case.model().eval(), case.data()
    return recorded(model, x, y)


@pytest.mark.parametrize("name", ["relu", "silu", "dense block"])
def test_a_pass_is_a_value_that_can_be_measured_again(name: str) -> None:
    case, method = CASES[name], PooledMethod()
    record = one_pass(case)
    first, second = method.quantities(record), PooledMethod().quantities(record)
    assert torch.equal(first.hessian_trace, second.hessian_trace)
    expected = oracle.hessian_trace(case.model(), case.layer, *case.data())
    torch.testing.assert_close(first.hessian_trace, expected, rtol=1e-9, atol=1e-12)
    part = method.quantities(record, slice(2))
    torch.testing.assert_close(part.hessian_trace, first.hessian_trace[:2], rtol=1e-12, atol=0)


def test_equal_tails_share_a_certificate() -> None:
    method, record = PooledMethod(), one_pass(CASES["relu"])
    other = one_pass(CASES["silu"])
    with mock.patch("lightning_flatness.curvature.pooled.method.certify", wraps=certify) as spy:
        for each, count in ((record, 1), (record, 1), (other, 2), (record, 3)):
            method.quantities(each)
            assert spy.call_count == count


def test_what_depends_on_the_values_is_certified_in_every_pass() -> None:
    method, record = PooledMethod(), one_pass(CASES["top-k pool"])
    with mock.patch("lightning_flatness.curvature.pooled.method.certify", wraps=certify) as spy:
        for count in (2, 3):
            method.quantities(record)
            assert spy.call_count == count


@pytest.mark.parametrize("name", ["layer norm before pooling", "shared weight"])
def test_a_refusal_is_raised_with_its_path(name: str) -> None:
    record = one_pass(CASES[name])
    with pytest.raises(UnsupportedTailError, match=f"{CASES[name].reason}.*\n  path: conv > "):
        PooledMethod().quantities(record)


def test_wrong_arguments_are_refused_at_once() -> None:
    with pytest.raises(ValueError, match="`chunk_bytes` must be a whole number, at least 1; got 0"):
        PooledMethod(chunk_bytes=0)


def test_logits_in_half_precision_are_computed_anew() -> None:
    case = CASES["relu"]
    model, (x, y) = case.model().bfloat16().eval(), case.data()
    derivatives = PooledMethod().derivatives(recorded(model, x.bfloat16(), y))
    assert derivatives.logits.dtype == derivatives.head.dtype == derivatives.inputs.dtype == torch.float32
    exact = derivatives.features @ derivatives.head.mT + model.head.bias.float()
    torch.testing.assert_close(derivatives.logits, exact)
