"""The factor of the loss's curvature, whatever the loss and the head."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_flatness.curvature.jacobian.factor import estimated_factor, longest_factor, loss_factor
from lightning_flatness.curvature.objective import Objective
from lightning_flatness.errors import UnsupportedTailError
from lightning_flatness.losses import BinaryCrossEntropy, CrossEntropy, Differentiated
from lightning_flatness.recording.graph import Cut

PHI, HEAD = torch.tensor([[0.3, -2.0, 1.0], [30.0, 0.0, -1.0]]).double(), torch.arange(6).reshape(3, 2).double().sin()
LABELS = torch.tensor([[0.2, 0.3, 0.5], [0.0, 2.0, 0.0]]).double()
S = PHI.softmax(1)
OTHER = torch.tensor([[[1.0, 2.0, 0.0], [2.0, -1.0, 0.5], [0.0, 0.5, 3.0]]] * 2).double()
SOFTMAX = LABELS.sum(1)[:, None, None] * (S.diag_embed() - S[:, :, None] * S[:, None])
SIGMOID = (PHI.sigmoid() * (-PHI).sigmoid()).diag_embed()


@pytest.mark.parametrize(
    ("loss", "curvature", "rows"),
    [
        (CrossEntropy(), SOFTMAX, 2),
        (BinaryCrossEntropy(), SIGMOID, 2),  # as many as there are numbers before the head
        (Differentiated(torch.zeros_like(PHI), OTHER), OTHER, 3),
    ],
)
def test_the_factor_gives_the_curvature(loss, curvature: Tensor, rows: int) -> None:
    goal = Objective(Cut(0, 0), torch.ones(2).bool(), PHI, HEAD, loss, LABELS)
    factor, signs = loss_factor(goal)
    expected = HEAD.T @ curvature @ HEAD
    signs = torch.ones(factor.shape[:2]) if signs is None else signs
    torch.testing.assert_close(torch.einsum("mnj,mn,mnk->njk", factor, signs.double(), factor), expected)
    assert len(factor) == (rows)


@pytest.mark.parametrize(
    "loss",
    [CrossEntropy(), BinaryCrossEntropy(), Differentiated(torch.zeros_like(PHI), OTHER)],
    ids=lambda v: type(v).__name__,
)
def test_two_rows_make_it_in_the_mean(loss) -> None:
    goal = Objective(Cut(0, 0), torch.ones(2).bool(), PHI, HEAD, loss, LABELS)

    def product(factor: Tensor, signs: Tensor | None) -> Tensor:
        signs = torch.ones(factor.shape[:2]) if signs is None else signs
        return torch.einsum("mnj,mn,mnk->njk", factor, signs.double(), factor)

    generator = torch.Generator().manual_seed(1)
    assert len(estimated_factor(goal, generator)[0]) <= 2
    draws = torch.stack([product(*estimated_factor(goal, generator)) for _ in range(400)])
    expected = product(*loss_factor(goal))
    error = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - expected).abs() <= 4 * error + 1e-12 * expected.abs().max()).all()


def test_the_longest_rows_are_fewer_and_a_negative_sign_is_refused() -> None:
    goal = Objective(Cut(0, 0), torch.ones(2).bool(), PHI, HEAD, CrossEntropy(), LABELS)
    (rows, _), (kept, signs) = loss_factor(goal), longest_factor(goal, 1)
    torch.testing.assert_close(kept.square().sum(-1)[0], rows.square().sum(-1).max(0).values)
    assert (len(kept), signs) == (1, None)
    with pytest.raises(UnsupportedTailError, match="convex"):
        longest_factor(Objective(Cut(0, 0), torch.ones(2).bool(), PHI, HEAD, Differentiated(PHI, OTHER)), 1)
