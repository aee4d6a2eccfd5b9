"""Checks what no recorder of operations can see: the record must predict what other filters would make of the loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_flatness.errors import GraphError, UnsupportedTailError
from lightning_flatness.precision import LOW_PRECISION
from lightning_flatness.recording.recorded_pass import RecordedPass

_STEP = 0.5  # of the largest weight: large enough to stand out of rounding


def verify(recorded: RecordedPass, repeat: Callable[[], Tensor]) -> str | None:
    """Compare the loss at moved filters, as the network computes it, with what the record predicts.

    Threads, kernels of extensions, gradients inside the forward pass or a weight that is used before the convolution
    leave no trace on the record; they move the loss all the same. The weight is restored to the last bit.

    Args:
        recorded: one pass.
        repeat: runs the network on the same samples again and returns its loss.

    Returns:
        None if they agree; else why nothing can be said.

    Raises:
        UnsupportedTailError: if they differ.
    """
    module, call = recorded.convolution, recorded.calls[-1]
    weight = module._parameters.get("weight")
    if weight is None or hasattr(weight, "full_tensor") or len(recorded.calls) > 1:
        return "the record could not be verified: the weight is computed, sharded, or used several times"
    before = weight.detach().clone()
    generator = torch.Generator().manual_seed(0)
    step = torch.randn(before.shape, generator=generator, dtype=torch.float64).to(before) * before.abs().max() * _STEP
    same = float(repeat())
    predicted = _predicted(recorded, call.weight.view_as(before) + step.to(call.weight))
    try:
        weight.data.add_(step)
        moved = float(repeat())
    finally:
        weight.data.copy_(before)
    dtype = recorded.graph.tensor_of(call.node).dtype
    eps = torch.finfo(dtype).eps
    rounding = (4 if dtype in LOW_PRECISION else 100) * eps * max(abs(same), abs(moved), abs(predicted))
    change, missed = abs(moved - same), abs(predicted - moved)
    if missed > eps**0.5 * max(change, abs(predicted - same)) + rounding:
        raise UnsupportedTailError(
            f"The recorded steps after `{recorded.layer}` must predict the loss at other filters; it moved from "
            f"{same:.6g} to {moved:.6g}, and {predicted:.6g} was predicted. Something reaches the loss that is no "
            "recorded operation: the weight used elsewhere, a gradient inside the forward pass, a thread, a kernel of "
            "an extension. Measure another layer (`layer=...`)."
        )
    return None


def _predicted(recorded: RecordedPass, weight: Tensor) -> float:
    """Return the loss that the record gives for another weight of the layer."""
    call, graph = recorded.calls[-1], recorded.graph
    if "samples" in call.geometry:  # a linear layer
        inputs, output = (graph.captures.value(index).to(weight.dtype) for index in (call.inputs, call.output))
        change = weight.flatten(1) - call.weight.to(weight.dtype)
        return _replayed(recorded, output + (inputs.reshape(-1, change.shape[1]) @ change.mT).view_as(output))
    given = call.geometry
    inputs = graph.captures.value(call.inputs).to(weight.dtype)
    functions = {3: nn.functional.conv1d, 4: nn.functional.conv2d, 5: nn.functional.conv3d}
    convolution = cast(Any, functions[inputs.dim()])
    with torch.no_grad():
        z = convolution(
            inputs, weight, call.bias.to(weight), given["stride"], given["padding"], given["dilation"], given["groups"]
        )
    return _replayed(recorded, z)


def _replayed(recorded: RecordedPass, z: Tensor) -> float:
    """Return the loss that the record gives for another output of the layer."""
    call, graph = recorded.calls[-1], recorded.graph
    try:
        needed = set(graph.ancestry(recorded.loss, in_steps=True))
        values = graph.replay({call.node: z}, len(graph.operations), only=needed)
    except GraphError:
        return float("nan")
    return float(values[recorded.loss])
