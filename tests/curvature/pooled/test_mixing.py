"""Which step is named: the one that computes with several filters, not one that moves their maps about."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from networks import Net, channel_norm, local_sum, shuffled
from recorded import pooled, recorded
from torch import Tensor

from lightning_flatness.curvature.pooled.mixing import mixing_step

# What follows the convolution -> the operator that mixes; "": none does.
TAILS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "layer norm of channels-last maps": (channel_norm, "layer_norm"),
    "softmax of channels-last maps": (lambda z: z.movedim(1, -1).softmax(-1).movedim(-1, 1), "softmax"),
    "a sum of neighbours": (lambda z: F.relu(z) + F.relu(z).roll(1, 1), "add"),
    "in place, after a step that does not": (lambda z: z.neg_().add_(z.mean(1, keepdim=True)), "mean"),
    "positions": (local_sum, ""),
    "a shuffle": (lambda z: F.relu(shuffled(z).transpose(1, 3).flip(3)).transpose(1, 3), ""),
}


@pytest.mark.parametrize(("act", "name"), TAILS.values(), ids=TAILS)
def test_the_step_that_mixes_is_named(act: Callable[[Tensor], Tensor], name: str) -> None:
    record = recorded(Net(act=act).double().eval(), torch.randn(5, 2, 5, 4, dtype=torch.float64))
    step = mixing_step(record, pooled(record).end)
    assert (step is None) == (not name)
    assert name in (step or "").split(",")[1 if name else 0]
