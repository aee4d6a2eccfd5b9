"""The values of every sample by name, as a report keeps them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_flatness.curvature.jacobian.method import LayerQuantities
from lightning_flatness.curvature.methods import Quantities

_QUANTITIES = (
    "relative_flatness",
    "hessian_trace",
    "confidence",
    "affine_hessian_trace",
    "head_relative_flatness",
    "output_margin",
    "softmax_margin",
    "margin_bound",
)


def per_sample_values(parts: Sequence[Quantities]) -> dict[str, Tensor]:
    """Return the quantities of each sample that all batches have, by name.

    Args:
        parts: of each batch, at least one.

    Returns:
        Each of shape (n,), as `FlatnessReport.samples` describes them.
    """
    rows = [_named(part) for part in parts]
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0] if all(name in row for row in rows)}


def _named(part: Quantities) -> dict[str, Tensor]:
    """Return the quantities of one batch by name; with several layers, those of a layer are named after it."""
    if not isinstance(part, LayerQuantities):
        return {name: value for name in _QUANTITIES if (value := getattr(part, name)) is not None}
    found = {} if part.network is None else {"network_trace": part.network}
    for layer, own in part.by_layer.items():
        values = _named(own)
        if len(part.by_layer) > 1:
            values |= {f"{name}/{layer}": values.pop(name) for name in ("relative_flatness", "hessian_trace")}
        found |= values
    return found
