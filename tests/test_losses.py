"""Every supported loss against torch's own loss, differentiated twice; checks of the targets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_flatness.functional import HadamardGram
from lightning_flatness.losses import (
    BinaryCrossEntropy,
    CrossEntropy,
    Differentiated,
    Loss,
    as_loss,
    checked_targets,
    cotangents,
)

CLASSES, SAMPLES = 4, 6


def weights() -> Tensor:
    return torch.tensor([0.3, 1.0, 2.5, 0.0], dtype=torch.float64)


def classes() -> Tensor:
    return torch.tensor([0, 1, 2, 3, 2, 1])


def probabilities() -> Tensor:
    return torch.randn(SAMPLES, CLASSES, dtype=torch.float64).softmax(1)


def labels() -> Tensor:
    return torch.randint(2, (SAMPLES, CLASSES)).double()


@dataclass(frozen=True)
class Case:
    given: str | nn.Module
    reference: Callable[[Tensor, Tensor], Tensor]  # the loss of one sample, of logits (1, c) and target (1, ...)
    target: Callable[[], Tensor]


def cross_entropy(target: Callable[[], Tensor], **options: Tensor | float) -> Case:
    given = nn.CrossEntropyLoss(**options)
    return Case(given, lambda phi, y: F.cross_entropy(phi, y, **options, reduction="none").sum(), target)


def binary(target: Callable[[], Tensor], **options: Tensor) -> Case:
    given = nn.BCEWithLogitsLoss(**options)
    return Case(given, lambda phi, y: F.binary_cross_entropy_with_logits(phi, y, **options, reduction="sum"), target)


CASES = {
    "cross_entropy": Case("cross_entropy", F.cross_entropy, classes),
    "class weights": cross_entropy(classes, weight=weights()),
    "label smoothing": cross_entropy(classes, label_smoothing=0.2),
    "smoothing and weights": cross_entropy(classes, weight=weights(), label_smoothing=0.2),
    "soft targets": cross_entropy(probabilities),
    "soft targets, all": cross_entropy(probabilities, weight=weights(), label_smoothing=0.2),
    "bce_with_logits": Case(
        "bce_with_logits", lambda phi, y: F.binary_cross_entropy_with_logits(phi, y, reduction="sum"), labels
    ),
    "soft labels": binary(probabilities),
    "label weights": binary(labels, weight=weights()),
    "pos_weight": binary(labels, pos_weight=weights()),
    "bce, all": binary(probabilities, weight=weights(), pos_weight=weights().flip(0)),
}


def derivatives(case: Case, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient (n, c) and Hessian (n, c, c) of each sample's loss in its logits."""
    losses = [lambda phi, y=y: case.reference(phi[None], y[None]) for y in target]
    gradients = [torch.func.grad(loss)(phi) for loss, phi in zip(losses, logits, strict=True)]
    return torch.stack(gradients), torch.stack(
        [torch.func.hessian(loss)(phi) for loss, phi in zip(losses, logits, strict=True)]
    )


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_the_loss_of_torch(case: Case) -> None:
    loss, target = as_loss(case.given), case.target()
    logits = 2 * torch.randn(SAMPLES, CLASSES, dtype=torch.float64)
    head, values = torch.randn(CLASSES, 3, dtype=torch.float64), torch.randn(SAMPLES, CLASSES, dtype=torch.float64)
    square = torch.randn(SAMPLES, 3, 3, dtype=torch.float64)
    gram = HadamardGram(torch.ones(3, 3).double(), square, square)
    gradient, curvature = derivatives(case, logits, target)
    kappa = loss.relative_flatness(logits[..., None], head, gram, target)[:, 0]
    pulled_back = head.mT @ curvature @ head
    pairs = {
        "trace": (loss.curvature_trace(logits, target), torch.einsum("ncc->n", curvature)),
        "diagonal": (
            loss.curvature_diagonal(logits, head, target),
            pulled_back.diagonal(dim1=1, dim2=2),
        ),
        "contraction": (kappa, (pulled_back * (square @ square.mT)).sum((1, 2))),
        "gradient": (loss.logit_gradient(logits[..., None], target)[..., 0], gradient),
        "product": (loss.logit_gradient_product(logits[..., None], values, target)[:, 0], (gradient * values).sum(1)),
    }
    for form in (loss, Differentiated(gradient, curvature)):
        factor, signs = cotangents(form, logits, target)
        pairs[f"cotangents of {type(form).__name__}"] = (factor.mT @ (signs.unsqueeze(-1) * factor), curvature)
    for value, expected in pairs.values():
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)
    bound = loss.trace_bound(logits, target)
    assert (loss.curvature_trace(logits, target) <= bound * (1 + 1e-12)).all()


@pytest.mark.parametrize(("name", "target"), [("cross_entropy", classes), ("bce_with_logits", labels)])
def test_gradient_and_bound_of_confident_samples_keep_their_precision(name: str, target: Callable[[], Tensor]) -> None:
    loss: Loss = as_loss(name)
    y = target()
    sign = 2 * (F.one_hot(y, CLASSES).double() if y.dim() == 1 else y) - 1
    logits, values = 30 * sign + torch.randn(SAMPLES, CLASSES), torch.randn(SAMPLES, CLASSES)
    logits = logits.float()
    exact = loss.logit_gradient_product(logits.double()[..., None], values.double(), y)
    assert (exact.abs() > 0).all()
    assert (exact.abs() < 1e-11).all()
    torch.testing.assert_close(
        loss.logit_gradient_product(logits[..., None], values, y).double(), exact, rtol=1e-4, atol=0
    )
    gradients = [loss.logit_gradient(phi[..., None], y).double() for phi in (logits, logits.double())]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=0)
    bound, exact_bound = (loss.trace_bound(phi, y) for phi in (logits, logits.double()))
    torch.testing.assert_close(bound.double(), exact_bound, rtol=1e-4, atol=0)


def test_binary_margins_are_those_of_two_classes() -> None:
    phi = torch.randn(SAMPLES, 1, dtype=torch.float64)
    y = torch.tensor([0, 1, 0, 1, 1, 0])
    two = torch.cat([torch.zeros_like(phi), phi], 1)
    single, double = as_loss("bce_with_logits"), as_loss("cross_entropy")
    for margin in ("output_margin", "softmax_margin"):
        value = getattr(single, margin)(phi, y.double()[..., None])
        torch.testing.assert_close(value, getattr(double, margin)(two, y))


@pytest.mark.parametrize("name", ["cross_entropy", "bce_with_logits"])
def test_masked_classes_do_not_count(name: str) -> None:
    loss, logits = as_loss(name), torch.randn(SAMPLES, CLASSES, dtype=torch.float64)
    masked = torch.cat([logits, torch.full((SAMPLES, 2), -torch.inf, dtype=torch.float64)], 1)
    torch.testing.assert_close(loss.logit_mean_square(masked), loss.logit_mean_square(logits))
    torch.testing.assert_close(loss.curvature_trace(masked, None), loss.curvature_trace(logits, None))
    assert (loss.logit_mean_square(masked[:, -2:]) == 0).all()


class FocalLoss(nn.CrossEntropyLoss):
    pass


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("mse", r"cross_entropy.*bce_with_logits.*'mse'"),
        (nn.CrossEntropyLoss(ignore_index=2), "ignore_index=2"),
        (nn.CrossEntropyLoss(weight=torch.tensor([1.0, -1.0])), "weight.* from -1 to 1"),
        (nn.BCEWithLogitsLoss(pos_weight=torch.ones(3, 4)), r"pos_weight.*\(3, 4\)"),
    ],
    ids=str,
)
def test_other_losses_are_refused(given: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        as_loss(given)


@pytest.mark.parametrize("given", ["cross_entropy", nn.BCEWithLogitsLoss(pos_weight=torch.ones(CLASSES))])
def test_missing_targets_are_named(given: str | nn.Module) -> None:
    loss = as_loss(given)
    assert as_loss(loss) is loss
    with pytest.raises(ValueError, match="got no target"):
        loss.trace_bound(torch.zeros(SAMPLES, CLASSES), None)


@pytest.mark.parametrize(
    "given", [nn.MSELoss(), FocalLoss(), F.cross_entropy], ids=["a module", "one's own module", "a function"]
)
def test_any_other_callable_is_itself(given: Any) -> None:
    """A subclass of torch's cross-entropy may compute something else."""
    assert as_loss(given) is given


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_its_value_is_the_mean_over_samples(case: Case) -> None:
    loss, target = as_loss(case.given), case.target()
    logits = torch.randn(SAMPLES, CLASSES, dtype=torch.float64)
    each = torch.stack([case.reference(phi[None], y[None]) for phi, y in zip(logits, target, strict=True)])
    torch.testing.assert_close(loss.value(logits, target), each.mean())


def test_ignored_samples_do_not_count() -> None:
    logits, target = torch.randn(SAMPLES, CLASSES), classes().index_fill(0, torch.tensor([0, 3]), -100)
    torch.testing.assert_close(as_loss("cross_entropy").value(logits, target), F.cross_entropy(logits, target))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_differentiated_loss_gives_the_same(case: Case) -> None:
    loss, target = as_loss(case.given), case.target()
    logits, head = torch.randn(SAMPLES, CLASSES, dtype=torch.float64), torch.randn(CLASSES, 3, dtype=torch.float64)
    square = torch.randn(SAMPLES, 3, 3, dtype=torch.float64)
    gram = HadamardGram(torch.ones(3, 3).double(), square, square)
    other = Differentiated(*derivatives(case, logits, target))
    for name, args in {
        "curvature_trace": (logits,),
        "curvature_diagonal": (logits, head),
        "logit_gradient": (logits[..., None],),
        "logit_gradient_product": (logits[..., None], logits.flip(0)),
        "relative_flatness": (logits[..., None], head, gram),
    }.items():
        values = [getattr(each, name)(*args, target) for each in (other, loss)]
        torch.testing.assert_close(*values, rtol=1e-10, atol=1e-12)
    part = other.select(slice(1, 3))
    assert torch.equal(part.gradient, other.gradient[1:3])
    assert torch.equal(part.curvature, other.curvature[1:3])


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_heads_of_each_sample(case: Case) -> None:
    """One head for all, or the same one for each."""
    loss, target = as_loss(case.given), case.target()
    logits, head = torch.randn(SAMPLES, CLASSES, dtype=torch.float64), torch.randn(CLASSES, 3, dtype=torch.float64)
    square = torch.randn(SAMPLES, 3, 3, dtype=torch.float64)
    gram = HadamardGram(torch.ones(3, 3).double(), square, square)
    each = head.expand(SAMPLES, -1, -1)
    torch.testing.assert_close(
        loss.curvature_diagonal(logits, each, target), loss.curvature_diagonal(logits, head, target)
    )
    torch.testing.assert_close(
        loss.relative_flatness(logits[..., None], each, gram, target),
        loss.relative_flatness(logits[..., None], head, gram, target),
    )


def test_weights_of_each_sample_are_selected() -> None:
    weights = torch.rand(SAMPLES, CLASSES)
    part = BinaryCrossEntropy(weights).select(slice(2))
    assert torch.equal(part.weight, weights[:2])
    shared = BinaryCrossEntropy(weights[0])
    assert shared.select(slice(2)) is shared
    loss = CrossEntropy()
    assert loss.select(slice(2)) is loss


SOFT = torch.tensor([[0.2, 0.8], [1.0, 0.0]])
INDICES = torch.tensor([1, 0])
# Loss, targets, number of logits, expected result.
GOOD: dict[str, tuple[Any, Any, int, Any]] = {
    "indices": ("cross_entropy", INDICES, 2, INDICES),
    "small integers": ("cross_entropy", INDICES.to(torch.uint8), 2, INDICES),
    "probabilities": ("cross_entropy", SOFT, 2, SOFT),
    "class weights": (nn.CrossEntropyLoss(torch.ones(2)), INDICES, 2, INDICES),
    "labels": ("bce_with_logits", SOFT.round().long(), 2, SOFT.round()),
    "truth values": ("bce_with_logits", SOFT > 0.5, 2, SOFT.round()),
    "soft labels": ("bce_with_logits", SOFT, 2, SOFT),
    "one logit": ("bce_with_logits", INDICES, 1, INDICES.float()[:, None]),
    "one pos_weight for all": (nn.BCEWithLogitsLoss(pos_weight=torch.tensor(3.0)), SOFT, 2, SOFT),
    "no sample": ("cross_entropy", INDICES[:0], 2, INDICES[:0]),
    "ignored": ("cross_entropy", torch.tensor([1, -100]), 2, torch.tensor([1, -100])),
    "all ignored": ("cross_entropy", torch.tensor([-100, -100]), 2, torch.tensor([-100, -100])),
}
BAD: dict[str, tuple[Any, Any, int, str]] = {
    "no tensor": ("cross_entropy", [1, 0], 2, "must be a dense tensor; got list"),
    "truth values": ("cross_entropy", SOFT[:, 0] > 0.5, 2, r"class indices of shape \(2,\) or .*; got torch.bool"),
    "one-hot integers": ("cross_entropy", SOFT.long(), 2, r"shape \(2,\) or .*; got torch.int64 of shape \(2, 2\)"),
    "floating indices": (
        "cross_entropy",
        INDICES.float(),
        2,
        r"probabilities.* \(2, 2\); got torch.float32 of .*\(2,\)",
    ),
    "too large": ("cross_entropy", INDICES + 5, 2, r"\[0, 2\) for 2 logits; got values from 5 to 6"),
    "negative": ("cross_entropy", INDICES - 99, 2, r"got values from -99 to -98"),
    "negative beside ignored": ("cross_entropy", INDICES - 100, 2, r"got values from -99 to -99"),
    "no probabilities": ("cross_entropy", SOFT * 3, 2, r"\[0, 1\]; got values from 0.0 to 3.0"),
    "not a number": ("cross_entropy", SOFT * torch.nan, 2, r"\[0, 1\]; got values from nan"),
    "one logit": ("cross_entropy", INDICES, 1, "two logits or more; got one.*bce_with_logits"),
    "indices for labels": ("bce_with_logits", INDICES, 2, r"labels in \[0, 1\] of shape \(2, 2\).*shape \(2,\)"),
    "labels too large": ("bce_with_logits", SOFT.long() * 7, 2, r"\[0, 1\]; got values from 0.0 to 7.0"),
    "weights": (nn.CrossEntropyLoss(torch.ones(3)), INDICES, 2, r"loss.weight.*\(2,\); got \(3,\)"),
    "pos_weights": (nn.BCEWithLogitsLoss(pos_weight=torch.ones(3)), SOFT, 2, r"loss.pos_weight.*got \(3,\)"),
}


@pytest.mark.parametrize(("loss", "target", "classes", "expected"), GOOD.values(), ids=GOOD)
def test_targets_are_read(loss: Any, target: Any, classes: int, expected: Any) -> None:
    torch.testing.assert_close(checked_targets(target, len(target), classes, as_loss(loss)), expected)


@pytest.mark.parametrize(("loss", "target", "classes", "message"), BAD.values(), ids=BAD)
def test_bad_targets_are_named(loss: Any, target: Any, classes: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        checked_targets(target, 2, classes, as_loss(loss))


def test_values_are_not_checked_on_request() -> None:
    assert checked_targets(INDICES + 5, 2, 2, as_loss("cross_entropy"), check_values=False).tolist() == [6, 5]
