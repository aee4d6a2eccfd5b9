"""Reading batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_flatness.data.batches import batch_inputs, batch_targets, is_empty

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
