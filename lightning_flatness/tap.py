"""Taps a forward pass between the last convolution and the logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from lightning_flatness.batch import class_indices
from lightning_flatness.certificate import Certificate, certify, recorded_points, replayed_features
from lightning_flatness.factors import TailFactors
from lightning_flatness.functional import ConvGeometry
from lightning_flatness.tail import (
    CLASSIFIERS,
    CONVOLUTIONS,
    Call,
    Recording,
    UnsupportedTailError,
    choose_classifier,
    refusal,
    weight_of,
)
from lightning_flatness.tape import Tape, is_low_precision, raised, tensors

_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")


class Tap:
    """Hooks on a model that turn each forward pass into `TailFactors`, without touching the pass.

    While entered, every forward pass is recorded from the last convolution on. `factors` then repeats the few
    recorded operations under autograd, certifies on the first pass that the closed form is exact, and returns
    the tensors that it needs. The pass itself runs as it would without the tap, in whatever mode the caller
    chose: no gradient is switched on in it and nothing in it is replaced.

    Args:
        model: any module whose forward pass will run.
        layer: name of the monitored convolution; None: the last one that runs on a map larger than 1 x 1.
        classifier: name of the linear classifier; None: found.

    Raises:
        ValueError: if a named module does not exist or is of the wrong kind; lists the candidates.

    Example:
        >>> with Tap(model) as tap:  # doctest: +SKIP
        ...     model(images)
        ...     factors = tap.factors(labels)
    """

    def __init__(self, model: nn.Module, layer: str | None = None, classifier: str | None = None) -> None:
        """Check the names against the model."""
        self._modules = {_plain_name(name): module for name, module in model.named_modules()}
        self._require(layer, "layer", CONVOLUTIONS)
        self._require(classifier, "classifier", CLASSIFIERS)
        self.layer = layer
        self.classifier = classifier
        self._settled = False  # whether the modules that matter are known
        self._handles: list[Any] = []
        self._entered: list[Tape] = []
        self._certificate: Certificate | None = None
        self.clear()

    def __enter__(self) -> Tap:
        """Install the hooks; the next `factors` certifies anew."""
        self._certificate = None
        self._install()
        return self

    def __exit__(self, *exception: object) -> None:
        """Remove the hooks and stop recording."""
        self.clear()
        while self._handles:
            self._handles.pop().remove()

    def clear(self) -> None:
        """Forget what was recorded."""
        self._close()
        self._tape: Tape | None = None
        self._running: str | None = None  # name of the convolution that the tape follows
        self._weight: Tensor | None = None
        self._roots: list[tuple[int, int, int]] = []
        self._calls: list[Call] = []
        self._outputs: list[Call] = []
        self._complete = False  # the first complete pass is measured, later ones run untouched
        self._failure: Exception | None = None

    def skip(self) -> None:
        """Let forward passes go unrecorded until the next `clear` or `factors`."""
        self.clear()
        self._complete = True

    def factors(self, target: Tensor | None = None) -> TailFactors:
        """Return the factors of the first complete forward pass since the last call, and forget it.

        Args:
            target: class indices of the batch, shape (n,).

        Raises:
            UnsupportedTailError: if the closed form is not exact for this network, or the convolution or the
                classifier did not run.
            NonFiniteError: if the convolution's output or the logits hold NaN when the tail is certified.
        """
        self._close()
        try:
            with torch.inference_mode(False), torch.enable_grad():
                recording = self._recording()
                with torch.autocast(recording.weight.device.type, enabled=False):
                    return self._factors(recording, target)
        finally:
            self.clear()

    def _factors(self, recording: Recording, target: Tensor | None) -> TailFactors:
        certificate = self._certificate
        unproven = certificate is None or certificate.signature != recording.signature
        if certificate is None or unproven:
            certificate = self._certificate = certify(recording)
        if not certificate.fixed:
            certificate = certify(recording, generic=False)
        tape, call = recording.tape, recording.classifier
        points = recorded_points(recording)
        slot, _, inputs = recording.roots[certificate.root]
        features = replayed_features(recording, points)
        (slope,) = torch.autograd.grad(features.sum(), points[slot], create_graph=certificate.curved)
        bend = None
        if certificate.curved and slope.requires_grad:
            (bend,) = torch.autograd.grad(slope.sum(), points[slot], materialize_grads=True)
        if certificate.silent is not None and slope[:, certificate.silent].any():
            raise refusal(recording, "a filter that reached no feature when the tail was certified reaches one now")
        features, slope = features.detach(), slope.detach()
        head = recording.head if recording.has_head else torch.eye(features.shape[1]).to(features)
        logits = raised(call.output)
        if recording.has_head and is_low_precision(call.output):
            logits = features @ head.mT + recording.head_bias
        look = unproven or not logits.is_cuda  # later batches must not wait for the device
        return TailFactors(
            inputs=raised(tape.value(inputs)).to(slope.dtype),
            jacobian=slope.flatten(2),
            bend=None if bend is None else bend.flatten(2),
            features=features,
            logits=logits.to(slope.dtype),
            weight=recording.weight.to(slope.dtype),
            head=head.to(slope.dtype),
            channels=certificate.channels,
            geometry=ConvGeometry.of(recording.convolution),
            target=None if target is None else class_indices(target, len(logits), logits.shape[1], look),
        )

    def _recording(self) -> Recording:
        """Return what was recorded, with the classifier chosen; from then on only these modules are hooked."""
        if self._failure is not None:
            raise UnsupportedTailError(f"Recording the forward pass failed: {self._failure!r}") from self._failure
        if self._tape is None or self._running is None or self._weight is None:
            wanted = f"the convolution `{self.layer}`" if self.layer else "a convolution on a map larger than 1 x 1"
            raise UnsupportedTailError(
                f"A forward pass must run {wanted}; none did. Convolutions of the model: {self._names(CONVOLUTIONS)}. "
                "Name one that runs with `layer=...`."
            )
        if self.classifier is None:
            call = choose_classifier(self._tape, self._running, self._calls, self._outputs)
        else:
            call = self._named_call()
        recording = Recording(
            self._tape, self._running, self._modules[self._running], self._weight, tuple(self._roots), call
        )
        if not self._settled:
            self._settle(recording)
        return recording

    def _named_call(self) -> Call:
        for call in (*self._calls, *self._outputs):
            if call.name == self.classifier:
                return call
        because = f" ({self._tape.failure})" if self._tape is not None and self._tape.failure else ""
        raise UnsupportedTailError(
            f"The classifier `{self.classifier}` must run after `{self._running}`, on what that computed; "
            f"it did not{because}. Linear modules that did: {sorted({call.name for call in self._calls})}."
        )

    def _settle(self, recording: Recording) -> None:
        shared = sum(
            parameter is recording.convolution.weight
            for module in self._modules.values()
            for parameter in module._parameters.values()
        )
        if shared > 1:
            raise refusal(recording, f"the weight of `{recording.layer}` is shared with another module")
        self.layer, self.classifier, self._settled = recording.layer, recording.classifier.name, True
        while self._handles:
            self._handles.pop().remove()
        self._install()

    def _install(self) -> None:
        for name, module in self._modules.items():
            holds_convolution = any(
                other.startswith(f"{name}." if name else "") and other != name for other in self._names(CONVOLUTIONS)
            )
            for wanted, hook in (
                (isinstance(module, CONVOLUTIONS) and self.layer in (None, name), self._on_convolution),
                (isinstance(module, CLASSIFIERS) and self.classifier in (None, name), self._on_classifier),
                (holds_convolution and (not self._settled or self.classifier == name), self._on_network),
            ):
                if wanted:
                    guarded = self._guarded(hook, name)
                    self._handles.append(module.register_forward_hook(guarded, with_kwargs=True))

    def _guarded(self, hook: Callable[..., None], name: str) -> Callable[..., None]:
        """Return a forward hook in which nothing can stop the user's forward pass."""

        def run(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if self._failure is None and not self._complete:
                try:
                    hook(name, module, next(tensors([args, kwargs])), output)
                except Exception as error:
                    self._failure = error
                    self._close()

        return run

    def _on_convolution(self, name: str, module: nn.Module, inputs: Tensor, output: Tensor) -> None:
        if self.layer is None and output.shape[2:].numel() == 1:
            return
        if self._tape is None or name != self._running:
            self.clear()
            self._tape, self._running = Tape(), name
            self._weight = weight_of(module).clone()
            self._entered.append(self._tape)
            self._tape.__enter__()
        slot, z = self._tape.add_root(output)
        self._roots.append((slot, z, self._tape.keep(inputs)))

    def _on_classifier(self, name: str, module: nn.Module, inputs: Tensor, output: Tensor) -> None:
        self._note(self._calls, Call(name, module, inputs, output, None, 0))

    def _on_network(self, name: str, module: nn.Module, inputs: Tensor, output: Any) -> None:
        parts = output if isinstance(output, (Tensor, list, tuple, dict)) else vars(output)
        for tensor in tensors(parts):
            if self._complete:
                return
            self._note(self._outputs, Call(name, module, tensor, tensor, None, 0))

    def _note(self, calls: list[Call], call: Call) -> None:
        """Note a module's call if it depends on the convolution and can be the end of the tail."""
        if self._tape is None or self._tape.slot(call.inputs) is None:
            return
        if call.output.dim() >= 2 and call.output.shape[2:].numel() == 1:
            slot, end = self._tape.slot(call.output), len(self._tape.operations)
            calls.append(call._replace(output=call.output.detach().clone().flatten(1), slot=slot, end=end))
            if self._settled:
                self._complete = True
                self._close()

    def _close(self) -> None:
        """Stop recording."""
        while self._entered and _get_current_dispatch_mode() is self._entered[-1]:
            self._entered.pop().__exit__(None, None, None)

    def _names(self, kinds: tuple[type[nn.Module], ...]) -> list[str]:
        return [name for name, module in self._modules.items() if isinstance(module, kinds)]

    def _require(self, name: str | None, argument: str, kinds: tuple[type[nn.Module], ...]) -> None:
        if name is not None and name not in self._names(kinds):
            raise ValueError(
                f"`{argument}` must name one of {self._names(kinds)}; got {name!r}. "
                "Names are those of `model.named_modules()`."
            )


def _plain_name(name: str) -> str:
    """Return a module's name without what compilers and wrappers put into it."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name
