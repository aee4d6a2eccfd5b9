"""A recorded pass as a value: a function of the convolution's output, up to the loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import SUPPORTED, Case
from networks import Net, applied_twice, conv2d
from recorded import pooled, recorded
from torch import nn

from lightning_flatness import ForwardRecorder
from lightning_flatness.curvature.pooled.certificate import features_at, signature_of
from lightning_flatness.errors import GraphError, UnsupportedTailError

CASES = {case.name: case for case in SUPPORTED}


@pytest.mark.parametrize("name", ["relu in place", "silu", "residual", "dense block", "conv3d", "conv is classifier"])
def test_it_is_the_network_as_a_function_of_the_map(name: str) -> None:
    case = CASES[name]
    model, (x, y) = case.model().eval(), case.data()
    one_pass = recorded(model, x, y)
    assert (one_pass.layer, len(one_pass), one_pass.convolution) == (
        case.layer,
        len(x),
        model.get_submodule(case.layer),
    )
    points, cut = one_pass.points(), pooled(one_pass)
    features = features_at(one_pass, cut, points)
    with torch.no_grad():
        torch.testing.assert_close(model.head(features.detach()) if case.classifier else features, model(x))
    (call,) = one_pass.calls
    assert torch.equal(call.weight, one_pass.convolution.weight.flatten(1))
    moved = features_at(one_pass, cut, {node: point + 1 for node, point in points.items()})
    assert not torch.equal(moved, features)


@pytest.mark.parametrize("name", ["relu", "silu", "residual in place", "log softmax", "hidden layer"])
def test_its_loss_is_that_of_the_step(name: str) -> None:
    case = CASES[name]
    model, (x, y) = case.model().eval(), case.data()
    one_pass = recorded(model, x, y)
    last = one_pass.cuts[-1]
    assert (last.node, last.end) == (one_pass.loss, len(one_pass.graph.operations))
    value = one_pass.graph.replay(one_pass.points(), last.end)[one_pass.loss]
    torch.testing.assert_close(value.detach(), F.cross_entropy(model(x), y).detach(), rtol=1e-12, atol=0)


def test_its_cuts_are_what_all_influence_passes_through() -> None:
    case = Case("skip", lambda: Net(act=lambda z: z.relu() + z))
    model, (x, y) = case.model().eval(), case.data()
    one_pass = recorded(model, x, y)
    names = [one_pass.graph.operations[cut.end - 1].name for cut in one_pass.cuts if cut.end]
    assert names[:3] == ["native_batch_norm", "add", "mean"]  # the activation is no cut
    assert pooled(one_pass).node == one_pass.cuts[3].node


def test_its_path_names_the_steps() -> None:
    model, (x, y) = CASES["functional mean"].model().eval(), CASES["functional mean"].data()
    path = recorded(model, x, y, F.cross_entropy).path
    assert path == "conv > native_batch_norm > relu_ > mean > addmm > _log_softmax > nll_loss_forward"


def test_it_names_a_later_convolution_that_was_passed_over() -> None:
    model, (x, y) = CASES["1x1 convolution as classifier"].model().eval(), CASES["relu"].data()
    assert "name it (`layer='head'`)" in recorded(model, x, y).remedy
    assert recorded(CASES["relu"].model().eval(), x, y).remedy == "Name another convolution (`layer=...`)."


def test_equal_tails_have_equal_signatures_whatever_the_batch() -> None:
    def signature(name: str, n: int | None = None) -> object:
        one_pass = recorded(CASES[name].model().eval(), CASES[name].data()[0][:n])
        return signature_of(one_pass, pooled(one_pass))

    assert signature("relu") == signature("relu", 2)
    assert signature("relu", 1) != signature("relu", 2)  # what a single sample cannot show
    assert signature("relu") != signature("silu")
    assert signature("hidden layer") == signature("temperature")  # the head is no part of it


def test_several_calls_are_several_points() -> None:
    case = Case("twice", lambda: Net(conv2d(inputs=4), tail=applied_twice), classifier=None)
    one_pass = recorded(case.model().eval(), case.data()[0])
    assert len(one_pass.calls) == len(one_pass.points()) == 2


FOLDED = Case("folded", lambda: Net(tail=lambda m, h: torch.cat([m.act(m.conv(h))] * 2)), classifier=None)
FLATTENED = Case("flattened", lambda: Net(pool=nn.Identity(), head=nn.Conv2d(4, 3, (5, 4))), classifier=None)


def test_what_is_no_row_per_sample_is_refused() -> None:
    x = torch.randn(5, 2, 5, 4, dtype=torch.float64)
    one_pass = recorded(FOLDED.model().eval(), x, torch.zeros(10, dtype=torch.long))
    with pytest.raises(UnsupportedTailError, match="one tensor with a row per sample"):
        pooled(one_pass)
    folded = next(cut for cut in one_pass.cuts if len(one_pass.graph.tensor_of(cut.node).shape) == 2)
    with pytest.raises(GraphError, match="folded"):
        features_at(one_pass, folded, one_pass.points())


def test_a_flattened_map_has_its_logits_for_pooled_features() -> None:
    """They mix the filters, which the certificate finds."""
    model, (x, y) = FLATTENED.model().eval(), CASES["relu"].data()
    one_pass = recorded(model, x, y, lambda phi, y: F.cross_entropy(phi.flatten(1), y))
    assert tuple(one_pass.graph.tensor_of(pooled(one_pass).node).shape) == (5, 3, 1, 1)


def binary(phi: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.binary_cross_entropy_with_logits(phi.flatten(1), F.one_hot(y, 3).double())


# What the network returns, the loss, and whether that is given probabilities for logits.
ENDS: dict[str, tuple[Any, Any, bool]] = {
    "logits": (lambda phi, p: phi, F.cross_entropy, False),
    "softmax": (lambda phi, p: phi.softmax(1), F.cross_entropy, True),
    "softmax, reshaped": (
        *(lambda phi, p: phi.softmax(1)[:, None].float(), lambda phi, y: F.cross_entropy(phi.flatten(1), y)),
        True,
    ),
    "sigmoid": (lambda phi, p: phi.sigmoid(), binary, True),
    "logits, binary": (lambda phi, p: phi, binary, False),
    "logarithm of a softmax": (lambda phi, p: phi.softmax(1).log(), F.nll_loss, False),
    "log-softmax": (lambda phi, p: phi.log_softmax(1), F.cross_entropy, False),
    "a gate": (lambda phi, p: phi * phi.sigmoid(), F.cross_entropy, False),
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("end", ENDS)
def test_it_knows_whether_a_loss_of_logits_takes_probabilities(end: str, mode: Any) -> None:
    output, loss, expected = ENDS[end]
    case = Case("end", lambda: Net(output=output))
    model, (x, y) = case.model().eval(), case.data()
    with ForwardRecorder(model) as recorder, mode():
        assert recorder.take_pass(loss(model(x), y)).takes_probabilities is expected
