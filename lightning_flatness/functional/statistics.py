"""Statistics of per-sample values."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

_QUANTILES = {"q01": 0.01, "q05": 0.05, "q25": 0.25, "q50": 0.5, "q75": 0.75, "q95": 0.95, "q99": 0.99}


def distribution(values: Float[Tensor, " n"]) -> dict[str, Tensor]:
    r"""Return the statistics that describe a distribution of margins.

    They are the mean \(\mu\), the standard deviation \(\sigma\) of the population (divided by \(N\), the number of
    values), the skewness \(\frac{1}{N} \sum_n ((v_n - \mu) / \sigma)^3\), the minimum, seven exact quantiles, linear
    between neighbours, and the share of negative values.

    Args:
        values: \(v\), shape (n,).

    Returns:
        Scalars under the names `mean`, `std`, `skewness`, `min`, `q01`, `q05`, `q25`, `q50`, `q75`, `q95`, `q99` and
        `negative`. `skewness` and `negative` have no unit, the others that of the values. The skewness is 0 where all
        values are equal. Without values everything is NaN.

    Example:
        >>> import torch
        >>> from lightning_flatness.functional import distribution
        >>> distribution(torch.tensor([-1.0, 0.0, 4.0]))["negative"]
        tensor(0.3333)
    """
    if len(values) == 0:
        nothing = values.new_tensor(torch.nan)
        return dict.fromkeys(("mean", "std", "skewness", "min", *_QUANTILES, "negative"), nothing)
    mean = values.mean()
    # Equal values have no spread, even if rounding moves their mean away from them.
    deviation = torch.where(values.amin() == values.amax(), 0.0, values - mean)
    std = deviation.square().mean().sqrt()
    skewness = torch.where(std == 0, 0.0, (deviation / std).pow(3).mean())
    ascending = values.sort().values
    quantiles = {name: _quantile(ascending, q) for name, q in _QUANTILES.items()}
    return {
        "mean": mean,
        "std": std,
        "skewness": skewness,
        "min": ascending[0],
        **quantiles,
        "negative": (values < 0).to(values.dtype).mean(),
    }


def pearson(x: Float[Tensor, " n"], y: Float[Tensor, " n"]) -> Float[Tensor, ""]:
    r"""Return Pearson's correlation coefficient.

    $$\rho = \frac{\sum_n (x_n - \bar x)(y_n - \bar y)}{\sqrt{\sum_n (x_n - \bar x)^2 \sum_n (y_n - \bar y)^2}}$$

    with the means \(\bar x\) and \(\bar y\).

    Args:
        x: one variable, shape (n,).
        y: the other variable, shape (n,).

    Returns:
        A scalar in [-1, 1]. It is 0 where the coefficient is not defined: with fewer than two samples, or where all
        values of a variable are equal.

    Example:
        >>> import torch
        >>> from lightning_flatness.functional import pearson
        >>> pearson(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([3.0, 2.0, 1.0]))
        tensor(-1.)
    """
    if len(x) < 2 or x.amin() == x.amax() or y.amin() == y.amax():
        return x.new_zeros(())
    x, y = x - x.mean(), y - y.mean()
    # Scale first, so that the squares of tiny values do not underflow.
    x, y = x / x.abs().amax(), y / y.abs().amax()
    return ((x * y).sum() / (x.square().sum() * y.square().sum()).sqrt()).clamp(-1, 1)


def _quantile(ascending: Float[Tensor, " n"], q: float) -> Float[Tensor, ""]:
    # torch.quantile raises an error for more than 2^24 values.
    position = q * (len(ascending) - 1)
    below = int(position)
    low, high = ascending[below], ascending[min(below + 1, len(ascending) - 1)]
    return torch.where(low == high, low, low + (high - low) * (position - below))
