"""What is certified, where it stops, and that neither depends on luck."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import MAP, SUPPORTED, UNSUPPORTED, Case
from networks import Net, channel_norm, conv2d, dense, shuffled, squeezed_and_excited
from recorded import Measured, certified, recorded
from torch import Tensor, nn

from lightning_flatness import oracle
from lightning_flatness.curvature.pooled.certificate import Certificate
from lightning_flatness.errors import NonFiniteError, UnsupportedTailError

CASES = {case.name: case for case in (*SUPPORTED, *UNSUPPORTED)}
STRAIGHT = "relu,relu in place,relu6,leaky relu,hardtanh,identity,prelu,saturated relu6".split(",")
CURVED = "hardswish,silu,gelu,gelu tanh,elu,mish,softplus,tanh,squared relu,written by hand".split(",")
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def certificate_of(case: Case, dtype: torch.dtype = torch.float64, n: int | None = None) -> Certificate:
    return certified(recorded(case.model().to(dtype).eval(), case.data()[0][:n].to(dtype)))


@each_dtype
@pytest.mark.parametrize("n", [1, None], ids=["one sample", "a batch"])
@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("relu", [0, 1, 2, 3]),
        ("silu", [0, 1, 2, 3]),
        ("global max", [0, 1, 2, 3]),
        ("inception", [2, 3, 4, 5]),
        ("dense block", [3, 4, 5, 6]),
        ("dense block silu", [3, 4, 5, 6]),
        ("channel shuffle", [0, 2, 1, 3]),
        ("channel shuffle and cat", [0, 2]),
        ("conv is classifier", [0, 1, 2]),
        ("depthwise", [0, 1, 2, 3]),
    ],
)
def test_which_filter_feeds_which_feature(name: str, channels: list[int], n: int | None, dtype: torch.dtype) -> None:
    certificate = certificate_of(CASES[name], dtype, n)
    assert certificate.feature_index.tolist() == channels
    assert len(certificate.inactive) == 0


@pytest.mark.parametrize("name", [*STRAIGHT, *CURVED])
def test_whether_the_tail_is_curved(name: str) -> None:
    assert certificate_of(CASES[name]).has_second_derivative == (name in CURVED)


def with_dead_channels(model: Net) -> Net:
    """Channels that batch norm, activation or classifier ignore."""
    with torch.no_grad():
        model.norm.weight[0] = 0
        model.norm.bias[1] = -100
        model.head.weight[:, 2] = 0
    return model


@each_dtype
@pytest.mark.parametrize("act", [nn.ReLU(), nn.SiLU(), shuffled])
def test_dead_channels(act: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    case = Case("dead", lambda: Net(act=act))
    model, (x, y) = with_dead_channels(case.model()).to(dtype).eval(), case.data()
    certificate = certified(recorded(model, x.to(dtype)))
    assert certificate.inactive.tolist() == ([0] if act is shuffled else [0, 1])
    assert sorted(certificate.feature_index.tolist()) == [0, 1, 2, 3]
    with Measured(model) as recorder, torch.no_grad():
        model(x.to(dtype))
        quantities = recorder.quantities(y)
    expected = oracle.hessian_trace(model.double(), "conv", x, y)
    torch.testing.assert_close(
        quantities.hessian_trace.double(), expected, rtol=1e-3 if dtype == torch.float32 else 1e-9, atol=1e-9
    )


def test_all_dead() -> None:
    """A map that the features do not depend on anywhere is flat; one that is rounded is not (see STEPS)."""
    case = Case("all dead", lambda: Net(norm=False))
    model, (x, y) = case.model().eval(), case.data()
    nn.init.constant_(model.conv.bias, -1000)
    with Measured(model) as recorder, torch.no_grad():
        model(x)
        quantities = recorder.quantities(y)
    assert not quantities.hessian_trace.any()
    assert not quantities.relative_flatness.any()


GATE = nn.Sequential(nn.Linear(4, 4), nn.Sigmoid())
STEPS: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "gate": (r"`addmm`, mixes.*\(5, 4\)", lambda: Net(tail=squeezed_and_excited, gate=GATE)),
    "weak gate": (
        "`mean`, mixes|positions",
        lambda: Net(act=lambda z: z * (1 + 1e-3 * z.mean((1, 2, 3), True).tanh())),
    ),
    "layer norm": ("`permute`, mixes|`native_layer_norm`, mixes", lambda: Net(act=channel_norm)),
    "neighbouring channels": ("`add`, mixes", lambda: Net(act=lambda z: F.relu(z + z.roll(1, 1)))),
    "residual of the map": (
        "`mixes|mixes",
        lambda: Net(tail=mixed, mix=conv2d(4, 1, 4)),
    ),
    "batch mean": ("`sub`, mixes", lambda: Net(act=lambda z: z - z.mean(0, keepdim=True))),
    "flatten": ("there are 80 and 320", CASES["flattened large map"].build),
    "mixed beside a plain feature": ("`roll`, mixes|`add`, mixes", CASES["average and neighbour's maximum"].build),
    "pool then curve": ("positions", lambda: Net(act=nn.Sequential(nn.AvgPool2d(2), nn.GELU()))),
    "dropout": ("random", lambda: Net(act=lambda z: F.dropout(z, 0.5))),
    "no derivative": ("no derivative", lambda: Net(act=torch.round)),
    "whole numbers": ("none was found|no derivative", lambda: Net(act=lambda z: z.round().long().to(z.dtype))),
}


def mixed(m: Net, h: Tensor) -> Tensor:
    z = m.conv(h)
    return F.relu(z + F.conv2d(z, m.mix.weight))


@pytest.mark.parametrize("name", STEPS)
def test_names_the_step_that_breaks_the_claim(name: str) -> None:
    message, build = STEPS[name]
    case = Case(name, build, classifier=None)
    for dtype in (torch.float64, torch.float32):
        with pytest.raises(UnsupportedTailError, match=message) as caught:
            certificate_of(case, dtype)
        assert "path: conv > " in str(caught.value)
        assert "layer=" in str(caught.value)


HIDDEN: dict[str, Callable[[Tensor], Tensor]] = {
    "channels mix where small": lambda p: p - p.amax(1, keepdim=True).clamp(max=0.3),
    "norm clipped": lambda p: p / p.norm(dim=1, keepdim=True).clamp(min=2),
    "gate shut": lambda p: p * p.mean(1, keepdim=True).clamp(0, 1),
    "sorted": lambda p: p.sort(1).values,
    "where": lambda p: torch.where(p.abs().amax(1, keepdim=True) < 0.5, p.flip(1) + p, p),
}


@pytest.mark.parametrize("sizes", [[4, 1], [1, 2, 2]], ids=str)
@pytest.mark.parametrize("name", HIDDEN)
def test_wiring_that_shows_only_at_some_values_is_never_wrong(name: str, sizes: list[int]) -> None:
    """What a random point cannot show: exact where it is separate for these samples, else refused."""
    for seed in range(2):
        case = Case(f"{name} {seed}", lambda: Net(pool=lambda a: HIDDEN[name](a.mean((2, 3)))))
        model, (x, y) = case.model().eval(), case.data()
        expected = oracle.hessian_trace(model, "conv", x, y).split(sizes)
        with Measured(model) as recorder:
            for images, targets, trace in zip(x.split(sizes), y.split(sizes), expected, strict=True):
                with torch.no_grad():
                    model(images)
                try:
                    value = recorder.quantities(targets).hessian_trace
                except UnsupportedTailError:
                    break
                torch.testing.assert_close(value, trace, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("where", "first"),
    [("input", "the output of `conv`"), ("conv", "the output of `conv`"), ("head", r"a tensor of shape \(5, 3\)")],
)
def test_not_a_number(where: str, first: str) -> None:
    case = CASES["relu without norm"]
    model, (x, y) = case.model().eval(), case.data()
    if where == "input":
        x[2, 0, 0, 0] = torch.nan
    else:
        nn.init.constant_(model.get_submodule(where).bias, torch.nan)
    with Measured(model) as recorder, torch.no_grad():
        model(x)
        with pytest.raises(NonFiniteError, match=f"the loss is NaN, and {first} is the first"):
            recorder.quantities(y)


def test_is_the_same_every_time_and_draws_nothing() -> None:
    case = CASES["channel shuffle"]
    one_pass = recorded(case.model().eval(), case.data()[0])
    state = torch.get_rng_state()
    first, second = certified(one_pass), certified(one_pass)
    assert torch.equal(torch.get_rng_state(), state)
    assert (first.signature, first.call, first.has_second_derivative) == (
        second.signature,
        second.call,
        second.has_second_derivative,
    )
    assert torch.equal(first.feature_index, second.feature_index)


def signature(act: Callable[[Tensor], Tensor], **options: Any) -> Any:
    case = Case("signature", lambda: Net(act=act, **options))
    return certificate_of(case).signature


def test_signature_tells_tails_apart() -> None:
    assert signature(F.relu) == signature(nn.ReLU())
    assert signature(F.relu) != signature(F.silu)
    assert signature(F.relu) != signature(F.relu, norm=False)
    assert signature(F.relu) != signature(lambda z: F.relu(shuffled(z)))


def test_wide_layers_in_float32() -> None:
    """Hundreds of channels over six decades of scale, behind a concatenation."""
    torch.manual_seed(0)
    model = Net(conv2d(256, 1), tail=dense, wide_norm=nn.BatchNorm2d(259), head=nn.Linear(259, 10)).eval()
    nn.init.uniform_(model.wide_norm.weight, 0.5, 1).data.mul_(torch.logspace(-3, 3, 259))
    certificate = certified(recorded(model, torch.randn(3, 2, 5, 4)))
    assert certificate.feature_index.tolist() == list(range(3, 259))
    assert len(certificate.inactive) == 0


SAMPLES = 64


def by_sample(even: Tensor, odd: Tensor) -> Tensor:
    return torch.stack([even, odd]).repeat(SAMPLES // 2, *[1] * even.dim())


def adapted(h: Tensor) -> Tensor:
    """Every second sample's filters are mixed."""
    matrices = by_sample(torch.eye(4).to(h), torch.ones(4, 4).to(h))
    return (h.unsqueeze(1) * matrices[..., None, None]).sum(2).relu()


def halves(h: Tensor) -> Tensor:
    first, second = h.relu().chunk(2)
    return torch.cat([first, second + first])


# (after the convolution, whether the closed form holds)
CONNECTED: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "the mean of the batch": (lambda h: h + h.mean(0), False),
    "the sample before": (lambda h: h + h.roll(1, 0), False),
    "the second sample before": (lambda h: h + h.roll(2, 0), False),
    "half a batch before": (lambda h: h + h.roll(SAMPLES // 2, 0), False),
    "halves of the batch": (halves, False),
    "pairs": (lambda h: h.unflatten(0, (-1, 2)).mean(1).repeat_interleave(2, 0), False),
    "the last sample": (lambda h: h + h[-1:], False),
    "a matrix for each sample": (adapted, False),
    "a factor for each sample": (lambda h: h * by_sample(h.new_ones(4, 1, 1), h.new_zeros(4, 1, 1)), True),
    "an index for each sample": (lambda h: h.relu()[torch.arange(len(h))], True),
}


@pytest.mark.parametrize("name", CONNECTED)
def test_samples_that_are_connected_in_a_large_batch(name: str) -> None:
    step, exact = CONNECTED[name]
    x = torch.randn(SAMPLES, *MAP[1:], dtype=torch.float64)
    one_pass = recorded(Net(tail=lambda net, x: step(net.conv(x))).double().eval(), x)
    if exact:
        assert certified(one_pass).feature_index.tolist() == [0, 1, 2, 3]
    else:
        with pytest.raises(UnsupportedTailError):
            certified(one_pass)


def test_a_later_batch_that_is_wired_otherwise_is_refused() -> None:
    """The first batch's matrices, one for each sample, leave the filters apart; the second's mix them."""
    matrices = torch.eye(4).double().expand(6, 4, 4).clone()
    model = Net(tail=lambda net, x: (net.conv(x).unsqueeze(1) * matrices.clone()[..., None, None]).sum(2).relu())
    model, x = model.double().eval(), torch.randn(6, *MAP[1:], dtype=torch.float64)
    with Measured(model) as recorder, torch.no_grad():
        model(x)
        recorder.quantities()
        matrices[3] = 1
        model(x)
        with pytest.raises(UnsupportedTailError):
            recorder.quantities()


def test_the_captured_values_stay_what_they_are() -> None:
    model, (x, _) = CASES["residual in place"].model().eval(), CASES["residual in place"].data()
    one_pass = recorded(model, x)
    before = [capture.value.clone() for capture in one_pass.graph.captures._captures]
    certified(one_pass)
    assert all(map(torch.equal, before, (capture.value for capture in one_pass.graph.captures._captures)))
