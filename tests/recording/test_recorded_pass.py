"""A recorded pass as a value: a function of the convolution's output, and what must not change."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import SUPPORTED, Case
from networks import Net
from recorded import recorded
from torch import nn

from lightning_flatness.errors import GraphError

CASES = {case.name: case for case in SUPPORTED}


@pytest.mark.parametrize("name", ["relu in place", "silu", "residual", "dense block", "conv3d", "conv is classifier"])
def test_it_is_the_network_as_a_function_of_the_map(name: str) -> None:
    case = CASES[name]
    model, (x, _) = case.model().eval(), case.data()
    one_pass = recorded(model, x)
    assert (one_pass.layer, len(one_pass)) == (case.layer, len(x))
    points = one_pass.points()
    features = one_pass.features_at(points)
    torch.testing.assert_close(features, one_pass.classifier.inputs.flatten(1))
    assert torch.equal(one_pass.weight, model.get_submodule(case.layer).weight.flatten(1))
    moved = one_pass.features_at({node: point + 1 for node, point in points.items()})
    assert not torch.equal(moved, features)


def test_its_path_names_the_steps() -> None:
    model, (x, _) = CASES["functional mean"].model().eval(), CASES["functional mean"].data()
    assert recorded(model, x).path == "conv > native_batch_norm > relu_ > mean > addmm > head"


def test_equal_tails_have_equal_signatures_whatever_the_batch() -> None:
    model, (x, _) = CASES["relu"].model().eval(), CASES["relu"].data()
    assert recorded(model, x).signature == recorded(model, x[:2]).signature
    other = CASES["silu"].model().eval()
    assert recorded(model, x).signature != recorded(other, x).signature


REFUSED: dict[str, tuple[str, nn.Module]] = {
    "folded": ("folded", Net(tail=lambda m, h: torch.cat([m.act(m.conv(h))] * 2))),
    "flattened map": ("shape", Net(pool=nn.Identity(), head=nn.Conv2d(4, 3, (5, 4)))),
    "cut off": ("does not depend", Net(tail=lambda m, h: F.relu(torch.from_numpy(m.conv(h).numpy().copy())))),
}


@pytest.mark.parametrize("name", ["folded", "flattened map"])
def test_what_is_no_row_per_sample_is_an_error(name: str) -> None:
    message, model = REFUSED[name]
    one_pass = recorded(Case(name, lambda: model).model().eval(), torch.randn(5, 2, 5, 4, dtype=torch.float64))
    with pytest.raises(GraphError, match=message):
        one_pass.features_at(one_pass.points())
