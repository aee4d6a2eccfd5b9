"""A recorded validation step, from the monitored convolution to the loss, as a value."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor, nn

from lightning_flatness.precision import upcast
from lightning_flatness.recording.graph import Cut, OperationGraph
from lightning_flatness.recording.network_call import NetworkCall
from lightning_flatness.recording.operation import Captured, Node, map_tree
from lightning_flatness.recording.operators import Trait

_SQUASHING = ("softmax", "_softmax", "sigmoid")
_RESHAPING = ("view", "_unsafe_view", "reshape", "flatten", "squeeze", "unsqueeze", "to", "_to_copy", "alias", "detach")
_TAKE_LOGITS = ("binary_cross_entropy_with_logits",)


class LinearCall(NamedTuple):
    """One call of a linear module after the monitored convolution.

    Attributes:
        name: of the module.
        inputs: node of its input.
        output: node of its output.
        weight: one row per output, shape (c, j).
        bias: shape (c,).
    """

    name: str
    inputs: int
    output: int
    weight: Tensor
    bias: Tensor


class ConvolutionCall(NamedTuple):
    """One call of the monitored convolution.

    Attributes:
        node: of its output `z`, an input of the graph.
        output: index of the captured `z`.
        inputs: index of the captured input `A` of the operation, padded where the module pads it itself.
        weight: `W` as it was in this pass, shape (k, d).
        bias: shape (k,).
        geometry: arguments of the operation by name: stride, padding, dilation, groups.
    """

    node: int
    output: int
    inputs: int
    weight: Tensor
    bias: Tensor
    geometry: dict[str, Any]


@runtime_checkable
class RecordedLoss(Protocol):
    """What is read of a record to say what the loss is as a function of a cut."""

    @property
    def graph(self) -> OperationGraph:
        """The recorded operations."""

    @property
    def cuts(self) -> tuple[Cut, ...]:
        """The nodes through which all influence on the loss passes, in order; the loss is the last."""

    @property
    def linear_calls(self) -> tuple[LinearCall, ...]:
        """Calls of linear modules, in order."""

    @property
    def ancestry(self) -> frozenset[int]:
        """The numbers of the operations that the loss depends on."""

    @property
    def path(self) -> str:
        """The recorded steps up to the loss."""


@dataclass(frozen=True)
class RecordedPass:
    """One pass through the network, from the monitored convolution to the loss.

    Attributes:
        graph: every operation that depends on the convolution's output.
        layer: name of the convolution.
        convolution: the module; a linear layer where the record starts at the classifier.
        calls: of it; the loss may depend on several.
        loss: node of the loss, a scalar.
        cuts: the nodes through which the influence of all calls on the loss passes, in order.
        linear_calls: of linear modules, in order.
        weight_is_shared: whether another module has the same weight.
        is_alone: whether no operation uses numbers that a layer before this one computed in another way; only a record
            from the classifier on knows.
        passed_over: name of a later convolution that was not followed, as it sees all of its input at once.
        network_call: the outermost call of a module during which the convolution ran, in a recorder's first pass.
        network_weights: how many numbers the parameters of the network have.
    """

    graph: OperationGraph
    layer: str
    convolution: nn.Module
    calls: tuple[ConvolutionCall, ...]
    loss: int
    cuts: tuple[Cut, ...]
    linear_calls: tuple[LinearCall, ...] = ()
    weight_is_shared: bool = False
    is_alone: bool = True
    passed_over: str | None = None
    network_call: NetworkCall | None = None
    network_weights: int = 0

    def __len__(self) -> int:
        """Return the number of samples that the convolution saw."""
        return len(self.graph.captures.peek(self.calls[0].output))

    @cached_property
    def ancestry(self) -> frozenset[int]:
        """The numbers of the operations that the loss depends on, see `OperationGraph.ancestry`."""
        return frozenset(self.graph.ancestry(self.loss))

    @property
    def path(self) -> str:
        """The recorded steps from the convolution to the loss."""
        steps = [self.graph.operations[number].name for number in sorted(self.ancestry)]
        return " > ".join([self.layer, *steps])

    @property
    def remedy(self) -> str:
        """What to try if this convolution cannot be measured."""
        if self.passed_over is None:
            return "Name another convolution (`layer=...`)."
        return (
            f"`{self.passed_over}` runs later, and sees all of its input at once: name it "
            f"(`layer={self.passed_over!r}`) or another."
        )

    @property
    def takes_probabilities(self) -> bool:
        """Whether a loss that takes logits is given the output of a softmax or sigmoid, as it is or reshaped."""
        return takes_probabilities(self.graph, self.ancestry)

    def points(self) -> dict[int, Tensor]:
        """Return the recorded output of each call of the convolution by its node, ready to be differentiated by."""
        values = self.graph.captures
        return {call.node: upcast(values.value(call.output)).requires_grad_() for call in self.calls}

    def encoded(self, numbers: Iterable[int]) -> tuple[Any, ...]:
        """Return operations with their arguments and wiring as comparable values, whatever the batch's size.

        Args:
            numbers: of the operations. A captured value with a row per sample is known by the shape of its rows.
        """
        samples = len(self)

        def encode(item: Any) -> Any:
            if isinstance(item, Node):
                return "node", item.index
            if isinstance(item, Captured):
                value = self.graph.captures.peek(item.index)
                return "captured", value.dtype, tuple(value.shape[1:] if value.shape[:1] == (samples,) else value.shape)
            return "samples" if item == samples and isinstance(item, int) and samples > 1 else item

        operations = (self.graph.operations[number] for number in numbers)
        return samples > 1, *(
            (operation.function, map_tree(operation.args, encode), str(map_tree(operation.kwargs, encode)))
            for operation in operations
        )


def takes_probabilities(graph: OperationGraph, ancestry: frozenset[int]) -> bool:
    """Return whether one of these operations is a loss that takes logits and is given probabilities.

    Args:
        graph: the operations.
        ancestry: the numbers of those that the loss depends on.
    """
    squashed: set[int] = set()  # nodes
    for number in sorted(ancestry):
        operation = graph.operations[number]
        first = operation.args[0] if operation.args else None
        if not isinstance(first, Node):
            continue
        if first.index in squashed and (operation.name in _TAKE_LOGITS or Trait.LOG_SOFTMAX in operation.traits):
            return True
        if operation.name in _SQUASHING or (first.index in squashed and operation.name in _RESHAPING):
            squashed.update(operation.results)
    return False
