"""Every layer and the whole network against dense Hessians and Jacobians."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from layer_cases import CASES, CLASSES, Case, Loss, Twice, gauss_newton, measured, recorded, whole_trace
from recorded import Measured
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lightning_flatness.functional as LF
from lightning_flatness import JacobianMethod, UnsupportedTailError, oracle
from lightning_flatness.functional import standard_error

NAMED = {case.name: case for case in CASES}
EXACT, CURVED = [case for case in CASES if not case.ggn], [case for case in CASES if case.ggn]
LABELS = (torch.arange(5 * CLASSES).reshape(5, CLASSES) % 2).double()
WEIGHTS = torch.tensor([0.2, 1.0, 3.0]).double()


def focal(phi: Tensor, y: Tensor) -> Tensor:
    log = phi.log_softmax(1).gather(1, y[:, None])[:, 0]
    return -((1 - log.exp()) ** 2 * log).mean()


# Each maps logits and class indices to a mean over samples.
LOSSES: dict[str, Loss] = {
    "cross-entropy": F.cross_entropy,
    "label smoothing": lambda phi, y: F.cross_entropy(phi, y, label_smoothing=0.2),
    "class weights": lambda phi, y: F.cross_entropy(phi, y, WEIGHTS, reduction="none").mean(),
    "temperature": lambda phi, y: F.cross_entropy(phi / 3, y),
    "binary": lambda phi, y: F.binary_cross_entropy_with_logits(phi, F.one_hot(y, CLASSES).double()),
    "squared error": lambda phi, y: F.mse_loss(phi, F.one_hot(y, CLASSES).double()),
    "squared error of probabilities": lambda phi, y: F.mse_loss(phi.softmax(1), F.one_hot(y, CLASSES).double()),
    "focal": focal,
}
close = {"rtol": 1e-9, "atol": 1e-12}


@pytest.mark.parametrize("case", EXACT, ids=str)
def test_every_layer_and_the_whole_network_equal_brute_force(case: Case) -> None:
    model, (x, y) = case.model(), case.data()
    found = measured(model, x, y)
    assert (found.left_out, found.network_curvature) == ((), "hessian")
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.modules.conv._ConvNd)]
    assert set(found.by_layer) == set(layers)
    for name, quantities in found.by_layer.items():
        assert quantities.curvature == "hessian", name
        torch.testing.assert_close(quantities.hessian_trace, oracle.hessian_trace(model, name, x, y), **close)
        torch.testing.assert_close(quantities.relative_flatness, oracle.relative_flatness(model, name, x, y), **close)
    torch.testing.assert_close(found.network, whole_trace(model, x, y), **close)


@pytest.mark.parametrize("case", CURVED, ids=str)
def test_behind_curved_steps_it_is_the_gauss_newton_part(case: Case) -> None:
    model, (x, y) = case.model(), case.data()
    found = measured(model, x, y)
    assert {name for name, kind in found.curvature.items() if kind == "ggn"} == set(case.ggn)
    assert (found.left_out, found.network_curvature) == ((), "ggn")
    for name, quantities in found.by_layer.items():
        trace, relative = gauss_newton(model, f"{name}.weight", x, y)
        torch.testing.assert_close(quantities.hessian_trace, trace, **close)
        torch.testing.assert_close(quantities.relative_flatness, relative, **close)
    total = sum(gauss_newton(model, name, x, y)[0] for name, _ in model.named_parameters())
    torch.testing.assert_close(found.network, total, **close)


@pytest.mark.parametrize("name", ["SiLU", "LayerNorm", "squeeze and excitation", "attention"])
def test_the_gauss_newton_part_equals_that_of_another_package(name: str) -> None:
    curvlinops = pytest.importorskip("curvlinops", reason="curvlinops is not installed; `make bench` installs it")
    model, (x, y) = NAMED[name].model(), NAMED[name].data()
    found, total = measured(model, x, y), 0.0
    for parameter_name, parameter in model.named_parameters():
        data = [(x, y)]
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernel has no forward derivative
            operator = curvlinops.GGNLinearOperator(
                model, nn.CrossEntropyLoss(), [parameter], data, check_deterministic=False
            )
            trace = float((operator @ torch.eye(parameter.numel(), dtype=torch.float64)).trace())
        total += trace
        layer = parameter_name.removesuffix(".weight")
        if layer in found.by_layer:
            assert float(found.by_layer[layer].hessian_trace.mean()) == pytest.approx(trace, rel=1e-6)
    assert float(found.network.mean()) == pytest.approx(total, rel=1e-6)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_inference_mode_gives_the_same_labels(case: Case) -> None:
    """Operators that are made of others are recorded as they are there, such as `conv2d`."""
    model, (x, y) = case.model(), case.data()
    expected = measured(model, x, y)
    with torch.inference_mode():
        found = measured(model, x, y)
    assert (found.curvature, found.network_curvature) == (expected.curvature, expected.network_curvature)
    for name, own in expected.by_layer.items():
        torch.testing.assert_close(found.by_layer[name].relative_flatness, own.relative_flatness, **close)
    assert found.left_out == ()
    torch.testing.assert_close(found.network, expected.network, **close)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss(name: str) -> None:
    case, loss = NAMED["residual, max-pool, groups, PReLU"], LOSSES[name]
    model, (x, y) = case.model(), case.data()
    found = measured(model, x, y, loss)
    assert found.network_curvature == "hessian"
    torch.testing.assert_close(found.network, whole_trace(model, x, y, loss), **close)
    for layer, quantities in found.by_layer.items():
        expected = oracle.relative_flatness(model, layer, x, y, loss)
        torch.testing.assert_close(quantities.relative_flatness, expected, **close)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_groups_of_samples_and_single_layers_give_the_same(case: Case) -> None:
    model, (x, y) = case.model(), case.data()
    whole = measured(model, x, y)
    torch.testing.assert_close(measured(model, x, y, chunk_bytes=1).network, whole.network, **close)
    for name, quantities in list(whole.by_layer.items())[:2]:
        alone = measured(model, x, y, layers=(name,), chunk_bytes=1)
        assert (alone.network, set(alone.by_layer)) == (None, {name})
        torch.testing.assert_close(alone.by_layer[name].relative_flatness, quantities.relative_flatness, **close)


def test_a_pooled_tail_gives_the_closed_form() -> None:
    model, (x, y) = NAMED["pooled"].model(), NAMED["pooled"].data()
    with Measured(model) as recorder, torch.no_grad():
        model(x)
        pooled = recorder.quantities(y)
    found = measured(model, x, y, layers=("0",)).by_layer["0"]
    for name in ("hessian_trace", "relative_flatness", "confidence", "output_margin", "softmax_margin"):
        torch.testing.assert_close(getattr(found, name).double(), getattr(pooled, name), rtol=1e-12, atol=1e-14)


def test_float32_keeps_its_precision_where_the_network_is_sure() -> None:
    case = NAMED["residual, max-pool, groups, PReLU"]
    model, (x, _) = case.model(), case.data()
    model[-1].weight.data.mul_(60)
    y = model(x).argmax(1)
    exact = measured(model, x, y)
    found = measured(model.float(), x.float(), y)
    assert float(next(iter(exact.by_layer.values())).confidence.min()) < 1e-9
    torch.testing.assert_close(found.network, exact.network, rtol=1e-3, atol=0)
    assert abs(float(found.network.mean() / exact.network.mean()) - 1) < 1e-4


def test_samples_that_the_loss_leaves_out_and_a_part_of_them() -> None:
    model, (x, y) = NAMED["LeNet"].model(), NAMED["LeNet"].data()
    full = measured(model, x, y).network
    ignored = y.index_fill(0, torch.tensor([1]), -100)
    torch.testing.assert_close(measured(model, x, ignored).network, full[[0, 2, 3, 4]], **close)
    part = JacobianMethod().quantities(recorded(model, x, y), slice(2))
    assert len(part) == 2
    torch.testing.assert_close(part.network, full[:2], **close)


@pytest.fixture(autouse=True)
def attention_step_by_step() -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(before)


def test_fused_attention_is_refused_with_a_remedy() -> None:
    torch.backends.mha.set_fastpath_enabled(True)
    case = NAMED["encoder layer"]
    with pytest.raises(UnsupportedTailError, match="set_fastpath_enabled"):
        measured(case.model(), *case.data())


class Coupled(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        h = super().forward(x)
        return h + 0.1 * h.roll(1, 0)


class Alone(nn.Module):
    """A parameter that is used as a matrix of its own, and one that is used in no way that is covered."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.matrix = nn.Linear(4, 4), nn.Parameter(torch.randn(4, CLASSES))
        self.power = nn.Parameter(torch.rand(()) + 1)

    def forward(self, x: Tensor) -> Tensor:
        return (self.first(x.flatten(1)).abs() + 1) ** self.power @ self.matrix


def test_what_is_left_out_is_named() -> None:
    model, x, y = Alone().double(), torch.randn(5, 4).double(), torch.arange(5) % 3
    found = measured(model, x, y)
    assert found.left_out == ("power",)
    names = ("first.weight", "first.bias", "matrix")
    expected = sum(gauss_newton(model, name, x, y)[0] for name in names)
    torch.testing.assert_close(found.network, expected, **close)


def with_penalty(model: nn.Module) -> Loss:
    return lambda phi, y: F.cross_entropy(phi, y) + sum(value.square().sum() for value in model.parameters())


@pytest.mark.parametrize(
    ("build", "loss", "reason"),
    [
        (lambda: Coupled(nn.Flatten(), nn.Linear(16, CLASSES)), None, "depend"),
        (lambda: mlp_in_training(), None, "training mode"),
        (lambda: Twice(False), with_penalty, "penalty"),
    ],
)
def test_what_has_no_values_of_single_samples_is_refused(build, loss, reason) -> None:
    model, (x, y) = build().double(), NAMED["LeNet"].data()
    with pytest.raises(UnsupportedTailError, match=reason):
        measured(model, x, y, loss(model) if loss else F.cross_entropy)


def mlp_in_training() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 4), nn.BatchNorm1d(4), nn.Linear(4, CLASSES)).train()


def test_the_longest_factors_give_a_lower_bound_for_every_sample() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7)).double()
    x, y = torch.randn(1000, 6).double(), torch.arange(1000) % 7
    bounds = [measured(model, x, y, longest=count) for count in (1, 3, 6)]
    values = [measured(model, x, y), *bounds[::-1]]
    for more, fewer in pairwise(values):
        for layer in ("0", "2"):
            for name in ("hessian_trace", "relative_flatness"):
                upper, lower = (getattr(each.by_layer[layer], name) for each in (more, fewer))
                assert (lower <= upper * (1 + 1e-12)).all()
                assert (lower >= 0).all()
    torch.testing.assert_close(values[1].network, values[0].network)  # six rows are all
    assert [each.is_lower_bound for each in values] == [False, True, True, True]
    with pytest.raises(ValueError, match="longest"):
        JacobianMethod(estimate=True, longest=2)


@pytest.mark.parametrize("loss", ["cross-entropy", "squared error of probabilities"])
def test_an_estimate_has_no_bias_and_states_its_error(loss: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, CLASSES)).double()
    x, y, draws = torch.randn(64, 6).double(), torch.arange(64) % CLASSES, 200
    exact = measured(model, x, y, LOSSES[loss])
    state, again = torch.get_rng_state(), recorded(model, x.repeat(draws, 1), y.repeat(draws), LOSSES[loss])
    found = JacobianMethod(estimate=True).quantities(again)  # the signs of every sample are its own
    for layer, quantities in exact.by_layer.items():
        for name in ("hessian_trace", "relative_flatness"):
            values = getattr(found.by_layer[layer], name).reshape(draws, 64)
            means, expected = values.mean(1), getattr(quantities, name).mean()
            assert (means.mean() - expected).abs() <= 3 * means.std() / draws**0.5 + 1e-12
            stated = torch.stack([standard_error(each) for each in values])
            assert stated.square().mean().sqrt() > 0.85 * means.std() > 0
    assert (found.is_estimate, exact.is_estimate) == (True, False)
    assert torch.equal(state, torch.get_rng_state())


def test_a_loss_behind_a_narrow_tensor_is_differentiated_there() -> None:
    """All influence passes through two numbers; the three logits behind them are curved."""
    x, y = NAMED["LeNet"].data()
    torch.manual_seed(0)
    layers = nn.Linear(x[0].numel(), 4), nn.ReLU(), nn.Linear(4, 2), nn.Tanh(), nn.Linear(2, CLASSES)
    model = nn.Sequential(nn.Flatten(), *layers).double()
    found = measured(model, x, y, focal, ["1", "3"]).by_layer
    for name, quantities in found.items():
        torch.testing.assert_close(quantities.hessian_trace, oracle.hessian_trace(model, name, x, y, focal), **close)
        assert quantities.curvature == "hessian"
    inputs = model[:3](x).square().sum(1)
    torch.testing.assert_close(found["3"].confidence * inputs, found["3"].hessian_trace, **close)


class Largest(TorchDispatchMode):
    """How many bytes the largest memory of a result has."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = (t.untyped_storage().nbytes() for t in tree_leaves(result) if isinstance(t, Tensor))
        self.size = max(self.size, *sizes, 0)
        return result


@pytest.mark.parametrize(("layers", "estimate"), [(("0",), False), (("2",), False), ("all", True)])
def test_the_factor_of_many_classes_is_in_memory_for_one_sample_at_a_time(layers: Any, estimate: bool) -> None:
    classes, n = 1000, 2
    model, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, classes)).double(), torch.randn(n, 3).double()
    record = recorded(model, x, torch.arange(n), layers=layers)
    with Largest() as largest:
        found = JacobianMethod(chunk_bytes=2**20, estimate=estimate).quantities(record)
    assert largest.size <= 8 * classes**2
    if layers == ("2",):
        expected = LF.confidence(model(x)) * model[:2](x).square().sum(1)
        torch.testing.assert_close(found.by_layer["2"].hessian_trace, expected.detach())
    if layers == ("0",):
        expected = oracle.hessian_trace(model, "0", x, torch.arange(n))
        torch.testing.assert_close(found.by_layer["0"].hessian_trace, expected)
