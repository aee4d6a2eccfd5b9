"""Batches that are evaluated together: the closed forms are many small operations, however many samples there are."""

from __future__ import annotations

from contextlib import suppress
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

_LARGEST = 128 * 2**20  # bytes of a group; on a device with less memory it must not crowd out the network
_FEWEST, _MOST = 4, 8  # batches of a group: larger ones gain little together, and more of them little more


Derivatives: TypeAlias = PooledDerivatives | HeadDerivatives


class BatchGroups:
    """Measures recorded passes, and evaluates small batches that share all but their samples as one.

    The values are those of each batch on its own, up to the rounding of their dtype. Nothing of a pass is kept but
    copies, since a network may use its memory again.

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

    def left(self, limit: int | None) -> int | None:
        """Return how many more samples there may be.

        Args:
            limit: how many in all; None: any number.
        """
        return None if limit is None else max(0, limit - self.samples)

    def rest(self) -> list[Quantities]:
        """Return the quantities of the samples that wait."""
        group, self._group = self._group, None
        return [] if group is None else [group.evaluated()]

    def _joined(self, method: Any, derivatives: Derivatives) -> list[Quantities]:
        apart = derivatives.apart() if len(derivatives) else None
        if self._group is not None and apart is not None and self._group.takes(apart, len(derivatives)):
            return []
        done = self.rest()
        capacity = 0 if apart is None else min(_capacity(apart.rows, derivatives), _MOST * len(derivatives))
        if apart is not None and capacity >= _FEWEST * len(derivatives):
            with suppress(torch.OutOfMemoryError):  # there may be enough to evaluate it alone
                self._group = _Group(method, derivatives, apart, capacity)
                return done
        return [*done, method.evaluate(derivatives)]


class _Group:
    """Copies of the rows of several batches, of which the first one says what they share.

    Args:
        method: that evaluates them.
        first: the derivatives of the first batch.
        apart: the same, taken apart.
        capacity: for how many samples there is room.
    """

    def __init__(self, method: Any, first: Derivatives, apart: Apart, capacity: int) -> None:
        self._method, self._shared, self._capacity, self._filled = method, apart.shared, capacity, 0
        self._without_rows = first.select(slice(0))
        with torch.inference_mode(False):
            self._rows = {name: row.new_empty(capacity, *row.shape[1:]) for name, row in apart.rows.items()}
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
        return cast(Quantities, self._method.evaluate(self._without_rows.with_rows(rows)))


def _capacity(rows: Rows, derivatives: Derivatives) -> int:
    """Return for how many samples like these there is memory."""
    device = next(iter(rows.values())).device
    per_sample = sum(row[0].nbytes for row in rows.values())
    return min(chunk_bytes_on(device, derivatives.chunk_bytes), _LARGEST) // per_sample
