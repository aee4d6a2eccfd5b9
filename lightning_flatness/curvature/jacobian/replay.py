"""Repeats a record for some of its samples, and keeps where the parameters act and on what."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_flatness.curvature.jacobian.plan import Plan, Use
from lightning_flatness.precision import upcast
from lightning_flatness.recording.graph import Cut
from lightning_flatness.recording.operation import Captured, Node, Operation, named_arguments, tensors
from lightning_flatness.recording.recorded_layers import RecordedLayers

_VIEWS = ("view", "reshape", "_unsafe_view")


class Tap(NamedTuple):
    """Where parameters act.

    Attributes:
        value: the operation's output, or copies of a parameter; the logits are differentiated by it.
        uses: of parameters.
        arguments: of the operation by name.
        inputs: what the weight of a layer or the scale of a normalisation acts on; None for copies.
        normalized: number of last dimensions that the parameters of a normalisation span; None: they are of channels.
    """

    value: Tensor
    uses: list[Use]
    arguments: dict[str, Any]
    inputs: Tensor | None = None
    normalized: int | None = None

    @property
    def is_convolution(self) -> bool:
        """Whether the operation is a convolution."""
        return "dilation" in self.arguments

    @property
    def has_channels(self) -> bool:
        """Whether the second dimension of the output has channels that the parameters belong to."""
        is_norm = "eps" in self.arguments or "epsilon" in self.arguments
        return self.is_convolution or (is_norm and self.normalized is None)


class Replay:
    """The network from the parameters to the cut, for some of the samples.

    Args:
        recorded: one pass.
        plan: of the same pass.
        cut: where the network ends.
        samples: n, the number of samples of the pass.
        part: which of them.

    Attributes:
        taps: where parameters act, in order.
        ends: values that all later ones depend on alone, with the number of taps before them, in order.
        output: the cut's values.
    """

    def __init__(self, recorded: RecordedLayers, plan: Plan, cut: Cut, samples: int, part: slice) -> None:
        """Run it."""
        self._recorded, self._plan, self._samples, self._part = recorded, plan, samples, part
        self._count = len(range(*part.indices(samples)))
        self.taps: list[Tap] = []
        self.ends: list[tuple[int, Tensor]] = []
        graph = recorded.graph
        values = graph.replay(
            {node: upcast(graph.captures.value(index)) for node, index in graph.inputs.items()},
            cut.end,
            only=frozenset(graph.ancestry(cut.node, in_steps=True)),
            repeat=self._repeat,
            captured=self._captured,
        )
        self.output = values[cut.node]

    def _captured(self, index: int, value: Tensor) -> Tensor:
        """Return the part of a captured value that belongs to the samples."""
        is_whole = self._count == self._samples or index in self._recorded.state
        if is_whole or value.dim() == 0 or len(value) == 0 or len(value) % self._samples:
            return value
        return value.unflatten(0, (self._samples, -1))[self._part].flatten(0, 1)

    def _repeat(self, number: int, operation: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        results = self._results(number, operation, args, kwargs)
        if number in self._plan.ends:
            end = next(iter(tensors(results)))
            if end.requires_grad:
                self.ends.append((len(self.taps), end))
        return results

    def _results(self, number: int, operation: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._count != self._samples and args and isinstance(args[0], Tensor):
            args = self._resized(operation, args)
        kind, uses = self._plan.kinds.get(number), self._plan.uses.get(number, [])
        named = named_arguments(operation.function, args, kwargs)
        if kind == "norm":
            plain, normalized = _normalized(operation, named)
            result = self._tapped(number, _scaled(plain, named, normalized), Tap(plain, uses, named, plain, normalized))
            return result, *[result.detach().flatten()[:0]] * (len(operation.results) - 1)
        if kind == "broadcast":
            (use,) = uses
            if operation.name == "prelu":  # whole as inference mode records it; its weight is of the channels
                x, copies = args[0], args[1].reshape(-1, *[1] * (args[0].dim() - 2))
                named["weight"], copies = copies, copies.expand(x.shape)
                copies = self._tapped(None, copies, Tap(copies, uses, named))
                return torch.where(x > 0, x, copies * x)
            shape = torch.broadcast_shapes(*(arg.shape for arg in args if isinstance(arg, Tensor)))
            copies = named[use.argument].expand(shape)
            copies = self._tapped(None, copies, Tap(copies, uses, named))
            given = [
                copies if isinstance(a, Node) and a.index == use.node else b
                for a, b in zip(operation.args, args, strict=True)
            ]
            return operation.repeat(tuple(given), kwargs)
        result = operation.repeat(args, kwargs)
        if kind is None:
            return result
        data = None if kind == "expansion" else next(named[name] for name in ("input", "mat1", "self") if name in named)
        return self._tapped(number, result, Tap(result, uses, named, data))

    def _tapped(self, number: int | None, value: Tensor, tap: Tap) -> Tensor:
        """Note a tap and return what the network goes on with, free to be overwritten where it is."""
        if not value.requires_grad:
            value = (value.clone() if value.is_inference() else value.detach()).requires_grad_()
        self.taps.append(tap._replace(value=value))
        return value.clone() if number in self._plan.overwritten else value

    def _resized(self, operation: Operation, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return the arguments with the sizes that hold the number of samples changed to that of the part."""
        first = operation.args[0]
        graph, n, count = self._recorded.graph, self._samples, self._count
        if len(args) < 2 or not isinstance(args[1], (list, tuple)) or not isinstance(first, (Node, Captured)):
            return args
        index = first.index
        before = (graph.tensor_of(index) if isinstance(first, Node) else graph.captures.peek(index)).shape
        sizes = list(args[1])
        if operation.name in _VIEWS and before.numel() != args[0].numel():
            place = next((place for place, size in enumerate(sizes) if size > 0 and size % n == 0), None)
            if place is not None:
                sizes[place] = sizes[place] // n * count
        if operation.name == "expand" and sizes[0] > 0 and sizes[0] % n == 0:
            is_new = len(sizes) > len(before) or before[0] == 1
            sizes[0] = sizes[0] // n * count if is_new else len(args[0])
        if operation.name == "repeat" and sizes[0] % n == 0 and args[0].shape[0] == before[0]:
            sizes[0] = sizes[0] // n * count
        return args[0], sizes, *args[2:]


def _normalized(operation: Operation, named: dict[str, Any]) -> tuple[Tensor, int | None]:
    """Return what the affine parameters of a normalisation act on, and how many last dimensions they span."""
    x = named["input"]
    if "layer_norm" in operation.name:
        spanned = list(named["normalized_shape"])
        return F.layer_norm(x, spanned, eps=named["eps"]), len(spanned)
    if "group_norm" in operation.name:
        return F.group_norm(x, named.get("num_groups") or named["group"], eps=named["eps"]), None
    eps = named.get("eps", named.get("epsilon"))
    shape = (-1, *[1] * (x.dim() - 2))
    scale = (named["running_var"] + eps).rsqrt()
    return x * scale.reshape(shape) - (named["running_mean"] * scale).reshape(shape), None


def _scaled(plain: Tensor, named: dict[str, Any], normalized: int | None) -> Tensor:
    shape = (-1, *[1] * (plain.dim() - 2))
    weight, bias = (
        value if value is None or normalized else value.reshape(shape) for value in (named["weight"], named["bias"])
    )
    scaled = plain if weight is None else plain * weight
    return scaled if bias is None else scaled + bias
