"""Checks what no recorder of operations can see: the record must predict what other filters would make of a pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from lightning_flatness.errors import UnsupportedTailError
from lightning_flatness.precision import LOW_PRECISION, allclose_for_dtype, upcast
from lightning_flatness.recording.dispatch import not_recorded
from lightning_flatness.recording.recorded_pass import RecordedPass

_STEP = 0.5  # of the largest weight: large enough to stand out of rounding
_CONVOLUTIONS = {3: nn.functional.conv1d, 4: nn.functional.conv2d, 5: nn.functional.conv3d}
_DERIVATIVES = {torch.float32: 1e-2, torch.float64: 1e-6}  # how far derivatives may differ, relative to the largest
_ROUNDINGS = 1e3  # of derivatives that vanish, in those of the largest output per largest weight
_HALF = 0.2  # in half precision
_FARTHER = (1, -1, 4, 16)  # steps to other filters at which something may move that is asleep at the network's own
_MARGIN = 10  # by how much rounding may grow when the filters are moved
SKIPPED = "that the loss depends on the filters as recorded is assumed"
"""Begins the sentence of `FlatnessReport.assumed` about a record that was not verified."""
UNVERIFIED = '`method="jacobian"` does not move the weights to verify its record'
"""Why the record of several layers is not verified."""


class Repetition(NamedTuple):
    """How a part of a recorded pass is computed once more.

    Attributes:
        what: its result, in words.
        nodes: the tensors of the record that it computes.
        end: the number of operations on the record when they were computed.
        observed: their values in the pass.
        rows: which rows of these tensors are computed once more.
        run: computes them.
        differentiate: computes them under autograd, and returns what a function makes of them.
    """

    what: str
    nodes: Sequence[int]
    end: int
    observed: Sequence[Tensor]
    rows: slice
    run: Callable[[], Sequence[Tensor]]
    differentiate: Callable[[Callable[[Sequence[Tensor]], Any]], Any]


class Verification:
    """Says for which loaders and layers of a run the record is still to be verified.

    Args:
        wanted: whether records are verified at all.

    Attributes:
        assumed: what could not be verified, in words.
    """

    def __init__(self, wanted: bool = True) -> None:
        """Start with nothing verified."""
        self._wanted = wanted
        self._verified: set[tuple[int, str | None]] = set()
        self.assumed: tuple[str, ...] = () if wanted else (f"{SKIPPED}: `verify=False`",)

    def is_due(self, loader: int, layer: str | None) -> bool:
        """Return whether the record from a layer, of a loader's batches, is still to be verified."""
        return self._wanted and (loader, layer) not in self._verified

    def note(self, loader: int, layer: str | None, obstacle: str | None) -> None:
        """Note that a record has been verified, or why that is not possible."""
        self._verified.add((loader, layer))
        if obstacle is not None and f"{SKIPPED}: {obstacle}" not in self.assumed:
            self.assumed += (f"{SKIPPED}: {obstacle}",)


def verify(recorded: RecordedPass, repetition: Repetition) -> str | None:
    """Compare what the network computes with moved filters with what the record predicts.

    Threads, kernels of extensions, gradients inside the forward pass or a weight that is used before the convolution
    leave no trace on the record; they move the result all the same. The weight is restored to the last bit.

    Then autograd's derivatives of the network are compared with those of the record: operations within
    `torch.no_grad()` or a `torch.autograd.Function` are recorded like all others, and have other derivatives.

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
        return f"the weight of `{recorded.layer}` is computed, or used several times"
    if type(weight.data) is not Tensor:
        return f"the weight of `{recorded.layer}` is distributed"
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
    return _differentiated(recorded, repetition, own + step.to(own))


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
    """Return what the record gives for another weight of the layer, differentiably if that is."""
    call, graph = recorded.calls[-1], recorded.graph
    needed: set[int] = set()
    for node in repetition.nodes:
        needed.update(graph.ancestry(node, in_steps=True))
    with (
        not_recorded(),
        torch.inference_mode(False),
        torch.autocast(weight.device.type, enabled=False),
        torch.set_grad_enabled(weight.requires_grad),  # switches when it is made: within the inference mode
    ):
        inputs = graph.captures.value(call.inputs).to(weight.dtype)
        if "samples" in call.geometry:  # a linear layer
            change = weight.flatten(1) - call.weight.to(weight.dtype)
            before = graph.captures.value(call.output).to(weight.dtype)
            z = before + (inputs.reshape(-1, change.shape[1]) @ change.mT).view_as(before)
        else:
            convolution = cast(Any, _CONVOLUTIONS[inputs.dim()])
            geometry = (call.geometry[name] for name in ("stride", "padding", "dilation", "groups"))
            z = convolution(inputs, weight, call.bias.to(weight), *geometry)
        values = graph.replay({call.node: z}, repetition.end, only=needed, detach=True)
        found = (values[node] for node in repetition.nodes)
        return [value[repetition.rows] if value.dim() else value for value in found]


def _differentiated(recorded: RecordedPass, repetition: Repetition, elsewhere: Tensor) -> str | None:
    """Compare autograd's first and second derivatives of the network with those of the record.

    Both are taken of one random combination of the outputs, with respect to the weight, the second ones along a random
    direction. The network gets a copy of its weight, on which nobody has hooks. If they are zero, they must not be zero
    at other filters, in the direction of `elsewhere`, as well.
    """
    parameters = recorded.convolution._parameters
    weight = cast(Tensor, parameters["weight"])
    with torch.inference_mode(False):
        copy = nn.Parameter(weight.detach().clone())
        own = recorded.calls[-1].weight.view_as(weight).clone().requires_grad_()
    parameters["weight"] = copy
    try:
        found = repetition.differentiate(partial(_derivatives, weight=copy))
    except Exception as error:  # of the user's code, which may never have run under autograd
        return f"autograd cannot differentiate the network ({type(error).__name__}: {error})"
    finally:
        parameters["weight"] = weight  # type: ignore[assignment]
    try:
        still = _predicted(recorded, repetition, own)
        expected = _derivatives(still, own)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        return f"the record cannot be differentiated ({error})"
    if found[0] is None and expected[0] is not None:
        return f"no gradient reaches `{recorded.layer}`; it may run under `torch.no_grad()`"
    _require_same_derivatives(recorded, repetition, found, expected)
    if not _has_slope(expected):
        step, is_moved = elsewhere - own.detach(), False
        for factor in _FARTHER:
            weight = (own.detach() + factor * step).requires_grad_()
            moved = _predicted(recorded, repetition, weight)
            if _has_slope(_derivatives(moved, weight)):
                return None
            is_moved |= not all(map(torch.equal, moved, still))
        if is_moved:
            raise UnsupportedTailError(
                f"A derivative must reach the filters of `{recorded.layer}`; {repetition.what} depends on them, and "
                "its derivatives are all zero. A step rounds, as `round`, `sign` or a comparison does. Measure a layer "
                "that follows (`layer=...`)."
            )
    return None


def _has_slope(derivatives: Sequence[Tensor | None]) -> bool:
    return derivatives[0] is not None and bool(derivatives[0].any())


@torch.inference_mode(False)
@torch.enable_grad()
def _derivatives(outputs: Sequence[Tensor], weight: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradient of a random combination of the outputs, and its derivative along a random direction.

    The first is None where autograd does not reach the weight, the second where it cannot differentiate twice.
    """
    generator = torch.Generator().manual_seed(1)

    def drawn(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)

    values = [upcast(output) for output in outputs]
    finite = [value.where(value.isfinite(), 0.0) for value in values]
    total = torch.stack([(value * drawn(value)).sum() for value in finite]).sum()
    (first,) = torch.autograd.grad(total, weight, create_graph=True, allow_unused=True)
    if first is None or not first.requires_grad:
        return first, None if first is None else torch.zeros_like(first)
    try:
        direction = drawn(weight) * weight.detach().abs().max()
        (second,) = torch.autograd.grad((first * direction).sum(), weight, materialize_grads=True)
    except RuntimeError:  # as of a fused kernel
        return first.detach(), None
    return first.detach(), second.detach()


def _require_same_derivatives(
    recorded: RecordedPass,
    repetition: Repetition,
    found: Sequence[Tensor | None],
    expected: Sequence[Tensor | None],
) -> None:
    dtype = repetition.observed[0].dtype
    tolerance = _HALF if dtype in LOW_PRECISION else _DERIVATIVES[dtype]
    weight = float(recorded.calls[-1].weight.abs().max())
    size = max(float(output.abs().where(output.isfinite(), 0.0).max()) for output in repetition.observed)
    rounding = _ROUNDINGS * torch.finfo(dtype).eps * size / weight if weight else 0.0
    scale = 0.0
    for order, first, second in zip(("first", "second"), found, expected, strict=True):
        if first is None or second is None or (order == "second" and dtype in LOW_PRECISION):
            continue
        first, second = first.double(), second.double()
        scale = max(scale, float(first.abs().max()), float(second.abs().max()))
        if _distance(first, second) > tolerance * scale + rounding:
            custom = sorted(set(recorded.graph.functions.values()))
            raise UnsupportedTailError(
                f"Autograd must differentiate {repetition.what} as the operations that compute it say; its {order} "
                f"derivatives with respect to the weight of `{recorded.layer}` are others. Part of the network runs "
                f"under `torch.no_grad()`, or in a `torch.autograd.Function` whose backward is no derivative"
                f"{f' {custom}' if custom else ''}, as of a straight-through estimator. Its curvature is not defined: "
                "measure a layer that follows (`layer=...`)."
            )
