"""What a forward pass changes in a network is as it was."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from lightning_runs import Network
from torch import Tensor, nn

from lightning_flatness import measure
from lightning_flatness.data.unchanged import unchanged


def test_what_a_container_held_is_there_again() -> None:
    module = nn.Module()
    module.register_buffer("a", torch.zeros(2))
    module.items, module.names, module.table = [1], {"a"}, {"k": 1}
    module.grown = None
    with unchanged(module):
        module.a.fill_(float("nan"))
        module.register_buffer("b", torch.ones(1))
        del module._buffers["a"]
        module.items.append(2), module.names.clear(), module.table.update(k=2, j=3)
        module.grown, module.training, module.new = [1], False, 1
    assert list(module._buffers) == ["a"]
    assert module.a.tolist() == [0, 0]
    assert (module.items, module.names, module.table) == ([1], {"a"}, {"k": 1})
    assert (module.grown, module.training, hasattr(module, "new")) == (None, True, False)


class Keeping(nn.Module):
    """A network that keeps a tensor of its last pass, and counts its passes."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.kept, self.passes = Network().double(), torch.zeros(1), 0

    def forward(self, x: Tensor) -> Tensor:
        self.kept, self.passes = self.net(x), self.passes + 1
        return self.kept


def test_what_verifies_a_measurement_leaves_no_graph_in_the_network() -> None:
    model: Any = Keeping()
    x, y = torch.randn(6, 2, 5, 5, dtype=torch.float64), torch.arange(6) % 3
    measure(model, [(x, y)], loss=F.cross_entropy)
    assert model.passes == 1
    assert not model.kept.requires_grad
    assert torch.equal(copy.deepcopy(model).kept, model.kept)
    assert len(model.kept) == len(x)
