"""What goes wrong while measuring: a warning for each kind of failure, or an exception if the user wants one."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from lightning_flatness.errors import UnsupportedTailError
from lightning_flatness.reporting.console import own_line, say, warn


class Failures:
    """The failures of one monitor, and what it has said about them.

    A failure belongs to one validation loader, or to all of them (None), and to one validation. A network that cannot
    be measured is tried again with the first batch of the next one: then it may be another network that runs.

    Args:
        strict: raise each failure instead of warning.
        name: of the monitor; its messages start with it.

    Attributes:
        failed: the loaders of which something failed in this validation.
        reason: why the last network that was refused was; empty: none was.
        label: what messages call the monitor.
    """

    def __init__(self, strict: bool, name: str = "") -> None:
        self.strict = strict
        self.failed: set[int | None] = set()
        self.reason = ""
        self.label = f"FlatnessMonitor `{name}`" if name else "FlatnessMonitor"
        self._reported: set[str] = set()

    def excludes(self, loader: int) -> bool:
        """Return whether a loader is not measured any more in this validation."""
        return not {None, loader}.isdisjoint(self.failed)

    @contextmanager
    def contained(
        self, close: Callable[[], None] = lambda: None, loader: int | None = None, what: str = "measure"
    ) -> Iterator[None]:
        """Let what fails within end the measurement of one loader in this validation, never the training.

        Args:
            close: called after a failure, before it is reported.
            loader: index of the loader that it belongs to; None: all.
            what: what was not done if it fails, in words.

        Raises:
            Exception: what failed, if `strict`.
        """
        try:
            yield
        except Exception as error:
            self.failed.add(loader)
            close()
            self.report(error, what)

    def report(self, error: Exception, what: str = "measure") -> None:
        """Warn about a failure, once for each first line of a message; raise it if `strict`."""
        if self.strict:
            raise error
        if isinstance(error, UnsupportedTailError):
            self.reason = str(error)
        # The message of this error says how much memory is left, which differs every time.
        kind = type(error).__name__ if isinstance(error, torch.OutOfMemoryError) else str(error).split("\n")[0]
        if kind not in self._reported:
            self._reported.add(kind)
            # On the process where it happened: the first one may know nothing of it.
            with own_line():
                warnings.warn(f"{self.label} did not {what}: {error}", stacklevel=2)

    def info_once(self, message: str) -> None:
        """Log a message on the first process, once."""
        self._once(message, say)

    def warn_once(self, message: str) -> None:
        """Warn on the first process, once."""
        self._once(message, warn)

    def _once(self, message: str, say: Callable[[str], None]) -> None:
        if message not in self._reported:
            self._reported.add(message)
            say(message)
