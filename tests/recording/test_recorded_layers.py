"""The record of a pass as a function of parameters."""

from __future__ import annotations

import torch
from layer_cases import CASES, recorded


def test_the_record_begins_at_the_first_use_and_ends_at_the_loss() -> None:
    case = next(case for case in CASES if case.name == "pooled")
    model, (x, y) = case.model(), case.data()
    whole, single = recorded(model, x, y), recorded(model, x, y, layers=("5",))
    assert single.path == "5 > t > addmm > _log_softmax > nll_loss_forward"
    assert whole.path.startswith("0 > convolution")
    assert whole.path.endswith(single.path.removeprefix("5"))
    assert set(whole.parameters) == {name for name, _ in model.named_parameters()}
    assert (single.parameters.keys(), single.linear_calls) == ({"5.weight"}, ())
    assert whole.graph.tensor_of(whole.loss).shape == torch.Size([])
