"""What the command lines share."""

from __future__ import annotations

import logging
import warnings

import pytest

from lightning_flatness.terminal import Parser, quiet


def test_only_known_warnings_are_hidden() -> None:
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        with quiet():
            warnings.warn("flatness cannot be measured", stacklevel=1)
            warnings.warn("The 'val_dataloader' does not have many workers", stacklevel=1)
    assert [str(warning.message) for warning in shown] == ["flatness cannot be measured"]


def test_lightning_speaks_again_afterwards() -> None:
    logger = logging.getLogger("lightning.pytorch")
    before = logger.level
    with quiet():
        assert logger.level == logging.WARNING
    assert logger.level == before


def test_errors_take_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        Parser(prog="it").error("must be 1; got 2.")
    assert capsys.readouterr().err == "it: error: must be 1; got 2.\n"
