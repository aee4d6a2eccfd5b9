"""The record against the loss at other filters: what no recorder can see is found, and the weight is restored."""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import Net, RightSwish, Swish, conv2d
from recorded import brute_force
from torch import Tensor, nn

from lightning_flatness import UnsupportedTailError, measure
from lightning_flatness.data.verification import SKIPPED, Repetition, Verification, verify
from lightning_flatness.recording.recorder import ForwardRecorder, only_for


class Unseen(Net):
    """What depends on the filters and is no recorded operation behind the convolution: `before` changes the inputs."""

    def __init__(self, before: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.before = before

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.before(self, x))


def in_a_thread(model: Any, x: Tensor) -> Tensor:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(lambda: x * (1 + model.conv.weight.pow(2).mean())).result()


UNSEEN: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "the weight's norm": lambda model, x: x * (1 + model.conv.weight.detach().norm()),
    "the weight in a thread": in_a_thread,
    "a number made of the weight": lambda model, x: x + float(model.conv.weight.detach().sum()) + 1,
}


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(6, 2, 5, 4, generator=generator, dtype=torch.float64), torch.arange(6) % 3


@pytest.mark.parametrize("name", UNSEEN)
def test_what_leaves_no_trace_is_refused(name: str) -> None:
    model = Unseen(UNSEEN[name]).double().eval()
    before = model.conv.weight.detach().clone()
    with pytest.raises(UnsupportedTailError, match="predict the loss at other filters"):
        measure(model, [batch()])
    assert torch.equal(model.conv.weight, before)


def test_what_does_not_depend_on_the_filters_is_no_reason() -> None:
    model = Unseen(lambda model, x: x * model.norm.weight.mean()).double().eval()
    assert measure(model, [batch()]).hessian_trace > 0


def test_an_error_of_the_network_restores_the_weight() -> None:
    model = Net().double().eval()
    recorder, (x, y) = ForwardRecorder(model), batch()
    before, calls = model.conv.weight.detach().clone(), []

    def repeat() -> list[Tensor]:
        calls.append(None)
        if len(calls) == 2:
            raise OSError("no data")
        return [nn.functional.cross_entropy(model(x), y)]

    with recorder, torch.no_grad():
        with only_for(recorder):
            loss = nn.functional.cross_entropy(model(x), y)
        recorded = recorder.take_pass(loss)
        end = len(recorded.graph.operations)
        with pytest.raises(OSError, match="no data"):
            verify(
                recorded,
                Repetition("the loss", [recorded.loss], end, [loss], slice(None), repeat, lambda use: use(repeat())),
            )
    assert len(calls) == 2
    assert torch.equal(model.conv.weight, before)


class Noisy(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + torch.randn_like(x))


NOT_VERIFIED: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "drawn inputs": (Noisy, {}, "computes something else"),
    "a computed weight": (lambda: Net(nn.utils.parametrizations.weight_norm(conv2d())), {}, "weight .* is computed"),
    "switched off": (Net, {"verify": False}, "verify=False"),
}


@pytest.mark.parametrize(("make", "options", "reason"), NOT_VERIFIED.values(), ids=NOT_VERIFIED)
def test_what_is_not_verified_is_said(make: Callable[[], nn.Module], options: dict[str, Any], reason: str) -> None:
    report = measure(make().double().eval(), [batch()], loss="cross_entropy", **options)
    (assumed,) = report.assumed
    assert re.search(reason, assumed)


def test_each_loader_is_due_once() -> None:
    verification = Verification()
    assert verification.is_due(0, "conv")
    verification.note(0, "conv", None)
    due = [verification.is_due(*where) for where in ((0, "conv"), (1, "conv"), (0, "other"))]
    assert (due, verification.assumed) == ([False, True, True], ())
    verification.note(1, "conv", "it is odd")
    verification.note(2, "conv", "it is odd")
    assert verification.assumed == (f"{SKIPPED}: it is odd",)
    assert not Verification(wanted=False).is_due(0, "conv")


class Reversed(torch.autograd.Function):
    """The identity, whose gradient is reversed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -gradient


class Signs(torch.autograd.Function):
    """Binary features, straight through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def straight_through(a: Tensor) -> Tensor:
    return a + (a.round() - a).detach()


@torch.no_grad()
def norm(p: Tensor) -> Tensor:
    return p.norm(dim=1, keepdim=True)


class Of(nn.Linear):
    """A classifier of changed features."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__(4, 3)
        self.change = change

    def forward(self, p: Tensor) -> Tensor:
        return super().forward(self.change(p))


# Where autograd's derivatives could be others than those of the recorded operations -> whether they are.
DERIVATIVES: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "rounded maps, straight through": (lambda: Net(act=straight_through), False),
    "half rounded maps": (lambda: Net(act=lambda a: F.relu(a) + (a.round() - a).detach() / 2), False),
    "a detached gate": (lambda: Net(act=lambda a: a * a.sigmoid().detach()), False),
    "a detached summand": (lambda: Net(act=lambda a: F.relu(a) + a.detach()), False),
    "a gate without gradient": (lambda: Net(act=lambda a: a * torch.no_grad()(torch.sigmoid)(a)), True),
    "signs of maps": (lambda: Net(act=Signs.apply), True),
    "signs beside maps": (lambda: Net(act=lambda a: F.relu(a) + Signs.apply(a)), True),
    "a wrong backward of maps": (lambda: Net(act=Swish.apply), True),
    "a right backward of maps": (lambda: Net(act=RightSwish.apply), False),
    "a reversed gradient": (lambda: Net(act=lambda a: F.relu(Reversed.apply(a))), True),
    "rounded features, straight through": (lambda: Net(head=Of(straight_through)), False),
    "signs of features": (lambda: Net(head=Of(Signs.apply)), True),
    "features by a detached norm": (lambda: Net(head=Of(lambda p: p / p.norm(dim=1, keepdim=True).detach())), False),
    "features by a norm without gradient": (lambda: Net(head=Of(lambda p: p / norm(p))), True),
    "a wrong backward of features": (lambda: Net(head=Of(Swish.apply)), True),
    "a right backward of features": (lambda: Net(head=Of(RightSwish.apply)), False),
}


@pytest.mark.parametrize(("make", "is_refused"), DERIVATIVES.values(), ids=DERIVATIVES)
def test_the_value_is_that_of_autograd_or_refused(make: Callable[[], nn.Module], is_refused: bool) -> None:
    model, (x, y) = make().double().eval(), batch()
    before, bound = model.conv.weight.detach().clone(), model.conv.weight
    if is_refused:
        with pytest.raises(UnsupportedTailError, match=r"Autograd must differentiate|no derivative reaches"):
            measure(model, [(x, y)], method="pooled")
    else:
        report = measure(model, [(x, y)], loss=F.cross_entropy)
        trace, kappa = brute_force(model, "conv", lambda model, x, y: F.cross_entropy(model(x), y), x, y)
        assert report.hessian_trace == pytest.approx(float(trace), rel=1e-9)
        assert report.relative_flatness == pytest.approx(float(kappa), rel=1e-9)
        assert not report.assumed
    assert model.conv.weight is bound
    assert torch.equal(bound, before)
    assert bound.grad is None


def hinge(phi: Tensor, y: Tensor) -> Tensor:
    """Satisfied where the logits are as they are."""
    return (phi.abs() - 9).clamp_min(0).square().mean()


@pytest.mark.parametrize(
    "change", [torch.round, lambda p: (p - 1).sign(), lambda p: (p > 1).to(p)], ids=["round", "sign", "more"]
)
def test_steps_are_not_taken_for_flat(change: Callable[[Tensor], Tensor]) -> None:
    model = Net(head=Of(lambda p: change(9 * p))).double().eval()
    with pytest.raises(UnsupportedTailError, match=r"A step rounds|none was found"):
        measure(model, [batch()], method="pooled")


def test_a_satisfied_hinge_is_flat() -> None:
    assert measure(Net().double().eval(), [batch()], loss=hinge).hessian_trace == 0


LOSSES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], bool]] = {
    "a wrong backward": (lambda phi, y: Swish.apply(phi).square().mean(), True),
    "a right backward": (lambda phi, y: RightSwish.apply(phi).square().mean(), False),
    "a weight without gradient": (
        lambda phi, y: (norm(phi)[:, 0] * F.cross_entropy(phi, y, reduction="none")).mean(),
        True,
    ),
    "a detached weight": (
        lambda phi, y: (phi.norm(dim=1).detach() * F.cross_entropy(phi, y, reduction="none")).mean(),
        False,
    ),
}


@pytest.mark.parametrize(("loss", "is_refused"), LOSSES.values(), ids=LOSSES)
def test_losses_are_differentiated_as_autograd_does(loss: Callable[..., Tensor], is_refused: bool) -> None:
    model, (x, y) = Net().double().eval(), batch()
    if is_refused:
        with pytest.raises(UnsupportedTailError, match=r"Autograd must differentiate the loss"):
            measure(model, [(x, y)], loss=loss)
    else:
        trace, _ = brute_force(model, "conv", lambda model, x, y: loss(model(x), y), x, y)
        assert measure(model, [(x, y)], loss=loss).hessian_trace == pytest.approx(float(trace), rel=1e-9)


def test_a_convolution_that_no_gradient_reaches_is_said() -> None:
    class Frozen(Net):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                p = self.pool(self.tail(self, self.stem(x))).flatten(1)
            return self.head(p)

    (assumed,) = measure(Frozen().double().eval(), [batch()], loss="cross_entropy").assumed
    assert "no gradient reaches `conv`" in assumed
