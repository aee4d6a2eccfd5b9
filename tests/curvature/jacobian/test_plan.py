"""Where parameters are used, which of their uses are not covered, and where the network is curved."""

from __future__ import annotations

import pytest
import torch
from layer_cases import CASES, Case, recorded
from torch import nn

from lightning_flatness.curvature.jacobian.network import network_end
from lightning_flatness.curvature.jacobian.plan import Plan
from lightning_flatness.recording.graph import Cut

NAMED = {case.name: case for case in CASES}


def plan_of(case: Case) -> Plan:
    model, (x, y) = case.model(), case.data()
    record = recorded(model, x, y)
    return Plan(record, network_end(record), len(x))


def test_the_uses_of_a_layer_that_runs_twice() -> None:
    plan = plan_of(NAMED["two views"])
    roles = {name: [use.role for use in plan.uses_of(name)] for name in ("conv.weight", "norm.weight", "head.bias")}
    assert roles == {"conv.weight": ["weight"] * 2, "norm.weight": ["scale"] * 2, "head.bias": ["bias"] * 2}


def test_a_value_that_is_overwritten_is_known() -> None:
    plan = plan_of(NAMED["VGG-like"])
    assert [plan.kinds[number] for number in sorted(plan.overwritten)] == ["norm", "norm", "layer"]


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda m, x: x @ m.weight.mT + (m.weight * 2).sum(), "way"),
        (lambda m, x: x @ (2 * m.weight).mT, "way"),
        (lambda m, x: x @ m.weight.mT + m.weight[0], "several|way"),
        (lambda m, x: (x @ m.weight.mT) @ m.weight, "columns"),
    ],
)
def test_uses_that_are_not_covered(forward, reason: str) -> None:
    class Net(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return forward(self, x)

    record = recorded(Net(4, 4, bias=False), torch.randn(5, 4), torch.arange(5) % 3)
    plan = Plan(record, network_end(record), 5)
    assert not plan.is_weight("weight")
    assert list(plan.left_out) == ["weight"]


def test_a_view_of_what_depends_on_the_layer_is_followed() -> None:
    class Net(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = super().forward(x)
            buffer = (h > 0).to(h)
            buffer[:, :2].copy_(h[:, :2])
            return buffer.square() @ torch.ones(5, 3)

    record = recorded(Net(4, 5), torch.randn(5, 4), torch.arange(5) % 3)
    names = [operation.name for operation in record.graph.operations]
    end = record.graph.operations[names.index("mm")]
    assert "copy_" in names
    assert not Plan(record, Cut(names.index("mm") + 1, end.results[0]), 5).is_exact("weight")
