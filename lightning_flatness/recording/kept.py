"""Recorders of compiled networks, which go on from one validation to the next: they have compiled something."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lightning_flatness.recording.both import BothRecorder
from lightning_flatness.recording.recorder import ForwardRecorder


class KeptRecorders:
    """Keeps the recorder of each loader, if it is one of a compiled network and knows which layer it records from."""

    def __init__(self) -> None:
        """Start with none."""
        self._known: dict[int, ForwardRecorder] = {}

    def continued(self, loader: int, recorder: Any) -> Any:
        """Return the recorder that is kept for a loader if it is like a new one, of the same modules; else the new one.

        Args:
            loader: index of the loader.
            recorder: the new one.
        """
        known = self._known.get(loader)
        return known if known is not None and known.resembles(recorder) else recorder

    def keep(self, loader: int, recorder: Any) -> str | None:
        """Keep a recorder that has recorded.

        Args:
            loader: index of the loader.
            recorder: its recorder.

        Returns:
            Why the network ran eagerly though it is compiled; None: there is nothing to say.
        """
        parts: list[ForwardRecorder] = recorder.parts if isinstance(recorder, BothRecorder) else [recorder]
        if len(parts) > 1 or not (parts[0].is_settled and parts[0].is_compiled):
            return None
        self._known[loader] = parts[0]
        return None if parts[0].split is None else parts[0].split.problem

    def forget(self, loaders: Iterable[int]) -> None:
        """Keep the recorders of these loaders no longer, as something failed."""
        for loader in loaders:
            self._known.pop(loader, None)
