"""`spectrum` against the oracle; what it owes to its callers."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import SUPPORTED, UNSUPPORTED
from recorded import gauss_newton_part
from torch import Tensor, nn

from lightning_flatness import LayerSpectrum, UnsupportedTailError, measure, oracle, spectrum
from lightning_flatness.functional import soft_rank

CASES = {case.name: case for case in SUPPORTED}


def squared_error(phi: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(phi.softmax(1), F.one_hot(y, 3).to(phi))


def found(name: str, samples: int = 5, **arguments: Any) -> tuple[LayerSpectrum, Tensor]:
    """The spectrum, and the eigenvalues by brute force in descending order."""
    case = CASES[name]
    model, (x, y) = case.model(), [tensor[:samples] for tensor in case.data()]
    loss = arguments.get("loss", F.cross_entropy)
    hessian = oracle.layer_hessian(model, case.layer, x, y, loss).mean(0).detach()
    matrix = hessian.reshape(hessian.shape[:2].numel(), -1)
    values = torch.linalg.eigvalsh((matrix + matrix.mT) / 2).flip(0)
    return spectrum(model, zip(x.split(2), y.split(2), strict=True), **arguments), values


# Name -> (number of samples, loss, matrix)
TABLE = [
    ("relu", 5, F.cross_entropy, "dual"),
    ("groups", 5, F.cross_entropy, "dual"),
    ("depthwise", 5, F.cross_entropy, "dual"),
    ("1x1", 5, F.cross_entropy, "dual"),
    ("1x1 stride", 5, squared_error, "primal"),
    ("relu", 1, F.cross_entropy, "dual"),
    ("silu", 5, F.cross_entropy, "primal"),
    ("silu", 5, squared_error, "primal"),
    ("relu", 5, squared_error, "dual"),
    ("curved hidden layer", 5, F.cross_entropy, "dual"),
]


@pytest.mark.parametrize(("name", "samples", "loss", "matrix"), TABLE)
def test_equals_the_oracle(name: str, samples: int, loss: Any, matrix: str) -> None:
    result, values = found(name, samples, loss=loss)
    largest = float(values.abs().max())
    known = result.eigenvalues
    assert (result.matrix, result.n_samples, result.n_weights) == (matrix, samples, len(values))
    padded = [F.pad(v, (0, max(len(known), len(values)) - len(v))).sort().values for v in (known, values)]
    torch.testing.assert_close(*padded, rtol=0, atol=1e-9 * largest)
    assert result.trace == pytest.approx(float(values.sum()), rel=1e-9, abs=1e-9 * largest)
    assert result.trace == pytest.approx(float(known.sum()), rel=1e-9, abs=1e-9 * largest)
    assert result.spectral_norm == pytest.approx(largest, rel=1e-9)
    assert result.frobenius_norm == pytest.approx(float(values.norm()), rel=1e-9)
    assert result.numerical_rank <= result.rank_bound
    assert result.participation <= result.numerical_rank * (1 + 1e-9)


def flattened() -> nn.Module:
    torch.manual_seed(0)
    body = nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(18, 6), nn.ReLU(), nn.Linear(6, 3)
    return nn.Sequential(*body).double()


@pytest.mark.parametrize(("layer", "method"), [("0", "jacobian"), ("3", "auto"), ("5", "auto")])
@pytest.mark.parametrize("batches", [list, iter], ids=["list", "generator"])
def test_any_layer_by_the_gradients_of_samples(layer: str, method: Any, batches: Any) -> None:
    model, (x, y) = flattened(), CASES["relu"].data()
    hessian = oracle.layer_hessian(model, layer, x, y).mean(0).detach()
    values = torch.linalg.eigvalsh(hessian.reshape(hessian.shape[:2].numel(), -1))
    result = spectrum(
        model, batches([(x[:3], y[:3]), (x[3:], y[3:])]), layer=layer, method=method, loss="cross_entropy"
    )
    assert (result.layer, result.method, result.curvature, result.n_samples) == (layer, "jacobian", "hessian", 5)
    torch.testing.assert_close(result.eigenvalues, values.flip(0)[:10], rtol=0, atol=1e-9 * float(values.max()))
    assert result.trace == pytest.approx(float(values.sum()), rel=1e-9)
    assert result.numerical_rank <= result.rank_bound == 10
    assert result.assumed == ()


def test_a_large_curved_head_leaves_the_gauss_newton_part(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["curved hidden layer"]
    exact = spectrum(case.model(), [case.data()])
    monkeypatch.setattr("lightning_flatness.curvature.pooled.method._HEAD_SIZE", 0)
    result = spectrum(case.model(), [case.data()])
    assert (exact.curvature, result.curvature) == ("hessian", "ggn")
    assert result.trace == pytest.approx(float(result.eigenvalues.sum()), rel=1e-9)
    assert result.trace != pytest.approx(exact.trace, rel=1e-3)


def test_both_methods_give_the_same() -> None:
    case = CASES["residual"]
    pooled, rows = (spectrum(case.model(), [case.data()], layer="conv", method=m) for m in ("auto", "jacobian"))
    assert (pooled.method, rows.method) == ("pooled", "jacobian")
    torch.testing.assert_close(pooled.eigenvalues, rows.eigenvalues)
    assert (pooled.rank_bound, pooled.n_weights) == (rows.rank_bound, rows.n_weights)


def test_behind_a_curved_network_the_label_is_the_gauss_newton_part() -> None:
    model, (x, y) = nn.Sequential(flattened()[0], nn.SiLU(), *flattened()[2:]), CASES["relu"].data()
    result = spectrum(model, [(x, y)], layer="0", method="jacobian", max_samples=4)
    assert (result.curvature, result.n_samples) == ("ggn", 4)
    assert "method                jacobian: Gauss-Newton part of the Hessian" in str(result)
    assert result.plot().axes[0].get_title(loc="left") == "Spectrum of 0: Gauss-Newton part of the Hessian"


def test_the_soft_rank_of_a_positive_hessian_is_its_own() -> None:
    result, values = found("relu")
    assert result.soft_rank == pytest.approx(float(soft_rank(values)), rel=1e-9)


def test_the_soft_rank_of_an_indefinite_one_is_that_of_its_gauss_newton_part() -> None:
    result, values = found("silu")
    case = CASES["silu"]
    model, (x, _) = case.model().eval(), case.data()
    part = gauss_newton_part(model, "conv", x)
    assert values.min() < -1e-3 * values.max()
    assert result.soft_rank == pytest.approx(float(soft_rank(torch.linalg.eigvalsh(part))), rel=1e-6)
    assert found("relu", loss=squared_error)[0].soft_rank is None  # the loss itself is not convex


def test_large_layers_have_leading_eigenvalues() -> None:
    whole, values = found("silu")
    result, _ = found("silu", dense_size=10, leading=4)
    largest = values[values.abs().argsort(descending=True)][:4].sort(descending=True).values
    torch.testing.assert_close(result.eigenvalues, largest, rtol=1e-9, atol=0)
    assert (result.matrix, result.trace) == ("leading", whole.trace)
    assert result.spectral_norm == pytest.approx(whole.spectral_norm, rel=1e-9)
    unknown = result.numerical_rank, result.frobenius_norm, result.participation, result.soft_rank
    assert unknown == (None, None, None, None)
    assert "numerical rank        unknown" in str(result)
    assert result.plot().axes[0].texts[0].get_text().endswith("104 of 108 are unknown")


def test_it_is_measured_on_the_same_samples_as_by_measure() -> None:
    case = CASES["relu"]
    model, (x, y) = case.model(), case.data()
    before, state = torch.get_rng_state(), {name: value.clone() for name, value in model.state_dict().items()}
    result = spectrum(model, [(x, y)], max_samples=3)
    report = measure(model, [(x, y)], max_samples=3)
    assert (result.layer, result.n_samples, result.assumed) == (report.layer, 3, report.assumed)
    assert result.trace == pytest.approx(report.hessian_trace)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.training


def test_its_forms() -> None:
    result, _ = found("silu")
    assert json.loads(json.dumps(result.to_dict()))["numerical_rank"] == result.numerical_rank
    lines = str(result).splitlines()
    assert lines[0] == "layer                 conv"
    assert lines[8] == f"numerical rank        {result.numerical_rank}  (at most {result.rank_bound})"
    figure = result.plot()
    figure.savefig(io.BytesIO())
    shown = sum(bar.get_height() for axes in figure.axes for bar in axes.patches)
    assert (len(figure.axes), shown) == (2, result.numerical_rank)


def test_no_curvature_at_all() -> None:
    """A loss that is linear in the logits."""
    result, _ = found("relu", loss=lambda phi, y: phi.gather(1, y[:, None]).mean())
    assert (result.trace, result.numerical_rank, result.participation, result.soft_rank) == (0, 0, 0, 0)
    with pytest.raises(ValueError, match="finite and not zero"):
        result.plot()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dense_size": 0}, "`dense_size` must be a whole number"),
        ({"leading": 2.5}, "`leading` must be a whole number"),
        ({"layer": "norm"}, "`layer` must name one of"),
        ({"method": "exact"}, "`method` must be"),
        ({"method": "jacobian"}, "`layer` must name a layer"),
        ({"loss": "hinge"}, "`loss` must be"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    case = CASES["relu"]
    with pytest.raises(ValueError, match=message):
        spectrum(case.model(), [case.data()], **arguments)


def test_nothing_to_measure() -> None:
    case = CASES["relu"]
    with pytest.raises(ValueError, match="at least one sample"):
        spectrum(case.model(), [])
    unsupported = next(case for case in UNSUPPORTED if case.name == "squeeze and excitation")
    with pytest.raises(UnsupportedTailError, match="mixes"):
        spectrum(unsupported.model(), [unsupported.data()])


def test_it_is_a_value() -> None:
    result, _ = found("relu")
    assert replace(result, layer="other").layer == "other"
    with pytest.raises(AttributeError):
        result.layer = "other"
