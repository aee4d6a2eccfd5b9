"""Whatever a network returns and a step does with it: the loss that was computed is measured, or it is refused."""

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
from recorded import brute_force
from torch import Tensor, nn

from lightning_flatness import ForwardRecorder, PooledMethod, SampleQuantities
from lightning_flatness.errors import UnsupportedTailError
from lightning_flatness.recording.layers import modules_by_name, program_kind, refuse_programs, require_name

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


class FirstOfTwo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, p: Tensor) -> Tensor:
        phi = self.first(p)
        self.confidence = self.second(p)
        return phi


def cross_entropy(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(m(x), y)


def two_views(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Test-time augmentation: each view is a pass of its own, and the predictions are averaged."""
    first, second = m(x), m(x.flip(3))
    _ = ((first.softmax(1) + second.softmax(1)) / 2).argmax(1)
    return F.cross_entropy(first, y)


def with_numbers(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Reads numbers for its log."""
    phi = m(x)
    loss = F.cross_entropy(phi, y)
    _ = phi.detach().max().item() + loss.detach().item(), f"{phi.detach().mean():.3f}"
    return loss


def averaged_views(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy((m(x) + m(x.flip(3))) / 2, y)


def contrastive(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    z = F.normalize(m(x))
    return F.cross_entropy(5 * z @ z.mT, torch.arange(len(x)))


def mixed_up(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    phi = m(0.7 * x + 0.3 * x.flip(0))
    return 0.7 * F.cross_entropy(phi, y) + 0.3 * F.cross_entropy(phi, y.flip(0))


def output(make: Callable[[Tensor, Tensor], Any]) -> Callable[[], nn.Module]:
    return lambda: Net(output=make)


def with_classifier() -> nn.Module:
    return nn.ModuleDict({"net": Backbone(), "fc": nn.Linear(4, 3)})


MATRIX = torch.tensor([[1.0, -2.0, 0.5], [0.3, 1.0, -1.0], [-0.7, 0.2, 2.0]], dtype=torch.float64)
# name -> (network, the user's step)
MEASURED: dict[str, tuple[Callable[[], nn.Module], Callable[..., Tensor]]] = {
    "tensor": (Net, cross_entropy),
    "tuple": (output(lambda phi, p: (phi, p)), lambda m, x, y: F.cross_entropy(m(x)[0], y)),
    "list, logits last": (output(lambda phi, p: [p, phi]), lambda m, x, y: F.cross_entropy(m(x)[1], y)),
    "dict": (output(lambda phi, p: {"features": p, "out": phi}), lambda m, x, y: F.cross_entropy(m(x)["out"], y)),
    "named tuple": (output(lambda phi, p: Output(p, phi)), lambda m, x, y: F.cross_entropy(m(x).logits, y)),
    "dataclass": (output(lambda phi, p: DataOutput(None, phi)), lambda m, x, y: F.cross_entropy(m(x).logits, y)),
    "namespace": (output(lambda phi, p: SimpleNamespace(logits=phi)), lambda m, x, y: F.cross_entropy(m(x).logits, y)),
    "mapping": (output(lambda phi, p: UserDict(a={"b": phi})), lambda m, x, y: F.cross_entropy(m(x)["a"]["b"], y)),
    "distribution": (
        output(lambda phi, p: torch.distributions.Categorical(logits=phi, validate_args=False)),
        lambda m, x, y: -m(x).log_prob(y).mean(),
    ),
    "log softmax": (output(lambda phi, p: phi.log_softmax(1)), lambda m, x, y: F.nll_loss(m(x), y)),
    "softmax": (output(lambda phi, p: phi.softmax(1)), lambda m, x, y: F.nll_loss(m(x).log(), y)),
    "loss inside the network": (
        output(lambda phi, p: DataOutput(F.cross_entropy(phi, torch.zeros(5, dtype=torch.long)), phi)),
        lambda m, x, y: m(x).loss,
    ),
    "backbone, classifier in the step": (with_classifier, lambda m, x, y: F.cross_entropy(m["fc"](m["net"](x)), y)),
    "two linear layers, the first returned": (lambda: Net(head=FirstOfTwo()), cross_entropy),
    "two linear layers, both returned": (
        output(lambda phi, p: (phi, phi.detach())),
        lambda m, x, y: F.cross_entropy(m(x)[0], y),
    ),
    "the other view is not in the loss": (Net, two_views),
    "numbers read for the log": (Net, with_numbers),
    "label smoothing": (Net, lambda m, x, y: F.cross_entropy(m(x), y, label_smoothing=0.1)),
    "class weights": (Net, lambda m, x, y: F.cross_entropy(m(x), y, MATRIX[0].abs())),
    "softened copy besides": (Net, lambda m, x, y: F.cross_entropy(phi := m(x), y) + (phi / 4).log_softmax(1).mean()),
    "temperature in the loss": (Net, lambda m, x, y: F.cross_entropy(m(x) / 2, y)),
    "margin in the loss": (Net, lambda m, x, y: F.cross_entropy(m(x) - 0.3 * F.one_hot(y, 3), y)),
    "logits added to others": (Net, lambda m, x, y: F.cross_entropy(m(x) + x.mean((1, 2, 3))[:, None] * MATRIX[0], y)),
    "penalty on the logits": (Net, lambda m, x, y: F.cross_entropy(phi := m(x), y) + 1e-2 * phi.square().mean()),
    "mixup": (Net, mixed_up),
    "embedding times prototypes": (Embedding, lambda m, x, y: F.cross_entropy(m(x) @ MATRIX * 2, y)),
    "embedding, linear function": (Embedding, lambda m, x, y: F.cross_entropy(F.linear(m(x), MATRIX), y)),
    "embedding, einsum": (Embedding, lambda m, x, y: F.cross_entropy(torch.einsum("nk,ck->nc", m(x), MATRIX), y)),
    "squared distances to prototypes": (
        Embedding,
        lambda m, x, y: F.cross_entropy(-(m(x)[:, None] - MATRIX).square().sum(2), y),
    ),
    "cosine to prototypes": (
        Embedding,
        lambda m, x, y: F.cross_entropy(5 * F.normalize(m(x)) @ F.normalize(MATRIX).mT, y),
    ),
    "functional classifier in the step": (Backbone, lambda m, x, y: F.cross_entropy(F.linear(m(x), m.head.weight), y)),
    "some logits": (Net, lambda m, x, y: F.cross_entropy(m(x)[:, 1:], y.clamp(max=1))),
    "samples picked": (Net, lambda m, x, y: F.cross_entropy(m(x)[y > 0], y[y > 0])),
    "accuracy besides": (
        Net,
        lambda m, x, y: F.cross_entropy(phi := m(x), y) + 0 * (phi.argmax(1) == y).double().mean(),
    ),
}
REFUSED: dict[str, tuple[Callable[[], nn.Module], Callable[..., Tensor], str]] = {
    "temperature, from a number that was read": (
        Net,
        lambda m, x, y: F.cross_entropy((phi := m(x)) / (2 + 0.1 * phi.max().item()), y),
        r"read out with `.item\(\)`",
    ),
    "mean of two views": (Net, averaged_views, "2 calls of `conv`|one tensor with a row per sample"),
    "contrastive": (Embedding, contrastive, "couples the samples|logits of one sample depend"),
    "distances among samples": (Embedding, lambda m, x, y: torch.cdist(z := m(x), z + 1).mean(), "couple|derivative"),
    "classes": (output(lambda phi, p: phi.argmax(1)), lambda m, x, y: m(x).double().mean(), "depend|derivative|row"),
    "accuracy": (Net, lambda m, x, y: (m(x).argmax(1) == y).double().mean(), "depend|derivative|row"),
    "several numbers": (Net, lambda m, x, y: F.cross_entropy(m(x), y, reduction="none"), r"has shape \(5,\)"),
    "of another network": (
        lambda: nn.ModuleDict({"net": Net(), "other": nn.Linear(2, 3)}),
        lambda m, x, y: F.cross_entropy(m["other"](x.mean((2, 3))), y) + 0 * len(m["net"](x)),
        "it does not depend on it",
    ),
}


def quantities_of(
    build: Callable[[], nn.Module], step: Callable[..., Tensor], mode: Any
) -> tuple[SampleQuantities, nn.Module, str]:
    """The quantities of a second pass, the network and the layer."""
    case = Case("tail", build, classifier=None)
    model, (x, y) = case.model().eval(), case.data()
    method = PooledMethod()
    with ForwardRecorder(model) as recorder:
        for _ in range(2):
            with mode():
                value = step(model, x.clone(), y)
            quantities = method.quantities(recorder.take_pass(value))
    return quantities, model, recorder.layer


each_mode = pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])


@each_mode
@pytest.mark.parametrize("name", MEASURED)
def test_measures_the_loss_of_the_step(name: str, mode: Any) -> None:
    build, step = MEASURED[name]
    quantities, model, layer = quantities_of(build, step, mode)
    trace, flatness = brute_force(model, layer, step, *Case("tail", build, classifier=None).data())
    torch.testing.assert_close(quantities.hessian_trace.mean(), trace, rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(quantities.relative_flatness.mean(), flatness, rtol=1e-9, atol=1e-14)


@each_mode
@pytest.mark.parametrize("name", REFUSED)
def test_refuses_a_loss_that_is_no_sum_over_samples(name: str, mode: Any) -> None:
    build, step, message = REFUSED[name]
    with pytest.raises(UnsupportedTailError, match=message):
        quantities_of(build, step, mode)


def test_names_are_those_of_the_modules_without_wrappers() -> None:
    model = nn.ModuleDict({"_orig_mod": nn.Sequential(nn.Conv2d(2, 3, 1), nn.Linear(3, 3))})
    modules = modules_by_name(model)
    assert list(modules) == ["", "0", "1"]
    require_name(modules, "0", "layer", (nn.Conv2d,))
    with pytest.raises(ValueError, match=r"`layer` must name one of \['0'\]; got '1'"):
        require_name(modules, "1", "layer", (nn.Conv2d,))


PROGRAMS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "scripted": torch.jit.script,
    "traced": lambda model: torch.jit.trace(model, torch.randn(2, 2, 4, 4)),
    "exported": lambda model: torch.export.export(model, (torch.randn(2, 2, 4, 4),)).module(),
}


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_programs_are_refused(program: Callable[[nn.Module], nn.Module]) -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3)).eval()
    assert program_kind(model.modules()) is None
    refuse_programs(model)
    with pytest.raises(UnsupportedTailError, match=r"run step by step; it is a.* graph|it is a .* program"):
        refuse_programs(program(model))
