"""Which method measures which network, why, and that the value is the brute-force one of the layer that is named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import SUPPORTED, UNSUPPORTED, Case
from recorded import brute_force
from torch import Tensor, nn

from lightning_flatness import BothRecorder, UnsupportedTailError, measure, select_method
from lightning_flatness.curvature.methods import METHODS, Choice, common_choice, encoded_choice, method_for


class Transformer(nn.Module):
    """A tiny vision transformer that reads its first token; its convolution makes the patches."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(2, 8, 2, 2)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.block(self.patches(x).flatten(2).mT)[:, 0]))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(16, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x.flatten(2))[0][:, -1])


class Excited(nn.Module):
    """Squeeze and excitation behind the last convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.down, self.up, self.head = nn.Conv2d(2, 4, 3), nn.Linear(4, 2), nn.Linear(2, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = self.conv(x).relu()
        z = z * self.up(self.down(z.mean((2, 3))).relu()).sigmoid()[:, :, None, None]
        return self.head(z.mean((2, 3)))


class ConvNeXt(nn.Module):
    """Depthwise convolution, layer norm, two linear layers on positions, attention pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 2, 3, padding=1, groups=2), nn.LayerNorm(2)
        self.up, self.down, self.head = nn.Linear(2, 8), nn.Linear(8, 2), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.down(F.gelu(self.up(self.norm(self.conv(x).permute(0, 2, 3, 1)))))
        z = x + h.permute(0, 3, 1, 2)
        attention = z.sum(1, keepdim=True).flatten(2).softmax(-1)
        return self.head((z.flatten(2) * attention).sum(-1))


def sequential(*layers: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*layers)


POOL = nn.AdaptiveAvgPool2d(1), nn.Flatten()
# Network, method, layer, and what the reason says.
ARCHITECTURES: dict[str, tuple[Callable[[], nn.Module], str, str, str]] = {
    "perceptron": (
        sequential(nn.Flatten(), nn.Linear(32, 6), nn.GELU(), nn.Linear(6, 3)),
        "classifier",
        "3",
        "model has no convolution",
    ),
    "vision transformer": (Transformer, "classifier", "head", "one filter of `patches`"),
    "recurrent": (Recurrent, "classifier", "head", "model has no convolution"),
    "squeeze and excitation": (Excited, "classifier", "head", "`addmm`, mixes the filters"),
    "convnext": (ConvNeXt, "classifier", "head", "native_layer_norm|permute"),
    "vgg": (
        sequential(
            nn.Conv2d(2, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)
        ),
        "pooled",
        "0",
        "certified",
    ),
    "flattened": (
        sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(16, 3)),
        "pooled",
        "0",
        "certified",
    ),
    "flattened large map": (
        sequential(nn.Conv2d(2, 4, 3), nn.Upsample(scale_factor=4), nn.Flatten(), nn.Linear(256, 3)),
        "classifier",
        "3",
        "up to 32 features for each filter",
    ),
    "fully connected convolution": (
        sequential(nn.Conv2d(2, 4, 3), nn.SiLU(), nn.Conv2d(4, 5, 2), nn.SiLU(), nn.Conv2d(5, 3, 1), nn.Flatten()),
        "classifier",
        "4",
        "mixes the filters",
    ),
    "global average pooling": (
        sequential(nn.Conv2d(2, 4, 3), nn.SiLU(), *POOL, nn.Linear(4, 3)),
        "pooled",
        "0",
        "certified",
    ),
    "no linear layer": (sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), *POOL), "pooled", "0", "certified"),
}


def network(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = build()
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return model.double().eval()


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(5, 2, 4, 4, generator=generator, dtype=torch.float64), torch.arange(5) % 3


def cross_entropy(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def assert_equals_brute_force(report: Any, model: nn.Module, x: Tensor, y: Tensor) -> None:
    trace, kappa = brute_force(model.eval(), report.layer, cross_entropy, x, y)
    assert report.hessian_trace == pytest.approx(float(trace), rel=1e-9)
    assert report.relative_flatness == pytest.approx(float(kappa), rel=1e-9)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_network_gives_a_reading_that_equals_brute_force(name: str) -> None:
    build, method, layer, reason = ARCHITECTURES[name]
    model, (x, y) = network(build), batch()
    with BothRecorder(model) as recorder, torch.no_grad():
        choice = select_method(recorder.take_pass(cross_entropy(model, x, y)))
    report = measure(model, [(x, y)])
    assert (report.method, report.layer, report.reason) == (choice.name, choice.layer, choice.reason)
    assert (choice.name, choice.layer) == (method, layer)
    assert any(part in choice.reason for part in reason.split("|")), choice.reason
    assert_equals_brute_force(report, model, x, y)
    if method == "classifier":
        with pytest.raises(UnsupportedTailError):
            measure(model, [(x, y)], method="pooled")


@pytest.mark.parametrize("case", [case for case in UNSUPPORTED if case.name != "two views of a sample"], ids=str)
def test_what_has_no_closed_form_at_the_convolution_has_one_at_the_classifier(case: Case) -> None:
    model, (x, y) = case.model(), case.data()
    report = measure(model, [(x, y)])
    assert report.method == "classifier"
    assert_equals_brute_force(report, model, x, y)


@pytest.mark.parametrize("case", SUPPORTED[::9], ids=str)
def test_what_is_certified_stays_at_the_convolution(case: Case) -> None:
    report = measure(case.model(), [case.data()])
    assert (report.method, report.layer) == ("pooled", case.layer)


def test_batches_add_up_and_all_have_one_method() -> None:
    model, (x, y) = network(Transformer), batch()
    whole = measure(model, [(x, y)], per_sample=True)
    single = measure(model, [(x[n : n + 1], y[n : n + 1]) for n in range(5)], per_sample=True)
    for name, values in whole.samples.items():
        torch.testing.assert_close(single.samples[name], values, rtol=1e-12, atol=1e-12)
    assert measure(model, [(x, y)], max_samples=3).n_samples == 3


def test_neither_method_is_a_refusal_with_both_reasons() -> None:
    model, (x, y) = network(sequential(nn.Conv2d(2, 3, 3), nn.Softmax(1), *POOL)), batch()
    with pytest.raises(UnsupportedTailError, match=r"(?s)one filter of `0`.*must end in a linear layer"):
        measure(model, [(x, y)])


class Doubled(nn.Module):
    """Changes its input in a way that torch does not see, as a kernel of an extension."""

    def forward(self, x: Tensor) -> Tensor:
        x.numpy()[...] *= 2
        return x


class AlwaysDropped(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5)


@pytest.mark.parametrize(("step", "reason"), [(Doubled, "must give the features"), (AlwaysDropped, "draws random")])
def test_a_pass_that_cannot_be_repeated_is_measured_at_no_other_layer(step: type[nn.Module], reason: str) -> None:
    model, (x, y) = network(sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), step(), *POOL, nn.Linear(3, 3))), batch()
    with pytest.raises(UnsupportedTailError, match=reason):
        measure(model, [(x, y)], verify=False)
    assert measure(model, [(x, y)], method="classifier", verify=False).method == "classifier"


class Strided(nn.Sequential):
    """Its last stages run on a map of 1 x 1, as those of a network for large images do on small ones."""

    def __init__(self) -> None:
        stages = [nn.Conv2d(width, 4, 3, stride=2, padding=1) for width in (2, 4, 4, 4)]
        super().__init__(*(part for stage in stages for part in (stage, nn.ReLU())), *POOL, nn.Linear(4, 3))


def test_the_deepest_convolution_may_run_on_a_single_position() -> None:
    model, (x, y) = network(Strided), batch()
    report = measure(model, [(x, y)])
    assert (report.method, report.layer) == ("pooled", "6")
    assert_equals_brute_force(report, model, x, y)


class Functional(nn.Module):
    """A hidden layer without linear modules."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(3, 6)), nn.Parameter(torch.randn(6, 3))

    def forward(self, p: Tensor) -> Tensor:
        return F.silu(p @ self.first) @ self.second


def test_an_exact_value_of_the_classifier_comes_before_a_part_of_the_convolution(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lightning_flatness.curvature.pooled.method._HEAD_SIZE", 0.1)
    hidden = nn.Sequential(nn.Linear(3, 6), nn.SiLU(), nn.Linear(6, 3))
    for head, method, curvature in ((hidden, "classifier", "hessian"), (Functional(), "pooled", "ggn")):
        model, (x, y) = network(sequential(nn.Conv2d(2, 3, 3), *POOL, head)), batch()
        report = measure(model, [(x, y)], loss=F.cross_entropy)
        assert (report.method, report.curvature) == (method, curvature)
        assert "only its Gauss-Newton part" in report.reason
    assert "The classifier is not measured" in report.reason


def test_a_named_convolution_is_not_replaced() -> None:
    model, (x, y) = network(Excited), batch()
    with pytest.raises(UnsupportedTailError, match="one filter of `conv`"):
        measure(model, [(x, y)], layer="conv")
    assert measure(model, [(x, y)], classifier="head").layer == "head"
    report = measure(model, [(x, y)], method="classifier")
    assert (report.layer, report.classifier, report.reason) == ("head", "head", "")
    assert 'measured by           "classifier"' in str(report)


def test_names_are_checked() -> None:
    model = network(Excited)
    with pytest.raises(ValueError, match=r"must be one of .*'jacobian'\]; got 'hessian'"):
        method_for(model, "hessian")
    with pytest.raises(ValueError, match="measures the classifier, not a convolution"):
        method_for(model, "classifier", layer="conv")
    for method in METHODS[:3]:  # the fourth takes no classifier
        with pytest.raises(ValueError, match=r"`classifier` must name one of .*'head'"):
            method_for(model, method, classifier="tail")


@pytest.mark.parametrize("choice", [Choice("pooled", "", ""), Choice("classifier", "head", "")], ids=lambda c: c.name)
def test_processes_exchange_a_choice_as_a_number(choice: Choice) -> None:
    model = network(Excited)
    code = encoded_choice(choice, model)
    known = common_choice(None, model, 2 * code, 2 * code**2, 2)
    assert known is not None
    assert (known.name, known.layer) == (choice.name, choice.layer)
    assert encoded_choice(None, model) == 0
