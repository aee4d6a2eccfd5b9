"""Runs compiled modules uncompiled while somebody needs their hooks."""

from __future__ import annotations

import sys
from typing import Any

import torch


class EagerStance:
    """Counts who needs it, so that they may come and go in any order; with nobody left, all is as it was.

    A compiled graph calls no hooks that came after it, and hooks that are there when it is compiled become part of it
    and make it compile again. Forced to run eagerly, it does neither, and keeps what it has compiled.
    """

    def __init__(self) -> None:
        self._users = 0
        self._stance: Any = None

    def enter(self) -> None:
        """Force eager execution; without a compiler in this process there is nothing to do."""
        self._users += 1
        if self._stance is None and "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance"):
            self._stance = torch.compiler.set_stance("force_eager")

    def leave(self) -> None:
        """Need it no more."""
        self._users -= 1
        if self._users == 0 and self._stance is not None:
            self._stance.__exit__(None, None, None)
            self._stance = None


EAGER = EagerStance()
"""The one of this process, as the compiler's stance is."""
