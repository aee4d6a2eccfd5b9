"""What a record is made of: the end of the network, the loss behind it, and its rows."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from layer_cases import CASES, CLASSES, recorded

from lightning_flatness.curvature.jacobian.factor import estimated_factor
from lightning_flatness.curvature.jacobian.network import network_end, network_of
from lightning_flatness.errors import NonFiniteError

NAMED = {case.name: case for case in CASES}


@pytest.mark.parametrize("name", ["LeNet", "two views", "pooled"])
def test_it_ends_in_the_logits_and_has_one_row_fewer_than_classes(name: str) -> None:
    model, (x, y) = NAMED[name].model(), NAMED[name].data()
    network = network_of(recorded(model, x, y))
    torch.testing.assert_close(network.values, model(x).detach())
    factor, signs = network.factor(slice(None))
    assert (factor.shape, signs, network.columns) == ((CLASSES - 1, len(x), CLASSES), None, CLASSES - 1)
    torch.testing.assert_close(network.factor(slice(1, 3))[0], factor[:, 1:3])
    assert network_end(network.recorded) == network.cut
    estimated = network_of(network.recorded, partial(estimated_factor, generator=torch.Generator()))
    assert estimated.factor(slice(None))[0].shape == (2, len(x), CLASSES)


def test_logits_that_are_no_numbers_are_refused() -> None:
    model, (x, y) = NAMED["LeNet"].model(), NAMED["LeNet"].data()
    record = recorded(model, x.index_fill(0, torch.tensor([1]), torch.nan), y, lambda phi, y: F.cross_entropy(phi, y))
    with pytest.raises(NonFiniteError, match="NaN in 1 of"):
        network_of(record)
