"""The small tensors of one batch from which every quantity follows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from math import prod
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

import lightning_flatness.functional as LF
from lightning_flatness.functional.flatness import pairs_pay
from lightning_flatness.functional.gram import BLOCK_ROWS
from lightning_flatness.losses import CrossEntropy, Loss

CHUNK_BYTES = 64 * 2**20


class LayerCurvature(NamedTuple):
    """What one pass over the samples yields; the first dimension of every entry is that of the samples."""

    filter_squared_norm: Tensor
    relative_flatness: Tensor
    scaled_flatness: Tensor


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Run matrix products in the precision of their operands: no autocast, no TF32, no graph."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False), _exact_products():
        yield


@contextmanager
def _exact_products() -> Iterator[None]:
    # The older switch of all backends raises where a user has set one of the newer ones, which are by backend.
    parts: list[Any] = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    before = [(part, part.fp32_precision) for part in parts if hasattr(part, "fp32_precision")]
    precision = None if before else torch.get_float32_matmul_precision()
    try:
        for part, _ in before:
            part.fp32_precision = "ieee"
        if precision:
            torch.set_float32_matmul_precision("highest")
        yield
    finally:
        for part, chosen in before:
            part.fp32_precision = chosen
        if precision:
            torch.set_float32_matmul_precision(precision)


class KernelGram:
    """Gram matrices of filters; that of the weight before is kept, as weights seldom change between two batches."""

    def __init__(self) -> None:
        """Start with none."""
        self._known: tuple[Tensor, Tensor] | None = None

    def of(self, weight: Float[Tensor, "k d"]) -> Float[Tensor, "k k"]:
        """Return `W W^T`, shape (k, k); the same tensor is taken to hold the same values."""
        if self._known is None or self._known[0] is not weight:
            with full_precision(weight.device):
                self._known = weight, weight @ weight.mT
        return self._known[1]


@dataclass(frozen=True)
class TailFactors:
    r"""What a network's tail, `z -> ... -> p -> phi = V p + c`, says about one batch.

    Attributes:
        inputs: `A`, the input of the monitored convolution, shape (n, channels, *space).
        jacobian: `M_ks = d p_{pi(k)} / d z_ks`, shape (n, k, s).
        bend: `d2 p_{pi(k)} / d z_ks^2`, shape (n, k, s); None where the tail is piecewise linear.
        features: `p`, the input of the classifier, shape (n, j).
        logits: `phi`, shape (n, c).
        kernel_gram: `W W^T`, inner products of the convolution's filters, shape (k, k).
        head: `V`, the classifier's weight; the identity if the convolution is the classifier, shape (c, j).
        channels: `pi`, the feature that each filter feeds, shape (k,).
        geometry: of the convolution.
        target: what `batch.checked_targets` returns; None if unknown. Class indices, shape (n,), or probabilities
            of the classes or labels, shape (n, c).
        loss: of the training.
        chunk_bytes: what temporary tensors may take at once; a single sample may take more.
    """

    inputs: Float[Tensor, "n i ..."]
    jacobian: Float[Tensor, "n k s"]
    bend: Float[Tensor, "n k s"] | None
    features: Float[Tensor, "n j"]
    logits: Float[Tensor, "n c"]
    kernel_gram: Float[Tensor, "k k"]
    head: Float[Tensor, "c j"]
    channels: Int[Tensor, " k"]
    geometry: LF.ConvGeometry
    target: Int[Tensor, " n"] | Float[Tensor, "n c"] | None = None
    loss: Loss = field(default_factory=CrossEntropy)
    chunk_bytes: int = CHUNK_BYTES

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.logits)

    def to(self, dtype: torch.dtype) -> TailFactors:
        """Return the same factors with every floating tensor in `dtype`."""
        changes: dict[str, Any] = {
            entry.name: value.to(dtype)
            for entry in fields(self)
            if isinstance(value := getattr(self, entry.name), Tensor) and value.is_floating_point()
        }
        return replace(self, **changes)

    def cpu(self) -> TailFactors:
        """Return the same factors on the CPU."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        changes: dict[str, Any] = {name: value.cpu() for name, value in values.items() if isinstance(value, Tensor)}
        return replace(self, **changes)

    def select(self, samples: slice) -> TailFactors:
        """Return the factors of some of the samples."""
        per_sample = ("inputs", "jacobian", "bend", "features", "logits", "target")
        changes: dict[str, Any] = {
            name: value[samples] for name in per_sample if (value := getattr(self, name)) is not None
        }
        return replace(self, **changes)

    @cached_property
    def hessian_trace(self) -> Float[Tensor, " n"]:
        """Per-sample Hessian trace, see `functional.hessian_trace`, with what a curved activation adds."""
        trace = LF.hessian_trace(self._filter_energy, self._curvature_diagonal[:, self.channels])
        if self.bend is None:
            return trace
        with full_precision(self.logits.device):
            added = self._label_term(self.logits.unsqueeze(-1), self._activation_curvature(self.bend))
        return trace + added.squeeze(1)

    @cached_property
    def relative_flatness(self) -> Float[Tensor, " n"]:
        """Per-sample relative flatness, see `functional.relative_flatness`, with what a curved activation adds."""
        return self._curvature.relative_flatness

    @cached_property
    def feature_energy(self) -> Float[Tensor, " n"]:
        """Per-sample `Tr R`, the squared norm of the features' gradients in the filters."""
        return self._filter_energy.sum(-1)

    @cached_property
    def scaled_flatness(self) -> Float[Tensor, "n t"]:
        """Per-sample relative flatness of the predictors `phi / tau` for every `tau` in `functional.TEMPERATURES`."""
        return self._curvature.scaled_flatness

    @cached_property
    def logit_mean_square(self) -> Float[Tensor, " n"]:
        """Per-sample mean square of the logits about their mean, see `losses.CrossEntropy.logit_mean_square`."""
        return self.loss.logit_mean_square(self.logits)

    @cached_property
    def confidence(self) -> Float[Tensor, " n"]:
        """Per-sample trace of the loss's curvature in the logits; `1 - |S|^2`, see `functional.confidence`."""
        return self.loss.curvature_trace(self.logits, self.target)

    @cached_property
    def affine_hessian_trace(self) -> Float[Tensor, " n"]:
        """Per-sample Hessian trace of the affine classifier on its own input, see `functional.affine_hessian_trace`."""
        return LF.affine_squared_norm(self.features) * self.confidence

    @cached_property
    def head_relative_flatness(self) -> Float[Tensor, " n"]:
        """Per-sample relative flatness of the classifier, see `functional.head_relative_flatness`."""
        return self.features.square().sum(-1) * self._curvature_diagonal.sum(-1)

    @cached_property
    def output_margin(self) -> Float[Tensor, " n"]:
        """Per-sample signed output margin, see `functional.output_margin`."""
        return self.loss.output_margin(self.logits, self.target)

    @cached_property
    def softmax_margin(self) -> Float[Tensor, " n"]:
        """Per-sample signed softmax margin, see `functional.softmax_margin`."""
        return self.loss.softmax_margin(self.logits, self.target)

    @cached_property
    def margin_bound(self) -> Float[Tensor, " n"]:
        """Per-sample bound of `affine_hessian_trace` by the margin, see `functional.margin_bound`."""
        return LF.affine_squared_norm(self.features) * self.loss.trace_bound(self.logits, self.target)

    @cached_property
    def head_energy(self) -> Float[Tensor, ""]:
        """`|V|_F^2` of the columns that the filters feed."""
        return self.head[:, self.channels].square().sum()

    @cached_property
    def kernel_energy(self) -> Float[Tensor, ""]:
        """`|W|_F^2`."""
        return self.kernel_gram.diagonal().sum()

    @cached_property
    def _curvature(self) -> LayerCurvature:
        return LayerCurvature(*self._by_chunks(TailFactors._chunk_curvature))

    @cached_property
    def _filter_energy(self) -> Float[Tensor, "n k"]:
        """`R_kk`, shape (n, k)."""
        if "_curvature" in self.__dict__:
            return self._curvature.filter_squared_norm  # found on its way; alone it costs far less than the rest
        return self._by_chunks(lambda chunk: (chunk._metric.squared_norms(),))[0]

    @cached_property
    def _curvature_diagonal(self) -> Float[Tensor, "n j"]:
        """`Q_jj` of all inputs of the classifier, shape (n, j)."""
        with full_precision(self.logits.device):
            return self.loss.curvature_diagonal(self.logits, self.head, self.target)

    @property
    def _metric(self) -> LF.HadamardGram:
        return LF.HadamardGram(self.kernel_gram, *LF.gram_factors(self.inputs, self.jacobian, self.geometry))

    def _by_chunks(self, function: Callable[[TailFactors], tuple[Tensor, ...]]) -> list[Tensor]:
        """Return what the function does, by chunks of samples under `chunk_bytes`, or smaller if memory is short."""
        classes, filters, temperatures = len(self.head), self.jacobian.shape[1], 1 + len(LF.TEMPERATURES)
        pixels = prod(self.geometry.padded_shape(self.inputs.shape[2:]))
        weights = self.inputs.shape[1] * prod(self.geometry.kernel)
        rows = classes if pairs_pay(classes, filters, temperatures) else classes + temperatures
        numbers = 3 * rows * filters + 3 * temperatures * classes
        numbers += pixels * min(2 * pixels, weights) + 2 * filters * min(pixels, weights)
        if self.logits.is_cuda:  # where a block of the metric holds all samples of a chunk
            numbers += min(BLOCK_ROWS, filters) * filters
        step = max(1, self.chunk_bytes // (numbers * self.jacobian.element_size()))
        with full_precision(self.logits.device):
            while True:
                starts = range(0, max(1, len(self)), step)
                try:
                    parts = [function(self.select(slice(start, start + step))) for start in starts]
                    return list(map(torch.cat, zip(*parts, strict=True)))
                except torch.OutOfMemoryError:
                    if step == 1:
                        raise
                    step = (min(step, len(self)) + 1) // 2

    def _chunk_curvature(self) -> LayerCurvature:
        metric, head = self._metric, self.head[:, self.channels]
        taus = torch.cat([LF.TEMPERATURES.new_ones(1), LF.TEMPERATURES]).to(self.logits)
        scaled = self.logits.unsqueeze(-1) / taus
        flatness = self.loss.relative_flatness(scaled, head, metric, self.target) / taus.square()
        if self.bend is not None:
            added = self._activation_curvature(self.bend) * self.kernel_gram.diagonal()
            flatness = flatness + self._label_term(scaled, added) / taus
        return LayerCurvature(metric.squared_norms(), flatness[:, 0], flatness[:, 1:])

    def _activation_curvature(self, bend: Float[Tensor, "n k s"]) -> Float[Tensor, "n k"]:
        """Return `sum_s (d2 p_k / d z_ks^2) |P_s|^2`, the trace of feature k's own Hessian in its filter."""
        grouped = bend.unflatten(1, (self.geometry.groups, -1))
        energy = LF.patch_squared_norm(self.inputs, self.geometry).unsqueeze(2)
        return (grouped * energy).sum(-1).flatten(1)

    def _label_term(self, logits: Float[Tensor, "n c t"], added: Float[Tensor, "n k"]) -> Float[Tensor, "n t"]:
        """Return `sum_k t_k`, what the curvature of the activation adds through the slope of the loss."""
        return self.loss.logit_gradient_product(logits, added @ self.head[:, self.channels].mT, self.target)
