"""The record of one pass: the deepest convolution is followed from its operation's own output on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from lightning_flatness.recording.builder import PassBuilder
from lightning_flatness.recording.dispatch import not_recorded

FIRST, SECOND, HEAD = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 4, 1), nn.Linear(4, 3)


@contextlib.contextmanager
def within(builder: PassBuilder, name: str, module: nn.Module, x: Tensor) -> Iterator[list[Tensor]]:
    """The call of a module, as its hooks see it; what it returned is put into the list."""
    returned: list[Tensor] = []
    with not_recorded():
        builder.before_convolution(name, module, (x,))
    yield returned
    with not_recorded():
        builder.after_convolution(name, module, (x,), *returned)


def convolved(builder: PassBuilder, name: str, module: nn.Module, x: Tensor) -> Tensor:
    with within(builder, name, module, x) as returned:
        returned.append(module(x))
    return returned[0]


def names(builder: PassBuilder) -> list[str]:
    return [operation.name for operation in builder.tracer.graph.operations]


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield
    assert _get_current_dispatch_mode() is None


def test_a_deeper_convolution_starts_anew_and_others_are_passed_over() -> None:
    builder, x = PassBuilder(None, None), torch.randn(5, 2, 4, 4)
    y = convolved(builder, "first", FIRST, x).relu()
    z = convolved(builder, "second", SECOND, y)
    convolved(builder, "first", FIRST, x)
    convolved(builder, "other", nn.Conv2d(2, 9, 3), x)
    z.relu()
    builder.stop()
    assert (builder.layer, builder.choice.ranking) == ("second", ["second", "other", "first"])
    assert names(builder) == ["relu"]
    (call,) = builder.convolution_calls
    assert torch.equal(call.weight, SECOND.weight.flatten(1))
    assert torch.equal(builder.tracer.graph.captures.peek(call.inputs), y)
    assert builder.refusal({}) is None


def test_the_one_that_is_wanted_is_followed_through_the_others() -> None:
    builder, x = PassBuilder("first", None), torch.randn(5, 2, 4, 4)
    y = convolved(builder, "first", FIRST, x)
    SECOND(y)
    builder.stop()
    assert (builder.layer, names(builder)) == ("first", ["convolution"])


def test_the_record_begins_at_the_output_of_the_operation() -> None:
    """What the module does with that is recorded, and how it was called is known."""

    class Doubled(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    module, builder = Doubled(2, 3, 3, stride=2, padding_mode="reflect", padding=1), PassBuilder(None, None)
    x = torch.randn(5, 2, 4, 4)
    z = convolved(builder, "conv", module, x)
    builder.stop()
    (call,) = builder.convolution_calls
    graph = builder.tracer.graph
    assert names(builder) == ["mul"]
    assert torch.equal(2 * graph.captures.peek(call.output), z)
    assert graph.captures.peek(call.inputs).shape == (5, 2, 6, 6)  # padded by the module
    assert (call.geometry["stride"], call.geometry["padding"], call.geometry["groups"]) == ([2, 2], [0, 0], 1)


def test_a_module_that_convolves_with_another_weight_is_not_followed() -> None:
    class Standardized(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return self._conv_forward(x, self.weight / self.weight.std(), self.bias)

    builder = PassBuilder(None, None)
    convolved(builder, "conv", Standardized(2, 3, 3), torch.randn(5, 2, 4, 4))
    builder.stop()
    assert builder.tracer is None
    assert "`conv` must convolve with its own `weight`" in builder.refusal({}).message


def test_a_single_position_is_passed_over_unless_it_is_wanted() -> None:
    x = torch.randn(5, 3, 1, 1)
    for wanted, layer, passed_over in ((None, None, "second"), ("second", "second", None)):
        builder = PassBuilder(wanted, None)
        convolved(builder, "second", SECOND, x)
        builder.stop()
        assert (builder.layer, builder.passed_over) == (layer, passed_over)


def test_linear_calls_are_on_what_depends_on_the_convolution_and_yield_one_row_per_sample() -> None:
    builder, x = PassBuilder(None, None), torch.randn(5, 3, 4, 4)

    def called(inputs: Tensor) -> Tensor:
        output = HEAD(inputs)
        with not_recorded():
            builder.after_linear("head", HEAD, (inputs,), {}, output)
        return output

    z = convolved(builder, "second", SECOND, x)
    p = z.relu().mean((2, 3))
    called(torch.randn(5, 4))
    called(z.permute(0, 2, 3, 1))
    logits = called(p)
    builder.after_network("", nn.Sequential(), (), logits)
    builder.stop()
    (call,), graph = builder.linear_calls, builder.tracer.graph
    assert (call.name, call.inputs, call.output) == ("head", graph.node(p), graph.node(logits))
    assert torch.equal(call.weight, HEAD.weight)
    assert builder.output == ("", logits)


def test_a_failure_ends_the_record() -> None:
    builder, x = PassBuilder(None, None), torch.randn(5, 3, 4, 4)
    z = convolved(builder, "second", SECOND, x)
    builder.fail(error := RuntimeError("mine"))
    z.relu()
    assert names(builder) == []
    assert builder.refusal({}).cause is error


@pytest.mark.parametrize("error", [ValueError("mine"), torch.OutOfMemoryError("mine")], ids=repr)
def test_what_says_nothing_about_the_network_is_raised(error: Any) -> None:
    builder = PassBuilder(None, None)
    builder.fail(error)
    with pytest.raises(type(error), match="mine"):
        builder.refusal({})


def test_an_empty_batch_is_an_error() -> None:
    builder = PassBuilder(None, None)
    convolved(builder, "second", SECOND, torch.randn(0, 3, 4, 4))
    builder.stop()
    with pytest.raises(ValueError, match="at least one sample; `second` got none"):
        builder.refusal({})


def test_nothing_ran() -> None:
    refusal = PassBuilder(None, None).refusal({"a.conv": FIRST})
    assert "none did" in refusal.message
    assert "['a.conv']" in refusal.message
    assert "has no convolution" in PassBuilder("b", None).refusal({}).message
