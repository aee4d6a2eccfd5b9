"""What derivatives hold for each sample, apart from what all samples share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple, TypeAlias

from torch import Tensor

from lightning_flatness.losses import BinaryCrossEntropy, CrossEntropy, Form

Rows: TypeAlias = dict[str, Tensor]
"""Tensors with a row for each sample, by name."""

_WEIGHT = "weight of the loss"


class Apart(NamedTuple):
    """Derivatives taken apart.

    Attributes:
        rows: of the samples.
        shared: what has to be equal for samples of several batches to be joined; tensors are the same object.
    """

    rows: Rows
    shared: Sequence[object]

    def joins(self, other: Apart) -> bool:
        """Return whether the samples of the other can be joined with these."""
        kinds = [{name: (row.shape[1:], row.dtype) for name, row in rows.items()} for rows in (self.rows, other.rows)]
        return (
            kinds[0] == kinds[1]
            and len(self.shared) == len(other.shared)
            and all(map(_equal, self.shared, other.shared))
        )


def _equal(first: object, second: object) -> bool:
    """Return whether two things are equal; a device would have to compare tensors, so these have to be the same."""
    return first is second or (not isinstance(first, Tensor) and first == second)


def of_loss(loss: Form) -> Apart | None:
    """Take a form of the loss apart; None if it can be that of its own samples alone."""
    if isinstance(loss, CrossEntropy) and loss.weight is None:
        return Apart({}, (CrossEntropy, loss.label_smoothing))
    if isinstance(loss, BinaryCrossEntropy) and loss.pos_weight is None and loss.weight is not None:
        return Apart({_WEIGHT: loss.weight}, (BinaryCrossEntropy,)) if loss.weight.dim() == 2 else None
    return None


def loss_with(loss: Form, rows: Rows) -> Form:
    """Return the form for the rows of other samples."""
    return replace(loss, weight=rows[_WEIGHT]) if isinstance(loss, BinaryCrossEntropy) else loss
