"""The proof of a loss's form: gradients at three random points, whatever was recorded."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from recorded import recorded
from torch import Tensor, nn

from lightning_flatness.curvature.forms import RecordedFunction, drawn_points, proved_form
from lightning_flatness.losses import BinaryCrossEntropy, CrossEntropy

Loss = Callable[[Tensor, Tensor], Tensor]


class Logits(nn.Module):
    """A network whose pooled features are its logits."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, classes, 2, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).mean((2, 3))


def tail_of(loss: Loss, samples: int, classes: int) -> RecordedFunction:
    torch.manual_seed(0)
    x, y = torch.randn(samples, 1, 3, 3, dtype=torch.float64), torch.randint(max(2, classes), (samples,))
    record = recorded(Logits(classes), x, y, loss)
    logits = next(cut for cut in record.cuts if record.graph.tensor_of(cut.node).shape == (samples, classes))
    return RecordedFunction(record, logits, record.cuts[-1])


def hardest(phi: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(phi, y, reduction="none").topk((len(y) + 1) // 2).values.mean()


# Loss -> its form for (classes); None: it has none. Two classes and one logit leave the fewest numbers to compare.
FORMS: dict[str, tuple[Loss, int, type | None]] = {
    "cross-entropy": (F.cross_entropy, 3, CrossEntropy),
    "cross-entropy of two classes": (F.cross_entropy, 2, CrossEntropy),
    "one sample weighs nothing": (lambda phi, y: F.cross_entropy(phi[:-1], y[:-1]), 3, CrossEntropy),
    "binary": (lambda phi, y: F.binary_cross_entropy_with_logits(phi, phi.detach() * 0 + 1), 3, BinaryCrossEntropy),
    "one logit": (lambda phi, y: F.binary_cross_entropy_with_logits(phi[:, 0], y.double()), 1, BinaryCrossEntropy),
    "logistic loss of a difference": (lambda phi, y: F.softplus(phi[:, 0] - phi[:, 1]).mean(), 2, CrossEntropy),
    "squared difference of two": (lambda phi, y: (phi[:, 0] - phi[:, 1] - 1).square().mean(), 2, None),
    "hinge of a difference": (lambda phi, y: (1 - phi[:, 0] + phi[:, 1]).clamp_min(0).mean(), 2, None),
    "exponential loss of one logit": (lambda phi, y: (-phi[:, 0]).exp().mean(), 1, None),
    "squared error of one logit": (lambda phi, y: (phi[:, 0] - y).square().mean(), 1, None),
    "temperature of two classes": (lambda phi, y: F.cross_entropy(phi / 2, y), 2, None),
    "negative weight": (lambda phi, y: -F.cross_entropy(phi, y), 3, None),
    "linear": (lambda phi, y: phi.mean(), 3, None),
    "of probabilities": (lambda phi, y: F.binary_cross_entropy(phi.clamp(0, 1), 0 * phi.detach()), 3, None),
    "not a number": (lambda phi, y: F.cross_entropy(phi, y) + phi.log().mean(), 3, None),
}


@pytest.mark.parametrize("name", FORMS)
def test_the_form_of_a_loss(name: str) -> None:
    loss, classes, kind = FORMS[name]
    found = proved_form(tail_of(loss, 5, classes), 5)
    assert (None if found is None else type(found[0])) is kind


@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize("samples", [2, 3, 8, 64])
def test_samples_that_compete_are_seen_in_the_smallest_batches(samples: int, classes: int) -> None:
    """The harder half at `phi` is the easier half at `-phi`."""
    assert proved_form(tail_of(hardest, samples, classes), samples) is None


def test_points_are_the_same_in_every_call_and_leave_the_generator_alone() -> None:
    tail, state = tail_of(F.cross_entropy, 4, 3), torch.get_rng_state()
    for first, second in zip(drawn_points(tail, 4), drawn_points(tail, 4), strict=True):
        assert torch.equal(first, second)
        assert first.shape == (4, 3)
    assert torch.equal(torch.get_rng_state(), state)
