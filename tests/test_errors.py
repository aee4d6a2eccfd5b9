"""Verdicts, checks of arguments, and packages that are missing."""

from __future__ import annotations

import re
from importlib.metadata import requires

import pytest

from lightning_flatness.errors import (
    Refusal,
    UnsupportedTailError,
    missing_package,
    require_counts,
    require_optional_counts,
)


def test_a_refusal_becomes_an_exception_with_its_cause() -> None:
    cause = RuntimeError("no derivative")
    error = Refusal("it mixes samples", cause).error()
    assert isinstance(error, UnsupportedTailError)
    assert (str(error), error.__cause__) == ("it mixes samples", cause)


@pytest.mark.parametrize("value", [0, -1, 1.5, "2", True, None])
def test_counts_are_whole_numbers(value: object) -> None:
    require_counts(samples=1)
    with pytest.raises(ValueError, match=rf"`samples` must be a whole number, at least 1; got {value!r}"):
        require_counts(samples=value)


def test_optional_counts_may_be_none() -> None:
    require_optional_counts(samples=None, bytes=1)
    with pytest.raises(ValueError, match=r"must be .*; got False\. Pass such a number, or leave `samples` out"):
        require_optional_counts(samples=False)


@pytest.mark.parametrize("module", ["matplotlib", "scipy", "sklearn", "tensorboard", "wandb"])
def test_a_missing_package_is_installed_by_itself_or_by_its_extra(module: str) -> None:
    error = missing_package("A figure", module)
    extra = re.search(r"pip install '\.\[(\w+)\]'", str(error))[1]
    package = re.search(r"pip install ([\w-]+)`", str(error))[1]
    assert str(error).startswith(f"A figure needs {package}, which must be installed; got no module `{module}`.")
    declared = [line for line in requires("lightning-flatness") if re.search(f"extra == .{extra}.", line)]
    assert any(re.match(rf"{package}\W", line) for line in declared)
    assert error.name == module
