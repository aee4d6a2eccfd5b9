"""What follows from a tensor is kept, and a weight with the same numbers is the same weight."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_flatness.curvature.kept import Kept, LastWeight

WEIGHT = torch.tensor([[1.0, 2.0]])


def test_the_function_runs_again_for_another_tensor_or_argument() -> None:
    kept, calls = Kept(lambda tensor, factor: calls.append(factor) or tensor * factor), []
    first, second = WEIGHT.clone(), WEIGHT.clone()
    found = [kept.of(first, 2), kept.of(first, 2), kept.of(first, 3), kept.of(second, 3)]
    assert [value.tolist() for value in found] == [[[2, 4]], [[2, 4]], [[3, 6]], [[3, 6]]]
    assert found[0] is found[1]
    assert calls == [2, 3, 3]


@pytest.mark.parametrize(
    ("other", "differs"),
    [
        (WEIGHT, False),
        (WEIGHT.clone(), False),
        (WEIGHT + 1, True),
        (WEIGHT.double(), True),
        (WEIGHT[:, :1], True),
        (WEIGHT / 0 * 0, True),
    ],
    ids=["the same", "a copy", "another number", "another dtype", "another shape", "no numbers"],
)
def test_the_last_weight_stays_until_another_one_comes(other: Tensor, differs: bool) -> None:
    last = LastWeight()
    assert last.differs(WEIGHT) is True
    assert last.of(WEIGHT, differs=True) is WEIGHT
    assert bool(last.differs(other)) == differs
    assert last.of(other, differs) is (other if differs else WEIGHT)
