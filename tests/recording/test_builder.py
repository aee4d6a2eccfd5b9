"""The record of one pass: the last convolution to run first is followed, up to what can be the logits."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from lightning_flatness.recording.builder import PassBuilder
from lightning_flatness.recording.dispatch import not_recorded
from lightning_flatness.recording.weights import WeightCopies

FIRST, SECOND, HEAD = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 4, 1), nn.Linear(4, 3)


def test_each_convolution_that_runs_first_starts_anew() -> None:
    builder, copies, x = PassBuilder(), WeightCopies(), torch.randn(5, 2, 4, 4)
    with torch.no_grad():
        for name, module in (("first", FIRST), ("second", SECOND), ("first", FIRST)):
            inputs = x if name == "first" else y
            y = module(inputs)
            if builder.must_start(name):
                builder.start(name, module, copies)
            builder.add_convolution(name, inputs, y)
        builder.stop()
    assert builder.layer == "second"
    assert torch.equal(builder.weights[0], SECOND.weight.flatten(1))
    assert len(builder.convolution_calls) == 1
    assert _get_current_dispatch_mode() is None


def test_what_can_end_the_tail_depends_on_the_convolution_and_has_a_row_per_sample() -> None:
    builder, copies, x = PassBuilder(), WeightCopies(), torch.randn(5, 3, 4, 4)
    with torch.no_grad():
        z = SECOND(x)
        builder.start("second", SECOND, copies)
        builder.add_convolution("second", x, z)
        p, other = z.relu().mean((2, 3)), torch.randn(5, 4)
        assert not builder.add_call("head", other, HEAD(other), HEAD, copies)
        assert not builder.add_output("map", z.relu())
        logits = HEAD(p)
        end = len(builder.tracer.graph.operations)
        with not_recorded():  # as in a hook
            assert builder.add_call("head", p, logits, HEAD, copies)
            assert builder.add_output("", logits)
        builder.complete()
        logits.relu()
    (call,), (output,) = builder.calls, builder.outputs
    assert (call.name, call.inputs is p, call.end) == ("head", True, end)
    assert torch.equal(call.output, output.output)
    assert output.weights is None
    assert builder.is_complete


def test_a_failure_ends_the_record() -> None:
    builder, x = PassBuilder(), torch.randn(5, 3, 4, 4)
    builder.start("second", SECOND, WeightCopies())
    builder.add_convolution("second", x, z := SECOND(x).detach())
    builder.fail(error := RuntimeError("mine"))
    z.relu()
    assert builder.failure is error
    assert builder.tracer.graph.operations == []
