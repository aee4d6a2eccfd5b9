"""Builds the record of one validation step: what depends on the monitored convolution, from its output to the loss."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_flatness.recording.dispatch import ConvolutionWatch, GraphTracer, dispatcher
from lightning_flatness.recording.recorded_pass import ConvolutionCall, LinearCall
from lightning_flatness.recording.weights import WeightCopies


class PassBuilder:
    """What has been recorded so far.

    Of several convolutions the last one to run for the first time is followed: each one that runs starts the record
    anew. The record goes on until the pass is taken, so that it holds the loss.

    Attributes:
        tracer: of the operations; None as long as no convolution has run.
        layer: name of the convolution that is followed; None: none has run.
        convolution_calls: its calls.
        linear_calls: calls of linear modules on what depends on it.
        outputs: what the modules around it returned, by name, in order.
        is_ignored: whether nothing is recorded.
        failure: the exception that ended the record.
        reason: why the convolution that ran last cannot be followed; None if it can.
        passed_over: name of the last convolution that was not followed as its output is a single position.
        seen: names of the convolutions that have been followed.
    """

    def __init__(self) -> None:
        """Start with nothing."""
        self.tracer: GraphTracer | None = None
        self.layer: str | None = None
        self.convolution_calls: list[ConvolutionCall] = []
        self.linear_calls: list[LinearCall] = []
        self.outputs: list[tuple[str, Any]] = []
        self.is_ignored = False
        self.failure: Exception | None = None
        self.reason: str | None = None
        self.passed_over: str | None = None
        self.seen: set[str] = set()
        self._watch: ConvolutionWatch | None = None

    def expect(self, name: str, module: nn.Module, follow_any: bool, copies: WeightCopies) -> None:
        """Wait for the convolution within the call of a module that is about to begin.

        Args:
            name: of the module.
            module: the module.
            follow_any: whether any convolution may be followed, but for those whose output is a single position.
            copies: of weights.
        """

        def begin(inputs: Tensor, output: Tensor, arguments: dict[str, Any]) -> None:
            try:
                if self._watch is None:
                    return
                if follow_any and output.shape[2:].numel() == 1:
                    self.passed_over = name
                    return
                self._begin(name, module, inputs, output, arguments, copies)
            except Exception as error:  # the user's forward pass must go on
                self.fail(error)

        self._watch = ConvolutionWatch(begin)
        dispatcher().attach(self._watch)
        if self.tracer is not None and name == self.layer:
            self.tracer.is_convolving = True

    def arrive(self, name: str) -> None:
        """End the wait when the module's call has ended."""
        if self._watch is not None:
            dispatcher().detach(self._watch)
            if not self.convolution_calls and self.layer in (None, name):
                self.reason = f"`{name}` ran without a convolution with its `weight`"
            self._watch = None
        if self.tracer is not None:
            self.tracer.is_convolving = False

    def _begin(
        self,
        name: str,
        module: nn.Module,
        inputs: Tensor,
        output: Tensor,
        arguments: dict[str, Any],
        copies: WeightCopies,
    ) -> None:
        if len(output) == 0:
            raise ValueError(f"A batch must hold at least one sample; `{name}` got none.")
        if not _is_own_weight(module, arguments["weight"]):
            return
        dispatcher().detach(cast(ConvolutionWatch, self._watch))
        if self.tracer is None or name not in self.seen:
            self._start(name, module)
        self.seen.add(name)
        if name == self.layer and self.tracer is not None:
            graph = self.tracer.graph
            node, captured = graph.add_input(output)
            weight, bias = copies.of(module)
            self.convolution_calls.append(
                ConvolutionCall(node, captured, graph.captures.add(inputs), weight, bias, arguments)
            )

    def _start(self, name: str, module: nn.Module) -> None:
        if self.tracer is not None:
            self.tracer.stop()
        self.convolution_calls, self.linear_calls, self.outputs, self.reason = [], [], [], None
        self.tracer, self.layer = GraphTracer(), name
        self.tracer.is_convolving = True
        for weight in (cast(Tensor, module.weight), *module.parameters()):  # or what the weight is computed from
            if weight.dim() > 1:
                self.tracer.forbid_storage(weight)
        self.tracer.start()

    def add_linear(self, name: str, inputs: Tensor, output: Tensor, module: nn.Module, copies: WeightCopies) -> None:
        """Note the call of a linear module on what depends on the convolution."""
        if self.tracer is None or (node := self.tracer.graph.node(inputs)) is None:
            return
        out = self.tracer.graph.node(output)
        if out is not None and output.numel() == len(output) * output.shape[-1]:
            self.linear_calls.append(LinearCall(name, node, out, *copies.of(module)))

    def add_output(self, name: str, output: Any) -> None:
        """Note what a module around the convolution returned."""
        self.outputs.append((name, output))

    def fail(self, error: Exception) -> None:
        """Record no more, because of this error."""
        self.failure = error
        self.stop()

    def stop(self) -> None:
        """Record no more."""
        if self._watch is not None:
            dispatcher().detach(self._watch)
            self._watch = None
        if self.tracer is not None:
            self.tracer.stop()


def _is_own_weight(module: nn.Module, used: Tensor) -> bool:
    """Return whether an operation uses the weight of the module: itself, computed anew, or in the dtype of autocast."""
    weight = cast(Tensor, module.weight)
    if used.shape != weight.shape:
        return False
    if "weight" not in module._parameters:  # computed, as by a parametrization
        return True
    if used.dtype == weight.dtype:
        return used.data_ptr() == weight.data_ptr()
    return weight.is_cuda or torch.equal(used, weight.detach().to(used.dtype))
