"""The record against the loss at other filters: what no recorder can see is found, and the weight is restored."""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from networks import Net, conv2d
from torch import Tensor, nn

from lightning_flatness import UnsupportedTailError, measure
from lightning_flatness.data.verification import SKIPPED, Repetition, Verification, verify
from lightning_flatness.recording.recorder import ForwardRecorder, only_for


class Unseen(Net):
    """What depends on the filters and is no recorded operation behind the convolution: `before` changes the inputs."""

    def __init__(self, before: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.before = before

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.before(self, x))


def in_a_thread(model: Any, x: Tensor) -> Tensor:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(lambda: x * (1 + model.conv.weight.pow(2).mean())).result()


UNSEEN: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "the weight's norm": lambda model, x: x * (1 + model.conv.weight.detach().norm()),
    "the weight in a thread": in_a_thread,
    "a number made of the weight": lambda model, x: x + float(model.conv.weight.detach().sum()) + 1,
}


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(6, 2, 5, 4, generator=generator, dtype=torch.float64), torch.arange(6) % 3


@pytest.mark.parametrize("name", UNSEEN)
def test_what_leaves_no_trace_is_refused(name: str) -> None:
    model = Unseen(UNSEEN[name]).double().eval()
    before = model.conv.weight.detach().clone()
    with pytest.raises(UnsupportedTailError, match="predict the loss at other filters"):
        measure(model, [batch()])
    assert torch.equal(model.conv.weight, before)


def test_what_does_not_depend_on_the_filters_is_no_reason() -> None:
    model = Unseen(lambda model, x: x * model.norm.weight.mean()).double().eval()
    assert measure(model, [batch()]).hessian_trace > 0


def test_an_error_of_the_network_restores_the_weight() -> None:
    model = Net().double().eval()
    recorder, (x, y) = ForwardRecorder(model), batch()
    before, calls = model.conv.weight.detach().clone(), []

    def repeat() -> list[Tensor]:
        calls.append(None)
        if len(calls) == 2:
            raise OSError("no data")
        return [nn.functional.cross_entropy(model(x), y)]

    with recorder, torch.no_grad():
        with only_for(recorder):
            loss = nn.functional.cross_entropy(model(x), y)
        recorded = recorder.take_pass(loss)
        end = len(recorded.graph.operations)
        with pytest.raises(OSError, match="no data"):
            verify(recorded, Repetition("the loss", [recorded.loss], end, [loss], slice(None), repeat))
    assert len(calls) == 2
    assert torch.equal(model.conv.weight, before)


class Noisy(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + torch.randn_like(x))


NOT_VERIFIED: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "drawn inputs": (Noisy, {}, "computes something else"),
    "a computed weight": (lambda: Net(nn.utils.parametrizations.weight_norm(conv2d())), {}, "weight .* is computed"),
    "switched off": (Net, {"verify": False}, "verify=False"),
}


@pytest.mark.parametrize(("make", "options", "reason"), NOT_VERIFIED.values(), ids=NOT_VERIFIED)
def test_what_is_not_verified_is_said(make: Callable[[], nn.Module], options: dict[str, Any], reason: str) -> None:
    report = measure(make().double().eval(), [batch()], loss="cross_entropy", **options)
    (assumed,) = report.assumed
    assert re.search(reason, assumed)


def test_each_loader_is_due_once() -> None:
    verification = Verification()
    assert verification.is_due(0)
    verification.note(0, None)
    assert (verification.is_due(0), verification.is_due(1), verification.assumed) == (False, True, ())
    verification.note(1, "it is odd")
    verification.note(2, "it is odd")
    assert verification.assumed == (f"{SKIPPED}: it is odd",)
    assert not Verification(wanted=False).is_due(0)
