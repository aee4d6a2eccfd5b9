"""Pure functions of tensors: one value per sample, no state, no model."""

from lightning_flatness.functional.curvature import confidence, curvature_root, label_slope
from lightning_flatness.functional.flatness import hessian_trace, relative_flatness
from lightning_flatness.functional.margin import output_margin
from lightning_flatness.functional.patches import ConvGeometry, filter_gram, patch_energy, patch_gram, patches

__all__ = [
    "ConvGeometry",
    "confidence",
    "curvature_root",
    "filter_gram",
    "hessian_trace",
    "label_slope",
    "output_margin",
    "patch_energy",
    "patch_gram",
    "patches",
    "relative_flatness",
]
