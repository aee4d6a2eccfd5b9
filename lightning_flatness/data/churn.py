"""Predictions of one validation, compared with those of the one before."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor


class _Predictions(NamedTuple):
    """The predictions of one loader, in the order of its samples.

    Attributes:
        source: returns what yields the samples; None if the order is not known, or the source is gone.
        parts: the predictions by batch.
    """

    source: Callable[[], Any]
    parts: list[Tensor]


class PredictionChurn:
    """Counts the samples whose prediction has changed since the previous validation, for each loader of this process.

    Only predictions of the same samples in the same order are compared: from a loader that reads in order, that is the
    same object as before, and that yields the same number of samples. A copy starts anew, so that neither a checkpoint
    nor another process gets the predictions.

    Example:
        >>> churn, loader = PredictionChurn(), [...]
        >>> for prediction in (torch.tensor([[0], [1]]), torch.tensor([[0], [2]])):
        ...     churn.start()
        ...     churn.add(0, prediction, source=loader)
        ...     print(churn.changed(0))
        ...     churn.finish([0])
        None
        1
    """

    def __init__(self) -> None:
        """Start without an earlier validation."""
        self._now: dict[int, _Predictions] = {}
        self._last: dict[int, _Predictions] = {}

    def start(self) -> None:
        """Begin a validation."""
        self._now = {}

    def add(self, loader: int, prediction: Tensor | None, source: Any) -> None:
        """Add the predictions of a batch.

        Args:
            loader: index of the loader.
            prediction: as in `SampleQuantities`.
            source: what yields the samples in a fixed order; None if the order may change.
        """
        if prediction is None:
            source, prediction = None, torch.empty(0)
        if loader not in self._now:
            self._now[loader] = _Predictions(weakly_held(source), [])
        self._now[loader].parts.append(prediction)

    def changed(self, loader: int) -> int | None:
        """Return how many predictions have changed; None if they cannot be compared.

        A process that has measured no sample, now as before, has none that changed.
        """
        now, last = self._now.get(loader), self._last.get(loader)
        if now is None or last is None:
            return 0 if now is last else None
        if now.source() is None or now.source() is not last.source():
            return None
        after, before = torch.cat(now.parts), torch.cat(last.parts)
        return int((after != before).any(-1).sum()) if after.shape == before.shape else None

    def finish(self, loaders: Iterable[int]) -> None:
        """End a validation: the next one is compared with it, as far as these loaders have values."""
        self._last = {loader: self._now[loader] for loader in loaders if loader in self._now}

    def __reduce__(self) -> Any:
        """Leave the predictions and the loaders out of a copy."""
        return PredictionChurn, ()


def weakly_held(source: Any) -> Callable[[], Any]:
    """Return a function that returns the source, and does not keep a loader with its workers alive."""
    try:
        return ref(source)
    except TypeError:  # a list
        return lambda: source
