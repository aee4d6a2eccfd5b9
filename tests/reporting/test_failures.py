"""Failures: contained and reported once, or raised; what the user's process may see of them."""

from __future__ import annotations

import warnings

import pytest
import torch

from lightning_flatness.reporting.failures import Failures


def messages(failures: Failures, *errors: Exception) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for error in errors:
            with failures.contained(lambda: None):
                raise error
    return [str(warning.message) for warning in caught]


def test_each_message_is_one_warning() -> None:
    failures = Failures(strict=False)
    said = messages(failures, ValueError("a"), ValueError("a"), ValueError("b"))
    assert said == ["FlatnessMonitor did not measure: a", "FlatnessMonitor did not measure: b"]
    assert failures.failed == {None}


def test_lack_of_memory_is_one_warning_whatever_is_left() -> None:
    errors = [torch.OutOfMemoryError(f"{size} MiB are free") for size in (1, 2)]
    assert messages(Failures(strict=False), *errors) == ["FlatnessMonitor did not measure: 1 MiB are free"]


def test_a_failure_belongs_to_a_loader_and_to_a_validation() -> None:
    failures = Failures(strict=False)
    with pytest.warns(UserWarning, match="mine"), failures.contained(loader=1):
        raise ValueError("mine")
    assert [failures.excludes(loader) for loader in range(3)] == [False, True, False]
    failures.failed = set()  # the next validation
    assert not failures.excludes(1)
    with pytest.warns(UserWarning, match="of all"), failures.contained():
        raise ValueError("of all")
    assert all(failures.excludes(loader) for loader in range(3))


def test_messages_name_the_monitor_and_what_was_not_done() -> None:
    failures = Failures(strict=False, name="train")
    with pytest.warns(UserWarning, match="^FlatnessMonitor `train` did not measure: a$"), failures.contained():
        raise ValueError("a")
    with pytest.warns(UserWarning, match="did not act: b$"), failures.contained(what="act"):
        raise ValueError("b")
    with pytest.warns(UserWarning, match="^c$") as caught:
        [failures.warn_once("c") for _ in range(3)]
    assert len(caught) == 1


def test_strict_raises_after_closing() -> None:
    failures, closed = Failures(strict=True), []
    with pytest.raises(ValueError, match="mine"), failures.contained(lambda: closed.append(True)):
        raise ValueError("mine")
    assert (closed, bool(failures.failed)) == ([True], True)


def test_an_interrupt_is_no_failure() -> None:
    failures = Failures(strict=False)
    with pytest.raises(KeyboardInterrupt), failures.contained(lambda: None):
        raise KeyboardInterrupt
    assert not failures.failed


def test_information_is_given_once(caplog: pytest.LogCaptureFixture) -> None:
    failures = Failures(strict=False)
    with caplog.at_level("INFO", "lightning.pytorch"):
        for message in ("x", "x", "y"):
            failures.info_once(message)
    assert [record.getMessage() for record in caplog.records if record.getMessage() in "xy"] in (["x", "y"], [])
