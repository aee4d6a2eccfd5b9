"""What the command lines share: errors in one line, and silence about what does not matter."""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

# Warnings of Lightning and torch that do not matter for a short run; all others are shown.
_NOISE = (
    ".*does not have many workers.*",
    ".*isinstance\\(treespec, LeafSpec\\).*",
    ".*logs directory .* exists and is not empty.*",
    ".*LightningCLI's args parameter.*",
)


class Parser(argparse.ArgumentParser):
    """Reports errors in one line, with exit status 2."""

    def error(self, message: str) -> NoReturn:
        """Leave the process."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def whole_number(text: str, least: int) -> int:
    """Return a whole number of at most 32 bits, the range of a seed."""
    most = 2**32 - 1
    if not text.isdecimal() or not least <= int(text) <= most:
        raise argparse.ArgumentTypeError(f"must be a whole number from {least} to {most}; got {text!r}")
    return int(text)


@contextmanager
def quiet() -> Iterator[None]:
    """Hide the tips of Lightning and the warnings in `_NOISE`, and nothing else."""
    lightning = logging.getLogger("lightning.pytorch")
    level = lightning.level
    lightning.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            for message in _NOISE:
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        lightning.setLevel(level)
