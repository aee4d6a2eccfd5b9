"""Measures recorded passes of networks with global pooling in closed form."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_flatness.curvature.kept import Kept, LastWeight
from lightning_flatness.curvature.objective import Objective
from lightning_flatness.curvature.pooled.certificate import (
    Certificate,
    TooManyFeatures,
    certify,
    connections_of,
    features_at,
    signature_of,
)
from lightning_flatness.curvature.pooled.closed_form import is_ill_conditioned, sample_quantities
from lightning_flatness.curvature.pooled.derivatives import PooledDerivatives
from lightning_flatness.curvature.quantities import SampleQuantities
from lightning_flatness.curvature.reader import ObjectiveReader
from lightning_flatness.errors import NonFiniteError, Refusal, UnrepeatableError, require_optional_counts
from lightning_flatness.functional import ConvGeometry
from lightning_flatness.precision import allclose_for_dtype, answers, full_precision, upcast
from lightning_flatness.recording.dispatch import not_recorded
from lightning_flatness.recording.graph import Cut
from lightning_flatness.recording.recorded_pass import ConvolutionCall, RecordedPass

_CANDIDATES = 3  # tensors that are tried for the pooled features

# How many features times weights of a curved head there may be for each weight of the network. Each feature takes a
# Hessian-vector product of 2.5 multiply-adds for each weight of the head; a forward pass takes some 50 for each
# weight of a convolution, one at each position of the map. So all products take about as long as a forward pass. Unlike
# the operations of that pass, the number of weights is the same for all batches and processes.
_HEAD_SIZE = 20


class PooledMethod:
    """The exact Hessian trace and relative flatness of a convolution under global pooling, for every sample.

    Every link from the convolution to the loss is proved or refused. The pooled features are the first tensor with one
    row per sample through which all influence of the map on the loss passes. That each of them depends on one filter
    alone is certified, and certified anew whenever an operation, its arguments, its wiring or a captured value that
    could connect filters changes. What follows them, head and loss, is analysed in every pass.

    Args:
        chunk_bytes: how much memory the contraction over filters may take at once, in bytes; None: see
            `chunk_bytes_on`.
        scale_free: whether to compute `scaled_flatness`, which scale-free flatness needs.

    Raises:
        ValueError: if `chunk_bytes` is not a whole number, at least 1.

    Example:
        >>> method = PooledMethod()
        >>> method.quantities(recorder.take_pass(loss)).hessian_trace  # doctest: +SKIP
    """

    name = "pooled"

    def __init__(self, chunk_bytes: int | None = None, scale_free: bool = True) -> None:
        """Start with no certificate."""
        require_optional_counts(chunk_bytes=chunk_bytes)
        self._scale_free = scale_free
        self._chunk_bytes = chunk_bytes
        self._certificate: Certificate | None = None
        self._reader = ObjectiveReader()
        self._weight, self._kernel_gram, self._head = LastWeight(), Kept(_gram), Kept(Tensor.to)

    def quantities(self, recorded: RecordedPass, samples: slice = slice(None)) -> SampleQuantities:
        """Return the quantities of a recorded pass, for the samples that the loss depends on.

        Args:
            recorded: the pass.
            samples: which of its samples to measure.

        Raises:
            UnsupportedTailError: if the closed form is not exact for this network and loss.
            NonFiniteError: if the pooled features or the logits hold NaN.
        """
        return self.evaluate(self.derivatives(recorded, samples))

    def evaluate(self, derivatives: PooledDerivatives) -> SampleQuantities:
        """Return the quantities that follow from derivatives."""
        with not_recorded(), torch.inference_mode(False):
            quantities = sample_quantities(derivatives, self._scale_free)
            if is_ill_conditioned(derivatives, quantities):
                quantities = sample_quantities(derivatives.exact, self._scale_free)
            return quantities

    def derivatives(self, recorded: RecordedPass, samples: slice = slice(None)) -> PooledDerivatives:
        """Return the tensors from which the quantities follow; arguments and errors are those of `quantities`."""
        with differentiating(recorded):
            derivatives = self._derivatives(recorded, samples)
        bent = derivatives.head_curvature
        is_too_large = bent is not None and bent.size > _HEAD_SIZE * recorded.network_weights
        return derivatives.gauss_newton if is_too_large else derivatives

    def _derivatives(self, recorded: RecordedPass, samples: slice) -> PooledDerivatives:
        require_finite(recorded)
        certificate = self._certified(recorded)
        pooled, call = certificate.pooled, recorded.calls[certificate.call]
        features, jacobian, second, newly_active = _differentiated(recorded, certificate)
        _require_same(recorded, pooled, features)
        goal, *questions = self._reader.again(recorded, pooled, features, samples)
        questions += [newly_active, self._weight.differs(call.weight)]
        holds, is_whole, is_newly_active, is_other = answers(*questions)
        if is_newly_active or not certificate.is_value_independent:  # what holds for these very values
            known, certificate = certificate, require(certify(recorded, pooled, at_random_points=False))
            if not known.differentiates_as(certificate):
                features, jacobian, second, _ = _differentiated(recorded, certificate)
        if goal is None or not holds:
            goal = cast(Objective, require(self._reader.proved(recorded, pooled, features)))
            is_whole = bool(goal.kept(samples).all())
        weight = self._weight.of(call.weight, is_other)
        dtype = jacobian.dtype
        derivatives = PooledDerivatives(
            inputs=upcast(recorded.graph.captures.value(call.inputs)).to(dtype),
            jacobian=jacobian,
            second_derivative=second,
            features=features.detach(),
            logits=goal.logits.to(dtype),
            kernel_gram=self._kernel_gram.of(weight, dtype),
            head=self._head.of(goal.head, dtype) if goal.head.dim() == 2 else goal.head.to(dtype),
            feature_index=certificate.feature_index,
            is_fed=certificate.is_fed,
            geometry=_geometry(recorded, call),
            loss=goal.loss,
            target=None if goal.target is None else goal.target.to(dtype),
            head_curvature=None
            if goal.head_curvature is None
            else goal.head_curvature.without((jacobian == 0).flatten(1).all(1)).to(dtype),
            chunk_bytes=self._chunk_bytes,
            weight=weight,
        )
        return derivatives if is_whole else derivatives.select(goal.kept(samples))

    def _certified(self, recorded: RecordedPass) -> Certificate:
        """Return the certificate of this tail: the last one if everything that it depends on is equal.

        If the first candidate for the pooled features has too many of them, the next ones are tried.
        """
        known, cuts = self._certificate, require(_pooled_features(recorded))
        if known is not None and known.pooled in cuts and known.signature == signature_of(recorded, known.pooled):
            pairs = zip(known.connections, connections_of(recorded, known.pooled), strict=True)
            if not any(known.captures.differ(old, recorded.graph.captures, new) for old, new in pairs):
                return known
        verdicts: list[Certificate | Refusal] = []
        for cut in cuts:
            verdicts.append(certify(recorded, cut))
            if not isinstance(verdicts[-1], TooManyFeatures):
                break
        self._certificate = verdicts[-1] if isinstance(verdicts[-1], Certificate) else require(verdicts[0])
        return self._certificate


def _pooled_features(recorded: RecordedPass) -> list[Cut] | Refusal:
    """Return the first tensors with one row per sample through which all influence on the loss passes."""
    found = []
    for cut in recorded.cuts[:-1]:
        shape = recorded.graph.tensor_of(cut.node).shape
        if len(shape) >= 2 and shape[0] == len(recorded) and shape[2:].numel() == 1:
            found.append(cut)
    return found[:_CANDIDATES] or Refusal(
        f"All influence of `{recorded.layer}` on the loss must pass through one tensor with a row per sample, as a "
        f"global pooling makes; none was found.\n  path: {recorded.path}\n  {recorded.remedy}"
    )


def _differentiated(
    recorded: RecordedPass, certificate: Certificate
) -> tuple[Tensor, Tensor, Tensor | None, bool | Tensor]:
    """Differentiate the pooled features by the map at the recorded values.

    Returns:
        The features, shape (n, j); their first derivative, shape (n, f, s), and their second one, if there is any; and
        whether a feature moves that did not move, or moved with another filter alone, where the tail was certified, a
        scalar.
    """
    points, count = recorded.points(), certificate.features_per_filter
    features, point = features_at(recorded, certificate.pooled, points), points[recorded.calls[certificate.call].node]
    first: list[Tensor] = []
    second: list[Tensor | None] = []
    is_curved = certificate.has_second_derivative
    coded: list[Tensor] = []
    if certificate.code is not None:
        coded += torch.autograd.grad(features, point, certificate.code.expand_as(features), retain_graph=True)
    for number, cotangent in enumerate(certificate.cotangents.to(features), start=1):
        is_last = number == len(certificate.cotangents)
        (gradient,) = torch.autograd.grad(
            features,
            point,
            cotangent.expand_as(features),
            retain_graph=is_curved or not is_last,
            create_graph=is_curved,
        )
        first.append(gradient.detach())
        if gradient.requires_grad:
            second += torch.autograd.grad(gradient.sum(), point, retain_graph=not is_last, materialize_grads=True)
        else:
            second.append(None)
    jacobian = _side_by_side(first[:count])
    active = [~certificate.explains(each, first) for each in coded]
    active += [gradient.any() for gradient in first[count:]]
    active += [jacobian[:, certificate.inactive].any()] if len(certificate.inactive) else []
    newly_active = torch.stack(active).any() if active else False
    if not any(part is not None for part in second[:count]):
        return features, jacobian, None, newly_active
    curvature = [torch.zeros_like(point) if part is None else part for part in second[:count]]
    return features, jacobian, _side_by_side(curvature), newly_active


def _side_by_side(parts: list[Tensor]) -> Tensor:
    """Return maps of the features of each filter, filter by filter, shape (n, f, s)."""
    if len(parts) == 1:
        return parts[0].flatten(2).contiguous()  # of one number, where the pooling follows at once
    return torch.stack([part.flatten(2) for part in parts], 2).flatten(1, 2)


@contextmanager
def differentiating(recorded: RecordedPass) -> Iterator[None]:
    """Differentiate the record within: nothing of it is recorded, and what cannot be done is refused.

    Raises:
        UnsupportedTailError: if an operation cannot be repeated, or has no second derivative.
    """
    with ExitStack() as stack:
        for context in (not_recorded(), torch.inference_mode(False), torch.enable_grad()):
            stack.enter_context(context)
        stack.enter_context(torch.autocast(recorded.calls[0].weight.device.type, enabled=False))
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise Refusal(
                f"The steps from `{recorded.layer}` to the loss must be repeatable and differentiable; {error}.\n"
                f"  path: {recorded.path}\n  {recorded.remedy}",
                error,
            ).error() from error


def require_finite(recorded: RecordedPass) -> None:
    """Refuse a pass whose numbers are none; on an accelerator that would make the host wait.

    Raises:
        NonFiniteError: names the first tensor with NaN.
    """
    loss = recorded.graph.tensor_of(recorded.loss)
    if loss.is_cuda or not bool(loss.isnan().any()):
        return
    first = next(cut for cut in recorded.cuts if bool(recorded.graph.tensor_of(cut.node).isnan().any()))
    shape = tuple(recorded.graph.tensor_of(first.node).shape)
    what = f"the output of `{recorded.layer}`" if first.node == recorded.calls[0].node else f"a tensor of shape {shape}"
    raise NonFiniteError(
        f"A measurement needs numbers; the loss is NaN, and {what} is the first that is. Look for an overflow in "
        "the network, and for a batch without a labelled sample."
    )


def _require_same(recorded: RecordedPass, pooled: Cut, features: Tensor) -> None:
    """Refuse a replay that does not give the features that the network computed."""
    later = recorded.graph.operations[pooled.end :]
    if any(pooled.node in operation.results for operation in later):
        return  # overwritten since
    observed = recorded.graph.tensor_of(pooled.node).detach().flatten(1)
    if not observed.is_cuda and not allclose_for_dtype(features.detach(), observed):
        raise Refusal(
            f"Repeating the recorded steps after `{recorded.layer}` must give the features that the network computed; "
            "it does not. A step is no torch operation, such as a kernel of an extension, and cannot be measured. The "
            'classifier\'s own weight may be (`method="classifier"`).',
            UnrepeatableError("a step was not recorded"),
        ).error()


def _geometry(recorded: RecordedPass, call: ConvolutionCall) -> ConvGeometry:
    """Return how the operation's output positions see its input: what the module pads itself is padded already."""
    module, given = cast(Any, recorded.convolution), call.geometry
    return ConvGeometry.of_call(
        module.kernel_size, *(given[name] for name in ("stride", "padding", "dilation", "groups"))
    )


def _gram(weight: Float[Tensor, "k d"], dtype: torch.dtype) -> Float[Tensor, "k k"]:
    with full_precision(weight.device):
        return (weight @ weight.mT).to(dtype)


def require(verdict: Any) -> Any:
    """Return the verdict; this is where a refusal is raised."""
    if isinstance(verdict, Refusal):
        raise verdict.error()
    return verdict
