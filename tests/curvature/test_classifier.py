"""The classifier's own weight against brute force: whatever lies before it and behind it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from recorded import brute_force
from torch import Tensor, nn

from lightning_flatness import (
    ClassifierMethod,
    ClassifierRecorder,
    RecordedPass,
    SampleQuantities,
    UnsupportedTailError,
    measure,
    oracle,
)

N, WIDTH, CLASSES = 6, 5, 3


class Tanh(nn.Module):
    """Something curved, a linear classifier and what follows it; on tokens if the input has three dimensions."""

    def __init__(self, behind: Callable[[Tensor], Tensor] = lambda phi: phi, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.fc, self.behind = nn.Linear(4, WIDTH), nn.Linear(WIDTH, CLASSES, **options), behind
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.behind(self.fc(torch.tanh(self.first(x))))


def data(*positions: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(N, *positions, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(CLASSES, (N,), generator=generator)


def recorded(
    model: nn.Module, x: Tensor, y: Tensor, loss: Callable[..., Tensor] = F.cross_entropy, **options: Any
) -> RecordedPass:
    with ClassifierRecorder(model, **options) as recorder, torch.no_grad():
        return recorder.take_pass(loss(model(x), y))


def quantities(
    model: nn.Module, x: Tensor, y: Tensor, loss: Callable[..., Tensor] = F.cross_entropy
) -> SampleQuantities:
    return ClassifierMethod().quantities(recorded(model, x, y, loss))


def focal(phi: Tensor, y: Tensor) -> Tensor:
    losses = F.cross_entropy(phi, y, reduction="none")
    return ((1 - (-losses).exp()).square() * losses).mean()


BEHIND: dict[str, Callable[[Tensor], Tensor]] = {
    "nothing": lambda phi: phi,
    "temperature": lambda phi: phi / 0.3,
    "prior": lambda phi: phi + torch.tensor([1.0, 0, -2]),
    "cap": lambda phi: 2 * torch.tanh(phi / 2),
    "relu": lambda phi: phi.relu() @ torch.tensor([[1.0, 0.5], [0, 1], [2, -1]]).double(),
    "log softmax": lambda phi: phi.log_softmax(-1),
    "some classes": lambda phi: phi[:, :2],
    "one position": lambda phi: phi[:, :, None, None].flatten(1),
}
LOSSES: dict[str, Callable[..., Tensor]] = {
    "cross-entropy": F.cross_entropy,
    "smoothed": lambda phi, y: F.cross_entropy(phi, y, label_smoothing=0.2),
    "weighted": lambda phi, y: F.cross_entropy(phi, y, torch.tensor([1.0, 3, 0.5])[: phi.shape[1]].double()),
    "binary": lambda phi, y: F.binary_cross_entropy_with_logits(phi, F.one_hot(y, phi.shape[1]).double()),
    "focal": focal,
    "squared error": lambda phi, y: F.mse_loss(phi, F.one_hot(y, phi.shape[1]).double()),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("behind", BEHIND.values(), ids=BEHIND)
def test_trace_and_flatness_equal_brute_force(behind: Callable[[Tensor], Tensor], loss: Callable[..., Tensor]) -> None:
    model, (x, y) = Tanh(behind), data()
    found = quantities(model, x, y % model(x).shape[1], loss)
    trace, kappa = brute_force(model, "fc", lambda net, a, b: loss(net(a), b), x, y % model(x).shape[1])
    assert float(found.hessian_trace.mean()) == pytest.approx(float(trace), rel=1e-9)
    assert float(found.relative_flatness.mean()) == pytest.approx(float(kappa), rel=1e-9)


def test_each_sample_has_its_own_value_in_any_grad_mode() -> None:
    model, (x, y) = Tanh(), data()
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with ClassifierRecorder(model) as recorder, mode():
            found = ClassifierMethod().quantities(recorder.take_pass(F.cross_entropy(model(x), y)), slice(4))
        torch.testing.assert_close(found.hessian_trace, oracle.hessian_trace(model, "fc", x[:4], y[:4]))
        torch.testing.assert_close(found.relative_flatness, oracle.relative_flatness(model, "fc", x[:4], y[:4]))


POSITIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda phi: phi.mean(1),
    "first": lambda phi: phi[:, 0],
    "chosen": lambda phi: phi[torch.arange(N), torch.arange(N) % 4],
    "weighted": lambda phi: (phi * torch.tensor([0.1, 0.2, 0.3, 0.4])[:, None]).sum(1),
}
NO_ROW: dict[str, Callable[[Tensor], Tensor]] = {
    "largest": lambda phi: phi.amax(1),
    "attention": lambda phi: (phi.softmax(1) * phi).sum(1),
    "other samples": lambda phi: phi.mean(1) - phi.mean((0, 1)),
}


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("behind", POSITIONS.values(), ids=POSITIONS)
def test_a_classifier_on_positions_is_one_on_their_weighted_sum(behind: Callable[[Tensor], Tensor], bias: bool) -> None:
    model, (x, y) = Tanh(behind, bias=bias), data(4)
    for mode in (torch.no_grad, torch.inference_mode):
        with ClassifierRecorder(model) as recorder, mode():
            found = ClassifierMethod().quantities(recorder.take_pass(F.cross_entropy(model(x), y)))
        trace, kappa = brute_force(model, "fc", lambda net, a, b: F.cross_entropy(net(a), b), x, y)
        assert float(found.hessian_trace.mean()) == pytest.approx(float(trace), rel=1e-9)
        assert float(found.relative_flatness.mean()) == pytest.approx(float(kappa), rel=1e-9)
        assert found.output_margin is not None


@pytest.mark.parametrize("behind", NO_ROW.values(), ids=NO_ROW)
def test_other_uses_of_positions_are_refused(behind: Callable[[Tensor], Tensor]) -> None:
    record = recorded(Tanh(behind), *data(4))
    with pytest.raises(UnsupportedTailError, match="one row per sample"):
        ClassifierMethod().quantities(record)


def test_the_margin_part_is_the_odds_times_the_squared_gradient() -> None:
    for behind in (BEHIND["nothing"], BEHIND["temperature"], BEHIND["cap"]):
        model, (x, y) = Tanh(behind), data()
        found = quantities(model, x, y)
        for n in range(N):
            loss = F.cross_entropy(model(x[n : n + 1]), y[n : n + 1])
            (gradient,) = torch.autograd.grad(loss, model.fc.weight)
            odds = 1 / (loss.exp() - 1)
            torch.testing.assert_close(found.margin_trace[n], (odds * gradient.square().sum()).detach())
    assert (found.margin_trace <= found.gauss_newton_trace).all()
    assert not torch.allclose(found.gauss_newton_trace, found.hessian_trace)  # behind a cap


def test_scale_free_flatness_is_that_of_the_scaled_predictor() -> None:
    model, (x, y) = Tanh(), data()
    report = measure(model, [(x, y)])
    phi = model(x).detach()
    tau = (phi - phi.mean(1, keepdim=True)).square().mean().sqrt()
    scaled = copy.deepcopy(model)
    with torch.no_grad():
        scaled.fc.weight.div_(tau)
        scaled.fc.bias.div_(tau)
    expected = oracle.relative_flatness(scaled, "fc", x, y).mean().item()
    assert report.scale_free_flatness == pytest.approx(expected, rel=1e-6)
    assert measure(scaled, [(x, y)]).scale_free_flatness == pytest.approx(expected, rel=1e-6)


def test_what_pooled_says_of_the_classifier_is_the_same() -> None:
    """On one network both methods read the same classifier: its own trace, bound, margins and uncertainty."""
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    ).double()
    x, y = torch.randn(5, 1, 4, 4, dtype=torch.float64), torch.arange(5) % 3
    pooled, own = (measure(model, [(x, y)], method=name, per_sample=True) for name in ("pooled", "classifier"))
    for name in ("confidence", "affine_hessian_trace", "head_relative_flatness", "softmax_margin", "margin_bound"):
        torch.testing.assert_close(own.samples[name], pooled.samples[name], rtol=1e-12, atol=0)
    assert own.margins == pytest.approx(pooled.margins)
    torch.testing.assert_close(own.samples["relative_flatness"], own.samples["head_relative_flatness"])


@pytest.mark.parametrize("chunk_bytes", [1, 2**16, 2**26])
def test_chunks_change_nothing_and_sure_predictions_keep_their_digits(chunk_bytes: int) -> None:
    """In float32 the values at logits of 30 are those of float64."""
    model, (x, y) = Tanh(lambda phi: 30 * phi), data()
    exact = quantities(model, x, y)
    record = recorded(model.float(), x.float(), y)
    found = ClassifierMethod(chunk_bytes).quantities(record)
    for name in ("hessian_trace", "relative_flatness", "scaled_flatness"):
        torch.testing.assert_close(getattr(found, name).double(), getattr(exact, name), rtol=1e-3, atol=1e-30)


@pytest.mark.parametrize("scale", [1e-28, 1e18])
def test_numbers_whose_squares_float32_cannot_hold(scale: float) -> None:
    """Small inputs and large weights, or the reverse: the logits are the same."""
    (x, y), weight = data(), torch.randn(3, 4, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    for features, rows in ((scale * x, weight / scale), (x, weight)):
        model = nn.Sequential(nn.Linear(4, 3, bias=False))
        model[0].weight = nn.Parameter(rows.float())
        found = quantities(model, features.float(), y)
        exact = nn.Sequential(nn.Linear(4, 3, bias=False)).double()
        exact[0].weight = nn.Parameter(rows)
        for name, reference in (
            ("hessian_trace", oracle.hessian_trace),
            ("relative_flatness", oracle.relative_flatness),
        ):
            expected = reference(exact, "0", features, y)
            torch.testing.assert_close(getattr(found, name).double(), expected, rtol=1e-4, atol=0)


class Applied(Tanh):
    """What else the weight may do."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        if kind == "shared":
            self.other = nn.Linear(WIDTH, CLASSES)
            self.other.weight = self.fc.weight
            self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        if self.kind == "twice":
            return self.fc(h) + self.fc(h.relu())
        phi = self.fc(h)
        if self.kind == "penalty":
            return phi + self.fc.weight.square().sum()
        return phi + self.other(h) if self.kind == "shared" else phi * phi.mean(0)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("twice", "acts 2 times"), ("shared", "shared"), ("penalty", "weight"), ("coupled", "sum over samples")],
)
def test_what_is_no_single_use_of_the_weight_is_refused(kind: str, reason: str) -> None:
    with pytest.raises(UnsupportedTailError, match=reason):
        ClassifierMethod().quantities(recorded(Applied(kind), *data(), classifier="fc"))


def test_a_gate_is_no_classifier() -> None:
    """What follows the last linear layer takes the features by another way."""
    model = nn.ModuleDict({"first": nn.Linear(4, 3), "gate": nn.Linear(3, 3)}).double()
    x, y = data()
    with ClassifierRecorder(model) as recorder, torch.no_grad():
        h = model["first"](x)
        record = recorder.take_pass(F.cross_entropy(h * model["gate"](h).sigmoid(), y))
    with pytest.raises(UnsupportedTailError, match="must end in its classifier"):
        ClassifierMethod().quantities(record)


def test_numbers_that_are_none_are_named() -> None:
    x, y = data()
    with pytest.raises(ValueError, match="NaN"):
        quantities(Tanh(), x / 0, y)
    with pytest.raises(ValueError, match="chunk_bytes"):
        ClassifierMethod(0)
