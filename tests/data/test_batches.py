"""Reading batches."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_flatness.data.batches import batch_inputs, batch_targets, is_empty, require_batches

SOFT = torch.tensor([[0.2, 0.8], [1.0, 0.0]])
INDICES = torch.tensor([1, 0])


@pytest.mark.parametrize(
    "batch", [(INDICES, SOFT), [INDICES, SOFT, "more"], {"image": INDICES, "label": SOFT, "id": 3}], ids=type
)
def test_batches_are_read(batch: Any) -> None:
    assert batch_inputs(batch) is INDICES
    assert batch_targets(batch) is SOFT


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (INDICES, "got Tensor"),
        ((INDICES,), r"got tuple of length 1.*target=lambda batch"),
        ({"image": INDICES}, r"got a mapping with the keys \['image'\]"),
    ],
    ids=["tensor", "pair of one", "mapping"],
)
def test_other_batches_are_named(batch: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        batch_targets(batch)


NOTHING, SOME = torch.zeros(0, 3), torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("batch", "target", "empty"),
    [
        ((NOTHING, NOTHING[:, 0]), NOTHING[:, 0], True),
        ({"x": NOTHING}, NOTHING[:, 0], True),
        (([[1.0], [2.0]], NOTHING), NOTHING, False),  # inputs in a list
        ((SOME, NOTHING[:, 0]), NOTHING[:, 0], False),  # targets that are missing
        ((NOTHING, SOME), SOME, False),
        ((SOME, SOME[:, 0]), SOME[:, 0], False),
        ((NOTHING, None), None, False),
    ],
)
def test_batches_without_a_sample(batch: Any, target: Any, empty: bool) -> None:
    assert is_empty(batch, target) == empty


X, Y = torch.zeros(2, 3), torch.zeros(2, dtype=torch.long)
NOT_BATCHES: dict[str, tuple[Any, str]] = {
    "a pair": ((X, Y), "one batch alone, of type tuple. Put it into a list"),
    "a list of tensors": ([X, Y], "one batch alone, of type list"),
    "a dictionary": ({"image": X, "label": Y}, "one batch alone, of type dict"),
    "a tensor": (X, "one batch alone, of type Tensor"),
    "a data set": (TensorDataset(X, Y), "a data set of samples, TensorDataset. Wrap it: `DataLoader"),
    "a number": (3, "got int. Pass a `DataLoader` or a list"),
}


@pytest.mark.parametrize(("batches", "message"), NOT_BATCHES.values(), ids=NOT_BATCHES)
def test_what_is_no_iterable_of_batches_is_refused(batches: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^`mine` must be .*{re.escape(message)}"):
        require_batches(batches, "mine")


def test_iterables_of_batches_are_accepted() -> None:
    pair, by_key = (X, Y), {"image": X, "label": Y}
    loader = DataLoader(TensorDataset(X, Y), batch_size=2)
    for batches in (loader, [pair], [by_key], (pair, pair), [], iter([pair]), [[X, Y]], {"a": pair}.values()):
        require_batches(batches, "mine")
