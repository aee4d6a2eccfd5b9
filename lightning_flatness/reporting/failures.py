"""What goes wrong while measuring: a warning for each kind of failure, or an exception if the user wants one."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from lightning.pytorch.utilities import rank_zero_info

from lightning_flatness.errors import UnsupportedTailError


class Failures:
    """The failures of one monitor, and what it has said about them.

    Args:
        strict: raise each failure instead of warning.

    Attributes:
        occurred: whether something failed in this validation.
        is_refused: whether the network was found to be one that cannot be measured; nothing is tried again in this run.
    """

    def __init__(self, strict: bool) -> None:
        self.strict = strict
        self.occurred = False
        self.is_refused = False
        self._reported: set[str] = set()

    @contextmanager
    def contained(self, close: Callable[[], None]) -> Iterator[None]:
        """Let what fails within end this validation's measurement, never the training, unless `strict`.

        Args:
            close: called after a failure, before it is reported.
        """
        try:
            yield
        except Exception as error:
            self.occurred = True
            close()
            self.report(error)

    def report(self, error: Exception) -> None:
        """Warn about a failure, once for each message; raise it if `strict`."""
        if self.strict:
            raise error
        self.is_refused = self.is_refused or isinstance(error, UnsupportedTailError)
        # The message of this error says how much memory is left, which differs every time.
        kind = type(error).__name__ if isinstance(error, torch.OutOfMemoryError) else str(error)
        if kind not in self._reported:
            self._reported.add(kind)
            # On the process where it happened: the first one may know nothing of it.
            warnings.warn(f"FlatnessMonitor did not measure: {error}", stacklevel=2)

    def info_once(self, message: str) -> None:
        """Log a message on the first process, once."""
        if message not in self._reported:
            self._reported.add(message)
            rank_zero_info(message)
