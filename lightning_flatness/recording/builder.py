"""Builds the record of one forward pass, call by call."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from lightning_flatness.recording.dispatch import GraphTracer
from lightning_flatness.recording.recorded_pass import ConvolutionCall, ModuleCall
from lightning_flatness.recording.weights import WeightCopies


class PassBuilder:
    """What has been recorded of a forward pass so far.

    Of several convolutions the last one to run for the first time is followed: each one that runs starts the record
    anew.

    Attributes:
        layer: name of the convolution that is followed; None: none has run.
        weights: its weight and bias.
        convolution_calls: its calls.
        calls: calls of linear modules on what depends on it.
        outputs: what the modules around it returned, one call for each tensor.
        is_complete: whether nothing more is recorded: the first complete pass is measured, later ones run untouched.
        failure: the exception that ended the record.
    """

    def __init__(self) -> None:
        """Start with nothing."""
        self.tracer: GraphTracer | None = None
        self.layer: str | None = None
        self.weights: tuple[Tensor, Tensor] | None = None
        self.convolution_calls: list[ConvolutionCall] = []
        self.calls: list[ModuleCall] = []
        self.outputs: list[ModuleCall] = []
        self.is_complete = False
        self.failure: Exception | None = None
        self._have_run: set[str] = set()

    def must_start(self, name: str) -> bool:
        """Return whether the record starts at this call of a convolution."""
        return self.tracer is None or name not in self._have_run

    def start(self, name: str, module: nn.Module, copies: WeightCopies) -> None:
        """Forget what was recorded and follow this convolution."""
        self.stop()
        self.convolution_calls, self.calls, self.outputs = [], [], []
        self.tracer, self.layer = GraphTracer(), name
        self.weights = copies.of(module)
        for weight in (cast(Tensor, module.weight), *module.parameters()):  # or what the weight is computed from
            if weight.dim() > 1:
                self.tracer.forbid_storage(weight)
        self.tracer.start()

    def add_convolution(self, name: str, inputs: Tensor, output: Tensor) -> None:
        """Note a call of a convolution."""
        self._have_run.add(name)
        if self.tracer is not None and name == self.layer:
            graph = self.tracer.graph
            node, captured = graph.add_input(output)
            self.convolution_calls.append(ConvolutionCall(node, captured, graph.captures.add(inputs)))

    def add_call(self, name: str, inputs: Tensor, output: Tensor, linear: nn.Module, copies: WeightCopies) -> bool:
        """Note the call of a linear module if it can end the tail; return whether it can."""
        if not self._can_end_the_tail(inputs, output):
            return False
        self.calls.append(self._call(name, inputs, output, copies.of(linear)))
        return True

    def add_output(self, name: str, output: Tensor) -> bool:
        """Note a tensor that a module returned if it can be the logits; return whether it can."""
        if not self._can_end_the_tail(output, output):
            return False
        self.outputs.append(self._call(name, output, output, None))
        return True

    def complete(self) -> None:
        """Record no more; the record stays what it is, whatever happens to the network."""
        self.is_complete = True
        if self.tracer is not None:
            self.tracer.finalize()

    def fail(self, error: Exception) -> None:
        """Record no more, because of this error."""
        self.failure = error
        self.stop()

    def stop(self) -> None:
        """Record no more."""
        if self.tracer is not None:
            self.tracer.stop()

    def _can_end_the_tail(self, inputs: Tensor, output: Tensor) -> bool:
        """Return whether the inputs depend on the convolution and the output is one row per sample."""
        depends = self.tracer is not None and self.tracer.graph.node(inputs) is not None
        return depends and output.dim() >= 2 and output.shape[2:].numel() == 1

    def _call(self, name: str, inputs: Tensor, output: Tensor, weights: tuple[Tensor, Tensor] | None) -> ModuleCall:
        graph = cast(GraphTracer, self.tracer).graph
        copy = output.detach().flatten(1).clone()
        return ModuleCall(name, inputs, copy, weights, graph.node(output), len(graph.operations))
