"""Verdicts and checks of arguments."""

from __future__ import annotations

import pytest

from lightning_flatness.errors import Refusal, UnsupportedTailError, require_counts


def test_a_refusal_becomes_an_exception_with_its_cause() -> None:
    cause = RuntimeError("no derivative")
    error = Refusal("it mixes samples", cause).error()
    assert isinstance(error, UnsupportedTailError)
    assert (str(error), error.__cause__) == ("it mixes samples", cause)


@pytest.mark.parametrize("value", [0, -1, 1.5, "2", None])
def test_counts_are_whole_numbers(value: object) -> None:
    require_counts(samples=1)
    with pytest.raises(ValueError, match=rf"`samples` must be a whole number, at least 1; got {value!r}"):
        require_counts(samples=value)
