"""A record is repeated for some of its samples."""

from __future__ import annotations

import pytest
import torch
from layer_cases import CASES, Case, recorded

from lightning_flatness.curvature.jacobian.network import network_end
from lightning_flatness.curvature.jacobian.plan import Plan
from lightning_flatness.curvature.jacobian.replay import Replay

# Where positions come before samples, only the whole batch can be repeated.
PARTS = [case for case in CASES if "first" not in case.name and "encoder" not in case.name]


@pytest.mark.parametrize("case", PARTS, ids=str)
def test_a_part_gives_the_logits_of_its_samples(case: Case) -> None:
    model, (x, y) = case.model(), case.data()
    record = recorded(model, x, y)
    end = network_end(record)
    part = Replay(record, Plan(record, end, len(x)), end, len(x), slice(1, 3))
    torch.testing.assert_close(part.output.detach(), model(x)[1:3].detach())
    assert all(tap.value.requires_grad for tap in part.taps)
