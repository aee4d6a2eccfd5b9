"""The closed form: precision in float32, every loss against the oracle, empty batches, chunks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from cases import SUPPORTED, Case
from networks import Net, average_and_max, conv2d, residual
from recorded import Measured
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_flatness.functional as LF
from lightning_flatness import oracle
from lightning_flatness.curvature.pooled.closed_form import hessian_trace, relative_flatness, sample_quantities
from lightning_flatness.curvature.pooled.derivatives import PooledDerivatives
from lightning_flatness.losses import as_loss

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "relu": lambda: Net(conv2d(32, inputs=16), head=nn.Linear(32, 10)),
    "residual": lambda: Net(conv2d(32, inputs=32), tail=residual, head=nn.Linear(32, 10)),
    "silu": lambda: Net(conv2d(32, inputs=16), nn.SiLU(), head=nn.Linear(32, 10)),
    "depthwise": lambda: Net(conv2d(32, inputs=32, groups=32), head=nn.Linear(32, 10)),
    "two poolings": lambda: Net(conv2d(32, inputs=16), nn.SiLU(), pool=average_and_max, head=nn.Linear(64, 10)),
}


def derivatives_of(name: str, scale: float) -> PooledDerivatives:
    """Derivatives of a float32 network whose logits have standard deviation `scale`."""
    case = Case(name, NETWORKS[name], (64, 2, 7, 7))
    model, (x, y) = case.model().float().eval(), case.data()
    x = x.float()
    with torch.no_grad():
        spread = model(x).std() / scale
        model.head.weight.div_(spread)
        model.head.bias.div_(spread)
        with Measured(model) as recorder:
            model(x)
            return recorder.derivatives(y)


def assert_precise(value: Tensor, reference: Tensor) -> None:
    assert (value.dtype, reference.dtype) == (torch.float32, torch.float64)
    comparable = reference.abs() > 1e-30
    torch.testing.assert_close(value[comparable].double(), reference[comparable], rtol=1e-4, atol=0)


@pytest.mark.parametrize("scale", [1.0, 4.0, 16.0, 30.0])
@pytest.mark.parametrize("name", NETWORKS)
def test_float32_keeps_its_precision_for_confident_predictions(name: str, scale: float) -> None:
    derivatives = derivatives_of(name, scale)
    value, exact = sample_quantities(derivatives), sample_quantities(derivatives.to(torch.float64))
    assert_precise(value.confidence, exact.confidence)
    assert_precise(value.hessian_trace, exact.hessian_trace)
    assert_precise(value.relative_flatness, exact.relative_flatness)
    assert_precise(value.affine_hessian_trace, exact.affine_hessian_trace)
    assert_precise(value.head_relative_flatness, exact.head_relative_flatness)
    assert_precise(value.margin_bound, exact.margin_bound)


def smoothed(phi: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(phi, y, label_smoothing=0.3)


def weighted(phi: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(phi, y, torch.tensor([0.2, 1.0, 3.0]).to(phi), reduction="sum")


def binary(phi: Tensor, y: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(phi, y, reduction="sum")


def binary_weighted(phi: Tensor, y: Tensor) -> Tensor:
    weights = torch.tensor([0.2, 1.0, 3.0]).to(phi)
    return F.binary_cross_entropy_with_logits(phi, y, weights, pos_weight=weights.flip(0), reduction="sum")


WEIGHTS = torch.tensor([0.2, 1.0, 3.0])
SOFT = torch.tensor([[0.1, 0.7, 0.2], [1.0, 0.0, 0.0], [0.3, 0.3, 0.4], [0.0, 1.0, 0.0], [0.0, 0.5, 0.5]])
# What is given, the same as a function of logits and targets, targets in place of class indices.
LOSSES: dict[str, tuple[object, Callable[[Tensor, Tensor], Tensor], Tensor | None]] = {
    "cross-entropy": ("cross_entropy", F.cross_entropy, None),
    "label smoothing": (nn.CrossEntropyLoss(label_smoothing=0.3), smoothed, None),
    "class weights": (nn.CrossEntropyLoss(WEIGHTS), weighted, None),
    "soft targets": ("cross_entropy", F.cross_entropy, SOFT),
    "labels": ("bce_with_logits", binary, SOFT.round()),
    "weighted labels": (nn.BCEWithLogitsLoss(WEIGHTS, pos_weight=WEIGHTS.flip(0)), binary_weighted, SOFT),
}


@pytest.mark.parametrize(
    "name", [*"relu/silu without norm/channel shuffle/conv is classifier silu/average and cells silu".split("/")]
)
@pytest.mark.parametrize(("given", "function", "target"), LOSSES.values(), ids=LOSSES)
def test_every_loss_equals_the_oracle(
    name: str, given: object, function: Callable[[Tensor, Tensor], Tensor], target: Tensor | None
) -> None:
    case = {case.name: case for case in SUPPORTED}[name]
    model, (x, y) = case.model().eval(), case.data()
    y = y if target is None else target.double()
    with torch.no_grad(), Measured(model, loss=as_loss(given)) as recorder:
        model(x)
        quantities = recorder.quantities(y)
    args = (model, "conv", x, y, function)
    torch.testing.assert_close(quantities.hessian_trace, oracle.hessian_trace(*args), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(quantities.relative_flatness, oracle.relative_flatness(*args), rtol=1e-9, atol=1e-12)
    assert (quantities.affine_hessian_trace <= quantities.margin_bound * (1 + 1e-12)).all()
    if case.name == "relu":
        head = oracle.relative_flatness(model, "head", x, y, function)
        torch.testing.assert_close(quantities.head_relative_flatness, head, rtol=1e-9, atol=1e-12)
        # The bias sees the constant input 1.
        trace = oracle.hessian_trace(model, "head", x, y, function) + quantities.confidence
        torch.testing.assert_close(quantities.affine_hessian_trace, trace, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["average and cells silu", "dense block of two poolings"])
def test_gradients_of_all_features_count(name: str) -> None:
    """`Tr R` is the squared norm of all derivatives of the features by the filters."""
    case = {case.name: case for case in SUPPORTED}[name]
    model, (x, y) = case.model().eval(), case.data()
    with torch.no_grad(), Measured(model) as recorder:
        model(x)
        quantities = recorder.quantities(y)

    def features(weight: Tensor) -> Tensor:
        model.head = nn.Identity()
        return torch.func.functional_call(model, {"conv.weight": weight}, x)

    jacobian = torch.autograd.functional.jacobian(features, model.conv.weight.detach())
    expected = jacobian.square().sum(tuple(range(1, jacobian.dim())))
    torch.testing.assert_close(quantities.feature_squared_norm, expected, rtol=1e-9, atol=0)
    assert quantities.kernel_squared_norm.item() == pytest.approx(model.conv.weight.square().sum().item())


def test_an_empty_batch_has_no_values() -> None:
    empty = sample_quantities(derivatives_of("silu", 1.0).select(slice(0)))
    for name in ("hessian_trace", "relative_flatness", "confidence", "output_margin", "margin_bound"):
        assert getattr(empty, name).shape == (0,)
    assert empty.scaled_flatness.shape[0] == 0


@pytest.mark.parametrize("name", ["silu", "two poolings"])
def test_chunks_do_not_matter(name: str) -> None:
    whole = derivatives_of(name, 1.0).to(torch.float64)
    values = vars(sample_quantities(replace(whole, chunk_bytes=1)))
    for name, reference in vars(sample_quantities(whole)).items():
        if name == "curvature":
            assert values[name] == reference == "hessian"
            continue
        torch.testing.assert_close(values[name], reference, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["relu", "silu", "two poolings"])
def test_one_quantity_alone_is_the_same(name: str) -> None:
    derivatives = derivatives_of(name, 1.0).to(torch.float64)
    quantities = sample_quantities(derivatives)
    torch.testing.assert_close(hessian_trace(derivatives), quantities.hessian_trace, rtol=1e-12, atol=0)
    flatness = torch.cat([quantities.relative_flatness.unsqueeze(1), quantities.scaled_flatness], 1)
    assert torch.equal(relative_flatness(derivatives), flatness)


def test_without_targets_there_are_no_margins() -> None:
    quantities = sample_quantities(replace(derivatives_of("relu", 1.0), target=None))
    assert quantities.output_margin is quantities.softmax_margin is quantities.margin_bound is None
    with pytest.raises(ValueError, match="got no target"):
        sample_quantities(replace(derivatives_of("silu", 1.0), target=None))


def test_every_quantity_of_logits_has_a_gradient() -> None:
    logits, features, head = (torch.randn(shape, dtype=torch.float64) for shape in ((3, 4), (3, 5), (4, 5)))
    assert torch.autograd.gradcheck(LF.head_relative_flatness, (features, logits.requires_grad_(), head))
