"""Pure functions of tensors: they keep no state, know no model, and most return one value per sample."""

from lightning_flatness.functional.cotangents import competitor_cotangents, margin_cotangent
from lightning_flatness.functional.curvature import centred_rows, confidence, curvature_diagonal, curvature_factor
from lightning_flatness.functional.estimate import (
    longest_first,
    sign_probe,
    sign_probe_variance,
    standard_error,
    two_pass_cotangents,
)
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
from lightning_flatness.functional.layer import flatness_of_cotangents, gradients_of_cotangents
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
    gradient_rows,
    gram_factors,
    patch_gram,
    patch_squared_norm,
    patches,
)
from lightning_flatness.functional.rank import head_rank_bound, rank_bound
from lightning_flatness.functional.spectrum import (
    dual_matrix,
    not_zero,
    participation_ratio,
    patch_second_moments,
    primal_matrix,
    signed_eigenvalues,
    soft_rank,
)
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
    "competitor_cotangents",
    "confidence",
    "curvature_diagonal",
    "curvature_factor",
    "distribution",
    "dual_matrix",
    "flatness_of_cotangents",
    "gradient_rows",
    "gradients_of_cotangents",
    "gram_factors",
    "head_rank_bound",
    "head_relative_flatness",
    "hessian_trace",
    "linear_relative_flatness",
    "longest_first",
    "margin_bound",
    "margin_cotangent",
    "margin_gap",
    "margin_row",
    "not_zero",
    "output_margin",
    "participation_ratio",
    "patch_gram",
    "patch_second_moments",
    "patch_squared_norm",
    "patches",
    "pearson",
    "primal_matrix",
    "rank_bound",
    "relative_flatness",
    "sign_probe",
    "sign_probe_variance",
    "signed_eigenvalues",
    "soft_rank",
    "softmax_margin",
    "standard_error",
    "two_pass_cotangents",
]
