"""Which call ends the tail: the one whose output the network and the loss use as logits, or none."""

from __future__ import annotations

from collections import UserDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import Case
from networks import Net
from recorded import Measured
from torch import Tensor, nn

from lightning_flatness.curvature.pooled.closed_form import hessian_trace
from lightning_flatness.curvature.pooled.derivatives import PooledDerivatives
from lightning_flatness.errors import UnsupportedTailError

Output = namedtuple("Output", "features logits")


@dataclass
class DataOutput:
    loss: Tensor | None
    logits: Tensor


class Backbone(Net):
    """Returns the pooled features; the rest is the user's step."""

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.tail(self, self.stem(x))).flatten(1)


class Embedding(Backbone):
    """Returns the output of a linear layer that is not the classifier."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(super().forward(x))


def cross_entropy(m: nn.Module, x: Tensor, y: Tensor) -> None:
    F.cross_entropy(m(x), y)


def two_views(m: nn.Module, x: Tensor, y: Tensor) -> None:
    """Test-time augmentation: each view is a pass of its own, and the predictions are averaged."""
    first, second = m(x), m(x.flip(3))
    _ = F.cross_entropy(first, y), ((first.softmax(1) + second.softmax(1)) / 2).argmax(1)


def averaged_views(m: nn.Module, x: Tensor, y: Tensor) -> None:
    F.cross_entropy((m(x) + m(x.flip(3))) / 2, y)


def siamese(m: nn.Module, x: Tensor, y: Tensor) -> None:
    F.normalize(m(x)) @ F.normalize(m(x.flip(3))).mT


def output(make: Callable[[Tensor, Tensor], Any]) -> Callable[[], nn.Module]:
    return lambda: Net(output=make)


# name -> (network, the user's step, name of the classifier)
CHOSEN: dict[str, tuple[Callable[[], nn.Module], Callable[..., Any], str]] = {
    "tensor": (Net, cross_entropy, "head"),
    "no loss": (Net, lambda m, x, y: m(x), "head"),
    "tuple": (output(lambda phi, p: (phi, p)), lambda m, x, y: F.cross_entropy(m(x)[0], y), "head"),
    "list, logits last": (output(lambda phi, p: [p, phi]), lambda m, x, y: m(x), "head"),
    "dict": (output(lambda phi, p: {"features": p, "out": phi}), lambda m, x, y: m(x), "head"),
    "named tuple": (output(lambda phi, p: Output(p, phi)), lambda m, x, y: m(x), "head"),
    "dataclass": (output(lambda phi, p: DataOutput(None, phi)), lambda m, x, y: m(x), "head"),
    "namespace": (output(lambda phi, p: SimpleNamespace(logits=phi)), lambda m, x, y: m(x), "head"),
    "mapping": (output(lambda phi, p: UserDict(a={"b": phi})), lambda m, x, y: m(x), "head"),
    "distribution": (
        output(lambda phi, p: torch.distributions.Categorical(logits=phi)),
        lambda m, x, y: -m(x).log_prob(y).mean(),
        "head",
    ),
    "log softmax": (output(lambda phi, p: phi.log_softmax(1)), lambda m, x, y: F.nll_loss(m(x), y), "head"),
    "loss inside the network": (
        output(lambda phi, p: DataOutput(F.cross_entropy(phi, torch.zeros(5, dtype=torch.long)), phi)),
        lambda m, x, y: m(x).loss,
        "head",
    ),
    "backbone, classifier in the step": (
        lambda: nn.ModuleDict({"net": Backbone(), "fc": nn.Linear(4, 3)}),
        lambda m, x, y: F.cross_entropy(m["fc"](m["net"](x)), y),
        "fc",
    ),
    "two linear layers, the first returned": (
        lambda: Net(head=FirstOfTwo()),
        lambda m, x, y: F.cross_entropy(m(x), y),
        "head.first",
    ),
    "two views in two passes": (Net, two_views, "head"),
    "number read for the log": (
        Net,
        lambda m, x, y: (phi := m(x)).max().item() + F.cross_entropy(phi, y).item(),
        "head",
    ),
    "label smoothing and weights": (
        Net,
        lambda m, x, y: F.cross_entropy(m(x), y, torch.ones(3).double(), label_smoothing=0.1),
        "head",
    ),
    "softened copy besides": (
        Net,
        lambda m, x, y: F.cross_entropy(phi := m(x), y) + (phi / 4).log_softmax(1).mean(),
        "head",
    ),
    "classes returned": (output(lambda phi, p: phi.argmax(1)), lambda m, x, y: m(x), "head"),
    "predictions": (Net, lambda m, x, y: (m(x).softmax(1).argmax(1) == y).double().mean(), "head"),
}
CHANGED = "after `head` they are"
REFUSED: dict[str, tuple[Callable[[], nn.Module], Callable[..., Any], str]] = {
    "temperature in the loss": (Net, lambda m, x, y: F.cross_entropy(m(x) / 2, y), CHANGED),
    "temperature, after a number was read": (
        Net,
        lambda m, x, y: F.cross_entropy((phi := m(x)) / (2 + 0 * phi.max().item()), y),
        CHANGED,
    ),
    "margin in the loss": (Net, lambda m, x, y: F.cross_entropy(m(x) - 0.3 * F.one_hot(y, 3), y), CHANGED),
    "ensemble": (Net, lambda m, x, y: F.cross_entropy(m(x) + torch.randn(5, 3), y), CHANGED),
    "mean of two views": (Net, averaged_views, CHANGED),
    "siamese": (Embedding, siamese, CHANGED),
    "embedding times prototypes": (
        Embedding,
        lambda m, x, y: F.cross_entropy(m(x) @ torch.eye(3).double() * 2, y),
        CHANGED,
    ),
    "embedding, linear function": (
        Embedding,
        lambda m, x, y: F.cross_entropy(F.linear(m(x), torch.randn(3, 3).double()), y),
        CHANGED,
    ),
    "embedding, einsum": (
        Embedding,
        lambda m, x, y: torch.einsum("nk,ck->nc", m(x), torch.randn(7, 3).double()),
        CHANGED,
    ),
    "prototypical": (
        Embedding,
        lambda m, x, y: F.cross_entropy(-torch.cdist(m(x), torch.randn(3, 3).double()), y),
        CHANGED,
    ),
    "functional classifier in the step": (
        Backbone,
        lambda m, x, y: F.cross_entropy(F.linear(m(x), m.head.weight), y),
        "the network they are",
    ),
    "softmax returned": (output(lambda phi, p: phi.softmax(1)), lambda m, x, y: m(x), CHANGED),
    "some logits returned": (output(lambda phi, p: phi[:, 1:]), lambda m, x, y: m(x), CHANGED),
}


class FirstOfTwo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, p: Tensor) -> Tensor:
        phi = self.first(p)
        self.confidence = self.second(p)
        return phi


def measured(
    build: Callable[[], nn.Module], step: Callable[..., Any], mode: Any, **names: Any
) -> tuple[Measured, PooledDerivatives]:
    case = Case("tail", build, classifier=None)
    model, (x, y) = case.model().eval(), case.data()
    with Measured(model, **names) as recorder:
        for _ in range(2):
            with mode():
                step(model, x.clone(), y)
            derivatives = recorder.derivatives(y)
    return recorder, derivatives


each_mode = pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])


@each_mode
@pytest.mark.parametrize("name", CHOSEN)
def test_finds_the_logits(name: str, mode: Any) -> None:
    build, step, classifier = CHOSEN[name]
    recorder, derivatives = measured(build, step, mode)
    assert recorder.classifier == classifier
    _, named = measured(build, step, mode, classifier=classifier)
    assert torch.equal(derivatives.logits, named.logits)
    assert torch.equal(hessian_trace(derivatives), hessian_trace(named))


@each_mode
@pytest.mark.parametrize("name", REFUSED)
def test_refuses_logits_that_are_not_the_classifiers(name: str, mode: Any) -> None:
    build, step, message = REFUSED[name]
    with pytest.raises(UnsupportedTailError, match=message):
        measured(build, step, mode)
