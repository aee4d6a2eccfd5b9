"""Which tensor is which node, while tensors come and go at the same addresses."""

from __future__ import annotations

from weakref import ref

import pytest
import torch

from lightning_flatness.errors import GraphError
from lightning_flatness.recording.nodes import Nodes

SHAPE = (8, 3, 4)


def test_maps_are_let_go_and_their_places_are_not_theirs() -> None:
    nodes = Nodes(keeps_maps=False)
    seen = []
    for count in range(40):  # an allocator gives the same memory, and Python the same id, again
        tensor = torch.full(SHAPE, float(count))
        assert nodes.of(tensor) is None
        assert nodes.first_in_memory(tensor) is None
        node, gone = nodes.add(tensor), ref(tensor)
        assert (nodes.of(tensor), nodes.of(tensor.view(SHAPE)), nodes.add(tensor)) == (node, node, node)
        part = nodes.add(tensor[1:])
        assert nodes.memory(node) == nodes.memory(part) == node
        assert nodes.first_in_memory(tensor[2]) == node
        assert nodes.memory(node) not in seen
        seen.append(nodes.memory(node))
        del tensor
        assert gone() is None
    assert nodes.tensor(node).shape == SHAPE
    assert nodes.is_floating(node)
    with pytest.raises(GraphError, match="not kept"):
        nodes.value(node)


@pytest.mark.parametrize(
    ("tensor", "keeps_maps"),
    [
        (torch.ones(SHAPE), True),
        (torch.ones(8, 12, 1), False),
        (torch.ones(SHAPE).long(), False),
        (torch.nn.Parameter(torch.ones(SHAPE)), False),
        (torch.from_numpy(torch.ones(SHAPE).numpy().copy()), False),
    ],
    ids=["all are kept", "rows", "whole numbers", "parameter", "memory of others"],
)
def test_the_rest_is_kept(tensor: torch.Tensor, keeps_maps: bool) -> None:
    nodes = Nodes(keeps_maps)
    node = nodes.add(tensor)
    assert nodes.tensor(node) is tensor
    assert nodes.value(node).equal(tensor.detach())
    assert nodes.memory(nodes.add(torch.ones(0))) is None


def test_memory_that_somebody_still_holds_is_still_the_nodes() -> None:
    nodes, tensor = Nodes(keeps_maps=False), torch.ones(SHAPE)
    node, numbers = nodes.add(tensor), tensor.numpy()
    del tensor
    assert nodes.of(torch.from_numpy(numbers)) == node
    assert nodes.first_in_memory(torch.from_numpy(numbers)[1]) == node
