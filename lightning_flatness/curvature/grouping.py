"""Batches that are evaluated together: the closed forms are many small operations, however many samples there are."""

from __future__ import annotations

from typing import Any, TypeAlias, cast

import torch

from lightning_flatness.curvature.chunks import chunk_bytes_on
from lightning_flatness.curvature.classifier import ClassifierMethod, HeadDerivatives
from lightning_flatness.curvature.methods import AutoMethod, Quantities
from lightning_flatness.curvature.pooled.derivatives import PooledDerivatives
from lightning_flatness.curvature.pooled.method import PooledMethod
from lightning_flatness.curvature.rows import Apart, Rows
from lightning_flatness.recording.dispatch import not_recorded
from lightning_flatness.recording.recorded_pass import RecordedPass

_SHARE = 4  # of the memory that temporary tensors may take at once, a group takes one part in so many


Derivatives: TypeAlias = PooledDerivatives | HeadDerivatives


class BatchGroups:
    """Measures recorded passes, and evaluates small batches that share all but their samples as one.

    The values are those of each batch on its own, up to rounding. Nothing of a pass is kept but copies, since a network
    may use its memory again.

    Attributes:
        samples: how many have been measured, those that wait for the rest of their group included.
    """

    def __init__(self) -> None:
        """Start with no samples."""
        self._group: _Group | None = None
        self.samples = 0

    def add(self, method: Any, recorded: Any, samples: slice = slice(None)) -> list[Any]:
        """Measure a recorded pass.

        Args:
            method: the method that measures it; the other arguments and the errors are those of its `quantities`.
            recorded: the pass.
            samples: which of its samples to measure.

        Returns:
            What is complete of what the method returns and was not returned before, in the order of the samples.
        """
        if isinstance(method, AutoMethod) and isinstance(recorded, RecordedPass):
            method = method.chosen
        if not isinstance(method, (PooledMethod, ClassifierMethod)):
            quantities = method.quantities(recorded, samples)
            self.samples += len(quantities)
            return [*self.rest(), quantities]
        derivatives = method.derivatives(recorded, samples)
        self.samples += len(derivatives)
        return self._joined(method, derivatives)

    def rest(self) -> list[Quantities]:
        """Return the quantities of the samples that wait."""
        group, self._group = self._group, None
        return [] if group is None else [group.evaluated()]

    def _joined(self, method: Any, derivatives: Derivatives) -> list[Quantities]:
        apart = derivatives.apart()
        if self._group is not None and apart is not None and self._group.takes(apart, len(derivatives)):
            return []
        done = self.rest()
        capacity = 0 if apart is None else _capacity(apart.rows, derivatives)
        if apart is None or capacity < 2 * len(derivatives):
            return [*done, method.evaluate(derivatives)]
        self._group = _Group(method, derivatives, apart, capacity)
        return done


class _Group:
    """Copies of the rows of several batches, of which the first one says what they share.

    Args:
        method: that evaluates them.
        first: the derivatives of the first batch.
        apart: the same, taken apart.
        capacity: for how many samples there is room.
    """

    def __init__(self, method: Any, first: Derivatives, apart: Apart, capacity: int) -> None:
        self._method, self._first, self._capacity, self._filled = method, first, capacity, 0
        with torch.inference_mode(False):
            self._rows = {name: row.new_empty(capacity, *row.shape[1:]) for name, row in apart.rows.items()}
        self._shared = apart.shared
        self.takes(apart, len(first))

    def takes(self, apart: Apart, samples: int) -> bool:
        """Add a batch, if there is room for it and it shares what it must."""
        end = self._filled + samples
        if end > self._capacity or not apart.joins(Apart(self._rows, self._shared)):
            return False
        with not_recorded(), torch.no_grad():
            for name, row in apart.rows.items():
                self._rows[name][self._filled : end] = row
        self._filled = end
        return True

    def evaluated(self) -> Quantities:
        """Return the quantities of all samples."""
        rows = {name: row[: self._filled] for name, row in self._rows.items()}
        return cast(Quantities, self._method.evaluate(self._first.with_rows(rows)))


def _capacity(rows: Rows, derivatives: Derivatives) -> int:
    """Return for how many samples like these there is room."""
    like = next(iter(rows.values()))
    per_sample = sum(row.nbytes for row in rows.values()) // max(1, len(like))
    return chunk_bytes_on(like.device, derivatives.chunk_bytes) // _SHARE // max(1, per_sample)
