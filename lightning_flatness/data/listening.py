"""Hears what a module logs."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor


class LoggedValues:
    """The tensors that a module's step gives to its logging.

    Args:
        module: the module.
    """

    def __init__(self, module: LightningModule) -> None:
        self._module = module
        self._before: Any = None  # a `log` of the module's own
        self._listening: Any = None
        self.values: list[tuple[str, Tensor]] = []

    def start(self) -> None:
        """Listen from now on: the module's own `log` is called all the same."""
        self.stop()
        self.values = []
        self._before = self._module.__dict__.get("log")
        log = self._module.log

        def listening(name: str, value: Any, *args: Any, **kwargs: Any) -> None:
            if isinstance(value, Tensor):
                self.values.append((name, value))
            log(name, value, *args, **kwargs)

        self._module.__dict__["log"] = self._listening = listening

    def stop(self) -> None:
        """Listen no more."""
        if self._listening is not None:
            if self._before is None:
                self._module.__dict__.pop("log", None)
            else:
                self._module.__dict__["log"] = self._before
            self._listening = None
