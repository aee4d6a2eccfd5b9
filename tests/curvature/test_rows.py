"""What derivatives hold for each sample, apart from what all samples share."""

from __future__ import annotations

import pytest
import torch

from lightning_flatness.curvature.rows import Apart, loss_with, of_loss
from lightning_flatness.losses import BinaryCrossEntropy, CrossEntropy, Differentiated, Form

ROWS, SHARED = {"inputs": torch.zeros(2, 3)}, torch.eye(2)
OTHERS: dict[str, tuple[Apart, bool]] = {
    "other samples": (Apart({"inputs": torch.ones(5, 3)}, (SHARED, 1)), True),
    "another width": (Apart({"inputs": torch.zeros(2, 4)}, (SHARED, 1)), False),
    "another dtype": (Apart({"inputs": torch.zeros(2, 3).double()}, (SHARED, 1)), False),
    "another name": (Apart({"logits": torch.zeros(2, 3)}, (SHARED, 1)), False),
    "more rows": (Apart({**ROWS, "logits": torch.zeros(2, 3)}, (SHARED, 1)), False),
    "another number": (Apart(ROWS, (SHARED, 2)), False),
    "an equal tensor": (Apart(ROWS, (SHARED.clone(), 1)), False),
    "less": (Apart(ROWS, (SHARED,)), False),
}


@pytest.mark.parametrize("name", OTHERS)
def test_samples_are_joined_if_they_share_all_else(name: str) -> None:
    other, expected = OTHERS[name]
    assert Apart(ROWS, (SHARED, 1)).joins(other) == other.joins(Apart(ROWS, (SHARED, 1))) == expected


WEIGHTS = torch.rand(4, 3)
FORMS: dict[str, tuple[Form, list[str] | None]] = {
    "cross-entropy": (CrossEntropy(), []),
    "class weights": (CrossEntropy(weight=torch.ones(3)), None),
    "binary": (BinaryCrossEntropy(WEIGHTS), ["weight of the loss"]),
    "binary, weights of the labels": (BinaryCrossEntropy(torch.ones(3)), None),
    "binary, no weights": (BinaryCrossEntropy(), None),
    "binary, weights of the positives": (BinaryCrossEntropy(WEIGHTS, torch.ones(3)), None),
    "derivatives": (Differentiated(WEIGHTS, torch.ones(4, 3, 3)), None),
}


@pytest.mark.parametrize("name", FORMS)
def test_forms_with_rows_of_their_own_alone_are_taken_apart(name: str) -> None:
    form, names = FORMS[name]
    apart = of_loss(form)
    assert (None if apart is None else list(apart.rows)) == names
    if apart is not None:
        again = loss_with(form, {key: rows[:2] for key, rows in apart.rows.items()})
        assert type(again) is type(form)
        assert again.weight is None or torch.equal(again.weight, WEIGHTS[:2])


def test_another_smoothing_is_another_loss() -> None:
    plain, smooth = of_loss(CrossEntropy()), of_loss(CrossEntropy(label_smoothing=0.1))
    assert not plain.joins(smooth)
