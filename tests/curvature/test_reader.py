"""The objective of one pass after another: what was proved before is used only while it holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import SUPPORTED
from recorded import pooled, recorded, required
from torch import Tensor

from lightning_flatness.curvature.objective import objective
from lightning_flatness.curvature.pooled.certificate import features_at
from lightning_flatness.curvature.reader import ObjectiveReader
from lightning_flatness.precision import answers

CASES = {case.name: case for case in SUPPORTED}
MODEL, (X, Y) = CASES["relu"].model().eval(), CASES["relu"].data()
C = 3
Loss = Callable[[Any, Tensor], Tensor]


def focal(phi: Tensor, y: Tensor) -> Tensor:
    losses = F.cross_entropy(phi, y, reduction="none")
    return ((1 - (-losses).exp()).square() * losses).mean()


def changed(temperature: float = 1.0, masked: int = 9, first: int = 0, mixing: float = 0.0, rise: float = 0.0) -> Loss:
    """A loss of logits that pass through the same operations with other values."""

    def loss(phi: Tensor, y: Tensor) -> Tensor:
        phi = (phi + torch.tensor(rise)) / torch.tensor(temperature)
        phi = phi.masked_fill(torch.arange(C) == masked, -20.0)
        phi = phi[:, (torch.arange(C) + first) % C]
        phi = phi + phi * torch.tensor(mixing)
        return F.cross_entropy(phi.clamp_max(60.0), y)

    return loss


# The loss of a second batch, its samples, and whether what was proved for the first batch holds for it.
SECOND_BATCHES: dict[str, tuple[Loss, slice, bool]] = {
    "the same": (changed(), slice(None), True),
    "fewer samples": (changed(), slice(2), True),
    "another temperature": (changed(temperature=3.0), slice(None), False),
    "a masked class": (changed(masked=1), slice(None), False),
    "another order": (changed(first=1), slice(None), False),
    "a larger factor": (changed(mixing=1.0), slice(None), False),
    "a limit that bites": (changed(rise=80.0), slice(None), False),
    "another loss": (focal, slice(None), False),
}


@pytest.mark.parametrize("name", SECOND_BATCHES)
def test_what_was_proved_of_a_head_is_used_only_while_it_holds(name: str) -> None:
    second, samples, holds = SECOND_BATCHES[name]
    reader = ObjectiveReader()
    for loss, part in ((changed(), slice(None)), (second, samples)):
        one_pass = recorded(MODEL, X[part], Y[part], loss)
        cut = pooled(one_pass)
        features = features_at(one_pass, cut, one_pass.points())
        again, *questions = reader.again(one_pass, cut, features, slice(1))
        does_hold, is_whole = answers(*questions)
        goal = again if again is not None and does_hold else required(reader.proved(one_pass, cut, features))
    assert (does_hold, is_whole) == (holds, False)
    anew = required(objective(one_pass, cut, features))
    for attribute in ("logits", "head", "counted"):
        torch.testing.assert_close(getattr(goal, attribute), getattr(anew, attribute), rtol=1e-12, atol=1e-12)
    assert holds is False or torch.equal(goal.target, anew.target)


def test_logits_that_are_the_features_themselves_are_known() -> None:
    """As behind the classifier's own output."""
    one_pass, reader = recorded(MODEL, X, Y), ObjectiveReader()
    phi = MODEL(X).detach()
    logits = next(cut for cut in one_pass.cuts if one_pass.graph.tensor_of(cut.node).shape == phi.shape)
    assert reader.again(one_pass, logits, phi, slice(None)) == (None, False, False)
    expected = required(reader.proved(one_pass, logits, phi))
    goal, *questions = reader.again(one_pass, logits, phi, slice(None))
    assert answers(*questions) == [True, True]
    assert (goal.cut, type(goal.loss)) == (logits, type(expected.loss))
    torch.testing.assert_close(goal.target, expected.target)
