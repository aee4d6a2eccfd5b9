"""Taps a forward pass between the last convolution and the logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from lightning_flatness.curvature.pooled.certificate import Certificate, certify
from lightning_flatness.curvature.pooled.derivatives import CHUNK_BYTES, KernelGram, TailFactors, full_precision
from lightning_flatness.curvature.pooled.subset import recorded_points, replayed_features
from lightning_flatness.functional import ConvGeometry
from lightning_flatness.losses import CrossEntropy, Loss, checked_targets
from lightning_flatness.recording.eager import EAGER
from lightning_flatness.recording.graph import RECORDER, Tape, unrecorded
from lightning_flatness.recording.operation import is_low_precision, raised, tensors
from lightning_flatness.recording.recorded_pass import (
    CLASSIFIERS,
    CONVOLUTIONS,
    Call,
    Recording,
    UnsupportedTailError,
    WeightCopies,
    choose_classifier,
    modules_by_name,
    named_classifier,
    require_name,
    require_own_weight,
)


class Tap:
    """Hooks on a model that turn each forward pass into `TailFactors`, without touching the pass.

    While entered, every forward pass is recorded from the last convolution on. `factors` then repeats the few recorded
    operations under autograd and certifies on the first pass that the closed form is exact. The pass itself runs as
    it would without the tap: no gradient is switched on in it and nothing in it is replaced.

    Args:
        model: any module whose forward pass will run.
        layer: name of the monitored convolution; None: the last one that runs on a map larger than 1 x 1.
        classifier: name of the linear classifier; None: found.
        loss: the training loss of the logits.
        chunk_bytes: see `TailFactors`.

    Raises:
        ValueError: if a named module does not exist or is of the wrong kind; lists the candidates.

    Example:
        >>> with Tap(model) as tap:  # doctest: +SKIP
        ...     model(images)
        ...     factors = tap.factors(labels)
    """

    _alone: ClassVar[Tap | None] = None  # the only one that listens at present

    def __init__(
        self,
        model: nn.Module,
        layer: str | None = None,
        classifier: str | None = None,
        loss: Loss | None = None,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        """Check the names against the model."""
        self._loss, self._chunk_bytes = loss or CrossEntropy(), chunk_bytes
        self._modules = modules_by_name(model)
        require_name(self._modules, layer, "layer", CONVOLUTIONS)
        require_name(self._modules, classifier, "classifier", CLASSIFIERS)
        self.layer, self.classifier = layer, classifier
        self._settled = False  # whether the modules that matter are known
        self._compiled = any(
            hasattr(module, "_orig_mod") or module._compiled_call_impl is not None for module in model.modules()
        )
        self._undo = ExitStack()  # what entering did
        self._handles: list[Any] = []
        self._tape: Tape | None = None
        self._certificate: Certificate | None = None
        self._kernel_gram = KernelGram()
        self.clear()

    def __enter__(self) -> Tap:
        """Install the hooks; the next `factors` certifies anew."""
        self._certificate = None
        with ExitStack() as undo:  # an error on the way undoes what has been done
            undo.callback(self._uninstall)
            EAGER.enter()
            undo.callback(EAGER.leave)
            RECORDER.hold(self._compiled)
            undo.callback(RECORDER.hold, -self._compiled)
            self._install()
            self._undo.callback(undo.pop_all().close)
        return self

    def __exit__(self, *exception: object) -> None:
        """Remove the hooks and stop recording."""
        self.clear()
        self._undo.close()

    def clear(self) -> None:
        """Forget what was recorded."""
        self._restart()
        self._ran: set[str] = set()  # convolutions that ran in this pass
        self._complete = False  # the first complete pass is measured, later ones run untouched
        self._failure: Exception | None = None

    def _restart(self) -> None:
        self._close()
        if not self._settled:  # forget weights that turned out not to matter
            self._copies = WeightCopies()
        self._tape = None
        self._running: str | None = None  # name of the convolution that the tape follows
        self._weights: tuple[Tensor, Tensor] | None = None
        self._roots: list[tuple[int, int, int]] = []
        self._calls: list[Call] = []
        self._outputs: list[Call] = []

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hide the forward passes within from every other tap."""
        before, Tap._alone = Tap._alone, self
        try:
            yield
        finally:
            Tap._alone = before

    def skip(self) -> None:
        """Let forward passes go unrecorded until the next `clear` or `factors`."""
        self.clear()
        self._complete = True

    def factors(self, target: Tensor | None = None) -> TailFactors:
        """Return the factors of the first complete forward pass since the last call, and forget it.

        Args:
            target: class indices of the batch, shape (n,), or what else the loss reads.

        Raises:
            UnsupportedTailError: if the closed form is not exact for this network, or the convolution or the
                classifier did not run.
            NonFiniteError: if the convolution's output or the logits hold NaN when the tail is certified.
        """
        self._close()
        try:
            with unrecorded(), torch.inference_mode(False), torch.enable_grad():
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
        tape, call = recording.tape, recording.classifier
        points = recorded_points(recording)
        slot, _, inputs = recording.roots[certificate.root]
        features = replayed_features(recording, points)
        (slope,) = torch.autograd.grad(features.sum(), points[slot], create_graph=certificate.curved)
        bend = None
        if certificate.curved and slope.requires_grad:
            (bend,) = torch.autograd.grad(slope.sum(), points[slot], materialize_grads=True)
        woken = certificate.any_silent and slope[:, certificate.silent].any()
        if woken or not certificate.fixed:  # what holds for these very values
            certificate = certify(recording, generic=False)
        features, slope = features.detach(), slope.detach()
        head = torch.eye(features.shape[1]).to(features) if call.weights is None else call.weights[0]
        logits = raised(call.output)
        if call.weights is not None and is_low_precision(call.output):
            with full_precision(logits.device):
                logits = features @ head.mT + call.weights[1]
        look = unproven or not logits.is_cuda  # later batches must not wait for the device
        return TailFactors(
            inputs=raised(tape.value(inputs)).to(slope.dtype),
            jacobian=slope.flatten(2).contiguous(),  # of one number, where the pooling follows at once
            bend=None if bend is None else bend.flatten(2),
            features=features,
            logits=logits.to(slope.dtype),
            kernel_gram=self._kernel_gram.of(recording.weight).to(slope.dtype),
            head=head.to(slope.dtype),
            channels=certificate.channels,
            geometry=ConvGeometry.of(recording.convolution),
            target=None if target is None else checked_targets(target, len(logits), logits.shape[1], self._loss, look),
            loss=self._loss,
            chunk_bytes=self._chunk_bytes,
        )

    def _recording(self) -> Recording:
        """Return what was recorded, with the classifier chosen; from then on only these modules are hooked."""
        failure = self._failure or (self._tape.exhausted if self._tape else None)
        if isinstance(failure, (ValueError, torch.OutOfMemoryError)):
            raise failure
        if failure is not None:
            raise UnsupportedTailError(f"Recording the forward pass failed: {failure!r}") from failure
        if self._tape is None or self._running is None or self._weights is None:
            wanted = f"the convolution `{self.layer}`" if self.layer else "a convolution on a map larger than 1 x 1"
            there = self._names(CONVOLUTIONS)
            remedy = f"Name one that runs with `layer=...`: {there}." if there else "The model has no convolution."
            raise UnsupportedTailError(f"A forward pass must run {wanted}; none did. {remedy}")
        self._tape.seal()
        if self.classifier is None:
            call = choose_classifier(self._tape, self._running, self._calls, self._outputs)
        else:
            call = named_classifier(self._tape, self._running, self.classifier, self._calls, self._outputs)
        module = self._modules[self._running]
        recording = Recording(self._tape, self._running, module, *self._weights, tuple(self._roots), call)
        if not self._settled:
            self._settle(recording)
        return recording

    def _settle(self, recording: Recording) -> None:
        require_own_weight(recording, self._modules)
        self.layer, self.classifier, self._settled = recording.layer, recording.classifier.name, True
        self._uninstall()
        self._install()

    def _uninstall(self) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _install(self) -> None:
        paths = [name.split(".") for name in self._names(CONVOLUTIONS) if name]
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
            if self._failure is None and not self._complete and Tap._alone in (None, self):
                try:
                    with unrecorded():
                        hook(name, module, next(tensors([args, kwargs]), None), output)
                except Exception as error:
                    self._failure = error
                    self._close()

        return run

    def _on_convolution(self, name: str, module: nn.Module, inputs: Tensor, output: Tensor) -> None:
        if self.layer is None and output.shape[2:].numel() == 1:
            return
        if len(output) == 0:
            raise ValueError(f"A batch must hold at least one sample; `{name}` got none.")
        if self._tape is None or name not in self._ran:  # the last one to run for the first time is followed
            self._restart()
            self._tape, self._running = Tape(), name
            self._weights = self._copies.of(module)
            for weight in (cast(Tensor, module.weight), *module.parameters()):  # or what the weight is computed from
                if weight.dim() > 1:
                    self._tape.forbid(weight)
            self._tape.start()
        self._ran.add(name)
        if name == self._running:
            slot, z = self._tape.add_root(output)
            self._roots.append((slot, z, self._tape.keep(inputs)))

    def _on_classifier(self, name: str, module: nn.Module, inputs: Tensor, output: Tensor) -> None:
        self._note(self._calls, name, inputs, output, module)

    def _on_network(self, name: str, module: nn.Module, inputs: Tensor | None, output: Any) -> None:
        parts = output if isinstance(output, (Tensor, list, tuple, dict)) else getattr(output, "__dict__", ())
        for tensor in tensors(parts):
            if not self._complete:
                self._note(self._outputs, name, tensor, tensor)

    def _note(
        self, calls: list[Call], name: str, inputs: Tensor, output: Tensor, linear: nn.Module | None = None
    ) -> None:
        """Note what a module returned if it depends on the convolution and can be the end of the tail."""
        tape = self._tape
        if tape is None or tape.slot(inputs) is None or output.dim() < 2 or output.shape[2:].numel() != 1:
            return
        end, weights = len(tape.operations), None if linear is None else self._copies.of(linear)
        copy = output.detach().flatten(1).clone()
        calls.append(Call(name, inputs, copy, weights, tape.slot(output), end))
        if self._settled:
            self._complete = True
            tape.seal()

    def _close(self) -> None:
        """Stop recording."""
        if self._tape is not None:
            self._tape.stop()

    def _names(self, kinds: tuple[type[nn.Module], ...]) -> list[str]:
        return [name for name, module in self._modules.items() if isinstance(module, kinds)]
