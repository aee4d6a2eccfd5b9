"""The loss as a function of the pooled features: which forms are recognised, which told apart, which refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import HEADS, SUPPORTED, Case
from networks import CosineLinear, Net
from recorded import brute_force, pooled, recorded, required
from torch import Tensor, nn

from lightning_flatness import measure
from lightning_flatness.curvature.objective import Objective, objective
from lightning_flatness.curvature.pooled.certificate import features_at
from lightning_flatness.errors import UnsupportedTailError
from lightning_flatness.losses import BinaryCrossEntropy, CrossEntropy, Differentiated

CASES = {case.name: case for case in SUPPORTED}
MODEL, (X, Y) = CASES["relu"].model().eval(), CASES["relu"].data()
N, C = len(Y), 3
ONE_HOT, ONES = F.one_hot(Y, C).double(), torch.ones(N, C).double()
SOFT = torch.tensor([[0.1, 0.7, 0.2], [1.0, 0.0, 0.0], [0.3, 0.3, 0.4], [0.0, 1.0, 0.0], [0.0, 0.5, 0.5]]).double()
LABELS = torch.tensor([[0, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 1], [0, 1, 0]]).double()
WEIGHTS, OTHERS = torch.tensor([0.2, 1.0, 3.0]).double(), torch.tensor([2.0, 0.5, 1.0]).double()
OF_SAMPLES = torch.tensor([0.5, 1.0, 0.0, 2.0, 0.1]).double()
IGNORED = Y.index_fill(0, torch.tensor([1, 3]), -100)
KEPT = (IGNORED >= 0).double()[:, None]
SMOOTH = 0.8 * ONE_HOT + 0.2 / C
TEACHER = torch.randn(N, C, generator=torch.Generator().manual_seed(3)).double()

Loss = Callable[[Tensor, Tensor], Tensor]


def mined(phi: Tensor, y: Tensor) -> Tensor:
    """The mean of the largest two: which ones depends on the logits."""
    return F.cross_entropy(phi, y, reduction="none").topk(2).values.mean()


def by_hand(phi: Tensor, y: Tensor) -> Tensor:
    return -(phi.log_softmax(1) * F.one_hot(y, C)).sum(1).mean()


def distilled(temperature: float) -> Loss:
    def loss(phi: Tensor, y: Tensor) -> Tensor:
        student, teacher = (phi / temperature).log_softmax(1), (TEACHER / temperature).softmax(1)
        soft = F.kl_div(student, teacher, reduction="batchmean") * temperature**2
        return 0.4 * F.cross_entropy(phi, y) + 0.6 * soft

    return loss


def mixed(phi: Tensor, y: Tensor) -> Tensor:
    return 0.3 * F.cross_entropy(phi, y) + 0.7 * F.cross_entropy(phi, y.flip(0))


# Name -> (loss, labels with their weights).
CROSS_ENTROPIES: dict[str, tuple[Loss, Tensor]] = {
    "mean": (F.cross_entropy, ONE_HOT),
    "sum": (lambda phi, y: F.cross_entropy(phi, y, reduction="sum"), ONE_HOT),
    "none, then mean": (lambda phi, y: F.cross_entropy(phi, y, reduction="none").mean(), ONE_HOT),
    "sum, by the number of samples": (lambda phi, y: F.cross_entropy(phi, y, reduction="sum") / len(y), ONE_HOT),
    "a factor": (lambda phi, y: 0.3 * F.cross_entropy(phi, y), 0.3 * ONE_HOT),
    "a factor that makes the weights 1": (lambda phi, y: len(y) * F.cross_entropy(phi, y), len(Y) * ONE_HOT),
    "a constant": (lambda phi, y: F.cross_entropy(phi, y) + 3, ONE_HOT),
    "label smoothing": (lambda phi, y: F.cross_entropy(phi, y, label_smoothing=0.2), SMOOTH),
    "class weights": (lambda phi, y: F.cross_entropy(phi, y, WEIGHTS), ONE_HOT * WEIGHTS * N / WEIGHTS[Y].sum()),
    "class weights, summed": (lambda phi, y: F.cross_entropy(phi, y, WEIGHTS, reduction="sum"), ONE_HOT * WEIGHTS),
    "class weights, by the number of samples": (
        lambda phi, y: F.cross_entropy(phi, y, WEIGHTS, reduction="none").mean(),
        ONE_HOT * WEIGHTS,
    ),
    "weights and smoothing": (
        lambda phi, y: F.cross_entropy(phi, y, WEIGHTS, label_smoothing=0.2),
        SMOOTH * WEIGHTS * N / WEIGHTS[Y].sum(),
    ),
    "weights of samples": (
        lambda phi, y: (OF_SAMPLES * F.cross_entropy(phi, y, reduction="none")).mean(),
        0.8 * ONE_HOT * OF_SAMPLES[:, None],  # four of the five count
    ),
    "soft labels": (lambda phi, y: F.cross_entropy(phi, SOFT), SOFT),
    "soft labels of other mass": (lambda phi, y: F.cross_entropy(phi, 2 * SOFT), 2 * SOFT),
    "mixed labels": (mixed, 0.3 * ONE_HOT + 0.7 * ONE_HOT.flip(0)),
    "ignored labels": (lambda phi, y: F.cross_entropy(phi, IGNORED), ONE_HOT * KEPT),
    "ignored class": (lambda phi, y: F.cross_entropy(phi, y, ignore_index=0), ONE_HOT * (Y > 0)[:, None]),
    "remapped labels": (lambda phi, y: F.cross_entropy(phi, (y + 1) % 3), ONE_HOT.roll(1, 1)),
    "reordered labels": (lambda phi, y: F.cross_entropy(phi, y.flip(0)), ONE_HOT.flip(0)),
    "temperature": (lambda phi, y: F.cross_entropy(phi / 2, y), ONE_HOT),
    "logit adjustment": (lambda phi, y: F.cross_entropy(phi + WEIGHTS.log(), y), ONE_HOT),
    "margin of the label": (lambda phi, y: F.cross_entropy(phi - 0.3 * F.one_hot(y, C), y), ONE_HOT),
    "log-softmax and picking": (lambda phi, y: -phi.log_softmax(1)[torch.arange(N), y].mean(), ONE_HOT),
    "negative log-likelihood": (lambda phi, y: F.nll_loss(phi.log_softmax(1), y), ONE_HOT),
    "log of softmax": (lambda phi, y: F.nll_loss(phi.softmax(1).log(), y), ONE_HOT),
    "by hand": (by_hand, ONE_HOT),
    "log-sum-exp": (lambda phi, y: (phi.logsumexp(1) - phi.gather(1, y[:, None])[:, 0]).mean(), ONE_HOT),
    "divergence from a teacher": (
        lambda phi, y: F.kl_div(phi.log_softmax(1), TEACHER.softmax(1), reduction="batchmean"),
        TEACHER.softmax(1),
    ),
    "distillation without temperature": (distilled(1.0), 0.4 * ONE_HOT + 0.6 * TEACHER.softmax(1)),
    "in half precision": (lambda phi, y: F.cross_entropy(phi.float(), y), ONE_HOT),
}
# Name -> (loss, weight of each label, labels).
SIGMOIDS: dict[str, tuple[Loss, Tensor, Tensor]] = {
    "mean": (lambda phi, y: F.binary_cross_entropy_with_logits(phi, LABELS), ONES / C, LABELS),
    "sum": (
        lambda phi, y: F.binary_cross_entropy_with_logits(phi, LABELS, reduction="sum"),
        ONES,
        LABELS,
    ),
    "sum over labels, mean over samples": (
        lambda phi, y: F.binary_cross_entropy_with_logits(phi, LABELS, reduction="none").sum(1).mean(),
        ONES,
        LABELS,
    ),
    "one-hot": (lambda phi, y: F.binary_cross_entropy_with_logits(phi, ONE_HOT), ONES / C, ONE_HOT),
    "soft labels": (lambda phi, y: F.binary_cross_entropy_with_logits(phi, SOFT), ONES / C, SOFT),
    "weights": (
        lambda phi, y: F.binary_cross_entropy_with_logits(phi, LABELS, WEIGHTS),
        WEIGHTS.expand(N, C) / C,
        LABELS,
    ),
    "weights of positives": (
        lambda phi, y: F.binary_cross_entropy_with_logits(phi, SOFT, pos_weight=OTHERS),
        (OTHERS * SOFT + 1 - SOFT) / C,
        OTHERS * SOFT / (OTHERS * SOFT + 1 - SOFT),
    ),
    "both weights": (
        lambda phi, y: F.binary_cross_entropy_with_logits(phi, LABELS, WEIGHTS, pos_weight=OTHERS),
        WEIGHTS * (OTHERS * LABELS + 1 - LABELS) / C,
        LABELS,
    ),
    "unknown labels": (
        lambda phi, y: (F.binary_cross_entropy_with_logits(phi, LABELS, reduction="none") * (SOFT > 0)).mean(),
        (SOFT > 0).double() / C,
        LABELS * (SOFT > 0),
    ),
    "of probabilities": (
        lambda phi, y: F.binary_cross_entropy(phi.sigmoid(), LABELS),
        ONES / C,
        LABELS,
    ),
    "softplus": (
        lambda phi, y: (F.softplus(phi) - LABELS * phi).sum(1).mean(),
        ONES,
        LABELS,
    ),
    "multilabel": (lambda phi, y: F.multilabel_soft_margin_loss(phi, LABELS), ONES / C, LABELS),
    "soft margin": (lambda phi, y: F.soft_margin_loss(phi, 2 * LABELS - 1), ONES / C, LABELS),
    "one logit": (
        lambda phi, y: F.binary_cross_entropy_with_logits(phi[:, 1], LABELS[:, 1]),
        torch.ones(N, 1),
        LABELS[:, 1:2],
    ),
}


def focal(gamma: float) -> Loss:
    def loss(phi: Tensor, y: Tensor) -> Tensor:
        each = F.cross_entropy(phi, y, reduction="none")
        return ((1 - (-each).exp()) ** gamma * each).mean()

    return loss


def poly(phi: Tensor, y: Tensor) -> Tensor:
    each = F.cross_entropy(phi, y, reduction="none")
    return (each + 0.5 * (1 - (-each).exp())).mean()


def squared_hinge(phi: Tensor, y: Tensor) -> Tensor:
    return (1 - (2 * F.one_hot(y, C) - 1) * phi).clamp_min(0).square().mean()


def with_entropy(phi: Tensor, y: Tensor) -> Tensor:
    log = phi.log_softmax(1)
    return F.nll_loss(log, y) + 0.1 * (log.exp() * log).sum(1).mean()


OTHER_LOSSES: dict[str, Loss] = {
    "focal": focal(2.0),
    "focal with a root": focal(0.5),
    "poly": poly,
    "squared error": lambda phi, y: F.mse_loss(phi, F.one_hot(y, C).double()),
    "squared error of probabilities": lambda phi, y: F.mse_loss(phi.softmax(1), F.one_hot(y, C).double()),
    "huber": lambda phi, y: F.huber_loss(phi, F.one_hot(y, C).double()),
    "absolute error": lambda phi, y: F.l1_loss(phi, F.one_hot(y, C).double()),
    "squared hinge": squared_hinge,
    "entropy": with_entropy,
    "penalty": lambda phi, y: F.cross_entropy(phi, y) + 0.01 * phi.square().sum(1).mean(),
    "linear term": lambda phi, y: F.cross_entropy(phi, y) + 0.05 * phi[:, 0].mean(),
    "distillation with temperature": distilled(3.0),
    "hardest samples": mined,
    "two temperatures": lambda phi, y: F.cross_entropy(phi, y) + F.cross_entropy(phi / 3, y),
    "loss to a power": lambda phi, y: F.cross_entropy(phi, y, reduction="none").pow(1.5).mean(),
    "detached weight": lambda phi, y: (
        (1 - phi.softmax(1).gather(1, y[:, None])[:, 0]).detach() * F.cross_entropy(phi, y, reduction="none") ** 2
    ).mean(),
    "asymmetric": lambda phi, y: (
        -(LABELS * F.logsigmoid(phi) + (1 - LABELS) * phi.sigmoid().pow(4) * F.logsigmoid(-phi)).mean()
    ),
    "two heads": lambda phi, y: F.cross_entropy(phi, y) + F.cross_entropy(phi[:, :2], y.clamp(max=1)),
    "gaussian": lambda phi, y: (phi[:, 1] + (phi[:, 0] - y).square() * (-phi[:, 1]).exp()).mean(),
}
COUPLED: dict[str, Loss] = {
    "contrastive": lambda phi, y: F.cross_entropy(F.normalize(phi) @ F.normalize(phi).mT * 5, torch.arange(N)),
    "pairs": lambda phi, y: (phi[::2][:2] - phi[1::2]).square().mean(),
    "neighbours": lambda phi, y: F.cross_entropy(phi + 0.1 * phi.roll(1, 0), y),
    "statistics of the batch": lambda phi, y: F.cross_entropy((phi - phi.mean(0)) / phi.std(0), y),
    "squared mean": lambda phi, y: F.cross_entropy(phi, y).square(),
    "variance of the losses": lambda phi, y: F.cross_entropy(phi, y, reduction="none").var(),
    "dice of the batch": lambda phi, y: (
        1 - (phi.softmax(1) * ONE_HOT).sum() / (phi.softmax(1).square() + ONE_HOT).sum()
    ),
    "entropy of the mean": lambda phi, y: F.cross_entropy(phi, y) - (q := phi.softmax(1).mean(0)) @ q.log(),
    "pairs of one hot": lambda phi, y: (
        F.margin_ranking_loss(phi[:2, 0], phi[2:4, 0].exp(), torch.ones(2), 5.0) + (phi[0] * phi[1]).sum()
    ),
}


def goal_of(loss: Loss, model: nn.Module = MODEL) -> tuple[Objective, Tensor]:
    """The objective of a loss and the pooled features."""
    one_pass = recorded(model, X, Y, loss)
    cut = pooled(one_pass)
    features = features_at(one_pass, cut, one_pass.points()).detach()
    return required(objective(one_pass, cut, features)), features


def expected_at(features: Tensor, loss: Loss, head: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Gradient (n, j) and Hessian (n, j, j) of the step's loss in the features, by autograd."""
    point = features.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(head(point), Y), point, create_graph=True)
    if not gradient.requires_grad:
        return gradient, point.new_zeros(*point.shape, point.shape[1])
    rows = [torch.autograd.grad(row.sum(), point, retain_graph=True)[0] for row in gradient.unbind(1)]
    return gradient.detach(), torch.stack(rows, 1)


def found_at(goal: Objective) -> tuple[Tensor, Tensor]:
    """The same from an objective: its gradient, and the diagonal of its Hessian."""
    phi, form, target = goal.logits, goal.loss, goal.target
    ones = torch.eye(phi.shape[1]).to(phi)
    slopes = [form.logit_gradient_product(phi[..., None], one.expand_as(phi), target)[:, 0] for one in ones]
    slope = torch.stack(slopes, 1)
    head = goal.head if goal.head.dim() == 3 else goal.head.expand(len(phi), -1, -1)
    diagonal = form.curvature_diagonal(phi, goal.head, target)
    if goal.head_curvature is not None:
        diagonal = diagonal + goal.head_curvature.dense().diagonal(dim1=1, dim2=2)
    return torch.einsum("nc,ncj->nj", slope, head), diagonal


def assert_is_the_loss(goal: Objective, features: Tensor, loss: Loss, factor: float, model: Any = MODEL) -> None:
    gradient, hessian = expected_at(features, loss, lambda p: model.output(model.head(p), p))
    slope, diagonal = found_at(goal)
    torch.testing.assert_close(slope, factor * gradient, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(diagonal, factor * hessian.diagonal(dim1=1, dim2=2), rtol=1e-7, atol=1e-9)


SUMMED = {"sum", "class weights, summed"}


@pytest.mark.parametrize("name", CROSS_ENTROPIES)
def test_every_cross_entropy_is_recognised_and_its_labels_read(name: str) -> None:
    loss, labels = CROSS_ENTROPIES[name]
    goal, features = goal_of(loss)
    assert type(goal.loss) is CrossEntropy
    torch.testing.assert_close(goal.target, labels, rtol=1e-12, atol=1e-12)
    assert ((goal.target == 0) == (labels == 0)).all()  # nothing is left of rounding
    assert torch.equal(goal.counted, labels.sum(1) > 0)
    if name != "in half precision":
        assert_is_the_loss(goal, features, loss, 1 if name in SUMMED else int(goal.counted.sum()))


@pytest.mark.parametrize("name", SIGMOIDS)
def test_every_binary_cross_entropy_is_recognised_and_its_labels_read(name: str) -> None:
    loss, weights, labels = SIGMOIDS[name]
    goal, features = goal_of(loss)
    assert type(goal.loss) is BinaryCrossEntropy
    torch.testing.assert_close(goal.loss.weight, weights.double(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(goal.target, labels, rtol=1e-10, atol=1e-10)
    assert_is_the_loss(goal, features, loss, 1 if name in SUMMED else N)


@pytest.mark.parametrize("name", OTHER_LOSSES)
def test_every_other_loss_is_told_apart_and_differentiated(name: str) -> None:
    loss = OTHER_LOSSES[name]
    goal, features = goal_of(loss)
    assert type(goal.loss) is Differentiated
    assert goal.target is None
    assert goal.counted.all()  # those without a gradient at these values as well
    assert_is_the_loss(goal, features, loss, N)


@pytest.mark.parametrize("name", COUPLED)
def test_a_loss_that_couples_samples_is_refused(name: str) -> None:
    with pytest.raises(UnsupportedTailError, match=r"one sample depend|couples the samples"):
        goal_of(COUPLED[name])


# Heads: (whether affine; None: as the samples lie; whether curved in the features) for cross-entropy.
KINDS: dict[str, tuple[bool | None, bool]] = {
    "relu": (True, False),
    "temperature": (True, False),
    "some of the logits": (True, False),
    "mean of two classifiers": (True, False),
    "functional classifier": (True, False),
    "prior added to the logits": (True, False),
    "hidden layer": (False, False),
    "relu of the logits": (None, False),
    "larger of two features": (None, False),
    "curved hidden layer": (False, True),
    "layer norm": (False, True),
    "cosine classifier": (False, True),
    "soft cap": (False, True),
    "learned temperature": (False, True),
}


@pytest.mark.parametrize("loss", [F.cross_entropy, focal(2.0)], ids=["cross-entropy", "focal"])
@pytest.mark.parametrize("name", KINDS)
def test_the_kind_of_the_head_is_seen(name: str, loss: Loss) -> None:
    is_affine, is_curved = KINDS[name]
    model: Any = CASES[name].model().eval()
    goal, features = goal_of(loss, model)
    if loss is F.cross_entropy:
        assert is_affine in (None, goal.head.dim() == 2)
        assert is_curved == (goal.head_curvature is not None)
    if name in HEADS and not any(word in name for word in ("layer norm", "features")):
        assert_is_the_loss(goal, features, loss, N, model)


def test_the_weight_itself_is_the_head_of_a_linear_classifier() -> None:
    goal, _ = goal_of(F.cross_entropy)
    assert torch.equal(goal.head, MODEL.head.weight)


def test_pooled_features_that_are_the_logits_have_no_head() -> None:
    goal, features = goal_of(F.cross_entropy, CASES["conv is classifier"].model().eval())
    assert torch.equal(goal.head, torch.eye(3).double())
    assert torch.equal(goal.logits, features)


CONFIDENT = Case("confident", lambda: Net(act=nn.ReLU()))


@pytest.mark.parametrize("scale", [1.0, 30.0, 300.0])
def test_forms_do_not_depend_on_the_recorded_values(scale: float) -> None:
    """Where a prediction is sure, nothing could be told from its derivatives."""
    model: Any = CONFIDENT.model().eval()
    with torch.no_grad():
        model.head.weight.mul_(scale)
    for loss, kind in ((F.cross_entropy, CrossEntropy), (focal(2.0), Differentiated)):
        goal, _ = goal_of(loss, model)
        assert type(goal.loss) is kind
    target = goal_of(F.cross_entropy, model)[0].target
    torch.testing.assert_close(target, ONE_HOT, rtol=1e-12, atol=0)


def test_one_sample_alone() -> None:
    for loss, labels in ((F.cross_entropy, ONE_HOT), (CROSS_ENTROPIES["sum"][0], ONE_HOT)):
        one_pass = recorded(MODEL, X[:1], Y[:1], loss)
        cut = pooled(one_pass)
        goal = objective(one_pass, cut, features_at(one_pass, cut, one_pass.points()))
        torch.testing.assert_close(goal.target, labels[:1])


def test_a_huge_slope_of_one_sample_does_not_hide_the_curvature_of_others() -> None:
    """Where all features are zero, a cosine head has a slope of 1e12 and no curvature; no filter moves them there."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), CosineLinear(4, 3))
    nn.init.constant_(model[0].bias, -0.2)
    model, x = model.double().eval(), torch.randn(4, 2, 5, 5).double()
    x[1] = 0.0
    for loss in (F.cross_entropy, focal(2.0)):

        def step(m: nn.Module, x: Tensor, y: Tensor, loss: Loss = loss) -> Tensor:
            return loss(m(x), y)

        report = measure(model, [(x, torch.arange(4) % 3)], loss=loss, layer="0", verify=False)
        values = [brute_force(model, "0", step, x[[n]], torch.tensor([n % 3])) for n in (0, 2, 3)]
        trace, relative = (float(sum(each)) / 4 for each in zip(*values, strict=True))
        assert (report.hessian_trace, report.relative_flatness) == pytest.approx((trace, relative), rel=1e-9)


def test_no_second_derivative_is_refused() -> None:
    """Never taken for flat."""

    def loss(phi: Tensor, y: Tensor) -> Tensor:
        return F.multi_margin_loss(phi, y, p=2)

    with pytest.raises((UnsupportedTailError, RuntimeError), match="derivative"):
        goal_of(loss)
