"""`measure` against the oracle, on the whole table; and what it owes to its callers."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import SUPPORTED, UNSUPPORTED, Case
from layer_cases import CASES as LAYER_CASES
from layer_cases import gauss_newton, whole_trace
from networks import Net, StandardizedConv
from recorded import brute_force
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_flatness import UnsupportedTailError, measure, oracle

CASES = {case.name: case for case in SUPPORTED}
SOME = [
    *map(CASES.get, ("relu", "silu without norm", "groups silu", "dense block", "global max", "conv3d")),
    *map(CASES.get, ("average and max", "average and cells silu", "dense block of two poolings")),
]


def logits_of(output: Any) -> Tensor:
    if isinstance(output, Tensor | tuple):
        return output if isinstance(output, Tensor) else output[0]
    return output["logits"] if isinstance(output, dict) else output.logits


def in_batches(x: Tensor, y: Tensor, *sizes: int) -> Iterable[tuple[Tensor, Tensor]]:
    return zip(x.split(sizes), y.split(sizes), strict=True)


def assert_same(value: Any, expected: Any, rtol: float) -> None:
    value, expected = (torch.as_tensor(v, dtype=torch.float64) for v in (value, expected))
    torch.testing.assert_close(value, expected, rtol=rtol, atol=0)


@pytest.mark.parametrize("case", SUPPORTED, ids=str)
def test_equals_the_oracle(case: Case) -> None:
    model, (x, y) = case.model(), case.data()
    report = measure(model, in_batches(x, y, 2, len(x) - 2), per_sample=True)
    logits = logits_of(model.eval()(x)).detach()
    rivals = logits.scatter(1, y[:, None], -torch.inf).amax(1)
    expected = {
        "hessian_trace": oracle.hessian_trace(model, case.layer, x, y),
        "relative_flatness": oracle.relative_flatness(model, case.layer, x, y),
        "confidence": 1 - logits.softmax(1).square().sum(1),
        "output_margin": logits.gather(1, y[:, None])[:, 0] - rivals,
    }
    for name, values in expected.items():
        assert_same(report.samples[name], values, rtol=1e-9)
    assert_same(report.hessian_trace, expected["hessian_trace"].mean(), rtol=1e-9)
    assert_same(report.relative_flatness, expected["relative_flatness"].mean(), rtol=1e-9)
    assert_same(report.confidence, expected["confidence"].mean(), rtol=1e-9)
    assert_same(report.margins["mean"], expected["output_margin"].mean(), rtol=1e-9)
    assert report.layer == case.layer
    assert (report.method, report.exact) == ("pooled", True)


@pytest.mark.parametrize("case", SOME, ids=str)
def test_named_layers_give_the_same(case: Case) -> None:
    model, data = case.model(), [case.data()]
    found, named = measure(model, data), measure(model, data, layer=case.layer, classifier=case.classifier)
    assert found.reason
    assert found.to_dict() | {"reason": ""} == named.to_dict()


def test_a_map_of_one_position_must_be_named() -> None:
    """Without a name the last convolution on a larger map is meant, and its tail has a convolution in it."""
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, (5, 4))
    model, (x, y) = Net(conv, norm=False).double(), CASES["relu"].data()
    report = measure(model, [(x, y)], layer="conv", per_sample=True)
    assert_same(report.samples["hessian_trace"], oracle.hessian_trace(model, "conv", x, y), rtol=1e-9)
    with pytest.raises(UnsupportedTailError, match=r"stem\.0"):
        measure(model, [(x, y)], method="pooled")


@pytest.mark.parametrize("case", SOME, ids=str)
def test_batches_and_order_do_not_matter(case: Case) -> None:
    model, (x, y) = case.model(), case.data()
    n = len(x)
    order = torch.arange(n).flip(0)
    whole = measure(model, [(x, y)], per_sample=True)
    single = measure(model, in_batches(x, y, *[1] * n), per_sample=True)
    turned = measure(model, in_batches(x[order], y[order], n - 1, 1), per_sample=True)
    for name, values in whole.samples.items():
        assert_same(single.samples[name], values, rtol=1e-12)
        assert_same(turned.samples[name], values[order], rtol=1e-12)
    for report in (single, turned):
        assert_same(report.hessian_trace, whole.hessian_trace, rtol=1e-12)
        assert_same(report.relative_flatness, whole.relative_flatness, rtol=1e-12)
        assert_same(report.margins["mean"], whole.margins["mean"], rtol=1e-12)


@pytest.mark.parametrize("case", UNSUPPORTED, ids=str)
def test_refuses_what_is_not_exact(case: Case) -> None:
    model, (x, y) = case.model(), case.data()
    with pytest.raises(UnsupportedTailError, match=case.reason):
        measure(model, in_batches(x, y, 2, len(x) - 2), method="pooled")


def test_a_refusal_prints_the_path_to_the_loss() -> None:
    case = next(case for case in UNSUPPORTED if case.name == "layer norm before pooling")
    with pytest.raises(UnsupportedTailError, match=r"path: conv > .*native_layer_norm > .*nll_loss_forward"):
        measure(case.model(), [case.data()], method="pooled")


DATA_DEPENDENT = {
    "gate": lambda: Net(act=lambda z: z * z.mean((1, 2, 3), keepdim=True).clamp(0, 1)),
    "strongest channels": lambda: Net(pool=lambda a: a.mean((2, 3)).topk(3).values, head=nn.Linear(3, 3)),
}


@pytest.mark.parametrize("build", DATA_DEPENDENT.values(), ids=DATA_DEPENDENT)
@pytest.mark.parametrize("sizes", [(1, 2, 2), (2, 3)], ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_wiring_that_depends_on_the_data_is_never_wrong(
    build: Callable[[], Net], seed: int, sizes: tuple[int, ...]
) -> None:
    """Where a gate is shut, or the order of the channels stays, the tail is a plain one: there only."""
    case = Case(f"data-dependent {seed}", build)
    model, (x, y) = case.model(), case.data()
    try:
        report = measure(model, in_batches(x, y, *sizes), method="pooled", per_sample=True)
    except UnsupportedTailError:
        return
    expected = oracle.hessian_trace(model, "conv", x, y)
    torch.testing.assert_close(report.samples["hessian_trace"], expected, rtol=1e-9, atol=1e-20)


def test_max_samples_cuts_in_the_middle_of_a_batch() -> None:
    case = CASES["silu"]
    model, (x, y) = case.model(), case.data()
    expected = measure(model, [(x[:3], y[:3])], per_sample=True)
    report = measure(model, in_batches(x, y, 2, 3), max_samples=3, per_sample=True)
    assert len(report.samples["hessian_trace"]) == 3
    assert_same(report.relative_flatness, expected.relative_flatness, rtol=1e-12)
    endless = measure(model, itertools.cycle([(x, y)]), max_samples=12, per_sample=True)
    assert_same(endless.samples["hessian_trace"][10:], expected.samples["hessian_trace"][:2], rtol=1e-12)


def test_report_reads_well() -> None:
    case = CASES["relu"]
    report = measure(case.model(), [case.data()])
    values = report.to_dict()
    assert values["relative_flatness"] == pytest.approx(report.relative_flatness)
    assert values["hessian_trace"] == pytest.approx(report.hessian_trace)
    assert "conv" in str(report)
    assert f"{report.relative_flatness:.3g}"[:4] in str(report)


def rescaled(model: Net, scale: Tensor) -> Net:
    """Every output filter times its own scale, undone by the batch norm or, without one, the classifier."""
    with torch.no_grad():
        model.conv.weight.mul_(scale[:, None, None, None])
        model.conv.bias.mul_(scale)
        if isinstance(model.norm, nn.BatchNorm2d):
            model.norm.running_mean.mul_(scale)
            model.norm.running_var.add_(model.norm.eps).mul_(scale.square()).sub_(model.norm.eps)
        else:
            model.head.weight.div_(scale)
    return model


@pytest.mark.parametrize("name", ["relu", "relu without norm", "prelu", "silu", "channel shuffle"])
def test_rescaled_filters_change_the_trace_and_nothing_else(name: str) -> None:
    case = CASES[name]
    model, data = case.model(), [case.data()]
    before = measure(model, data)
    after = measure(rescaled(model, torch.tensor([0.3, 0.8, 1.7, 4.0], dtype=torch.float64)), data)
    assert_same(after.relative_flatness, before.relative_flatness, rtol=1e-6)
    assert_same(after.margins["mean"], before.margins["mean"], rtol=1e-9)
    assert abs(after.hessian_trace / before.hessian_trace - 1) > 0.01


def state_of(model: nn.Module) -> list[Any]:
    """Everything about a model and its surroundings that a measurement could disturb."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    random_state = np.random.get_state()
    return [
        [(name, module.training, [len(getattr(module, h)) for h in hooks]) for name, module in model.named_modules()],
        [(name, p.requires_grad, p.grad, p._version) for name, p in model.named_parameters()],
        {name: value.tolist() for name, value in model.state_dict().items()},
        [torch.get_rng_state().tolist(), random.getstate(), random_state[1].tolist(), random_state[2]],
        [torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_float32_matmul_precision()],
    ]


def consume_random_numbers(output: Tensor, _: Tensor) -> Tensor:
    torch.rand(3), np.random.rand(3), random.random()
    return output


def partly_trained(case: Case) -> nn.Module:
    """A model in the middle of training: mixed modes, gradients, a frozen parameter, a hook of its user."""
    model = case.model()
    model.norm.eval()
    x, y = case.data()
    F.cross_entropy(model(x), y).backward()
    model.head.bias.requires_grad_(False)
    model.pool.register_forward_hook(lambda *_: None)
    model.output = consume_random_numbers
    return model


@pytest.mark.parametrize("name", ["relu in place without norm", "silu"])
def test_leaves_everything_as_it_was(name: str) -> None:
    model = partly_trained(CASES[name])
    loader = DataLoader(TensorDataset(*CASES[name].data()), batch_size=2, shuffle=True)
    before = state_of(model)
    measure(model, loader)
    assert state_of(model) == before


@pytest.mark.parametrize("where", ["stem", "conv", "act", "head", "loader", "target"])
def test_leaves_everything_as_it_was_after_an_error(where: str) -> None:
    """Whatever fails in the second batch, before, in or behind the tail."""
    case = CASES["relu in place"]
    model, (x, y) = partly_trained(case), case.data()
    calls = itertools.count()

    def fail(*_: Any) -> None:
        if next(calls) == 1:
            raise KeyError("broken")

    if isinstance(getattr(model, where, None), nn.Module):
        getattr(model, where).register_forward_hook(fail)

    def batches() -> Iterable[tuple[Tensor, Tensor]]:
        yield x[:3], y[:3]
        if where == "loader":
            raise KeyError("broken")
        yield x[3:], y[3:] + (9 if where == "target" else 0)

    before = state_of(model)
    with pytest.raises(ValueError if where == "target" else KeyError):
        measure(model, batches())
    assert state_of(model) == before


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_same_in_every_grad_mode(mode: Any) -> None:
    case = CASES["silu in place without norm"]
    expected, model = measure(case.model(), [case.data()]), case.model()
    with mode():
        x, y = case.data()
        report = measure(model, [(x.clone(), y.clone())])
    assert report.to_dict() == expected.to_dict()


def without_a_number(x: Tensor) -> Tensor:
    return x.index_fill(0, torch.tensor([2]), torch.nan)


BAD_BATCHES: dict[str, tuple[Callable[[Tensor, Tensor], Any], str]] = {
    "no batch": (lambda x, y: [], "at least one sample that the loss depends on; got none"),
    "no targets": (lambda x, y: [x], "target"),
    "inputs only": (lambda x, y: [(x,)], "target"),
    "too few targets": (lambda x, y: [(x, y[:3])], r"\b3\b"),
    "targets too large": (lambda x, y: [(x, y + 3)], r"\b[345]\b"),
    "targets negative": (lambda x, y: [(x, y - 1)], "-1"),
    "targets missing": (lambda x, y: [(x, y), (x, y[:0])], "got .*0"),
    "targets one-hot": (lambda x, y: [(x, F.one_hot(y, 3))], "5, 3"),
    "not a number": (lambda x, y: [(without_a_number(x), y)], "NaN|finite"),
    "not a number, later": (lambda x, y: [(x, y), (without_a_number(x), y)], "NaN|finite"),
}
BAD_ARGUMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown layer": ({"layer": "conv9"}, r"conv9.*stem\.0|stem\.0.*conv9"),
    "layer of another kind": ({"layer": "head"}, r"head.*stem\.0|stem\.0.*head"),
    "unknown classifier": ({"classifier": "fc"}, "fc.*head|head.*fc"),
    "classifier of another kind": ({"classifier": "norm"}, "norm.*head|head.*norm"),
    "no samples wanted": ({"max_samples": 0}, r"max_samples.*\b0\b"),
    "half a sample wanted": ({"max_samples": 2.5}, r"max_samples.*2\.5"),
    "several layers": ({"layer": ["conv", "head"]}, r"one convolution; got \['conv', 'head'\].*jacobian"),
    "all layers": ({"layer": "all"}, "one convolution; got 'all'.*jacobian"),
    "jacobian of no layer": ({"method": "jacobian"}, "needs the layers.*`layer=None`"),
    "jacobian of nothing": ({"method": "jacobian", "layer": []}, r"needs the layers.*`layer=\[\]`"),
    "jacobian of a norm": ({"method": "jacobian", "layer": ["norm"]}, "norm.*head|head.*norm"),
    "jacobian and classifier": ({"method": "jacobian", "layer": "head", "classifier": "head"}, "classifier='head'"),
    "no memory": ({"chunk_bytes": 0}, r"chunk_bytes.*\b0\b"),
    "memory in megabytes": ({"chunk_bytes": 0.5}, r"chunk_bytes.*\b0\.5\b"),
}


@pytest.mark.parametrize(("batches", "message"), BAD_BATCHES.values(), ids=BAD_BATCHES)
def test_bad_batches_are_named(batches: Callable[[Tensor, Tensor], Any], message: str) -> None:
    case = CASES["relu"]
    with pytest.raises(ValueError, match=message):
        measure(case.model(), batches(*case.data()))


@pytest.mark.parametrize(("arguments", "message"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    case = CASES["relu"]
    with pytest.raises(ValueError, match=message):
        measure(case.model(), [case.data()], **arguments)


def test_a_convolution_that_changes_its_weight_is_refused() -> None:
    model = Case("standardized", lambda: Net(StandardizedConv(3, 4, 3))).model()
    with pytest.raises(UnsupportedTailError, match=r"`conv` must convolve with its own `weight`"):
        measure(model, [CASES["relu"].data()], layer="conv")


def test_a_map_of_logits_needs_a_loss_and_has_no_pooled_features() -> None:
    model, (x, y) = Case("map", lambda: Net(head=nn.Conv2d(4, 3, 1), pool=nn.Identity())).model(), CASES["relu"].data()
    with pytest.raises(ValueError, match=r"must have shape \(n, c\); got \(5, 3, 5, 4\).*`loss=lambda"):
        measure(model, [(x, y)])
    with pytest.raises(UnsupportedTailError, match="one tensor with a row per sample"):
        measure(model, [(x, y)], loss=lambda phi, y: F.cross_entropy(phi, y[:, None, None].expand(-1, 5, 4)))


def test_a_layer_whose_tail_has_another_convolution_is_refused() -> None:
    case = CASES["relu"]
    with pytest.raises(UnsupportedTailError, match="conv"):
        measure(case.model(), [case.data()], layer="stem.0")


def focal(phi: Tensor, y: Tensor) -> Tensor:
    each = F.cross_entropy(phi, y, reduction="none")
    return ((1 - (-each).exp()).square() * each).mean()


@pytest.mark.parametrize("max_samples", [None, 4])
def test_negative_samples_stay_in_the_sums(max_samples: int | None) -> None:
    model = Net(act=nn.SiLU(), head=nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))).double().eval()
    x, y = torch.randn(9, 2, 5, 4, dtype=torch.float64), torch.arange(9) % 3
    report = measure(model, [(x[:5], y[:5]), (x[5:], y[5:])], loss=focal, per_sample=True, max_samples=max_samples)
    for name in ("hessian_trace", "relative_flatness"):
        values = report.samples[name]
        assert values.min() < 0 < values.max()
        assert getattr(report, name) == pytest.approx(float(values.mean()), rel=1e-12)
    n = len(report.samples["hessian_trace"])
    trace, kappa = brute_force(model, "conv", lambda model, x, y: focal(model(x), y), x[:n], y[:n])
    assert report.hessian_trace == pytest.approx(float(trace), rel=1e-9)
    assert report.relative_flatness == pytest.approx(float(kappa), rel=1e-9)


LENET, TOKENS = (next(case for case in LAYER_CASES if case.name == name) for name in ("LeNet", "attention"))


def test_every_layer_and_the_network_equal_brute_force() -> None:
    model, (x, y) = LENET.model(), LENET.data()
    report = measure(model, in_batches(x, y, 2, len(x) - 2), layer="all", method="jacobian", per_sample=True)
    assert (report.exact, report.curvature, report.left_out) == (True, "hessian", ())
    assert (report.relative_flatness, report.hessian_trace, report.layer) == (None, None, "all")
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    assert list(report.layers) == names
    assert len(names) > 2
    for name, layer in report.layers.items():
        trace, relative = (of(model, name, x, y) for of in (oracle.hessian_trace, oracle.relative_flatness))
        assert_same(layer.hessian_trace, trace.mean(), rtol=1e-9)
        assert_same(layer.relative_flatness, relative.mean(), rtol=1e-9)
        assert_same(report.samples[f"hessian_trace/{name}"], trace, rtol=1e-9)
        assert f"{name} " in str(report)
    assert_same(report.network_trace, whole_trace(model, x, y).mean(), rtol=1e-9)
    assert_same(report.samples["network_trace"].mean(), report.network_trace, rtol=1e-9)
    assert_same(report.margins["negative"], (model(x).argmax(1) != y).double().mean(), rtol=1e-12)
    assert "whole network" in str(report)
    assert "Gauss-Newton" not in str(report)
    assert any("jacobian" in sentence for sentence in report.assumed)


def test_a_gauss_newton_value_is_labelled() -> None:
    model, (x, y) = TOKENS.model(), TOKENS.data()
    report = measure(model, [(x, y)], layer="qkv", method="jacobian")
    trace, relative = gauss_newton(model, "qkv.weight", x, y)
    assert_same(report.hessian_trace, trace.mean(), rtol=1e-9)
    assert_same(report.relative_flatness, relative.mean(), rtol=1e-9)
    assert (report.exact, report.curvature, report.layers["qkv"].curvature) == (False, "ggn", "ggn")
    assert str(report).count("Gauss-Newton") == 2
    assert (report.network_trace, list(report.layers)) == (None, ["qkv"])
    several = measure(model, [(x, y)], layer=["qkv", "head", "qkv"], method="jacobian")
    assert several.layers["qkv"] == report.layers["qkv"]
    assert several.to_dict()["layers"]["head"]["curvature"] == "hessian"


def test_fused_attention_runs_by_steps() -> None:
    case = next(case for case in LAYER_CASES if case.name == "encoder layer")
    model, (x, y) = case.model(), case.data()
    assert torch.backends.mha.get_fastpath_enabled()
    report = measure(model, [(x, y)], layer="layer.linear1", method="jacobian")
    trace, _ = gauss_newton(model, "layer.linear1.weight", x, y)
    assert_same(report.hessian_trace, trace.mean(), rtol=1e-9)
    assert torch.backends.mha.get_fastpath_enabled()


def test_an_estimate_is_labelled_and_has_its_standard_error() -> None:
    model, (x, y) = LENET.model(), LENET.data()
    batches = list(in_batches(x, y, 2, len(x) - 2))
    report = measure(model, batches, layer="all", method="jacobian", estimate=True, per_sample=True)
    exact = measure(model, batches, layer="all", method="jacobian")
    assert (report.exact, report.curvature, exact.network_standard_error) == (False, "hessian", None)
    values = report.samples["network_trace"]
    assert_same(report.network_standard_error, values.std() / len(values) ** 0.5, rtol=1e-9)
    assert f"{report.network_trace:.6g} ± " in str(report)
    for name, layer in report.layers.items():
        assert exact.layers[name].standard_errors is None
        kappa = report.samples[f"relative_flatness/{name}"]
        assert_same(layer.standard_errors[0], kappa.std() / len(kappa) ** 0.5, rtol=1e-9)
    assert report.margins == pytest.approx(exact.margins)
    with pytest.raises(ValueError, match="`estimate=True` needs"):
        measure(model, batches, estimate=True)


def test_the_report_of_one_layer_is_the_same_by_every_method() -> None:
    case = CASES["relu"]
    model, data = case.model(), [case.data()]
    closed, general = (measure(model, data, layer="conv", method=method) for method in ("pooled", "jacobian"))
    for report in (closed, general):
        assert_same(report.relative_flatness, closed.relative_flatness, rtol=1e-9)
        assert_same(report.hessian_trace, closed.hessian_trace, rtol=1e-9)
        assert report.layers["conv"].relative_flatness == report.relative_flatness
    assert_same(general.confidence, closed.confidence, rtol=1e-9)
    assert {name: general.margins[name] for name in general.margins} == pytest.approx(
        {name: value for name, value in closed.margins.items() if name != "scale_free"}
    )


def test_batch_norm_in_the_name_of_all_is_measured_and_left_as_it_was() -> None:
    model, data = partly_trained(CASES["relu"]), [CASES["relu"].data()]
    before = state_of(model)
    assert measure(model, data, layer="all", method="jacobian").left_out == ()
    assert state_of(model) == before
