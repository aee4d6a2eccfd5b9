"""A curve over the temperature, read between its points."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_flatness.functional import TEMPERATURES, HadamardGram, at_temperature
from lightning_flatness.losses import as_loss


def one_sample(scale: float, hot: float, classes: int) -> tuple[Tensor, Tensor]:
    logits = scale * torch.randn(4, classes, dtype=torch.float64)
    logits[:, 0] += hot
    return logits, torch.randn(classes, 6, dtype=torch.float64)


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("hot", [0.0, 3.0, 300.0])
@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_equals_the_value_with_the_temperature_known_beforehand(scale: float, hot: float, classes: int) -> None:
    loss, ones = as_loss("cross_entropy"), torch.ones(4, 6, 1, dtype=torch.float64)
    identity = HadamardGram(torch.eye(6, dtype=torch.float64), ones, ones)
    logits, head = one_sample(scale, hot, classes)

    def curve(temperatures: Tensor) -> Tensor:
        scaled = logits.unsqueeze(-1) / temperatures
        return (loss.relative_flatness(scaled, head, identity, None) / temperatures.square()).sum(0)

    tau = loss.logit_mean_square(logits).mean().sqrt()
    torch.testing.assert_close(at_temperature(curve(TEMPERATURES), tau), curve(tau[None])[0], rtol=1e-7, atol=0)


def test_curves_with_a_sign_and_temperatures_at_and_beyond_the_ends() -> None:
    curve = TEMPERATURES.log2().sin()
    for octave in (-12.0, -11.9, 0.05, 11.9, 12.0):
        value = at_temperature(curve, torch.tensor(2.0**octave, dtype=torch.float64))
        torch.testing.assert_close(value, torch.tensor(octave, dtype=torch.float64).sin(), rtol=0, atol=1e-5)
    assert at_temperature(curve, torch.tensor(0.0, dtype=torch.float64)) == pytest.approx(curve[0].item())
    assert at_temperature(curve, torch.tensor(torch.nan, dtype=torch.float64)).isnan()
    assert at_temperature(0 * curve, torch.tensor(0.0, dtype=torch.float64)) == 0
    assert at_temperature(curve, torch.tensor(torch.inf, dtype=torch.float64)) == pytest.approx(curve[-1].item())
