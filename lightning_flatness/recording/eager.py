"""Runs compiled modules eagerly while somebody needs their hooks."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch


class EagerStance:
    """Counts who needs eager execution, so that they may come and go in any order; with nobody left, all is as before.

    A compiled graph calls no hook that was added after it was compiled, and one that was there before becomes part of
    the graph and makes it compile again. A module that is forced to run eagerly does neither, and keeps its graphs.
    The compiler's stance belongs to the whole process (`torch.compiler.set_stance`), so the count does, too: several
    threads share it, under a lock.
    """

    def __init__(self) -> None:
        self._users = 0
        self._stance: Any = None
        self._lock = threading.Lock()

    def enter(self) -> None:
        """Force eager execution; without a compiler in this process there is nothing to do."""
        with self._lock:
            self._users += 1
            if self._stance is None and "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance"):
                self._stance = torch.compiler.set_stance("force_eager")

    def leave(self) -> None:
        """Undo one `enter`."""
        with self._lock:
            self._users -= 1
            if self._users == 0 and self._stance is not None:
                self._stance.__exit__(None, None, None)
                self._stance = None

    @contextmanager
    def lifted(self, stance: str) -> Iterator[bool]:
        """Compile within in another stance, if nobody else needs eager execution; yield whether that is so.

        Nobody can begin to need it before the end.

        Args:
            stance: of `torch.compiler.set_stance`.
        """
        with self._lock:
            is_alone = self._users == 1 and self._stance is not None
            with torch.compiler.set_stance(stance) if is_alone else nullcontext():
                yield is_alone


EAGER = EagerStance()
"""The stance of this process."""
