"""Measures recorded passes of networks with global pooling in closed form."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lightning_flatness.curvature.pooled.certificate import Certificate, certify
from lightning_flatness.curvature.pooled.closed_form import sample_quantities
from lightning_flatness.curvature.pooled.derivatives import CHUNK_BYTES, PooledDerivatives
from lightning_flatness.curvature.quantities import SampleQuantities
from lightning_flatness.errors import Refusal, require_counts
from lightning_flatness.functional import ConvGeometry
from lightning_flatness.losses import CrossEntropy, Loss, as_loss, checked_targets
from lightning_flatness.precision import full_precision, is_low_precision, upcast
from lightning_flatness.recording.dispatch import not_recorded
from lightning_flatness.recording.recorded_pass import RecordedPass


class PooledMethod:
    """The exact Hessian trace and relative flatness of a convolution under global pooling, for every sample.

    It certifies in the first pass that the closed form is exact, and again when the names of the recorded operations
    change (see `RecordedPass.signature`).
    The certificate and the filters' Gram matrix are kept from pass to pass.

    Args:
        loss: the training loss of the logits, as `losses.as_loss` takes it; None: cross-entropy.
        chunk_bytes: what temporary tensors may take at once.

    Raises:
        ValueError: if the loss is another one, or `chunk_bytes` is not a whole number, at least 1.

    Example:
        >>> method = PooledMethod()
        >>> method.quantities(recorder.take_pass(), labels).hessian_trace  # doctest: +SKIP
    """

    name = "pooled"

    def __init__(self, loss: str | nn.Module | Loss | None = None, chunk_bytes: int = CHUNK_BYTES) -> None:
        """Start with no certificate."""
        require_counts(chunk_bytes=chunk_bytes)
        self._loss: Loss = CrossEntropy() if loss is None else as_loss(loss)
        self._chunk_bytes = chunk_bytes
        self._certificate: Certificate | None = None
        self._kernel_gram = _KernelGram()

    def quantities(self, recorded: RecordedPass, target: Any = None, samples: slice = slice(None)) -> SampleQuantities:
        """Return the quantities of a recorded pass.

        Args:
            recorded: the forward pass.
            target: class indices of the batch, shape (n,), or what else the loss reads; they are checked.
            samples: which of its samples to measure.

        Raises:
            UnsupportedTailError: if the closed form is not exact for this network.
            NonFiniteError: if the convolution's output or the logits hold NaN when the tail is certified.
            ValueError: if the targets are not what the loss reads.
        """
        derivatives = self.derivatives(recorded, target).select(samples)
        with not_recorded():
            return sample_quantities(derivatives)

    def derivatives(self, recorded: RecordedPass, target: Any = None) -> PooledDerivatives:
        """Return the tensors from which the quantities follow; arguments and errors are those of `quantities`."""
        with ExitStack() as stack:
            for context in (not_recorded(), torch.inference_mode(False), torch.enable_grad()):
                stack.enter_context(context)
            stack.enter_context(torch.autocast(recorded.weight.device.type, enabled=False))
            return self._derivatives(recorded, target)

    def _derivatives(self, recorded: RecordedPass, target: Any) -> PooledDerivatives:
        certificate, is_new = self._certified(recorded)
        call = recorded.calls[certificate.call]
        points = recorded.points()
        features = recorded.features_at(points)
        point = points[call.node]
        (jacobian,) = torch.autograd.grad(features.sum(), point, create_graph=certificate.has_second_derivative)
        second = None
        if certificate.has_second_derivative and jacobian.requires_grad:
            (second,) = torch.autograd.grad(jacobian.sum(), point, materialize_grads=True)
        newly_active = certificate.any_inactive and jacobian[:, certificate.inactive].any()
        if newly_active or not certificate.is_value_independent:  # what holds for these very values
            certificate = _require(certify(recorded, at_random_points=False))
        jacobian, features = jacobian.detach(), features.detach()
        head, logits = _head_and_logits(recorded, features)
        look = is_new or not logits.is_cuda  # later batches must not wait for the device
        dtype, classes = jacobian.dtype, logits.shape[1]
        return PooledDerivatives(
            inputs=upcast(recorded.graph.captures.value(call.inputs)).to(dtype),
            jacobian=jacobian.flatten(2).contiguous(),  # of one number, where the pooling follows at once
            second_derivative=None if second is None else second.flatten(2),
            features=features,
            logits=logits.to(dtype),
            kernel_gram=self._kernel_gram.of(recorded.weight).to(dtype),
            head=head.to(dtype),
            feature_index=certificate.feature_index,
            geometry=ConvGeometry.of(recorded.convolution),
            target=None if target is None else checked_targets(target, len(logits), classes, self._loss, look),
            loss=self._loss,
            chunk_bytes=self._chunk_bytes,
        )

    def _certified(self, recorded: RecordedPass) -> tuple[Certificate, bool]:
        """Return the certificate of this tail, and whether it was made for this pass."""
        if self._certificate is not None and self._certificate.signature == recorded.signature:
            return self._certificate, False
        self._certificate = _require(certify(recorded))
        return self._certificate, True


class _KernelGram:
    """Gram matrices of filters; the last one is kept, as weights seldom change between two batches."""

    def __init__(self) -> None:
        self._known: tuple[Tensor, Tensor] | None = None

    def of(self, weight: Float[Tensor, "k d"]) -> Float[Tensor, "k k"]:
        """Return `W W^T`, shape (k, k); the same tensor is taken to hold the same values."""
        if self._known is None or self._known[0] is not weight:
            with full_precision(weight.device):
                self._known = weight, weight @ weight.mT
        return self._known[1]


def _require(verdict: Certificate | Refusal) -> Certificate:
    """Return the certificate; this is where a refusal is raised."""
    if isinstance(verdict, Refusal):
        raise verdict.error()
    return verdict


def _head_and_logits(recorded: RecordedPass, features: Tensor) -> tuple[Tensor, Tensor]:
    """Return the classifier's weight `V` and the logits; logits in half precision are computed anew in float32."""
    call = recorded.classifier
    if call.weights is None:
        return torch.eye(features.shape[1]).to(features), upcast(call.output)
    weight, bias = call.weights
    if not is_low_precision(call.output):
        return weight, call.output
    with full_precision(features.device):
        return weight, features @ weight.mT + bias
