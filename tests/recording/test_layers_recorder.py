"""Passes are recorded from the parameters on, and stay as they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from layer_cases import CASES, Case
from torch import nn
from torch.nn.utils import parametrizations

from lightning_flatness import LayersRecorder, UnsupportedTailError


@pytest.mark.parametrize("case", CASES[:6], ids=str)
def test_the_pass_is_the_same_to_the_last_bit_and_nothing_stays(case: Case) -> None:
    model, (x, y) = case.model(), case.data()
    before = model(x)
    with LayersRecorder(model) as recorder:
        during = model(x)
        assert recorder.depends(during)
        assert recorder.output is during
        record = recorder.take_pass(F.cross_entropy(during, y))
        assert recorder.output is None
    assert during.equal(before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert len(record.graph.operations) > 3


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_maps_of_the_network_are_let_go(mode: Any) -> None:
    model = nn.Sequential(*(layer for _ in range(4) for layer in (nn.Conv2d(2, 2, 1), nn.ReLU())), nn.Flatten())
    x, y = torch.randn(3, 2, 32, 32), torch.arange(3)
    with LayersRecorder(model) as recorder, mode():
        graph = recorder.take_pass(F.cross_entropy(model(x), y)).graph
    results = [graph.tensor_of(node) for operation in graph.operations for node in operation.results]
    assert sum(result.is_meta for result in results) >= 8
    assert sum(result.numel() for result in results if not result.is_meta) < 3 * x.numel()  # flattened, and the loss


def test_only_one_of_two_branches_is_named() -> None:
    model, (x, y) = (case := next(case for case in CASES if case.name == "branches")).model(), case.data()
    with LayersRecorder(model, ("right", "head")) as recorder, torch.no_grad():
        record = recorder.take_pass(F.cross_entropy(model(x), y))
    assert record.layers == {"right": "right.weight", "head": "head.weight"}
    assert sum(operation.name == "convolution" for operation in record.graph.operations) == 1


@pytest.mark.parametrize(("name", "reason"), [("1", "must name one of"), ("2", "of its own"), ("nothing", "must name")])
def test_names_are_checked(name: str, reason: str) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), parametrizations.weight_norm(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match=reason):
        LayersRecorder(model, (name,))


def test_what_cannot_be_taken_is_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with LayersRecorder(model, ("0",)) as recorder:
        with pytest.raises(UnsupportedTailError, match="must run"):
            recorder.take_pass(torch.zeros(()))
        model[1](torch.ones(3, 2))
        model(torch.ones(3, 2))
        with pytest.raises(UnsupportedTailError, match="one number that depends on"):
            recorder.take_pass(torch.zeros(()))
        model(torch.ones(0, 2))
        with pytest.raises(ValueError, match="at least one sample"):
            recorder.take_pass(torch.zeros(()))
        recorder.ignore_passes()
        model(torch.ones(3, 2))
        assert recorder.output is None
