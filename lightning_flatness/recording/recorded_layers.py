"""A recorded validation step as a function of the parameters of some layers, as a value."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from lightning_flatness.recording.graph import Cut, OperationGraph
from lightning_flatness.recording.recorded_pass import LinearCall, takes_probabilities


@dataclass(frozen=True)
class RecordedLayers:
    """One pass through the network, from the first use of some parameters to the loss.

    The parameters are the inputs of the graph: a layer's call is an operation of which one argument is its weight.

    Attributes:
        graph: every operation that depends on the parameters.
        parameters: node of each parameter by its name; one that several modules share has its first name.
        layers: name of the weight of each layer to measure, by the layer's name.
        is_whole: whether the parameters are all of the network's.
        loss: node of the loss, a scalar.
        cuts: the nodes through which the influence of all parameters on the loss passes, in order.
        state: indices of captured values that are parameters or buffers of the network, and not data.
    """

    graph: OperationGraph
    parameters: dict[str, int]
    layers: dict[str, str]
    is_whole: bool
    loss: int
    cuts: tuple[Cut, ...]
    state: frozenset[int] = frozenset()

    @property
    def linear_calls(self) -> tuple[LinearCall, ...]:
        """None: the weights are no constants of this record."""
        return ()

    @cached_property
    def ancestry(self) -> frozenset[int]:
        """The numbers of the operations that the loss depends on, see `OperationGraph.ancestry`."""
        return frozenset(self.graph.ancestry(self.loss))

    @property
    def takes_probabilities(self) -> bool:
        """See `RecordedPass.takes_probabilities`."""
        return takes_probabilities(self.graph, self.ancestry)

    @property
    def path(self) -> str:
        """The recorded steps from the first layer to the loss."""
        first = next(iter(self.layers), "the network")
        return " > ".join([first, *(self.graph.operations[number].name for number in sorted(self.ancestry))])
