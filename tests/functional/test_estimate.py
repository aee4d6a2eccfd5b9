"""Estimates against the exact value: no bias, an honest error; bounds that hold for every sample."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_flatness.functional import (
    competitor_cotangents,
    curvature_factor,
    longest_first,
    sign_probe,
    sign_probe_variance,
    standard_error,
    two_pass_cotangents,
)

SAMPLES, CLASSES, WEIGHTS = 64, 7, 12


def drawn(seed: int, samples: int = SAMPLES, sure: float = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Jacobians of the logits, logits and labels; mostly the label is predicted."""
    generator = torch.Generator().manual_seed(seed)
    jacobian = torch.randn(samples, CLASSES, WEIGHTS, generator=generator, dtype=torch.float64)
    target = torch.randint(CLASSES, (samples,), generator=generator)
    logits = torch.randn(samples, CLASSES, generator=generator, dtype=torch.float64)
    return jacobian, logits + sure * torch.nn.functional.one_hot(target, CLASSES), target


def pulled(jacobian: Tensor, cotangents: Tensor) -> Tensor:
    """`|J^T v|^2`, summed over the cotangents, by sample."""
    return (cotangents @ jacobian).square().sum((1, 2))


ESTIMATES = {
    "signs": lambda logits, target, generator: sign_probe(curvature_factor(logits), generator).unsqueeze(1),
    "margin and signs": two_pass_cotangents,
    "longest and signs": lambda logits, target, generator: torch.cat(
        [
            (cotangents := longest_first(curvature_factor(logits)))[:, :2],
            sign_probe(cotangents[:, 2:], generator).unsqueeze(1),
        ],
        1,
    ),
}


@pytest.mark.parametrize("sure", [0, 3, 8])
@pytest.mark.parametrize("name", ESTIMATES)
def test_estimates_have_no_bias_and_an_honest_error(name: str, sure: float) -> None:
    jacobian, logits, target = drawn(seed=1, sure=sure)
    exact = pulled(jacobian, curvature_factor(logits)).mean()
    generator = torch.Generator().manual_seed(11)
    values = torch.stack([pulled(jacobian, ESTIMATES[name](logits, target, generator)) for _ in range(200)])
    means = values.mean(1)
    true_error = means.std()
    assert (means.mean() - exact).abs() <= 3 * true_error / 200**0.5
    stated = torch.stack([standard_error(draw) for draw in values])
    assert stated.square().mean().sqrt() > 0.85 * true_error


def test_the_variance_is_that_of_the_formula() -> None:
    jacobian, logits, target = drawn(seed=3, samples=3)
    cotangents = competitor_cotangents(logits, target)
    pulled_back = cotangents @ jacobian
    generator = torch.Generator().manual_seed(4)
    draws = torch.stack([pulled(jacobian, sign_probe(cotangents, generator).unsqueeze(1)) for _ in range(4000)])
    torch.testing.assert_close(draws.var(0), sign_probe_variance(pulled_back @ pulled_back.mT), rtol=0.15, atol=0)


def test_margin_and_signs_beat_signs_where_most_is_learnt() -> None:
    jacobian, logits, target = drawn(seed=5, sure=6)
    generator = torch.Generator().manual_seed(6)
    spread = {
        name: torch.stack([pulled(jacobian, draw(logits, target, generator)).mean() for _ in range(100)]).std()
        for name, draw in ESTIMATES.items()
    }
    assert spread["margin and signs"] < spread["signs"] / 2


def test_two_classes_are_exact() -> None:
    jacobian, logits, target = drawn(seed=7)
    values = pulled(jacobian[:, :2], two_pass_cotangents(logits[:, :2], target % 2))
    torch.testing.assert_close(values, pulled(jacobian[:, :2], curvature_factor(logits[:, :2])))


def test_the_longest_cotangents_are_a_lower_bound_of_every_sample() -> None:
    for seed in range(1000):
        jacobian, logits, _ = drawn(seed, samples=4, sure=seed % 10)
        cotangents = longest_first(curvature_factor(logits))
        partial = (cotangents @ jacobian).square().sum(-1).cumsum(-1)
        exact = pulled(jacobian, curvature_factor(logits))
        assert (partial <= exact.unsqueeze(1) * (1 + 1e-12)).all()
        lengths = cotangents.square().sum(-1)
        assert (lengths.diff(dim=-1) <= 0).all()
        torch.testing.assert_close(partial[:, -1], exact)


def test_one_value_has_no_error() -> None:
    assert standard_error(torch.ones(1)).isnan()
