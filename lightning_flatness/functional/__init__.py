"""Pure functions of tensors: they keep no state, know no model, and most return one value per sample."""

from lightning_flatness.functional.curvature import centred_rows, confidence, curvature_diagonal
from lightning_flatness.functional.flatness import (
    affine_hessian_trace,
    affine_trace,
    attribution,
    channelwise_relative_flatness,
    head_relative_flatness,
    hessian_trace,
    linear_relative_flatness,
    relative_flatness,
)
from lightning_flatness.functional.gram import HadamardGram
from lightning_flatness.functional.margin import (
    binary_margin,
    margin_bound,
    margin_gap,
    margin_row,
    output_margin,
    softmax_margin,
)
from lightning_flatness.functional.patches import (
    ConvGeometry,
    gram_factors,
    patch_gram,
    patch_squared_norm,
    patches,
)
from lightning_flatness.functional.rank import head_rank_bound, rank_bound
from lightning_flatness.functional.statistics import distribution, pearson
from lightning_flatness.functional.temperature import TEMPERATURES, at_temperature

__all__ = [
    "TEMPERATURES",
    "ConvGeometry",
    "HadamardGram",
    "affine_hessian_trace",
    "affine_trace",
    "at_temperature",
    "attribution",
    "binary_margin",
    "centred_rows",
    "channelwise_relative_flatness",
    "confidence",
    "curvature_diagonal",
    "distribution",
    "gram_factors",
    "head_rank_bound",
    "head_relative_flatness",
    "hessian_trace",
    "linear_relative_flatness",
    "margin_bound",
    "margin_gap",
    "margin_row",
    "output_margin",
    "patch_gram",
    "patch_squared_norm",
    "patches",
    "pearson",
    "rank_bound",
    "relative_flatness",
    "softmax_margin",
]
