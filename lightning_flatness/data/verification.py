"""Checks what no recorder of operations can see: the record must predict what other filters would make of a pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from lightning_flatness.errors import UnsupportedTailError
from lightning_flatness.precision import LOW_PRECISION, allclose_for_dtype
from lightning_flatness.recording.dispatch import not_recorded
from lightning_flatness.recording.recorded_pass import RecordedPass

_STEP = 0.5  # of the largest weight: large enough to stand out of rounding
_MARGIN = 10  # by how much rounding may grow when the filters are moved
SKIPPED = "that nothing but recorded operations reaches the loss is assumed"
"""Begins the sentence of `FlatnessReport.assumed` about a record that was not verified."""


class Repetition(NamedTuple):
    """How a part of a recorded pass is computed once more.

    Attributes:
        what: its result, in words.
        nodes: the tensors of the record that it computes.
        end: the number of operations on the record when they were computed.
        observed: their values in the pass.
        rows: which rows of these tensors are computed once more.
        run: computes them.
    """

    what: str
    nodes: Sequence[int]
    end: int
    observed: Sequence[Tensor]
    rows: slice
    run: Callable[[], Sequence[Tensor]]


class Verification:
    """Says for which loaders of a run the record is still to be verified.

    Args:
        wanted: whether records are verified at all.

    Attributes:
        assumed: what could not be verified, in words.
    """

    def __init__(self, wanted: bool = True) -> None:
        """Start with nothing verified."""
        self._wanted = wanted
        self._verified: set[int] = set()
        self.assumed: tuple[str, ...] = () if wanted else (f"{SKIPPED}: `verify=False`",)

    def is_due(self, loader: int) -> bool:
        """Return whether the record of a loader is still to be verified."""
        return self._wanted and loader not in self._verified

    def note(self, loader: int, obstacle: str | None) -> None:
        """Note that a record has been verified, or why that is not possible."""
        self._verified.add(loader)
        if obstacle is not None and f"{SKIPPED}: {obstacle}" not in self.assumed:
            self.assumed += (f"{SKIPPED}: {obstacle}",)


def verify(recorded: RecordedPass, repetition: Repetition) -> str | None:
    """Compare what the network computes with moved filters with what the record predicts.

    Threads, kernels of extensions, gradients inside the forward pass or a weight that is used before the convolution
    leave no trace on the record; they move the result all the same. The weight is restored to the last bit.

    Args:
        recorded: one pass.
        repetition: computes a part of it once more, on the same samples or some of them.

    Returns:
        None if they agree; else why nothing can be said.

    Raises:
        UnsupportedTailError: if they differ.
    """
    weight = recorded.convolution._parameters.get("weight")
    if weight is None or len(recorded.calls) > 1:
        return "the weight of the convolution is computed, or used several times"
    if type(weight.data) is not Tensor:
        return "the weight of the convolution is distributed"
    before = weight.detach().clone()
    generator = torch.Generator().manual_seed(0)
    step = torch.randn(before.shape, generator=generator, dtype=torch.float64).to(before) * before.abs().max() * _STEP
    own = recorded.calls[-1].weight.view_as(before)
    try:
        expected, predicted = (_predicted(recorded, repetition, each) for each in (own, own + step.to(own)))
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        return f"the record cannot be repeated ({error})"
    again = repetition.run()
    if not all(map(_is_same, again, repetition.observed)):
        return "the network computes something else when it is called again"
    try:
        weight.data.add_(step)
        moved = repetition.run()
    finally:
        weight.data.copy_(before)
    for values in zip(repetition.observed, again, expected, moved, predicted, strict=True):
        _require_agreement(recorded, repetition.what, *values)
    return None


def _is_same(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and allclose_for_dtype(first, second)


def _require_agreement(
    recorded: RecordedPass,
    what: str,
    observed: Tensor,
    again: Tensor,
    expected: Tensor,
    moved: Tensor,
    predicted: Tensor,
) -> None:
    """Refuse a record that does not give what the network computes, with its own filters or with moved ones."""
    if not _is_same(expected, observed):
        raise UnsupportedTailError(
            f"Repeating the recorded steps after `{recorded.layer}` must give {what} as the network computed it; it "
            "does not. A step is no torch operation, such as a kernel of an extension, and cannot be measured."
        )
    eps = torch.finfo(observed.dtype).eps
    values = [value.to(expected) for value in (observed, again, expected, moved, predicted)]
    seen = torch.stack([value.isfinite() for value in values]).all(0)
    observed, again, expected, moved, predicted = (value[seen].double() for value in values)
    largest = torch.stack([observed, moved, predicted]).abs().amax() if seen.any() else 0.0
    noise = _distance(observed, again) + _distance(observed, expected)  # of another number of samples, or dtype
    change, missed = _distance(moved, again), _distance(moved, predicted)
    rounding = (4 if observed.dtype in LOW_PRECISION else 100) * eps * float(largest) + _MARGIN * noise
    if missed > eps**0.5 * max(change, _distance(predicted, expected)) + rounding:
        raise UnsupportedTailError(
            f"The recorded steps after `{recorded.layer}` must predict {what} at other filters; it changed by "
            f"{change:.6g}, and the prediction is wrong by {missed:.6g}. Something reaches the loss that is no "
            "recorded operation: the weight used elsewhere, a gradient inside the forward pass, a thread, a kernel of "
            "an extension. Measure another layer (`layer=...`)."
        )


def _distance(first: Tensor, second: Tensor) -> float:
    return float((first - second).abs().max()) if first.numel() else 0.0


def _predicted(recorded: RecordedPass, repetition: Repetition, weight: Tensor) -> list[Tensor]:
    """Return what the record gives for another weight of the convolution."""
    call, graph = recorded.calls[-1], recorded.graph
    needed: set[int] = set()
    for node in repetition.nodes:
        needed.update(graph.ancestry(node, in_steps=True))
    with (
        not_recorded(),
        torch.inference_mode(False),
        torch.autocast(weight.device.type, enabled=False),
        torch.no_grad(),
    ):
        inputs = graph.captures.value(call.inputs).to(weight.dtype)
        convolution = cast(
            Any, {3: nn.functional.conv1d, 4: nn.functional.conv2d, 5: nn.functional.conv3d}[inputs.dim()]
        )
        geometry = (call.geometry[name] for name in ("stride", "padding", "dilation", "groups"))
        z = convolution(inputs, weight, call.bias.to(weight), *geometry)
        values = graph.replay({call.node: z}, repetition.end, only=needed)
    found = (values[node].detach() for node in repetition.nodes)
    return [value[repetition.rows] if value.dim() else value for value in found]
