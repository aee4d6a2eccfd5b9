"""The small tensors of one batch from which every quantity follows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

import lightning_flatness.functional as LF

CHUNK_BYTES = 64 * 2**20


class LayerCurvature(NamedTuple):
    """What one pass over the samples yields; every entry has shape (n,)."""

    hessian_trace: Tensor
    relative_flatness: Tensor


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Run matrix products in the precision of their operands: no autocast, no TF32, no graph."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


@dataclass(frozen=True)
class TailFactors:
    r"""What a network's tail, `z -> ... -> p -> phi = V p + c`, says about one batch.

    Attributes:
        inputs: `A`, the input of the monitored convolution, shape (n, channels, *space).
        jacobian: `M_ks = d p_{pi(k)} / d z_ks`, shape (n, k, s).
        bend: `d2 p_{pi(k)} / d z_ks^2`, shape (n, k, s); None where the tail is piecewise linear.
        features: `p`, the input of the classifier, shape (n, j).
        logits: `phi`, shape (n, c).
        weight: `W`, the convolution's filters as rows, shape (k, d).
        head: `V`, the classifier's weight; the identity if the convolution is the classifier, shape (c, j).
        channels: `pi`, the feature that each filter feeds, shape (k,).
        geometry: of the convolution.
        target: class indices, shape (n,); None if unknown.
    """

    inputs: Float[Tensor, "n i ..."]
    jacobian: Float[Tensor, "n k s"]
    bend: Float[Tensor, "n k s"] | None
    features: Float[Tensor, "n j"]
    logits: Float[Tensor, "n c"]
    weight: Float[Tensor, "k d"]
    head: Float[Tensor, "c j"]
    channels: Int[Tensor, " k"]
    geometry: LF.ConvGeometry
    target: Int[Tensor, " n"] | None = None

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.logits)

    def to(self, dtype: torch.dtype) -> TailFactors:
        """Return the same factors with every floating tensor in `dtype`."""
        changes = {
            field.name: value.to(dtype)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor) and value.is_floating_point()
        }
        return replace(self, **changes)

    def select(self, samples: slice) -> TailFactors:
        """Return the factors of some of the samples."""
        per_sample = ("inputs", "jacobian", "bend", "features", "logits", "target")
        changes = {name: value[samples] for name in per_sample if (value := getattr(self, name)) is not None}
        return replace(self, **changes)

    @cached_property
    def hessian_trace(self) -> Float[Tensor, " n"]:
        """Per-sample Hessian trace, see `functional.hessian_trace`."""
        return self._curvature.hessian_trace

    @cached_property
    def relative_flatness(self) -> Float[Tensor, " n"]:
        """Per-sample relative flatness, see `functional.relative_flatness`."""
        return self._curvature.relative_flatness

    @cached_property
    def confidence(self) -> Float[Tensor, " n"]:
        """Per-sample `1 - |S|^2`, see `functional.confidence`."""
        return LF.confidence(self.logits)

    @cached_property
    def output_margin(self) -> Float[Tensor, " n"]:
        """Per-sample signed output margin, see `functional.output_margin`."""
        if self.target is None:
            raise ValueError("A margin needs the true classes: got no target. Pass `target`.")
        return LF.output_margin(self.logits, self.target)

    @cached_property
    def _curvature(self) -> LayerCurvature:
        """Everything that needs the (k, k) matrices, in chunks of samples that stay under `CHUNK_BYTES`."""
        filters, positions = self.jacobian.shape[1:]
        classes, unfolded = len(self.head), positions * self.geometry.groups * self.weight.shape[1]
        numbers = 3 * filters**2 + 2 * classes * filters + unfolded + 2 * positions**2
        step = max(1, CHUNK_BYTES // (numbers * self.jacobian.element_size()))
        with full_precision(self.logits.device):
            parts = [self.select(slice(start, start + step))._chunk_curvature() for start in range(0, len(self), step)]
            return LayerCurvature(*map(torch.cat, zip(*parts, strict=True)))

    def _chunk_curvature(self) -> LayerCurvature:
        head = self.head[:, self.channels]
        kernel_gram = self.weight @ self.weight.mT
        root = LF.curvature_root(self.logits, head)
        curvature = root.mT @ root
        gram = LF.filter_gram(self.inputs, self.jacobian, self.geometry)
        label_term = None if self.bend is None else self._label_term(head)
        return LayerCurvature(
            LF.hessian_trace(gram, curvature, label_term),
            LF.relative_flatness(kernel_gram, gram, curvature, label_term),
        )

    def _label_term(self, head: Float[Tensor, "c k"]) -> Float[Tensor, "n k"]:
        """Return `t_k`, what the curvature of the activation adds to the diagonal blocks."""
        if self.target is None:
            raise ValueError("A tail with a curved activation needs the true classes: got no target. Pass `target`.")
        bend = self.bend.reshape(len(self), self.geometry.groups, -1, self.bend.shape[-1])
        energy = LF.patch_energy(self.inputs, self.geometry).unsqueeze(2)
        return (bend * energy).sum(-1).flatten(1) * LF.label_slope(self.logits, head, self.target)
