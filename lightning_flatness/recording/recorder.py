"""Hooks on a model that record its forward passes, from a convolution to the logits."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_flatness.errors import Refusal
from lightning_flatness.recording.builder import PassBuilder
from lightning_flatness.recording.dispatch import dispatcher, not_recorded
from lightning_flatness.recording.eager import EAGER
from lightning_flatness.recording.layers import (
    CLASSIFIERS,
    CONVOLUTIONS,
    choose_classifier,
    modules_by_name,
    named_classifier,
    require_name,
)
from lightning_flatness.recording.operation import tensors
from lightning_flatness.recording.recorded_pass import RecordedPass
from lightning_flatness.recording.weights import WeightCopies


class _OfThread(threading.local):
    """What each thread has of its own."""

    exclusive: ForwardRecorder | None = None  # the only one that records at present


_THREAD = _OfThread()


class ForwardRecorder:
    """Records the forward passes of a model, without touching them.

    While entered, every forward pass is recorded from the last convolution on. `take_pass` yields the record as a
    value. The pass itself runs as it would without the recorder: no gradient is switched on in it and nothing in it is
    replaced.

    Args:
        model: any module whose forward pass will run.
        layer: name of the convolution to record from; None: the last one that runs on a map larger than 1 x 1.
        classifier: name of the linear classifier; None: found.

    Raises:
        ValueError: if a named module does not exist or is of the wrong kind; lists the candidates.

    Example:
        >>> with ForwardRecorder(model) as recorder:  # doctest: +SKIP
        ...     model(images)
        ...     recorded = recorder.take_pass()
    """

    def __init__(self, model: nn.Module, layer: str | None = None, classifier: str | None = None) -> None:
        """Check the names against the model."""
        self._modules = modules_by_name(model)
        require_name(self._modules, layer, "layer", CONVOLUTIONS)
        require_name(self._modules, classifier, "classifier", CLASSIFIERS)
        self.layer, self.classifier = layer, classifier
        self._settled = False  # whether the modules that matter are known
        self._weight_is_shared = False
        self._compiled = any(
            hasattr(module, "_orig_mod") or module._compiled_call_impl is not None for module in model.modules()
        )
        self._undo = ExitStack()  # what entering did
        self._handles: list[Any] = []
        self._copies = WeightCopies()
        self._builder = PassBuilder()

    def __enter__(self) -> ForwardRecorder:
        """Install the hooks."""
        with ExitStack() as undo:  # an error on the way undoes what has been done
            undo.callback(self._uninstall)
            EAGER.enter()
            undo.callback(EAGER.leave)
            if self._compiled:
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
        self._builder = PassBuilder()
        if not self._settled:  # forget the weights of modules that turned out not to matter
            self._copies = WeightCopies()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hide the forward passes within from every other recorder of this thread."""
        before, _THREAD.exclusive = _THREAD.exclusive, self
        try:
            yield
        finally:
            _THREAD.exclusive = before

    def ignore_passes(self) -> None:
        """Let forward passes go unrecorded until the next `clear` or `take_pass`."""
        self.clear()
        self._builder.is_complete = True

    def take_pass(self) -> RecordedPass:
        """Return the first complete forward pass since the last call, and forget it.

        From then on only the modules that turned out to matter are hooked.

        Raises:
            UnsupportedTailError: if the convolution or the classifier did not run, the loss does not take the
                classifier's output, or recording failed.
        """
        self._builder.stop()
        try:
            with not_recorded(), torch.inference_mode(False):
                verdict = self._verdict()
            if isinstance(verdict, Refusal):
                raise verdict.error()
            return verdict
        finally:
            self.clear()

    def _verdict(self) -> RecordedPass | Refusal:
        builder = self._builder
        failure = builder.failure or (builder.tracer.graph.out_of_memory if builder.tracer else None)
        if isinstance(failure, (ValueError, torch.OutOfMemoryError)):
            raise failure
        if failure is not None:
            return Refusal(f"Recording the forward pass failed: {failure!r}", failure)
        if builder.tracer is None or builder.layer is None or builder.weights is None:
            wanted = f"the convolution `{self.layer}`" if self.layer else "a convolution on a map larger than 1 x 1"
            there = _names(self._modules, CONVOLUTIONS)
            remedy = f"Name one that runs with `layer=...`: {there}." if there else "The model has no convolution."
            return Refusal(f"A forward pass must run {wanted}; none did. {remedy}")
        builder.tracer.finalize()
        graph, layer = builder.tracer.graph, builder.layer
        if self.classifier is None:
            call = choose_classifier(graph, layer, builder.calls, builder.outputs)
        else:
            call = named_classifier(graph, layer, self.classifier, builder.calls, builder.outputs)
        if isinstance(call, Refusal):
            return call
        if not self._settled:
            self._settle(layer, call.name)
        calls = tuple(builder.convolution_calls)
        return RecordedPass(graph, layer, self._modules[layer], *builder.weights, calls, call, self._weight_is_shared)

    def _settle(self, layer: str, classifier: str) -> None:
        """Hook only the modules that matter from now on."""
        weight = self._modules[layer].weight
        owners = sum(own is weight for module in self._modules.values() for own in module._parameters.values())
        self._weight_is_shared = owners > 1
        self.layer, self.classifier, self._settled = layer, classifier, True
        self._uninstall()
        self._install()

    def _uninstall(self) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _install(self) -> None:
        paths = [name.split(".") for name in _names(self._modules, CONVOLUTIONS) if name]
        holders = {".".join(path[:depth]) for path in paths for depth in range(len(path))}
        for name, module in self._modules.items():
            for wanted, hook in (
                (isinstance(module, CONVOLUTIONS) and self.layer in (None, name), self._on_convolution),
                (isinstance(module, CLASSIFIERS) and self.classifier in (None, name), self._on_classifier),
                (name in holders and (not self._settled or self.classifier == name), self._on_network),
            ):
                if wanted:
                    guarded = self._guarded(hook, name)
                    self._handles.append(module.register_forward_hook(guarded, with_kwargs=True))

    def _guarded(self, hook: Callable[..., None], name: str) -> Callable[..., None]:
        """Return a forward hook in which nothing can stop the user's forward pass."""

        def run(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            builder = self._builder
            if builder.failure is None and not builder.is_complete and _THREAD.exclusive in (None, self):
                try:
                    with not_recorded():
                        hook(name, module, next(tensors([args, kwargs]), None), output)
                except Exception as error:
                    builder.fail(error)

        return run

    def _on_convolution(self, name: str, module: nn.Module, inputs: Tensor, output: Tensor) -> None:
        if self.layer is None and output.shape[2:].numel() == 1:
            return
        if len(output) == 0:
            raise ValueError(f"A batch must hold at least one sample; `{name}` got none.")
        if self._builder.must_start(name):
            if not self._settled:
                self._copies = WeightCopies()
            self._builder.start(name, module, self._copies)
        self._builder.add_convolution(name, inputs, output)

    def _on_classifier(self, name: str, module: nn.Module, inputs: Tensor, output: Tensor) -> None:
        if self._builder.add_call(name, inputs, output, module, self._copies) and self._settled:
            self._builder.complete()

    def _on_network(self, name: str, module: nn.Module, inputs: Tensor | None, output: Any) -> None:
        parts = output if isinstance(output, (Tensor, list, tuple, dict)) else getattr(output, "__dict__", ())
        for tensor in tensors(parts):
            if not self._builder.is_complete and self._builder.add_output(name, tensor) and self._settled:
                self._builder.complete()


def _names(modules: dict[str, nn.Module], kinds: tuple[type[nn.Module], ...]) -> list[str]:
    return [name for name, module in modules.items() if isinstance(module, kinds)]
