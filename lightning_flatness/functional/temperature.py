"""Relative flatness at a temperature that is known only after all data has been seen."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

_PER_OCTAVE, _OCTAVES, _POINTS = 6, 12, 12

TEMPERATURES = 2.0 ** (
    torch.arange(-_OCTAVES * _PER_OCTAVE, _OCTAVES * _PER_OCTAVE + 1, dtype=torch.float64) / _PER_OCTAVE
)
"""The 145 temperatures at which curves are added up: six per octave from 2^-12 to 2^12, shape (t,)."""


def temperatures_for(logits: Float[Tensor, "n c"], is_wanted: bool = True) -> Float[Tensor, " t"]:
    """Return temperature 1 and, if they are wanted, `TEMPERATURES`, in the dtype and on the device of the logits.

    Example:
        >>> import torch
        >>> from lightning_flatness.functional.temperature import temperatures_for
        >>> temperatures_for(torch.zeros(2, 3), is_wanted=False)
        tensor([1.])
    """
    own = logits.new_ones(1)
    return torch.cat([own, TEMPERATURES.to(logits, non_blocking=True)]) if is_wanted else own


def at_temperature(curve: Float[Tensor, " t"], temperature: Float[Tensor, ""]) -> Float[Tensor, ""]:
    r"""Return the value at any temperature of a smooth curve that is given at `TEMPERATURES`.

    The logarithm \(\log f\) of the curve is interpolated by the polynomial of degree 11 in \(\log \tau\) through the
    twelve nearest temperatures. Where one of these values is not positive, \(f\) itself is interpolated. Sums of
    softmax curvatures are analytic in \(\log \tau\); for them the relative error is below 1e-7.

    Args:
        curve: \(f\) at `TEMPERATURES`, float64, shape (t,).
        temperature: \(\tau\), where to read the curve; a temperature outside the range counts as the nearer end.

    Returns:
        The value, a scalar in the unit of the curve; NaN if the temperature is NaN.

    Example:
        >>> import torch
        >>> from lightning_flatness.functional import TEMPERATURES, at_temperature
        >>> at_temperature(TEMPERATURES**-2, torch.tensor(3.0, dtype=torch.float64))
        tensor(0.1111, dtype=torch.float64)
    """
    position = ((temperature.log2() + _OCTAVES) * _PER_OCTAVE).clamp(0, len(curve) - 1)
    # If the temperature is NaN, the weights make the result NaN, but the index must still be valid.
    first = (position.nan_to_num().floor() - (_POINTS // 2 - 1)).clamp(0, len(curve) - _POINTS).long()
    points = torch.arange(_POINTS, device=curve.device)
    others = ~torch.eye(_POINTS, dtype=torch.bool, device=curve.device)
    factors = (position - first - points) / (points.unsqueeze(1) - points)
    weights = torch.where(others, factors, 1.0).prod(1).to(curve)
    values = curve[first + points]
    return torch.where((values > 0).all(), (weights @ values.clamp_min(1e-300).log()).exp(), weights @ values)
