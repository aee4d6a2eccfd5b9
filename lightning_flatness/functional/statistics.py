"""Statistics of per-sample values."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

_QUANTILES = {"q01": 0.01, "q05": 0.05, "q25": 0.25, "q50": 0.5, "q75": 0.75, "q95": 0.95, "q99": 0.99}


def distribution(values: Float[Tensor, " n"]) -> dict[str, Tensor]:
    r"""Return what describes a distribution of margins.

    `mean`, `std` (of the population: it divides by n), `skewness` (the third standardised moment; 0 where all values
    are equal), `min`, the quantiles `q01`, `q05`, `q25`, `q50`, `q75`, `q95` and `q99` (exact, linear between
    neighbours), and `negative`, the share of values below 0.

    Args:
        values: at least one, shape (n,).

    Returns:
        Scalars by name, in the unit of the values but for `skewness` and `negative`; NaN if there are no values.

    Example:
        >>> import torch
        >>> {name: value.item() for name, value in distribution(torch.tensor([-1.0, 0.0, 4.0])).items()}["negative"]
        0.3333333432674408
    """
    if len(values) == 0:
        nothing = values.new_tensor(torch.nan)
        return dict.fromkeys(("mean", "std", "skewness", "min", *_QUANTILES, "negative"), nothing)
    mean = values.mean()
    # Equal values have no spread, whatever the rounding of their mean.
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
    r"""Return Pearson's correlation coefficient; 0 where fewer than two samples, or one value only, leave it undefined.

    Args:
        x: one variable, shape (n,).
        y: the other, shape (n,).

    Returns:
        A scalar in [-1, 1].

    Example:
        >>> import torch
        >>> pearson(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([3.0, 2.0, 1.0]))
        tensor(-1.)
    """
    if len(x) < 2 or x.amin() == x.amax() or y.amin() == y.amax():
        return x.new_zeros(())
    x, y = x - x.mean(), y - y.mean()
    # Scaled first, so that squares of tiny traces do not underflow.
    x, y = x / x.abs().amax(), y / y.abs().amax()
    return ((x * y).sum() / (x.square().sum() * y.square().sum()).sqrt()).clamp(-1, 1)


def _quantile(ascending: Tensor, q: float) -> Tensor:
    # torch.quantile refuses more than 2^24 values.
    position = q * (len(ascending) - 1)
    below = int(position)
    low, high = ascending[below], ascending[min(below + 1, len(ascending) - 1)]
    return torch.where(low == high, low, low + (high - low) * (position - below))
