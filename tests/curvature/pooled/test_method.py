"""The method: one certificate for many passes, a refusal raised once, precision that the network did not have."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import pytest
import torch
from cases import SUPPORTED, UNSUPPORTED, Case
from networks import CosineLinear, RootMeanSquare
from recorded import recorded, required
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_flatness import PooledMethod, RecordedPass, UnsupportedTailError, oracle
from lightning_flatness.curvature.pooled.certificate import certify
from lightning_flatness.curvature.pooled.method import _pooled_features

CASES = {case.name: case for case in (*SUPPORTED, *UNSUPPORTED)}


def one_pass(case: Case) -> RecordedPass:
    model, (x, y) = case.model().eval(), case.data()
    return recorded(model, x, y)


@pytest.mark.parametrize("name", ["relu", "silu", "dense block"])
def test_a_pass_is_a_value_that_can_be_measured_again(name: str) -> None:
    case, method = CASES[name], PooledMethod()
    record = one_pass(case)
    first, second = method.quantities(record), PooledMethod().quantities(record)
    assert torch.equal(first.hessian_trace, second.hessian_trace)
    expected = oracle.hessian_trace(case.model(), case.layer, *case.data())
    torch.testing.assert_close(first.hessian_trace, expected, rtol=1e-9, atol=1e-12)
    part = method.quantities(record, slice(2))
    torch.testing.assert_close(part.hessian_trace, first.hessian_trace[:2], rtol=1e-12, atol=0)


def test_equal_tails_share_a_certificate() -> None:
    method, record = PooledMethod(), one_pass(CASES["relu"])
    other = one_pass(CASES["silu"])
    with mock.patch("lightning_flatness.curvature.pooled.method.certify", wraps=certify) as spy:
        for each, count in ((record, 1), (record, 1), (other, 2), (record, 3)):
            method.quantities(each)
            assert spy.call_count == count


def test_what_depends_on_the_values_is_certified_in_every_pass() -> None:
    method, record = PooledMethod(), one_pass(CASES["top-k pool"])
    with mock.patch("lightning_flatness.curvature.pooled.method.certify", wraps=certify) as spy:
        for count in (2, 3):
            method.quantities(record)
            assert spy.call_count == count


@pytest.mark.parametrize("name", ["average and max", "dense block of two poolings", "pyramid", "2 x 2 cells"])
def test_several_features_of_a_filter_are_certified_once(name: str) -> None:
    method, record = PooledMethod(), one_pass(CASES[name])
    with mock.patch("lightning_flatness.curvature.pooled.method.certify", wraps=certify) as spy:
        method.quantities(record)
        method.quantities(record)
        assert spy.call_count == 1


def test_a_later_tensor_is_tried_where_the_first_is_refused() -> None:
    """With one filter the map itself is a row per sample: too many features, before the pooling makes one of them."""
    method, record = PooledMethod(), one_pass(CASES["many positions of one filter"])
    first, second, *_ = required(_pooled_features(record))
    assert "there are 80 and 80" in certify(record, first).message
    with mock.patch("lightning_flatness.curvature.pooled.method.certify", wraps=certify) as spy:
        method.quantities(record)
        method.quantities(record)
        assert [call.args[1] for call in spy.call_args_list].count(first) == 1
        assert spy.call_args.args[1] == second


def test_the_first_reason_is_the_one_that_is_told() -> None:
    record = one_pass(CASES["flattened large map"])
    assert len(required(_pooled_features(record))) > 1
    with pytest.raises(UnsupportedTailError, match="there are 80 and 320"):
        PooledMethod().quantities(record)


class Waking(nn.Module):
    """Behind the average stand features that become active where the map is a thousand times as large."""

    def __init__(self, features: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.features, self.head = nn.Conv2d(2, 3, 2), features, nn.LazyLinear(3)

    def forward(self, x: Tensor) -> Tensor:
        a = self.conv(x)
        return self.head(torch.cat([a.mean((2, 3)), a.amax((2, 3)), self.features(a.amin((2, 3)) - 1000)], 1))


WAKING: dict[str, Callable[[Tensor], Tensor]] = {
    "one for each filter": F.relu,
    "for some": lambda p: F.relu(p[:, 1:]),
    "all of two filters": lambda p: F.relu(p).cumsum(1),
    "never": lambda p: F.relu(p - 1e9),
}


@pytest.mark.parametrize("name", WAKING)
def test_features_that_become_active_later(name: str) -> None:
    torch.manual_seed(1)
    x, y, method = torch.randn(4, 2, 4, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 0]), PooledMethod()
    model = Waking(WAKING[name]).double().eval()
    model(x)
    for scale in (1, 1e4, 1):
        images = x.abs() * scale
        model.head.weight.data.div_(scale)
        with torch.no_grad():
            model.conv.weight.abs_()
        try:
            value = method.quantities(recorded(model, images, y)).hessian_trace
        except UnsupportedTailError:
            assert (name, scale) == ("all of two filters", 1e4)
        else:
            torch.testing.assert_close(value, oracle.hessian_trace(model, "conv", images, y), rtol=1e-9, atol=0)
        model.head.weight.data.mul_(scale)


class Narrow(nn.Module):
    """Each filter feeds two features; the second one moves only where the map is nearly 0."""

    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.act, self.head = nn.Conv2d(1, 2, 1, bias=False), act, nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        a = self.act(self.conv(x) * torch.tensor([1, 1e5]).to(x))
        return self.head(a.mean(2).transpose(1, 2).flatten(1))


WINDOWS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu6": F.relu6,
    "clamp": lambda z: z.clamp(-1, 5),
    "two relus": lambda z: F.relu(5 - F.relu(z + 1)),
    "relu of abs": lambda z: F.relu(5 - z.abs()),
    "relu of square": lambda z: F.relu(5 - z.square()),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "erf": torch.erf,
    "bell": lambda z: (-z.square()).exp(),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", WINDOWS)
def test_units_that_no_drawn_point_wakes(name: str, dtype: torch.dtype) -> None:
    x, y = torch.full((2, 1, 1, 2), 1e-5, dtype=torch.float64), torch.tensor([0, 1])
    x[1] = 3.0
    model, method = Narrow(WINDOWS[name]).double(), PooledMethod()
    with torch.no_grad():
        model.conv.weight.fill_(1.0)[1] = 0.5
    for images in (x, x.flip(0)):
        expected = oracle.hessian_trace(model.double(), "conv", images, y)
        value = method.quantities(recorded(model.to(dtype), images.to(dtype), y)).hessian_trace
        rounding = {torch.float64: 1e-9, torch.float32: 5e-3}[dtype]
        torch.testing.assert_close(value.double(), expected, rtol=rounding, atol=0)


@pytest.mark.parametrize("name", ["layer norm before pooling", "shared weight"])
def test_a_refusal_is_raised_with_its_path(name: str) -> None:
    record = one_pass(CASES[name])
    with pytest.raises(UnsupportedTailError, match=f"{CASES[name].reason}.*\n  path: conv > "):
        PooledMethod().quantities(record)


def test_wrong_arguments_are_refused_at_once() -> None:
    with pytest.raises(ValueError, match="`chunk_bytes` must be a whole number, at least 1; got 0"):
        PooledMethod(chunk_bytes=0)


def test_logits_in_half_precision_are_computed_anew() -> None:
    case = CASES["relu"]
    model, (x, y) = case.model().bfloat16().eval(), case.data()
    derivatives = PooledMethod().derivatives(recorded(model, x.bfloat16(), y))
    assert derivatives.logits.dtype == derivatives.head.dtype == derivatives.inputs.dtype == torch.float32
    exact = derivatives.features @ derivatives.head.mT + model.head.bias.float()
    torch.testing.assert_close(derivatives.logits, exact)


K, DIM, C = 6, 3, 4


def hidden(width: int, *layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(K, width), *layers, nn.Linear(width, C))


def smoothed(phi: Tensor, y: Tensor) -> Tensor:
    weights = torch.tensor([0.2, 1.0, 3.0, 0.5]).to(phi)
    return F.cross_entropy(phi, y, weights, label_smoothing=0.2, reduction="none").mean()


def labels(phi: Tensor, y: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(phi, F.one_hot(y, C).to(phi))


def focal(phi: Tensor, y: Tensor) -> Tensor:
    each = F.cross_entropy(phi, y, reduction="none")
    return ((1 - (-each).exp()).square() * each).mean()


def squared(phi: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(phi.softmax(1), F.one_hot(y, C).to(phi))


BENT: dict[str, Callable[[], nn.Module]] = {
    "hidden silu": lambda: hidden(5, nn.SiLU()),
    "wide hidden silu": lambda: hidden(9, nn.SiLU()),
    "layer norm": lambda: nn.Sequential(nn.LayerNorm(K), nn.Linear(K, C)),
    "root mean square": lambda: nn.Sequential(RootMeanSquare(), nn.Linear(K, C)),
    "cosine": lambda: CosineLinear(K, C),
    "hidden relu behind a norm": lambda: hidden(7, nn.BatchNorm1d(7), nn.ReLU()),
    "more classes than features": lambda: nn.Sequential(nn.Linear(K, 8), nn.SiLU(), nn.Linear(8, K + 2)),
}
LOSSES = {
    "cross-entropy": F.cross_entropy,
    "smoothed": smoothed,
    "labels": labels,
    "focal": focal,
    "squared": squared,
}


def behind(head: str, act: nn.Module) -> tuple[nn.Module, Tensor, Tensor]:
    """A convolution under global pooling with this head, in float64, and a batch."""
    torch.manual_seed(5)
    pool = nn.AdaptiveAvgPool2d(1), nn.Flatten()
    model = nn.Sequential(nn.Conv2d(DIM, K, 1), act, *pool, BENT[head]()).double().eval()
    return model, torch.randn(5, DIM, 3, 3).double(), torch.randint(C, (5,))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("head", BENT)
def test_curved_heads_equal_brute_force_in_small_groups(head: str, loss: str) -> None:
    if head == "more classes than features" and loss not in ("cross-entropy", "focal"):
        return
    model, x, y = behind(head, nn.SiLU())
    record = recorded(model, x, y, LOSSES[loss])
    hessian, rows = oracle.layer_hessian(model, "0", x, y, LOSSES[loss]), model[0].weight.flatten(1)
    expected = torch.einsum("nkiki->n", hessian), torch.einsum("kd,ld,nkili->n", rows, rows, hessian)
    method = PooledMethod(chunk_bytes=1)
    with mock.patch("lightning_flatness.curvature.pooled.method._HEAD_SIZE", 10**6):
        found = method.quantities(record)
        part = method.quantities(record, slice(3))
    for name, value in zip(("hessian_trace", "relative_flatness"), expected, strict=True):
        torch.testing.assert_close(getattr(found, name), value, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(getattr(part, name), value[:3], rtol=1e-9, atol=1e-12)
    assert found.curvature == "hessian"


@pytest.mark.parametrize("loss", ["cross-entropy", "smoothed", "labels", "focal"])
def test_a_large_curved_head_has_the_gauss_newton_part(loss: str) -> None:
    model, x, y = behind("wide hidden silu", nn.SiLU())
    with mock.patch("lightning_flatness.curvature.pooled.method._HEAD_SIZE", 0.1):
        found = PooledMethod().quantities(recorded(model, x, y, LOSSES[loss]))
    weight, rows, expected = model[0].weight.detach(), model[0].weight.flatten(1), []
    for image, label in zip(x.split(1), y.split(1), strict=True):

        def logits(free: Tensor, image: Tensor = image) -> Tensor:
            return torch.func.functional_call(model, {"0.weight": free}, image)

        jacobian = torch.autograd.functional.jacobian(logits, weight).reshape(C, *rows.shape)
        curvature = torch.autograd.functional.hessian(
            lambda phi, label=label: LOSSES[loss](phi[None], label), model(image)[0]
        )
        matrix = torch.einsum("ckd,ce,elf->kdlf", jacobian, curvature, jacobian)
        expected.append((torch.einsum("kdkd->", matrix), torch.einsum("kd,ld,kili->", rows, rows, matrix)))
    trace, relative = map(torch.stack, zip(*expected, strict=True))
    torch.testing.assert_close(found.hessian_trace, trace, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.relative_flatness, relative, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.gauss_newton_trace, trace, rtol=1e-9, atol=1e-12)
    assert found.curvature == "ggn"
    assert found.scaled_flatness is None


@pytest.mark.parametrize(("width", "expected"), [(11, "hessian"), (12, "ggn")])
def test_the_limit_is_20_times_the_weights_of_the_network(width: int, expected: str) -> None:
    """The features times the weights of the two linear layers are just within the limit, or just beyond it."""
    features = 24
    head = nn.Sequential(nn.Linear(features, width), nn.SiLU(), nn.Linear(width, 2))
    model = nn.Sequential(nn.Conv2d(1, features, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head).eval()
    weights, own = sum(p.numel() for p in model.parameters()), head[0].weight.numel() + head[2].weight.numel()
    assert (features * own > 20 * weights) == (expected == "ggn")
    record = recorded(model, torch.randn(4, 1, 2, 2), torch.tensor([0, 1, 1, 0]))
    assert PooledMethod().quantities(record).curvature == expected
