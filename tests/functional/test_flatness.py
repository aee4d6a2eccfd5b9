"""The affine classifier against its brute-force Hessian; attribution."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from lightning_flatness import oracle
from lightning_flatness.functional import (
    HadamardGram,
    affine_hessian_trace,
    attribution,
    centred_rows,
    head_relative_flatness,
    relative_flatness,
)
from lightning_flatness.functional.flatness import pairs_pay


def affine(classes: int, scale: float) -> tuple[nn.Linear, Tensor, Tensor]:
    """A classifier, inputs with a constant 1 for the bias, and labels."""
    linear = nn.Linear(4, classes, bias=False).double()
    nn.init.normal_(linear.weight, 0, scale)
    x = torch.cat([torch.randn(7, 3, dtype=torch.float64), torch.ones(7, 1, dtype=torch.float64)], 1)
    return linear, x, torch.randint(classes, (7,))


@pytest.mark.parametrize("classes", [2, 3, 12])
@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0])
def test_affine_classifier_equals_the_oracle(classes: int, scale: float) -> None:
    linear, x, y = affine(classes, scale)
    logits, weight = linear(x).detach(), linear.weight.detach()
    trace = oracle.hessian_trace(linear, "", x, y)
    torch.testing.assert_close(affine_hessian_trace(x[:, :-1], logits), trace, rtol=1e-12, atol=1e-14)
    kappa = oracle.relative_flatness(linear, "", x, y)
    # The reference itself has rounding error of the size of the Hessian's entries.
    torch.testing.assert_close(head_relative_flatness(x, logits, weight), kappa, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_float32_at_a_confidence_of_one_minus_1e_12(classes: int) -> None:
    """The exact values follow from the probability outside the top class."""
    rest = 1e-12 / (classes - 1)
    logits = torch.full((1, classes), math.log(rest / (1 - 1e-12)), dtype=torch.float64)
    logits[0, classes // 2] = 0
    x = torch.tensor([[3.0, -1.0]])
    exact = 11 * (1e-12 * (2 - 1e-12) - (classes - 1) * rest**2)
    assert affine_hessian_trace(x, logits.float()).item() == pytest.approx(exact, rel=1e-5)
    weight = torch.randn(classes, 2)
    expected = head_relative_flatness(x.double(), logits.float().double(), weight.double())
    assert head_relative_flatness(x, logits.float(), weight).item() == pytest.approx(expected.item(), rel=1e-5)


def test_relative_flatness_at_several_temperatures() -> None:
    logits, factor = torch.randn(4, 3), torch.randn(4, 2, 5)
    rows, gram = centred_rows(logits, torch.randn(3, 2)), HadamardGram(torch.ones(2, 2), factor, factor)
    temperatures = torch.tensor([0.5, 1.0, 4.0])
    together = relative_flatness(logits.unsqueeze(-1) / temperatures, rows, gram)
    apart = [relative_flatness((logits / temperature).unsqueeze(-1), rows, gram) for temperature in temperatures]
    torch.testing.assert_close(together, torch.cat(apart, 1))


@pytest.mark.parametrize(("classes", "temperatures"), [(3, 7), (40, 1)], ids=["pairs of rows", "rows and means"])
@pytest.mark.parametrize(("rival", "rest"), [(-80.0, 1.8e-35), (-95.0, 0.0)], ids=["normal", "subnormal"])
def test_only_subnormal_probabilities_count_as_zero(classes: int, temperatures: int, rival: float, rest: float) -> None:
    """`S_c |V_c - V_top|^2 = rest` for the one other class that is not masked."""
    logits = torch.full((1, classes, temperatures), -torch.inf)
    logits[:, 0], logits[:, 1] = 0.0, rival
    assert pairs_pay(classes, 8, temperatures) == (classes == 3)
    rows, factor = torch.zeros(1, classes, 8), torch.ones(1, 8, 1)
    rows[:, 1, 0] = 1.0
    value = relative_flatness(logits, rows, HadamardGram(torch.eye(8), factor, factor))
    torch.testing.assert_close(value, torch.full((1, temperatures), rest), rtol=1e-2, atol=0.0)


@pytest.mark.parametrize("classes", [3, 40])
def test_relative_flatness_can_be_differentiated(classes: int) -> None:
    logits, head, factor, kernels = (
        torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for shape in ((2, classes), (classes, 4), (2, 4, 3), (4, 5))
    )

    def mean(logits: Tensor, head: Tensor, factor: Tensor, kernels: Tensor) -> Tensor:
        gram = HadamardGram(kernels @ kernels.mT, factor, factor)
        return relative_flatness(logits.unsqueeze(-1), centred_rows(logits, head), gram).mean()

    assert torch.autograd.gradcheck(mean, (logits, head, factor, kernels))


@pytest.mark.parametrize(
    ("factors", "alignment"),
    [
        ((6.0, 0.5, 2.0, 3.0, 4.0), 0.5),
        ((-6.0, 0.5, 2.0, 3.0, 4.0), -0.5),  # the label term of a curved activation can outweigh the rest
        ((0.0, 0.0, 2.0, 3.0, 4.0), 0.0),  # every prediction is certain
    ],
    ids=str,
)
def test_attribution_multiplies_to_relative_flatness(factors: tuple[float, ...], alignment: float) -> None:
    values = attribution(*map(torch.tensor, factors))
    assert list(values) == ["confidence", "head", "kernel", "features", "alignment"]
    assert values["alignment"] == alignment
    assert math.prod(map(float, values.values())) == factors[0]


@pytest.mark.parametrize(("relative", "confidence"), [(-6.0, 0.5), (-6.0, -0.5), (6.0, -0.5), (-6.0, 0.0)])
def test_attribution_of_negative_flatness(relative: float, confidence: float) -> None:
    """Curved heads and losses such as focal loss may have either sign; the product holds unless a factor is zero."""
    found = attribution(*map(torch.tensor, (relative, confidence, 2.0, 3.0, 4.0)))
    product = math.prod(float(factor) for factor in found.values())
    assert product == pytest.approx(relative if confidence else 0.0)
    assert all(math.isfinite(factor) for factor in found.values())
