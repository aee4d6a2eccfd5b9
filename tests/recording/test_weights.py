"""Copies of weights: as rows, in full precision, the same tensors while the values stay the same."""

from __future__ import annotations

import pytest
import torch
from networks import conv2d
from torch import nn

from lightning_flatness.errors import UnsupportedTailError
from lightning_flatness.recording.weights import WeightCopies


@pytest.mark.parametrize("module", [nn.Linear(4, 3), nn.Linear(4, 3, bias=False), conv2d(5), conv2d(5, bias=False)])
def test_weights_as_rows(module: nn.Module) -> None:
    """Copies, in full precision."""
    weight, bias = WeightCopies().of(module.bfloat16())
    assert weight.dtype == bias.dtype == torch.float32
    expected = module.weight.detach().float().flatten(1)
    module.weight.data.zero_()
    assert torch.equal(weight, expected)
    assert torch.equal(bias, torch.zeros(len(weight)) if module.bias is None else module.bias.float())


def test_copies_stay_while_the_weights_do() -> None:
    module, copies = nn.Linear(4, 3), WeightCopies()
    before = copies.of(module)
    assert copies.of(module) is before
    for parameter, index in ((module.bias, 1), (module.weight, 0)):
        parameter.data += 1  # leaves no trace in the version of the parameter
        assert torch.equal(copies.of(module)[index], parameter)
        assert not torch.equal(before[index], parameter)


def test_a_sharded_weight_is_refused() -> None:
    module = nn.Linear(2, 2)
    module.weight = nn.Parameter(torch.empty(0))
    with pytest.raises(UnsupportedTailError, match=r"Linear\(in_features=2.*is sharded"):
        WeightCopies().of(module)
