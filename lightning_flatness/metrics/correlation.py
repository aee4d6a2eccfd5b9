"""How well margins and the classifier's own trace tell the flatness of each sample."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import lightning_flatness.functional as LF
from lightning_flatness.curvature.pooled.derivatives import TailFactors
from lightning_flatness.metrics.flatness import FactorsMetric

_COMPARED = {"aceht": "affine_hessian_trace", "margin_bound": "margin_bound", "output_margin": "output_margin"}


class FlatnessMarginCorrelation(FactorsMetric):
    r"""Pearson's r over samples between the Hessian trace of the convolution and three cheaper quantities.

    The quantities: `aceht` (`functional.affine_hessian_trace`), `margin_bound` and the signed `output_margin`; each
    over `all`, `correct` (margin not negative) and `wrong` samples. r is 0 where a group is empty, has one
    sample only, or does not vary.

    Source: "On flat minima, large margins and generalizability", where r is taken after removing outliers.

    Args:
        remove_outliers: leave out of each group what scikit-learn's `LocalOutlierFactor` with its default settings
            marks as an outlier of the pairs (trace, quantity).

    Raises:
        ModuleNotFoundError: if outliers are to be removed and scikit-learn is not installed.
    """

    def __init__(self, remove_outliers: bool = False, **kwargs: Any) -> None:
        """Start with no samples."""
        super().__init__(**kwargs)
        if remove_outliers:
            _local_outlier_factor()
        self.remove_outliers = remove_outliers
        for name in ("hessian_trace", *_COMPARED.values()):
            self._add_values(name)

    def update(self, factors: TailFactors) -> None:
        """Add the samples of one batch."""
        for name in ("hessian_trace", *_COMPARED.values()):
            getattr(self, name).append(getattr(factors, name).double())
        self.samples += len(factors)

    def compute(self) -> dict[str, Tensor]:
        """Return r by `quantity/group`, over all samples so far."""
        trace, margin = self._values("hessian_trace"), self._values("output_margin")
        groups = {"all": torch.ones_like(margin, dtype=torch.bool), "correct": margin >= 0, "wrong": margin < 0}
        values = {}
        for name, quantity in _COMPARED.items():
            compared = self._values(quantity)
            for group, chosen in groups.items():
                pairs = torch.stack([trace[chosen], compared[chosen]], 1)
                values[f"{name}/{group}"] = LF.pearson(*self._inliers(pairs).unbind(1))
        return values

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
        raise ModuleNotFoundError(
            "`remove_outliers=True` needs scikit-learn, which is not installed. "
            "Install it with `pip install lightning-flatness[examples]`."
        ) from error
    return LocalOutlierFactor
