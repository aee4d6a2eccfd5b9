"""How well margins and the classifier's own trace predict the flatness of each sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import lightning_flatness.functional as LF
from lightning_flatness.curvature.quantities import SampleQuantities, given
from lightning_flatness.errors import missing_package
from lightning_flatness.metrics.flatness import SampleMetric

_QUANTITIES = ("aceht", "margin_bound", "output_margin")
_FIELDS = {"trace": "hessian_trace", "aceht": "affine_hessian_trace"} | {name: name for name in _QUANTITIES[1:]}
"""The attribute of `SampleQuantities` that holds a quantity, by its name here."""


class FlatnessMarginCorrelation(SampleMetric):
    r"""Pearson's r over samples between the Hessian trace of the layer and three cheaper quantities.

    The quantities are `aceht` (`functional.affine_hessian_trace`), `margin_bound` and the signed `output_margin`; each
    over `all`, `correct` (margin not negative) and `wrong` samples. r is the coefficient of `functional.pearson`. It is
    0 where a group is empty, has only one sample, or does not vary.

    `compute` returns scalars in [-1, 1] under the names `quantity/group`, such as `aceht/correct`; no unit. The metric
    needs `hessian_trace`, `output_margin` and the quantities that are compared, each of shape (n,).

    Source: "On flat minima, large margins and generalizability", where r is taken after removing outliers.

    Args:
        remove_outliers: leave out of each group what scikit-learn's `LocalOutlierFactor` with its default settings
            marks as an outlier of the pairs (trace, quantity).
        quantities: which of the three to compare; each one keeps a number per sample.

    Raises:
        ValueError: if one of the quantities is another.
        ModuleNotFoundError: if outliers are to be removed and scikit-learn is not installed.

    Example:
        >>> import torch
        >>> from lightning_flatness import SampleQuantities
        >>> from lightning_flatness.metrics import FlatnessMarginCorrelation
        >>> trace, margin, other = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([6.0, 4.0, 2.0]), torch.zeros(3)
        >>> metric = FlatnessMarginCorrelation(quantities=["output_margin"])
        >>> metric.update(SampleQuantities(trace, other, other, output_margin=margin))
        >>> metric.compute()["output_margin/correct"]
        tensor(-1., dtype=torch.float64)
    """

    def __init__(self, remove_outliers: bool = False, quantities: Sequence[str] = _QUANTITIES, **kwargs: Any) -> None:
        """Start with no samples."""
        super().__init__(**kwargs)
        if unknown := [name for name in quantities if name not in _QUANTITIES]:
            raise ValueError(f"`quantities` must be among {list(_QUANTITIES)}; got {unknown[0]!r}. Correct the name.")
        if remove_outliers:
            _local_outlier_factor()
        self.quantities = tuple(quantities)
        self.remove_outliers = remove_outliers
        self._kept = {name: _FIELDS[name] for name in ("trace", "output_margin", *quantities)}
        self.requires = tuple(self._kept.values())
        for name in self._kept:
            self._add_values(name)

    def _add(self, quantities: SampleQuantities) -> None:
        for name, field in self._kept.items():
            getattr(self, name).append(given(getattr(quantities, field), field).double())

    def _value(self) -> dict[str, Tensor]:
        """Return r by `quantity/group`, over all samples so far."""
        trace, margin = self._values("trace"), self._values("output_margin")
        groups = {"all": torch.ones_like(margin, dtype=torch.bool), "correct": margin >= 0, "wrong": margin < 0}
        correlations = {}
        for name in self.quantities:
            compared = self._values(name)
            for group, chosen in groups.items():
                pairs = torch.stack([trace[chosen], compared[chosen]], 1)
                correlations[f"{name}/{group}"] = LF.pearson(*self._inliers(pairs).unbind(1))
        return correlations

    def _inliers(self, pairs: Tensor) -> Tensor:
        # With two samples or fewer there is no neighbourhood to be outside of.
        if not self.remove_outliers or len(pairs) < 3:
            return pairs
        detector = _local_outlier_factor()(n_neighbors=min(20, len(pairs) - 1))
        return pairs[torch.as_tensor(detector.fit_predict(pairs.cpu().numpy()) > 0, device=pairs.device)]


def _local_outlier_factor() -> Any:
    try:
        from sklearn.neighbors import LocalOutlierFactor
    except ModuleNotFoundError as error:
        raise missing_package("`remove_outliers=True`", "sklearn") from error
    return LocalOutlierFactor
