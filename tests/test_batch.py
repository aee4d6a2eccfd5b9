"""Reading batches and checking targets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_flatness.batch import batch_inputs, batch_targets, checked_targets, is_empty
from lightning_flatness.functional import as_loss

SOFT = torch.tensor([[0.2, 0.8], [1.0, 0.0]])
INDICES = torch.tensor([1, 0])
# Loss, targets, number of logits, what comes out.
GOOD: dict[str, tuple[Any, Any, int, Any]] = {
    "indices": ("cross_entropy", INDICES, 2, INDICES),
    "small integers": ("cross_entropy", INDICES.to(torch.uint8), 2, INDICES),
    "probabilities": ("cross_entropy", SOFT, 2, SOFT),
    "class weights": (nn.CrossEntropyLoss(torch.ones(2)), INDICES, 2, INDICES),
    "labels": ("bce_with_logits", SOFT.round().long(), 2, SOFT.round()),
    "truth values": ("bce_with_logits", SOFT > 0.5, 2, SOFT.round()),
    "soft labels": ("bce_with_logits", SOFT, 2, SOFT),
    "one logit": ("bce_with_logits", INDICES, 1, INDICES.float()[:, None]),
    "one pos_weight for all": (nn.BCEWithLogitsLoss(pos_weight=torch.tensor(3.0)), SOFT, 2, SOFT),
    "no sample": ("cross_entropy", INDICES[:0], 2, INDICES[:0]),
}
BAD: dict[str, tuple[Any, Any, int, str]] = {
    "no tensor": ("cross_entropy", [1, 0], 2, "must be a dense tensor; got list"),
    "truth values": ("cross_entropy", SOFT[:, 0] > 0.5, 2, r"class indices of shape \(2,\) or .*; got torch.bool"),
    "one-hot integers": ("cross_entropy", SOFT.long(), 2, r"shape \(2,\) or .*; got torch.int64 of shape \(2, 2\)"),
    "floating indices": (
        "cross_entropy",
        INDICES.float(),
        2,
        r"probabilities.* \(2, 2\); got torch.float32 of .*\(2,\)",
    ),
    "too large": ("cross_entropy", INDICES + 5, 2, r"\[0, 2\) for 2 logits; got values from 5 to 6"),
    "ignored": ("cross_entropy", INDICES - 100, 2, r"got values from -100 to -99"),
    "no probabilities": ("cross_entropy", SOFT * 3, 2, r"\[0, 1\]; got values from 0.0 to 3.0"),
    "not a number": ("cross_entropy", SOFT * torch.nan, 2, r"\[0, 1\]; got values from nan"),
    "one logit": ("cross_entropy", INDICES, 1, "two logits or more; got one.*bce_with_logits"),
    "indices for labels": ("bce_with_logits", INDICES, 2, r"labels in \[0, 1\] of shape \(2, 2\).*shape \(2,\)"),
    "labels too large": ("bce_with_logits", SOFT.long() * 7, 2, r"\[0, 1\]; got values from 0.0 to 7.0"),
    "weights": (nn.CrossEntropyLoss(torch.ones(3)), INDICES, 2, r"loss.weight.*\(2,\); got \(3,\)"),
    "pos_weights": (nn.BCEWithLogitsLoss(pos_weight=torch.ones(3)), SOFT, 2, r"loss.pos_weight.*got \(3,\)"),
}


@pytest.mark.parametrize(("loss", "target", "classes", "expected"), GOOD.values(), ids=GOOD)
def test_targets_are_read(loss: Any, target: Any, classes: int, expected: Any) -> None:
    torch.testing.assert_close(checked_targets(target, len(target), classes, as_loss(loss)), expected)


@pytest.mark.parametrize(("loss", "target", "classes", "message"), BAD.values(), ids=BAD)
def test_bad_targets_are_named(loss: Any, target: Any, classes: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        checked_targets(target, 2, classes, as_loss(loss))


def test_values_are_not_looked_at_where_that_would_wait_for_the_device() -> None:
    assert checked_targets(INDICES + 5, 2, 2, as_loss("cross_entropy"), look=False).tolist() == [6, 5]


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
