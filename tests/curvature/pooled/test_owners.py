"""Which filter each channel depends on: found by moving filters, proved by random cotangents."""

from __future__ import annotations

import pytest
import torch
from cases import SUPPORTED, UNSUPPORTED
from recorded import pooled, recorded

from lightning_flatness.curvature.pooled.certificate import features_at
from lightning_flatness.curvature.pooled.owners import cotangents_of, owners, random_points, slots_of, traced

CASES = {case.name: case for case in (*SUPPORTED, *UNSUPPORTED)}
PAIRS = [0, 1, 2, 3] * 2
OWNERS: dict[str, list[int] | None] = {
    "relu": [0, 1, 2, 3],
    "channel shuffle": [0, 2, 1, 3],
    "dense block": [-1, -1, -1, 0, 1, 2, 3],
    "average and max": PAIRS,
    "average and max silu": PAIRS,
    "shuffled cells": [0, 2, 1, 3] * 2,
    "2 x 2 cells": [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4,
    "dense block of two poolings": [-1, -1, -1, 0, 1, 2, 3] * 2,
    "two features for some filters": [0, 1, 2, 3, 1, 2],
    "average and neighbour's maximum": None,
    "batch mean": [0, 1, 2, 3],  # that samples are mixed does not show here
}


@pytest.mark.parametrize("at_random_points", [True, False])
@pytest.mark.parametrize("name", OWNERS)
def test_the_filter_of_each_feature(name: str, at_random_points: bool) -> None:
    case = CASES[name]
    one_pass = recorded(case.model().eval(), case.data()[0])
    owner = owners(one_pass, pooled(one_pass), at_random_points)
    assert (owner if owner is None else owner.tolist()) == OWNERS[name]


@pytest.mark.parametrize("name", ["average and max", "dense block of two poolings", "batch mean"])
def test_only_the_right_owners_are_proved(name: str) -> None:
    case = CASES[name]
    one_pass = recorded(case.model().eval(), case.data()[0])
    points = next(random_points(one_pass, torch.Generator().manual_seed(3)))
    (point,) = points.values()
    features = features_at(one_pass, pooled(one_pass), points)

    def is_proved(owner: list[int]) -> bool:
        slots, generator = slots_of(torch.tensor(owner), 4), torch.Generator().manual_seed(4)
        return traced(features, point, generator, point.new_zeros(()), slots)[0] is not None

    right = OWNERS[name]
    assert is_proved(right) == (name != "batch mean")
    for j, k in enumerate(right):
        for wrong in {-1, 0, 1, 2, 3} - {k} if k >= 0 else ():
            assert not is_proved([*right[:j], wrong, *right[j + 1 :]])


def test_slots_and_their_cotangents() -> None:
    slots = slots_of(torch.tensor([2, -1, 0, 2, 0, 2]), 4)
    assert slots.tolist() == [[2, 4, -1], [-1, -1, -1], [0, 3, 5], [-1, -1, -1]]
    rows = [[1, 0, 1, 0, 0, 0], [0, 0, 0, 1, 1, 0], [0, 0, 0, 0, 0, 1], [0, 1, 0, 0, 0, 0]]
    assert cotangents_of(slots, 6).tolist() == rows
    assert cotangents_of(torch.tensor([[1], [0]]), 2).tolist() == [[1, 1]]
