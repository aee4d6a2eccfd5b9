"""Builds the record of one validation step: what depends on the monitored convolution, from its output to the loss."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_flatness.errors import Refusal
from lightning_flatness.recording.depth import LayerChoice, is_counted
from lightning_flatness.recording.dispatch import ConvolutionWatch, GraphTracer, dispatcher
from lightning_flatness.recording.layers import CONVOLUTIONS, outer, program_kind
from lightning_flatness.recording.network_call import NetworkCall
from lightning_flatness.recording.operation import tensors
from lightning_flatness.recording.recorded_pass import ConvolutionCall, LinearCall
from lightning_flatness.recording.weights import WeightCopies

_LISTED = 5  # so many other convolutions a message names


class PassBuilder:
    """What has been recorded so far.

    Of several convolutions the deepest is followed, see `LayerChoice`: one that runs for the first time and is deeper
    than all before starts the record anew, others are passed over. The record goes on until the pass is taken, so that
    it holds the loss.

    Args:
        wanted: name of the convolution to follow; None: the deepest, see `is_counted`.
        copies: of weights; None: new ones for each convolution.
        names: of the modules, in the order of the model, which decides between equals.

    Attributes:
        tracer: of the operations; None as long as no convolution has run.
        layer: name of the convolution that is followed; None: none has run.
        copies: of weights.
        convolution_calls: its calls.
        linear_calls: calls of linear modules on what depends on it.
        output: what the outermost module around it that has returned so far returned first, with its name.
        network_call: the outermost call of a module during which it ran; None if that was not kept.
        is_ignored: whether nothing is recorded.
        failure: the exception that ended the record.
        passed_over: name of the last convolution that was not followed, as it sees all of its input at once.
        choice: between the convolutions that run; None: one is wanted.
    """

    def __init__(self, wanted: str | None, copies: WeightCopies | None, names: Iterable[str] = ()) -> None:
        """Start with nothing."""
        self._wanted, self._keeps_copies = wanted, copies is not None
        self.choice = LayerChoice(names) if wanted is None else None
        self.copies = copies or WeightCopies()
        self.tracer: GraphTracer | None = None
        self.layer: str | None = None
        self.convolution_calls: list[ConvolutionCall] = []
        self.linear_calls: list[LinearCall] = []
        self.output: tuple[str | None, Any] = None, None
        self.network_call: NetworkCall | None = None
        self.is_ignored = False
        self.failure: Exception | None = None
        self.passed_over: str | None = None
        self._have_run: set[str] = set()
        self._not_own: set[str] = set()  # names of modules that did not convolve with their own weight
        self._has_convolved = False  # whether the module that runs did
        self._open_call: NetworkCall | None = None  # the outermost one that has not ended
        self._watch: ConvolutionWatch | None = None

    def before_convolution(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Wait for the convolution within the call of a module: the record begins at the operation's own output."""

        def begin(inputs: Tensor, output: Tensor, arguments: dict[str, Any]) -> None:
            try:
                self._begin(name, module, inputs, output, arguments)
            except Exception as error:  # the user's forward pass must go on
                self.fail(error)

        if self.choice is not None:
            dispatcher().attach(self.choice.watch)  # before the other: it knows the depth of an output first
        self._watch, self._has_convolved = ConvolutionWatch(begin), False
        dispatcher().attach(self._watch)
        if self.tracer is not None and name == self.layer:
            self.tracer.is_convolving = True

    def after_convolution(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """End the wait when the module's call has ended."""
        self._end_watch()
        if self.tracer is not None:
            self.tracer.is_convolving = False
        if not self._has_convolved:
            self._not_own.add(name)
            if self.choice is not None and any(_is_counted(module, args[0], each) for each in tensors(output)):
                depth_of = self.choice.watch.of
                self.choice.add(name, module, max(depth_of(output), depth_of(args) + 1))

    def after_linear(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Note the call of a linear module on what depends on the convolution."""
        inputs = next(iter(tensors([args, kwargs])), None)
        if self.tracer is None or inputs is None or not isinstance(output, Tensor):
            return
        graph = self.tracer.graph
        before, after = graph.node(inputs), graph.node(output)
        has_rows = output.dim() > 1 and sum(size > 1 for size in output.shape[1:]) <= 1
        if before is not None and after is not None and has_rows:
            self.linear_calls.append(LinearCall(name, before, after, *self.copies.of(module)))

    def before_network(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the outermost call of a module around the measured layer, in the first pass.

        A module whose `forward` was replaced is no network: with several processes, Lightning calls steps in this way.
        """
        if self._keeps_copies or self._open_call is not None:
            return
        if getattr(module.forward, "__func__", None) is type(module).forward:
            with suppress(Exception):  # a pass whose inputs cannot be copied is measured all the same
                self._open_call = NetworkCall(name, module, args, kwargs)

    def after_network(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Note what a module around the convolution returned."""
        if self.layer is not None and self.layer.startswith(f"{name}." if name else ""):
            self.output = outer(self.output, name, output)  # the others are let go, with their maps
        call = self._open_call
        if call is not None and call.module is module:
            self._open_call = None
            with suppress(Exception):
                self._finish(call, output)

    def _finish(self, call: NetworkCall, output: Any) -> None:
        """Keep what a call returned, if the convolution ran during it."""
        if self.tracer is not None and call is self.network_call:
            self.network_call = call.finished(output, self.tracer.graph)

    def fail(self, error: Exception) -> None:
        """Record no more, because of this error."""
        self.failure = error
        self.stop()

    def stop(self) -> None:
        """Record no more."""
        if self.tracer is not None:
            self.tracer.stop()
        if self.choice is not None:
            dispatcher().detach(self.choice.watch)
        self._end_watch()

    def _end_watch(self) -> None:
        if self._watch is not None:
            dispatcher().detach(self._watch)
            self._watch = None
        dispatcher().settle()  # what ended within an operation could not leave the stack of modes

    def refusal(self, modules: dict[str, nn.Module]) -> Refusal | None:
        """Return why there is nothing to measure; None if there is.

        Raises:
            ValueError: if a batch was empty.
            OutOfMemoryError: if memory was short; that says nothing about the network.
        """
        if (failed := self._failed()) is not None:
            return failed
        chosen = self._wanted if self.choice is None else self.choice.deepest
        if chosen in self._not_own:
            return Refusal(
                f"`{chosen}` must convolve with its own `weight`; it does more than convolve with its `weight`. "
                f"{self.remedy(chosen)}"
            )
        if self.tracer is not None and self.layer != chosen:
            return Refusal(
                f"The deepest convolution must be recorded from its first call on; `{chosen}` ran before "
                f"`{self.layer}` for the first time, and deeper than that later. Name one (`layer={chosen!r}`)."
            )
        if self.tracer is not None:
            return None
        there = [name for name, module in modules.items() if isinstance(module, CONVOLUTIONS)]
        remedy = f"Name one that runs with `layer=...`: {there}." if there else "The model has no convolution."
        if (kind := program_kind(modules.values())) is not None:
            remedy = f"The network is {kind}; give the eager network that it was made from."
        # The same text for all batches of a run, so that it is one warning.
        return Refusal(f"A forward pass must run a convolution that is more than a linear layer; none did. {remedy}")

    def _failed(self) -> Refusal | None:
        """Return the refusal of a record that an exception has ended; raise one that says nothing of the network."""
        watched = self.choice.watch.failure if self.choice else None
        failure = self.failure or watched or (self.tracer.graph.out_of_memory if self.tracer else None)
        return ended_by(failure)

    def remedy(self, name: str | None) -> str:
        """Return what to do if this convolution cannot be measured."""
        others = [other for other in self.choice.ranking if other != name] if self.choice is not None else []
        listed = f"; these ran, the deepest first: {others[:_LISTED]}" if others else ""
        return f"Name another convolution (`layer=...`){listed}."

    def _begin(self, name: str, module: nn.Module, inputs: Tensor, output: Tensor, arguments: dict[str, Any]) -> None:
        if self._watch is None or not is_own_weight(module, arguments["weight"]):
            return
        self._has_convolved = True
        if self._wanted is None and not _is_counted(module, inputs, output):
            self.passed_over = name
            return
        if len(output) == 0:
            raise ValueError(f"A batch must hold at least one sample; `{name}` got none.")
        dispatcher().detach(self._watch)
        is_chosen = self.choice is None or self.choice.add(name, module, self.choice.watch.of(output))
        if is_chosen and name not in self._have_run:
            self._start(name, module)
        self._have_run.add(name)
        if name == self.layer and self.tracer is not None:
            graph = self.tracer.graph
            node, captured = graph.add_input(output)
            weights, inputs_index = self.copies.of(module), graph.captures.add(inputs)
            self.convolution_calls.append(ConvolutionCall(node, captured, inputs_index, *weights, arguments))

    def _start(self, name: str, module: nn.Module) -> None:
        """Forget what was recorded and follow this convolution."""
        if self.tracer is not None:
            self.tracer.stop()
        if not self._keeps_copies:
            self.copies = WeightCopies()
        self.convolution_calls, self.linear_calls, self.output, self.passed_over = [], [], (None, None), None
        self.tracer, self.layer = GraphTracer(finds_functions=not self._keeps_copies), name
        self.network_call = self._open_call
        start_at(module, self.tracer)


def _is_counted(module: nn.Module, inputs: Tensor, output: Tensor) -> bool:
    return is_counted(inputs.shape[2:], cast(nn.Conv2d, module).kernel_size, output.shape[2:])


def is_own_weight(module: nn.Module, used: Tensor) -> bool:
    """Return whether an operation uses the weight of the module: itself, computed anew, or in the dtype of autocast."""
    weight = cast(Tensor, module.weight)
    if used.shape != weight.shape:
        return False
    if "weight" not in module._parameters:  # computed, as by a parametrization
        return True
    if used.dtype == weight.dtype:
        return used.data_ptr() == weight.data_ptr()
    return weight.is_cuda or torch.equal(used, weight.detach().to(used.dtype))


def ended_by(failure: Exception | None) -> Refusal | None:
    """Return the refusal of a record that an exception has ended; raise one that says nothing of the network.

    Raises:
        ValueError: if a batch was empty.
        OutOfMemoryError: if memory was short.
    """
    if isinstance(failure, (ValueError, torch.OutOfMemoryError)):
        raise failure
    return None if failure is None else Refusal(f"Recording the forward pass failed: {failure!r}", failure)


def start_at(module: nn.Module, tracer: GraphTracer) -> None:
    """Start a record while its layer runs: from then on nothing else may read the layer's weight."""
    tracer.is_convolving = True
    for weight in (cast(Tensor, module.weight), *module.parameters()):  # or what the weight is computed from
        if weight.dim() > 1:
            tracer.forbid_storage(weight)
    tracer.start()
