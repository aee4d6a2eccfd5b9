"""Which recorders go on in the next validation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning_runs import Network
from torch import nn

from lightning_flatness import BothRecorder, ClassifierRecorder, ForwardRecorder
from lightning_flatness.recording.kept import KeptRecorders


def used(recorder: Any, network: nn.Module) -> Any:
    with recorder, torch.no_grad():
        recorder.take_pass(network(torch.zeros(2, 2, 5, 5)).logsumexp(1).mean())
    return recorder


def test_those_of_compiled_networks_that_know_their_layer() -> None:
    network, kept = Network().eval(), KeptRecorders()
    new = ForwardRecorder(network)
    kept.keep(0, used(ForwardRecorder(network), network))  # of a network that is not compiled
    assert kept.continued(0, new) is new
    network.compile(backend="eager")
    kept.keep(0, ForwardRecorder(network))  # has recorded nothing
    kept.keep(0, both := used(BothRecorder(network), network))  # nothing is chosen
    assert kept.continued(0, new) is new
    both.follow(ForwardRecorder)
    kept.keep(0, both)
    assert kept.continued(0, new) is both.parts[0]
    assert kept.continued(1, new) is new
    for other in (ClassifierRecorder(network), ForwardRecorder(Network())):
        assert kept.continued(0, other) is other
    kept.forget([0, 1])
    assert kept.continued(0, new) is new


@pytest.mark.parametrize("index", [0, 5])
def test_say_why_the_network_ran_eagerly(index: int) -> None:
    network, kept = Network().eval(), KeptRecorders()
    network[index].compile(backend="eager")
    recorder = used(ForwardRecorder(network, layer="conv2"), network)
    assert kept.keep(0, recorder) is None
    assert "outside of what is compiled" in str(kept.keep(0, used(recorder, network)))
