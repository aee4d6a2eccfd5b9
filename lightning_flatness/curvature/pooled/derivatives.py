"""The small tensors from which every quantity of a pooled convolution follows."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lightning_flatness.curvature.head import HeadCurvature, is_own_logit
from lightning_flatness.curvature.rows import Apart, Rows, loss_with, of_loss
from lightning_flatness.functional import ConvGeometry
from lightning_flatness.losses import CrossEntropy, Differentiated, Form

_PER_SAMPLE = ("inputs", "jacobian", "second_derivative", "features", "logits", "target")


@dataclass(frozen=True)
class PooledDerivatives:
    r"""What follows a convolution under global pooling, `z -> ... -> p -> phi = V p + b`, and its derivatives.

    The features that the filters feed, axis f, come filter by filter, the same number for each; `z_f` is the map of the
    filter that feeds feature f.

    Attributes:
        inputs: `A`, the input of the monitored convolution, shape (n, channels, *space).
        jacobian: `M_fs = d p_{pi(f)} / d z_fs`, shape (n, f, s).
        second_derivative: `d2 p_{pi(f)} / d z_fs^2`, shape (n, f, s); None where the tail is piecewise linear.
        features: `p`, the pooled features, shape (n, j).
        logits: `phi`, shape (n, c).
        kernel_gram: `W W^T`, inner products of the convolution's filters, shape (k, k).
        head: `d phi / d p`, shape (c, j); (n, c, j) where it differs between samples.
        feature_index: `pi`, where the features that the filters feed lie among all features, shape (f,).
        is_fed: which of them are known, shape (f,).
        geometry: of the convolution.
        loss: of each sample in its logits.
        target: what the loss reads; None if it is in the loss.
        head_curvature: see `objective.Objective`; None for a piecewise linear head.
        chunk_bytes: what temporary tensors may take at once, see `chunks.chunk_bytes_on`.
        is_gauss_newton: whether the curvature of the map and of the head has been left out.
        weight: `W`, the filters as rows, shape (k, d); None: not known.
    """

    inputs: Float[Tensor, "n i ..."]
    jacobian: Float[Tensor, "n f s"]
    second_derivative: Float[Tensor, "n f s"] | None
    features: Float[Tensor, "n j"]
    logits: Float[Tensor, "n c"]
    kernel_gram: Float[Tensor, "k k"]
    head: Float[Tensor, "*n c j"]
    feature_index: Int[Tensor, " f"]
    is_fed: Bool[Tensor, " f"]
    geometry: ConvGeometry
    loss: Form = field(default_factory=CrossEntropy)
    target: Int[Tensor, " n"] | Float[Tensor, "n c"] | None = None
    head_curvature: HeadCurvature | None = None
    chunk_bytes: int | None = None
    is_gauss_newton: bool = False
    weight: Float[Tensor, "k d"] | None = None

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.logits)

    def to(self, dtype: torch.dtype) -> PooledDerivatives:
        """Return the same derivatives with every floating tensor in `dtype`."""
        changes: dict[str, Any] = {
            entry.name: value.to(dtype)
            for entry in fields(self)
            if isinstance(value := getattr(self, entry.name), HeadCurvature)
            or (isinstance(value, Tensor) and value.is_floating_point())
        }
        return replace(self, **changes)

    def select(self, samples: slice | Tensor) -> PooledDerivatives:
        """Return the derivatives of some of the samples."""
        changes: dict[str, Any] = {
            name: value[samples] for name in _PER_SAMPLE if (value := getattr(self, name)) is not None
        }
        if self.head.dim() == 3:
            changes["head"] = self.head[samples]
        if self.head_curvature is not None:
            changes["head_curvature"] = self.head_curvature.select(samples)
        return self._changed(**changes, loss=self.loss.select(samples))

    def apart(self) -> Apart | None:
        """Take apart what samples of several batches have in common; None if they cannot be joined."""
        loss = of_loss(self.loss)
        if loss is None or not self.is_linear or self.is_gauss_newton:
            return None
        rows = {name: value for name in _PER_SAMPLE if (value := getattr(self, name)) is not None}
        shared = self.kernel_gram, self.weight, self.head, self.feature_index, self.is_fed, self.geometry
        return Apart({**rows, **loss.rows}, (*shared, self.chunk_bytes, *loss.shared))

    def with_rows(self, rows: Rows) -> PooledDerivatives:
        """Return what the same tail has for other samples, of which `apart` gave the rows."""
        own: dict[str, Any] = {name: rows[name] for name in _PER_SAMPLE if name in rows}
        return self._changed(**own, loss=loss_with(self.loss, rows))

    @property
    def exact(self) -> PooledDerivatives:
        """The same derivatives in float64, with inner products of the filters that were never rounded to float32."""
        assert self.weight is not None
        weight = self.weight.double()
        return replace(self.to(torch.float64), kernel_gram=weight @ weight.mT)

    @property
    def features_per_filter(self) -> int:
        """How many features each filter feeds."""
        return len(self.feature_index) // len(self.kernel_gram)

    @cached_property
    def used_head(self) -> Float[Tensor, "*n c f"]:
        """The columns of the head in the order of the filters that feed them; zero where that is not known."""
        return self.head[..., self.feature_index] * self.is_fed

    @property
    def gauss_newton(self) -> PooledDerivatives:
        """The same derivatives without the curvature of the map and of the head, unless this holds that of the loss."""
        bent = self.head_curvature if self.is_own_logit else None
        return replace(self, second_derivative=None, head_curvature=bent, is_gauss_newton=True)

    @property
    def is_own_logit(self) -> bool:
        """See `Objective.is_own_logit`."""
        return is_own_logit(self.loss, self.logits, self.head_curvature)

    @property
    def has_temperatures(self) -> bool:
        """Whether relative flatness is known at other temperatures: behind a softmax or sigmoid of a straight head."""
        is_curved = self.head_curvature is not None or self.is_gauss_newton
        return not is_curved and not isinstance(self.loss, Differentiated)

    @property
    def is_linear(self) -> bool:
        """Whether the head is affine, and the same for all samples."""
        return self.head.dim() == 2 and self.head_curvature is None

    def _changed(self, **changes: Any) -> PooledDerivatives:
        """Return what is the same but for what belongs to single samples."""
        changed = replace(self, **changes)
        if self.head.dim() == 2:
            vars(changed)["used_head"] = self.used_head  # the same for all samples: it is not copied again
        return changed
