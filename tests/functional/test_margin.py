"""Margins: definitions, precision, and the chain of bounds."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import Tensor

from lightning_flatness.functional import (
    affine_hessian_trace,
    binary_margin,
    confidence,
    margin_bound,
    margin_gap,
    margin_row,
    output_margin,
    softmax_margin,
)

INF = torch.inf
# logits, class, output margin, softmax margin
CASES: dict[str, tuple[list[float], int, float, float]] = {
    "correct": ([2.0, 0.0], 0, 2.0, 0.7615941559557649),
    "wrong": ([2.0, 0.0], 1, -2.0, -0.7615941559557649),
    "tie of two": ([1.0, 1.0, -3.0], 1, 0.0, 0.0),
    "tie of all": ([0.0, 0.0, 0.0], 2, 0.0, 0.0),
    "masked rival": ([1.0, -INF, 0.0], 0, 1.0, 0.46211715726000973),
    "masked rivals": ([1.0, -INF, -INF], 0, INF, 1.0),
    "masked truth": ([1.0, 0.0, -INF], 2, -INF, -0.7310585786300049),
}


@pytest.mark.parametrize(("logits", "target", "output", "softmax"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("signed", [True, False])
def test_margins(logits: list[float], target: int, output: float, softmax: float, signed: bool) -> None:
    phi, y = torch.tensor([logits], dtype=torch.float64), torch.tensor([target])
    expected = (output, softmax) if signed else (abs(output), abs(softmax))
    assert (output_margin(phi, y, signed).item(), softmax_margin(phi, y, signed).item()) == pytest.approx(expected)
    assert margin_gap(phi, y).item() == pytest.approx(1 - softmax**2)


@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_the_gap_keeps_its_precision_in_float32(classes: int) -> None:
    logits = torch.randn(5, classes)
    y = torch.arange(5) % classes
    logits[torch.arange(5), y] += torch.tensor([5.0, 10.0, 20.0, 30.0, 50.0])
    s = logits.double().softmax(-1)
    others = s.scatter(1, y[:, None], 0)
    below = others.sum(1) + others.amax(1)
    torch.testing.assert_close(margin_gap(logits, y).double(), below * (2 - below), rtol=1e-5, atol=0)


@hypothesis.settings(max_examples=200, derandomize=True)
@hypothesis.given(st.integers(2, 40), st.sampled_from([0.1, 1.0, 5.0, 20.0, 80.0]), st.booleans(), st.integers(0))
def test_the_chain_of_bounds(classes: int, scale: float, tied: bool, seed: int) -> None:
    """`1 - |S|^2 <= 1 - S_y^2 <= 1 - gamma^2` where samples are correct, the outer bound for every label."""
    generator = torch.Generator().manual_seed(seed % 2**63)
    phi = scale * torch.randn(50, classes, dtype=torch.float64, generator=generator)
    phi = phi.round() if tied else phi
    top = phi.argmax(1)
    below_one = phi.softmax(1).scatter(1, top[:, None], 0).sum(1)
    chain = torch.stack([confidence(phi), below_one * (2 - below_one), margin_gap(phi, top)])
    assert (chain[:-1] <= chain[1:] * (1 + 1e-12)).all()
    y = torch.randint(classes, (50,), generator=generator)
    x = torch.randn(50, 3, dtype=torch.float64, generator=generator)
    assert (affine_hessian_trace(x, phi) <= margin_bound(x, phi, y) * (1 + 1e-12)).all()


@pytest.mark.parametrize(
    ("logits", "labels", "margin"),
    [([3.0, -1.0], [1.0, 0.0], 1.0), ([3.0, -1.0], [0.0, 0.0], -3.0), ([0.5], [0.9], 0.5)],
)
def test_binary_margin(logits: list[float], labels: list[float], margin: float) -> None:
    assert binary_margin(torch.tensor([logits]), torch.tensor([labels])) == margin


def test_no_sample() -> None:
    empty, y = torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)
    results: list[Tensor] = [f(empty, y) for f in (output_margin, softmax_margin, margin_gap)]
    assert [len(result) for result in results] == [0, 0, 0]


@pytest.mark.parametrize("classes", [2, 3, 12])
@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0])
def test_the_curvature_is_the_margin_part_and_that_of_the_competitors(classes: int, scale: float) -> None:
    """`B` from its definition; the margin part is the odds times the squared gradient of the loss."""
    phi, y = scale * torch.randn(6, classes, dtype=torch.float64), torch.arange(6) % classes
    s, own = phi.softmax(1), torch.nn.functional.one_hot(y, classes).double()
    gradient, true = s - own, (s * own).sum(1)[:, None, None]
    part = true / (1 - true) * gradient[:, :, None] * gradient[:, None]
    row = margin_row(phi, y, torch.eye(classes, dtype=torch.float64))
    torch.testing.assert_close(row[:, :, None] * row[:, None], part, rtol=1e-9, atol=1e-14)
    others = torch.diag_embed(s) - s[:, :, None] * s[:, None] - part
    assert torch.linalg.eigvalsh(others).min() > -1e-14
    if classes == 2:  # no competitors
        assert others.abs().max() < 1e-14
    head = torch.randn(6, classes, 4, dtype=torch.float64)
    of_each = margin_row(phi, y, head)
    torch.testing.assert_close(of_each, (row.unsqueeze(1) @ head).squeeze(1))
    torch.testing.assert_close(of_each[:1], margin_row(phi[:1], y[:1], head[0] + torch.randn(4).double()))


@pytest.mark.parametrize("classes", [3, 100])
@pytest.mark.parametrize("lead", [-80.0, -30.0, 0.0, 30.0, 80.0])
def test_the_margin_row_keeps_its_precision_in_float32(classes: int, lead: float) -> None:
    phi, y, head = torch.randn(5, classes), torch.arange(5) % classes, torch.randn(classes, 4)
    phi[torch.arange(5), y] += lead
    rivals = phi.double().scatter(1, y[:, None], -INF)
    below = (rivals.logsumexp(1) - phi.double()[torch.arange(5), y]).unsqueeze(1)  # minus the log odds
    exact = (head.double()[y] - rivals.softmax(1) @ head.double()) * (-below / 2).exp() / (1 + (-below).exp())
    value = margin_row(phi, y, head).double()
    torch.testing.assert_close(value, exact, rtol=1e-4, atol=float(1e-5 * exact.abs().max()))


@pytest.mark.parametrize("masked", [[1], [1, 2], [0]], ids=["a rival", "all rivals", "the truth"])
def test_masked_classes_have_no_part_in_the_margin_row(masked: list[int]) -> None:
    phi = torch.tensor([[1.0, 0.5, -1.0]]).index_fill(1, torch.tensor(masked), -INF)
    row = margin_row(phi, torch.tensor([0]), torch.eye(3))
    kept = [c for c in range(3) if c not in masked]
    expected = torch.zeros(1, 3)
    if masked == [1]:
        expected[:, kept] = margin_row(phi[:, kept], torch.tensor([0]), torch.eye(2))
    torch.testing.assert_close(row, expected)
