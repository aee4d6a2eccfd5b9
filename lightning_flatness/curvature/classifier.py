r"""Measures the classifier's own weight in closed form: exact for every network that ends in a linear layer.

With the classifier's input \(x\), its weight \(V\), its output \(\phi = V x + b\) and the curvature \(h\) of the loss
with respect to \(\phi\), the Hessian of the loss with respect to \(V\) is \(h \otimes x x^\top\), whatever the network
does to make \(x\).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

import lightning_flatness.functional as LF
from lightning_flatness.curvature.chunks import chunk_bytes_on
from lightning_flatness.curvature.head import HeadCurvature, is_own_logit
from lightning_flatness.curvature.kept import Kept, LastWeight
from lightning_flatness.curvature.objective import Objective
from lightning_flatness.curvature.pooled.method import differentiating, require, require_finite
from lightning_flatness.curvature.quantities import SampleQuantities
from lightning_flatness.curvature.reader import ObjectiveReader
from lightning_flatness.curvature.rows import Apart, Rows, loss_with, of_loss
from lightning_flatness.errors import Refusal, UnsupportedTailError, require_optional_counts
from lightning_flatness.functional.temperature import temperatures_for
from lightning_flatness.losses import CrossEntropy, Differentiated, Form
from lightning_flatness.precision import allclose_at_scale, answers, full_precision, upcast
from lightning_flatness.recording.dispatch import not_recorded
from lightning_flatness.recording.graph import Cut
from lightning_flatness.recording.recorded_pass import ConvolutionCall, RecordedPass


class ClassifierMethod:
    r"""The exact Hessian trace and relative flatness of the classifier's own weight, for every sample.

    $$\operatorname{Tr} H = \Vert x \Vert^2 \operatorname{Tr} h, \qquad
    \kappa = \Vert x \Vert^2 \sum_{c,c'} h_{cc'} \langle V_c, V_{c'} \rangle$$

    with the classifier's input \(x\), its weight \(V\) with rows \(V_c\), and the curvature
    \(h = \partial^2 \ell / \partial \phi^2\) of the loss of one sample with respect to the classifier's own output
    \(\phi\), whatever follows it: a softmax, a temperature, any loss. The bias is no part of them. The trace over
    weight and bias is the quantity `affine_hessian_trace`.

    Args:
        chunk_bytes: how much memory temporary tensors may take at once, in bytes; None: see `chunk_bytes_on`.
        scale_free: whether to compute `scaled_flatness`, which scale-free flatness needs.

    Raises:
        ValueError: if `chunk_bytes` is not a whole number, at least 1.

    Example:
        >>> method = ClassifierMethod()
        >>> method.quantities(recorder.take_pass(loss)).hessian_trace  # doctest: +SKIP
    """

    name = "classifier"

    def __init__(self, chunk_bytes: int | None = None, scale_free: bool = True) -> None:
        """Check the argument."""
        require_optional_counts(chunk_bytes=chunk_bytes)
        self._scale_free = scale_free
        self._chunk_bytes = chunk_bytes
        self._reader = ObjectiveReader()
        self._weight, self._rows, self._jacobian = LastWeight(), Kept(_rows), Kept(Tensor.to)

    def quantities(self, recorded: RecordedPass, samples: slice = slice(None)) -> SampleQuantities:
        """Return the quantities of a recorded pass, for the samples that the loss depends on.

        Args:
            recorded: the pass, from the classifier's own output on, as a `ClassifierRecorder` makes it.
            samples: which of its samples to measure.

        Raises:
            UnsupportedTailError: if the record does not hold all that the weight acts on, or the loss is no sum over
                samples.
            NonFiniteError: if the logits hold NaN.
        """
        return self.evaluate(self.derivatives(recorded, samples))

    def evaluate(self, derivatives: HeadDerivatives) -> SampleQuantities:
        """Return the quantities that follow from derivatives."""
        device = derivatives.features.device
        with not_recorded(), torch.inference_mode(False), full_precision(device):
            return _quantities(derivatives, chunk_bytes_on(device, self._chunk_bytes), self._scale_free)

    def derivatives(self, recorded: RecordedPass, samples: slice = slice(None)) -> HeadDerivatives:
        """Return the tensors from which the quantities follow; arguments and errors are those of `quantities`."""
        with differentiating(recorded):
            return self._derivatives(recorded, samples)

    def _derivatives(self, recorded: RecordedPass, samples: slice) -> HeadDerivatives:
        require_finite(recorded)
        call = _only_call(recorded)
        features, output, point = _on_rows(recorded, call)
        goal, *questions = self._reader.again(recorded, output, point, samples)
        holds, is_whole, is_other = answers(*questions, self._weight.differs(call.weight))
        if goal is None or not holds:
            goal = cast(Objective, require(self._reader.proved(recorded, output, point)))
            is_whole = bool(goal.kept(samples).all())
        if not recorded.is_alone and not _is_affine(goal):
            raise Refusal(
                f"A network must end in its classifier; what follows `{recorded.layer}` takes more from the layers "
                f"before it than its output. Name another linear layer (`classifier=...`).\n  path: {recorded.path}"
            ).error()
        dtype = features.dtype
        rows, scale = self._rows.of(self._weight.of(call.weight, is_other), dtype)
        head = HeadDerivatives(
            features=features.double(),
            rows=rows,
            scale=scale,
            logits=goal.logits.to(dtype),
            jacobian=None if goal.cut == output else self._jacobian.of(goal.head, dtype),
            loss=goal.loss,
            target=None if goal.target is None else goal.target.to(dtype),
            head_curvature=None if goal.head_curvature is None else goal.head_curvature.to(dtype),
            chunk_bytes=self._chunk_bytes,
        )
        return head if is_whole else head.select(goal.kept(samples))


@dataclass(frozen=True)
class HeadDerivatives:
    """What follows the input of the classifier.

    Attributes:
        features: `x`, shape (n, j).
        rows: `V / scale`, shape (k, d): one row per output; d is j, or k if that is less, with the same inner products.
        scale: the largest number in `V`; squares of small weights vanish in float32.
        logits: shape (n, c).
        jacobian: `d logits / d phi`, shape (c, k) or (n, c, k); None: the identity.
        loss: of each sample in its logits.
        target: what the loss reads.
        head_curvature: see `Objective`.
        chunk_bytes: what temporary tensors may take at once, see `chunk_bytes_on`.
    """

    features: Tensor
    rows: Tensor
    scale: Tensor
    logits: Tensor
    jacobian: Tensor | None
    loss: Form
    target: Tensor | None
    head_curvature: HeadCurvature | None
    chunk_bytes: int | None = None

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.logits)

    def select(self, samples: slice | Tensor) -> HeadDerivatives:
        """Return what follows the inputs of some of the samples."""
        changes: dict[str, Any] = {name: value[samples] for name, value in self._per_sample.items()}
        if self.head_curvature is not None:
            changes["head_curvature"] = self.head_curvature.select(samples)
        if self.jacobian is not None and self.jacobian.dim() == 3:
            changes["jacobian"] = self.jacobian[samples]
        return replace(self, **changes, loss=self.loss.select(samples))

    def apart(self) -> Apart | None:
        """Take apart what samples of several batches have in common; None if they cannot be joined."""
        loss = of_loss(self.loss)
        if loss is None or not self.is_linear:
            return None
        shared = self.rows, self.scale, self.jacobian, self.chunk_bytes
        return Apart({**self._per_sample, **loss.rows}, (*shared, *loss.shared))

    def with_rows(self, rows: Rows) -> HeadDerivatives:
        """Return what the same classifier has for other samples, of which `apart` gave the rows."""
        own: dict[str, Any] = {name: rows[name] for name in self._per_sample}
        return replace(self, **own, loss=loss_with(self.loss, rows))

    @property
    def _per_sample(self) -> Rows:
        rows = {"features": self.features, "logits": self.logits}
        return rows if self.target is None else {**rows, "target": self.target}

    @property
    def is_linear(self) -> bool:
        """Whether the logits are affine in the input, and in the same way for all samples."""
        return self.head_curvature is None and (self.jacobian is None or self.jacobian.dim() == 2)

    @property
    def logit_rows(self) -> Tensor:
        """The rows of `d logits / d x / scale`, shape (c, d) or (n, c, d)."""
        return self.rows if self.jacobian is None else self.jacobian @ self.rows


class _Euclidean(LF.HadamardGram):
    """The inner product of rows that are vectors in the space of the weights."""

    def inner_products(self, vectors: Tensor) -> Tensor:
        return vectors @ vectors.mT

    def quadratic_forms(self, vectors: Tensor) -> Tensor:
        return vectors.square().sum(-1)


def _only_call(recorded: RecordedPass) -> ConvolutionCall:
    """Return the one call through which the weight acts on the loss; refuse a weight that acts in several ways."""
    operations = (recorded.graph.operations[number] for number in recorded.ancestry)
    read = {node.index for operation in operations for node in operation.nodes}
    used = [call for call in recorded.calls if call.node in read]
    if len(used) == 1 and not recorded.weight_is_shared:
        return used[0]
    reason = "is shared with another module" if recorded.weight_is_shared else f"acts {len(used)} times"
    raise Refusal(
        f"The classifier's weight must act once on each sample; that of `{recorded.layer}` {reason}. Name another "
        f"linear layer (`classifier=...`).\n  path: {recorded.path}"
    ).error()


def _on_rows(recorded: RecordedPass, call: ConvolutionCall) -> tuple[Tensor, Cut, Tensor]:
    """Return input and output of the classifier with one row per sample, shape (n, j) and (n, k), and their cut.

    A classifier that ran on several positions s of a sample is one on their weighted sum, if that is what follows:
    a mean, or the choice of one position.
    """
    graph, phi = recorded.graph, recorded.cuts[0]
    inputs = upcast(graph.captures.value(call.inputs)).reshape(-1, call.weight.shape[1])
    outputs = upcast(graph.captures.value(call.output)).reshape(-1, len(call.weight))
    samples = call.geometry["samples"]
    if len(inputs) == samples:
        return inputs, phi, outputs
    for cut in recorded.cuts[1:]:
        if tuple(graph.tensor_of(cut.node).shape) == (samples, len(call.weight)):
            break
    else:
        raise _not_one_row(recorded)
    point = outputs.detach().requires_grad_()
    value = point.reshape(graph.tensor_of(phi.node).shape)
    needed = recorded.ancestry
    pooled = graph.replay({phi.node: value}, cut.end, start=phi.end, only=needed)[cut.node]
    generator = torch.Generator().manual_seed(0)
    cotangent = torch.rand(pooled.shape, generator=generator, dtype=torch.float64).to(pooled) + 0.5
    (ones,) = torch.autograd.grad(pooled.sum(), point, create_graph=True)
    (drawn,) = torch.autograd.grad(pooled, point, cotangent)
    weights, by_cotangent = (
        ones.detach().reshape(samples, -1, len(call.weight)),
        drawn.reshape(samples, -1, len(call.weight)),
    )
    expected = weights[..., :1] * cotangent.unsqueeze(1)
    if ones.requires_grad or not allclose_at_scale(by_cotangent, expected, weights.abs().max()):
        raise _not_one_row(recorded)
    weighted = torch.einsum("ns,nsj->nj", weights[..., 0], inputs.reshape(samples, -1, inputs.shape[1]))
    return weighted, cut, pooled.detach()


def _not_one_row(recorded: RecordedPass) -> UnsupportedTailError:
    return Refusal(
        f"The classifier must act on one row per sample; `{recorded.layer}` acts on several positions, and what "
        f"follows is neither their mean nor one of them.\n  path: {recorded.path}"
    ).error()


def _is_affine(goal: Objective) -> bool:
    """Return whether the logits are known to be affine in the output, and in the same way for all samples."""
    return goal.head.dim() == 2 and goal.head_curvature is None and not isinstance(goal.loss, Differentiated)


def _rows(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the rows of a weight and their scale, see `HeadDerivatives`."""
    rows = _reduced(weight.double())
    scale = rows.abs().max().clamp_min(torch.finfo(rows.dtype).tiny)
    return (rows / scale).to(dtype), scale


def _reduced(weight: Tensor) -> Tensor:
    """Return rows with the same inner products, as short as possible."""
    if weight.shape[1] <= weight.shape[0]:
        return weight
    return torch.linalg.qr(weight.mT, mode="r").R.mT


def _quantities(head: HeadDerivatives, chunk_bytes: int, scale_free: bool) -> SampleQuantities:
    loss, logits, target = head.loss, head.logits, head.target
    square, uncertainty = head.features.square().sum(-1), loss.curvature_trace(logits, target)
    gauss_newton = uncertainty
    if head.jacobian is not None:
        gauss_newton = loss.curvature_diagonal(logits, head.jacobian, target).sum(-1)
    trace = gauss_newton
    flatness = _flatness(head, chunk_bytes, scale_free)
    if head.head_curvature is not None:
        kernels = head.rows @ head.rows.mT
        for columns, bent in head.head_curvature.columns(chunk_bytes):
            own = bent[:, :, columns].diagonal(dim1=1, dim2=2).sum(-1)
            trace, flatness = trace + own, flatness + (bent * kernels[columns]).sum((1, 2)).unsqueeze(1)
            if is_own_logit(loss, logits, head.head_curvature):
                uncertainty = uncertainty + own
    flatness = flatness * (square * head.scale.square()).unsqueeze(1)
    values: dict[str, Any] = {"gauss_newton_trace": square * gauss_newton}
    if not isinstance(loss, Differentiated):
        values["logit_mean_square"] = loss.logit_mean_square(logits)
        if flatness.shape[1] > 1:
            values["scaled_flatness"] = flatness[:, 1:]
        if target is not None:
            values |= {
                "prediction": loss.prediction(logits),
                "output_margin": loss.output_margin(logits, target),
                "softmax_margin": loss.softmax_margin(logits, target),
            }
            if head.is_linear:
                values["margin_bound"] = LF.affine_trace(head.features, loss.trace_bound(logits, target))
    if isinstance(loss, CrossEntropy) and (label := loss.hard_label(target)) is not None:
        jacobian = torch.eye(logits.shape[1]).to(logits) if head.jacobian is None else head.jacobian
        margin = LF.margin_row(logits, label, jacobian).square().sum(-1)
        values["margin_trace"] = square * loss.label_weight(logits, target) * margin
    if head.is_linear:
        values |= {
            "feature_squared_norm": square,
            "head_squared_norm": head.scale.square() * head.logit_rows.square().sum(),
            "affine_hessian_trace": LF.affine_trace(head.features, uncertainty),
            "head_relative_flatness": flatness[:, 0],
        }
    return SampleQuantities(square * trace, flatness[:, 0], uncertainty, **values)


def _flatness(head: HeadDerivatives, chunk_bytes: int, scale_free: bool) -> Tensor:
    """Return relative flatness of the predictor itself and, where it has a meaning, at all temperatures.

    It is that for inputs and weights of unit size: `|x|` and `scale` are left out.
    """
    has_temperatures = not isinstance(head.loss, Differentiated) and head.head_curvature is None
    taus = temperatures_for(head.logits, scale_free and has_temperatures)
    numbers = 3 * (head.logits.shape[1] + len(taus)) * (sum(head.rows.shape) + head.logits.shape[1])
    step = max(1, chunk_bytes // (numbers * head.logits.element_size()))
    parts = []
    for start in range(0, max(1, len(head.logits)), step):
        chunk = head.select(slice(start, start + step))
        ones = chunk.logits.new_ones(len(chunk.logits), 1, 1)
        gram = _Euclidean(chunk.rows, ones, ones)
        scaled = chunk.logits.unsqueeze(-1) / taus
        flatness = chunk.loss.relative_flatness(scaled, chunk.logit_rows, gram, chunk.target)
        parts.append(flatness / taus.square())
    return torch.cat(parts)
