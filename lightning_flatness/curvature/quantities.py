"""What every method returns: one value per sample of each quantity that it can give."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

GAUSS_NEWTON = (
    "the Gauss-Newton part of trace and relative flatness alone, under keys that end in `/ggn`, since the head is "
    "curved and so large that the Hessian would take longer than the network"
)
"""What a `PooledMethod` says where it labels its values."""


@dataclass(frozen=True)
class SampleQuantities:
    r"""The quantities of one batch or several, for each sample; metrics add them up and compute nothing themselves.

    Symbols are those of `docs/mathematics.md`. A quantity that a method cannot give is None; the table of `keys`
    says which method gives which.

    Attributes:
        hessian_trace: trace of the loss's Hessian with respect to the layer's weight, shape (n,); loss per squared
            weight.
        relative_flatness: relative flatness of the layer, shape (n,); unit of the loss.
        confidence: trace of the loss's curvature with respect to the logits, `1 - |S|^2` for cross-entropy, shape (n,);
            no unit.
        scaled_flatness: relative flatness at each of `functional.TEMPERATURES`, shape (n, t); unit of the loss.
        logit_mean_square: mean square of the logits about their mean, shape (n,); squared logit.
        feature_squared_norm: `Tr R`, shape (n,); squared feature per squared weight.
        head_squared_norm: `|V|_F^2` of the columns that the filters feed, a scalar; squared weight.
        kernel_squared_norm: `|W|_F^2`, a scalar; squared weight.
        affine_hessian_trace: Hessian trace of the classifier on its own input (ACEHT), shape (n,); loss per squared
            weight.
        head_relative_flatness: relative flatness of the classifier, shape (n,); unit of the loss.
        output_margin: signed margin of the logits, shape (n,); logit.
        softmax_margin: signed margin of the probabilities, shape (n,); no unit.
        margin_bound: bound of `affine_hessian_trace` by the margin, shape (n,); loss per squared weight.
        gauss_newton_trace: trace of the Gauss-Newton part of the layer's Hessian, shape (n,); loss per squared weight.
        margin_trace: its part of the true class against all others, see `functional.margin_row`, shape (n,); only for
            labels of one class.
        prediction: the predicted class, shape (n, 1), or the predicted labels, shape (n, c).
        curvature: whether trace and flatness are those of the Hessian or of its Gauss-Newton part.

    Example:
        >>> import torch
        >>> from lightning_flatness import SampleQuantities
        >>> values = torch.tensor([1.0, 2.0, 3.0])
        >>> quantities = SampleQuantities(hessian_trace=values, relative_flatness=values, confidence=values / 4)
        >>> len(quantities), quantities.select(slice(2)).hessian_trace, quantities.output_margin
        (3, tensor([1., 2.]), None)
    """

    hessian_trace: Float[Tensor, " n"]
    relative_flatness: Float[Tensor, " n"]
    confidence: Float[Tensor, " n"]
    scaled_flatness: Float[Tensor, "n t"] | None = None
    logit_mean_square: Float[Tensor, " n"] | None = None
    feature_squared_norm: Float[Tensor, " n"] | None = None
    head_squared_norm: Float[Tensor, ""] | None = None
    kernel_squared_norm: Float[Tensor, ""] | None = None
    affine_hessian_trace: Float[Tensor, " n"] | None = None
    head_relative_flatness: Float[Tensor, " n"] | None = None
    output_margin: Float[Tensor, " n"] | None = None
    softmax_margin: Float[Tensor, " n"] | None = None
    margin_bound: Float[Tensor, " n"] | None = None
    gauss_newton_trace: Float[Tensor, " n"] | None = None
    margin_trace: Float[Tensor, " n"] | None = None
    prediction: Shaped[Tensor, "n m"] | None = None
    curvature: Literal["hessian", "ggn"] = "hessian"

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.hessian_trace)

    def select(self, samples: slice) -> SampleQuantities:
        """Return the quantities of some of the samples."""
        return self._changed(lambda value: value[samples] if value.dim() else value)

    def cpu(self) -> SampleQuantities:
        """Return the same quantities on the CPU."""
        return self._changed(torch.Tensor.cpu)

    def _changed(self, change: Any) -> SampleQuantities:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: change(value) for name, value in values.items() if isinstance(value, Tensor)})


def given(quantity: Tensor | None, name: str) -> Tensor:
    """Return a quantity, or refuse if the method did not give it.

    Args:
        quantity: the attribute of `SampleQuantities`.
        name: its name.

    Raises:
        ValueError: if it is None.
    """
    if quantity is None:
        raise ValueError(
            f"This metric needs `{name}` of every sample; the quantities have none. Pass the targets to the method "
            "that makes them, or use a method that gives it."
        )
    return quantity
