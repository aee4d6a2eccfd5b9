"""Hooks on a model that record its forward passes, from a convolution to the loss."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_flatness.errors import Refusal
from lightning_flatness.recording.builder import PassBuilder
from lightning_flatness.recording.dispatch import GraphTracer, dispatcher, not_recorded
from lightning_flatness.recording.eager import EAGER
from lightning_flatness.recording.hooks import Hooks, Wanted
from lightning_flatness.recording.layers import CLASSIFIERS, CONVOLUTIONS, modules_by_name, require_name
from lightning_flatness.recording.recorded_pass import LinearCall, RecordedPass
from lightning_flatness.recording.split import Split, is_compiled
from lightning_flatness.recording.weights import WeightCopies


class _OfThread(threading.local):
    """What each thread has of its own."""

    exclusive: tuple[object, ...] | None = None  # the only recorders that record at present


_THREAD = _OfThread()


@contextmanager
def only_for(recorder: object) -> Iterator[None]:
    """Hide the forward passes within from every recorder of this thread but one; from all if it is no recorder."""
    before, _THREAD.exclusive = _THREAD.exclusive, (recorder, *getattr(recorder, "parts", ()))
    try:
        yield
    finally:
        _THREAD.exclusive = before


class ForwardRecorder:
    """Records the forward passes of a model, without touching them.

    While entered, everything that depends on the output of the deepest convolution is recorded, until `take_pass`
    yields the record as a value; the loss is to be computed before that. The pass itself runs as it would without the
    recorder: no gradient is switched on in it and nothing in it is replaced.

    Args:
        model: any module whose forward pass will run.
        layer: name of the convolution to record from; None: the deepest.
        classifier: name of the linear classifier; None: found.

    Attributes:
        is_settled: whether the modules that matter are known, from a pass before.
        is_compiled: whether something in the model is.
        split: the compiled network, whose beginning stays compiled; None: not before the second time.

    Raises:
        ValueError: if a named module does not exist or is of the wrong kind; lists the candidates.

    Example:
        >>> with ForwardRecorder(model) as recorder:  # doctest: +SKIP
        ...     loss = criterion(model(images), labels)
        ...     recorded = recorder.take_pass(loss)
    """

    _builder_type = PassBuilder

    def __init__(self, model: nn.Module, layer: str | None = None, classifier: str | None = None) -> None:
        """Check the names against the model."""
        self._modules = modules_by_name(model)
        require_name(self._modules, layer, "layer", CONVOLUTIONS)
        require_name(self._modules, classifier, "classifier", CLASSIFIERS)
        self.layer, self.classifier = layer, classifier
        self.is_settled = False  # whether the modules that matter are known
        self._linear: set[str] = set()  # linear modules on what the convolution computes
        self._weight_is_shared = False
        self._network_weights = 0
        self.is_compiled = any(map(is_compiled, model.modules()))
        self._model = model
        self.split: Split | None = None
        self._undo = ExitStack()  # what entering did
        self._hooks = Hooks(partial(guarded, self))
        self._copies: WeightCopies | None = None  # of the modules that matter
        self._builder = self._builder_type(layer, None, self._modules)

    def __enter__(self) -> ForwardRecorder:
        """Install the hooks."""
        with ExitStack() as undo:  # an error on the way undoes what has been done
            undo.callback(self._hooks.remove)
            EAGER.enter()
            undo.callback(EAGER.leave)
            if self.is_settled and self.is_compiled and self.split is None:
                self.split = Split(self._model, self._modules[cast(str, self.layer)])
            if self.split is not None and self.split.problem is None:
                self.split.install(self._hooks, self.clear)
                undo.callback(self.split.uninstall)
            elif self.is_compiled:
                dispatcher().retain()
                undo.callback(dispatcher().release)
            self._install()
            self._undo.callback(undo.pop_all().close)
        return self

    def __exit__(self, *exception: object) -> None:
        """Remove the hooks and stop recording."""
        self.clear()
        self._undo.close()

    def clear(self) -> None:
        """Forget what was recorded."""
        self._builder.stop()
        self._builder = self._builder_type(self.layer, self._copies, self._modules)

    def ignore_passes(self) -> None:
        """Let forward passes go unrecorded until the next `clear`."""
        self.clear()
        self._builder.is_ignored = True

    def depends(self, tensor: Tensor) -> bool:
        """Return whether a tensor depends on the recorded convolution, and not only in steps, as an accuracy does."""
        tracer = self._builder.tracer
        node = None if tracer is None else tracer.graph.node(tensor)
        return node is not None and tracer is not None and tracer.graph.is_moved(node)

    def bypassing(self, values: Iterable[Tensor]) -> Tensor | None:
        """Return a number that is computed from convolutions of this pass, if none is from the recorded one.

        That is known as long as the convolution is neither named nor settled.
        """
        choice, tracer, values = self._builder.choice, self._builder.tracer, list(values)
        if choice is None or tracer is None or any(tracer.graph.node(value) is not None for value in values):
            return None
        return next((value for value in values if choice.watch.of(value)), None)

    def resembles(self, other: object) -> bool:
        """Return whether another recorder is one of the same kind and of the same modules."""
        return type(other) is type(self) and other._modules == self._modules

    @property
    def output(self) -> Any:
        """What the outermost recorded module returned in the first pass since the last call; None if none has run."""
        return self._builder.output[1]

    def require_recorded(self) -> None:
        """Refuse a pass of which nothing could be recorded, or not all until now.

        Raises:
            UnsupportedTailError: says why.
        """
        builder = self._builder
        if (refusal := builder.refusal(self._modules)) is not None:
            raise refusal.error()
        tracer = builder.tracer
        if tracer is None:  # the last layer is none that is recorded from
            return
        graph = tracer.graph
        if not tracer.is_listening():
            raise Refusal(
                f"The loss must be computed in the same inference mode, or compiled call, as the output of "
                f"`{builder.layer}`; that has ended before, and the record with it. Compute both in one "
                "`torch.inference_mode()`, or use `torch.no_grad()`."
            ).error()
        if (gap := graph.incomplete_because(len(graph.operations) + 1)) is not None:
            raise Refusal(f"All that follows `{builder.layer}` must be recorded; {gap}.").error()

    def take_pass(self, loss: Tensor) -> RecordedPass:
        """Return what has been recorded since the last call, up to the loss, and forget it.

        From then on only the modules that turned out to matter are hooked.

        Args:
            loss: what the step computed, a single number.

        Raises:
            UnsupportedTailError: if no convolution ran, the loss does not depend on it, or recording failed.
        """
        self._builder.stop()
        try:
            with not_recorded(), torch.inference_mode(False):
                verdict = self._builder.refusal(self._modules) or self._verdict(loss)
            if isinstance(verdict, Refusal):
                raise verdict.error()
            return verdict
        finally:
            self.clear()

    def _verdict(self, loss: Tensor) -> RecordedPass | Refusal:
        builder = self._builder
        tracer, layer, linear = cast(GraphTracer, builder.tracer), cast(str, builder.layer), builder.linear_calls
        tracer.finalize()
        graph = tracer.graph
        node = graph.node(loss)
        if node is None or loss.numel() != 1:
            what = "does not depend on it" if node is None else f"has shape {tuple(loss.shape)}"
            reason = graph.incomplete_because(len(graph.operations) + 1)
            return Refusal(
                f"The loss must be one number that depends on the output of `{layer}`; it {what}"
                f"{f' ({reason})' if reason else ''}. Return it from the step. {builder.remedy(layer)}"
            )
        names = {call.name for call in linear}
        if not self.is_settled and self.classifier not in {None, *names}:
            return Refusal(
                f"The classifier `{self.classifier}` must run after `{layer}`, on what that computed; it did not. "
                f"Linear modules that did: {sorted(names)}."
            )
        if not self.is_settled:
            self._settle(layer, linear)
        return RecordedPass(
            graph,
            layer,
            self._modules[layer],
            calls=tuple(builder.convolution_calls),
            loss=node,
            cuts=tuple(graph.cuts([call.node for call in builder.convolution_calls], node)),
            linear_calls=tuple(linear),
            weight_is_shared=self._weight_is_shared,
            passed_over=builder.passed_over,
            network_call=builder.network_call,
            network_weights=self._network_weights,
        )

    def _settle(self, layer: str, linear: list[LinearCall]) -> None:
        """Hook only the modules that matter from now on."""
        self._weight_is_shared = weight_is_shared(self._modules[layer], self._modules)
        self._network_weights = sum(parameter.numel() for parameter in self._modules[""].parameters())
        self.classifier = self.classifier or (linear[-1].name if linear else None)
        self.layer, self._linear, self.is_settled = layer, {call.name for call in linear}, True
        self._copies = self._builder.copies
        self._install()

    def _install(self) -> None:
        self._hooks.install(self._wanted())

    def _wanted(self) -> Iterator[Wanted]:
        """Yield the hooks that are needed, as far as it is known which modules matter."""
        convolutions = {
            name
            for name, module in self._modules.items()
            if isinstance(module, CONVOLUTIONS) and self.layer in (None, name)
        }
        holders = holders_of(convolutions)
        for name, module in self._modules.items():
            if name in convolutions:
                yield Wanted(name, module, "before_convolution", "after_convolution")
            if isinstance(module, CLASSIFIERS) and (not self.is_settled or name in self._linear):
                yield Wanted(name, module, None, "after_linear")
            if name in holders:
                yield Wanted(name, module, "before_network", "after_network")


def holders_of(names: Iterable[str]) -> set[str]:
    """Return the names of the modules around those with these names."""
    paths = [name.split(".") for name in names if name]
    return {".".join(path[:depth]) for path in paths for depth in range(len(path))}


def guarded(recorder: ForwardRecorder, hook: str, name: str) -> Callable[..., None]:
    """Return a hook in which nothing can stop the user's forward pass."""

    def run(module: nn.Module, *arguments: Any) -> None:
        builder = recorder._builder
        if builder.failure is None and not builder.is_ignored and _is_heard(recorder):
            try:
                with not_recorded():
                    getattr(builder, hook)(name, module, *arguments)
            except Exception as error:
                builder.fail(error)

    return run


def _is_heard(recorder: object) -> bool:
    return _THREAD.exclusive is None or recorder in _THREAD.exclusive


def weight_is_shared(layer: nn.Module, modules: dict[str, nn.Module]) -> bool:
    """Return whether another of the modules has the weight of a layer, too."""
    return sum(own is layer.weight for module in modules.values() for own in module._parameters.values()) > 1
