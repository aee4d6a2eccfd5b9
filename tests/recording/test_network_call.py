"""A call that is kept: which samples, in which modes, and what its outputs are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import Net
from torch import Tensor, nn

from lightning_flatness.recording.recorded_pass import RecordedPass
from lightning_flatness.recording.recorder import ForwardRecorder


class Step(nn.Module):
    """Holds a network, which a step calls."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net(output=lambda logits, features: {"logits": logits, "features": features, "size": 3})

    def forward(self, x: Tensor) -> Any:
        return self.net(x)


def recorded(run: Callable[[Step, Tensor], Any], inputs: Tensor) -> RecordedPass:
    model = Step().eval()
    with ForwardRecorder(model) as recorder, torch.no_grad():
        output = run(model, inputs)
        return recorder.take_pass(output["logits"].square().mean())


def redirected(model: Step, x: Tensor) -> Any:
    """As Lightning calls a step through the wrapper of a strategy."""
    forward = model.forward

    def step(x: Tensor) -> Any:
        model.forward = forward
        return model.net(x)

    model.forward = step
    return model(x)


INPUTS = torch.randn(6, 2, 5, 4)
RUNS: dict[str, tuple[Callable[[Step, Tensor], Any], str]] = {
    "the outermost module": (lambda model, x: model(x), ""),
    "the network": (lambda model, x: model.net(x), "net"),
    "a step in the place of forward": (redirected, "net"),
    "another pass before": (lambda model, x: (model(x[:1]), model.net(x))[1], ""),
}


@pytest.mark.parametrize(("run", "name"), RUNS.values(), ids=RUNS)
def test_the_outermost_call_of_a_network_is_kept(run: Callable[[Step, Tensor], Any], name: str) -> None:
    call = recorded(run, INPUTS).network_call
    assert call is not None
    assert call.name == name


@pytest.mark.parametrize("overwritten", [False, True])
def test_a_few_samples_are_repeated_as_they_came(overwritten: bool) -> None:
    inputs = INPUTS.clone()
    record = recorded(lambda model, x: model(x.mul_(2) if overwritten else x), inputs)
    call = record.network_call
    assert call is not None
    assert [position for position, _, _ in call.outputs] == [0, 1]
    inputs.zero_()
    for (_, node, observed), again in zip(call.outputs, call.repeat(), strict=True):
        assert len(again) == 4
        torch.testing.assert_close(again, observed)
        torch.testing.assert_close(again, record.graph.tensor_of(node)[:4])


def test_inputs_without_rows_are_kept_whole() -> None:
    class Shifted(Net):
        def forward(self, x: Tensor, shift: Tensor, scale: float) -> Tensor:
            return super().forward(scale * x + shift)

    model = Shifted().eval()
    with ForwardRecorder(model) as recorder, torch.no_grad():
        record = recorder.take_pass(model(INPUTS, shift=torch.ones(()), scale=2.0).square().mean())
        assert record.network_call is not None
        assert record.network_call.outputs[0][2].shape == (6, 3)
        later = recorder.take_pass(model(INPUTS, shift=torch.ones(()), scale=2.0).square().mean())
    assert later.network_call is None


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, None], ids=str)
def test_the_modes_are_those_of_the_call(grad: bool, dtype: torch.dtype | None) -> None:
    seen = []

    class Sees(Net):
        def forward(self, x: Tensor) -> Tensor:
            seen.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")))
            return super().forward(x)

    model = Sees().eval()
    with ForwardRecorder(model) as recorder, torch.inference_mode(not grad):
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            logits = model(INPUTS)
        record = recorder.take_pass(logits.float().square().mean())
    assert record.network_call is not None
    record.network_call.repeat()
    assert seen[0] == seen[1] == (grad, not grad, dtype is not None)
