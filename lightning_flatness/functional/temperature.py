"""Relative flatness at the temperature of the data, which is known only when all data has been seen."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

_PER_OCTAVE, _OCTAVES, _POINTS = 6, 12, 12

TEMPERATURES = 2.0 ** (
    torch.arange(-_OCTAVES * _PER_OCTAVE, _OCTAVES * _PER_OCTAVE + 1, dtype=torch.float64) / _PER_OCTAVE
)
"""Six temperatures per octave from 2^-12 to 2^12, at which curves over the temperature are added up."""


def at_temperature(curve: Float[Tensor, " t"], temperature: Float[Tensor, ""]) -> Float[Tensor, ""]:
    r"""Return a smooth curve, given at `TEMPERATURES`, at any temperature.

    Interpolates `log f` as a polynomial of degree 11 in `log tau` through the twelve nearest temperatures (`f`
    itself where it is not positive). For sums of softmax curvatures, which are analytic in `log tau`, the
    relative error is below 1e-7.

    Args:
        curve: values at `TEMPERATURES`, float64, shape (t,).
        temperature: where to read it; one outside of the range is read at its end.

    Returns:
        The value, a scalar.

    Example:
        >>> import torch
        >>> at_temperature(TEMPERATURES**-2, torch.tensor(3.0, dtype=torch.float64))
        tensor(0.1111, dtype=torch.float64)
    """
    position = ((temperature.log2() + _OCTAVES) * _PER_OCTAVE).clamp(0, len(curve) - 1)
    # Where the temperature is NaN the weights make the result NaN; the index has to exist all the same.
    first = (position.nan_to_num().floor() - (_POINTS // 2 - 1)).clamp(0, len(curve) - _POINTS).long()
    points = torch.arange(_POINTS, device=curve.device)
    others = ~torch.eye(_POINTS, dtype=torch.bool, device=curve.device)
    factors = (position - first - points) / (points.unsqueeze(1) - points)
    weights = torch.where(others, factors, 1.0).prod(1).to(curve)
    values = curve[first + points]
    return torch.where((values > 0).all(), (weights @ values.clamp_min(1e-300).log()).exp(), weights @ values)
