"""A recorded forward pass, from the monitored convolution to the logits, as a value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from lightning_flatness.errors import GraphError
from lightning_flatness.precision import upcast
from lightning_flatness.recording.graph import OperationGraph


class ModuleCall(NamedTuple):
    """One call of a module after the monitored convolution.

    Attributes:
        name: of the module.
        inputs: its first tensor argument.
        output: a copy of its output, flattened to (n, features).
        weights: a linear module's weight, one row per output, and its bias; None for another module.
        node: of the output in the graph; None if it does not depend on the convolution.
        end: number of operations in the graph when it returned.
    """

    name: str
    inputs: Tensor
    output: Tensor
    weights: tuple[Tensor, Tensor] | None
    node: int | None
    end: int


class ConvolutionCall(NamedTuple):
    """One call of the monitored convolution.

    Attributes:
        node: of its output `z`, an input of the graph.
        output: index of the captured `z`.
        inputs: index of the captured input `A`.
    """

    node: int
    output: int
    inputs: int


@dataclass(frozen=True)
class RecordedPass:
    """One forward pass from the monitored convolution to the logits.

    Attributes:
        graph: every operation that depends on the convolution's output.
        layer: name of the convolution.
        convolution: the module.
        weight: `W` as it was in this pass, shape (k, d).
        bias: shape (k,).
        calls: of the convolution.
        classifier: the call that ends the tail.
        weight_is_shared: whether another module has the same weight.
    """

    graph: OperationGraph
    layer: str
    convolution: nn.Module
    weight: Tensor
    bias: Tensor
    calls: tuple[ConvolutionCall, ...]
    classifier: ModuleCall
    weight_is_shared: bool = False

    def __len__(self) -> int:
        """Return the number of samples that the classifier saw."""
        return len(self.classifier.inputs)

    @property
    def path(self) -> str:
        """The recorded steps from the convolution to the logits."""
        steps = [operation.name for operation in self.graph.operations[: self.classifier.end]]
        return " > ".join([self.layer, *steps, self.classifier.name])

    @property
    def signature(self) -> tuple[Any, ...]:
        """What must not change for a certificate to stay valid."""
        names = tuple(operation.name for operation in self.graph.operations[: self.classifier.end])
        return names, self.classifier.name, tuple(self.classifier.inputs.shape[1:]), len(self.calls)

    def points(self) -> dict[int, Tensor]:
        """Return the recorded output of each call of the convolution by its node, fit to differentiate by."""
        values = self.graph.captures
        return {call.node: upcast(values.value(call.output)).requires_grad_() for call in self.calls}

    def features_at(self, points: dict[int, Tensor]) -> Tensor:
        """Return the classifier's input as a function of the convolution's output, shape (n, j).

        Args:
            points: value of the convolution's output, by node.

        Raises:
            GraphError: if the recorded operations cannot be repeated, or the result is not one row per sample.
        """
        call = self.classifier
        node = self.graph.node(call.inputs)
        if node is None:
            reason = self.graph.incomplete_because(call.end)
            raise GraphError(reason or "the classifier's input does not depend on the convolution")
        if len(call.inputs) != len(next(iter(points.values()))):
            raise GraphError("the batch is folded between the convolution and the classifier")
        features = self.graph.replay(points, call.end)[node]
        if features.shape[2:].numel() != 1:
            raise GraphError(f"the classifier's input must have shape (n, features), got {tuple(features.shape)}")
        return features.flatten(1)
