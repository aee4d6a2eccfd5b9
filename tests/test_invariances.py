"""Which measure survives which rescaling that leaves the network's function as it is; the page quotes the factors."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from recorded import Measured
from torch import Tensor, nn

import lightning_flatness.functional as LF
from lightning_flatness import oracle
from lightning_flatness.metrics.evaluation import Evaluation

PAGE = Path(__file__).parents[1] / "docs" / "concepts" / "flatness.md"
# The key, and the rescalings that the measure survives.
MEASURES = {
    "relative flatness": ("flatness/relative", {"filters", "batch norm"}),
    "channel-wise relative flatness": ("channelwise", {"filters", "batch norm", "input channels"}),
    "Hessian trace": ("flatness/trace", set()),
    "scale-free flatness": ("flatness/scale_free", {"filters", "batch norm", "logits"}),
    "ACEHT": ("flatness/aceht", {"input channels", "batch norm"}),
    "relative flatness of the classifier": ("head", {"input channels", "batch norm"}),
    "margin share": ("flatness/margin_share", set()),
    "mean margin": ("margin/mean", {"filters", "input channels", "batch norm"}),
    "scale-free margin": ("margin/scale_free", {"filters", "input channels", "batch norm", "logits"}),
    "softmax margin": ("margin/softmax_mean", {"filters", "input channels", "batch norm"}),
}


class Network(nn.Module):
    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.conv = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 6, 3, groups=groups)
        self.norm = nn.BatchNorm2d(6, eps=0.0)
        self.head = nn.Linear(6, 3)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.norm(self.conv(F.relu(self.first(x))))).mean((2, 3)))


def spread(n: int) -> Tensor:
    """Factors between 1/4 and 4."""
    return torch.logspace(-2, 2, n, base=2, dtype=torch.float64)


def filters(net: Network) -> None:
    net.conv.weight.mul_(spread(6)[:, None, None, None])
    net.conv.bias.mul_(spread(6))
    net.norm.running_mean.mul_(spread(6))  # a shift and a scale that follow
    net.norm.bias.mul_(spread(6))
    net.head.weight.div_(spread(6))


def channels(net: Network) -> None:
    net.first.weight.div_(spread(4)[:, None, None, None])
    net.first.bias.div_(spread(4))
    net.conv.weight.mul_(spread(4)[None, :, None, None])


def absorbed(net: Network) -> None:
    net.conv.weight.mul_(spread(6)[:, None, None, None])
    net.conv.bias.mul_(spread(6))
    net.norm.running_mean.mul_(spread(6))
    net.norm.running_var.mul_(spread(6).square())


def logits(net: Network) -> None:
    net.head.weight.mul_(10)
    net.head.bias.mul_(10)


RESCALINGS: dict[str, tuple[Callable[[Network], None], bool]] = {  # whether the probabilities stay
    "filters": (filters, True),
    "input channels": (channels, True),
    "batch norm": (absorbed, True),
    "logits": (logits, False),
}


def data(net: Network) -> tuple[Tensor, Tensor]:
    """Samples that the network classifies correctly with a margin of 1/2 at least."""
    x = torch.randn(40, 2, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    net.head.weight.mul_(2 / (net(x) - net(x).mean(0)).std())
    net.head.bias -= net(x).mean(0)  # so that all classes occur
    best = net(x).topk(2)
    sure = best.values[:, 0] - best.values[:, 1] > 0.5
    assert len(best.indices[sure, 0].unique()) == 3
    return x[sure], best.indices[sure, 0]


def channelwise(net: Network, recorder: Measured, y: Tensor) -> Tensor:
    given = recorder.derivatives(y)
    s = given.logits.softmax(1)
    curvature = given.used_head.mT @ (torch.diag_embed(s) - s[:, :, None] * s[:, None]) @ given.used_head
    return LF.channelwise_relative_flatness(net.conv.weight, given.inputs, given.jacobian, curvature, given.geometry)


def measured(net: Network, x: Tensor, y: Tensor) -> dict[str, float]:
    evaluation = Evaluation(torch.device("cpu"))
    with torch.no_grad(), Measured(net) as recorder:
        net(x)
        quantities = recorder.quantities(y)
        net(x)
        by_channel = channelwise(net, recorder, y)
    evaluation.update(quantities)
    values = {key: float(value) for key, value in evaluation.compute().items()}
    return {**values, "head": float(quantities.head_relative_flatness.mean()), "channelwise": float(by_channel.mean())}


@cache
def factors(name: str) -> dict[str, float]:
    """Value after the rescaling by value before, of every measure."""
    rescale, keeps_probabilities = RESCALINGS[name]
    net = Network().double().eval()
    with torch.no_grad():
        x, y = data(net)
        before, phi = measured(net, x, y), net(x)
        rescale(net)
        after = measured(net, x, y)
        torch.testing.assert_close(net(x), phi if keeps_probabilities else 10 * phi, rtol=1e-10, atol=1e-12)
    return {measure: after[key] / before[key] for measure, (key, _) in MEASURES.items()}


@pytest.mark.parametrize("name", RESCALINGS)
def test_what_survives_and_what_the_page_says(name: str) -> None:
    found = factors(name)
    lines = [re.split(r" *\| *", line.strip("| \n")) for line in PAGE.read_text(encoding="utf-8").splitlines()]
    (start,) = [number for number, line in enumerate(lines) if line[1:] == list(RESCALINGS)]
    table = {row[0]: row[1 + list(RESCALINGS).index(name)] for row in lines[start + 2 : start + 2 + len(MEASURES)]}
    same = {measure: abs(factor - 1) < 1e-7 for measure, factor in found.items()}
    assert same == {measure: name in survived for measure, (_, survived) in MEASURES.items()}
    assert table == {measure: "unchanged" if same[measure] else f"{factor:.3g}" for measure, factor in found.items()}


@pytest.mark.parametrize("groups", [1, 2])
def test_channelwise_relative_flatness_equals_its_definition(groups: int) -> None:
    """Blocks of the brute-force Hessian between filters that read the same input channel."""
    net = Network(groups).double().eval()
    with torch.no_grad(), Measured(net) as recorder:
        x, y = data(net)
        recorder.clear()
        net(x)
        value = channelwise(net, recorder, y)
    hessian = oracle.layer_hessian(net, "conv", x, y)
    width = 4 // groups
    hessian = hessian.unflatten(4, (width, 9)).unflatten(2, (width, 9))  # n k i o k i o
    weight = net.conv.weight.detach().flatten(2)
    group = torch.arange(6) // (6 // groups)
    together = (group[:, None] == group).double()
    expected = torch.einsum("kip,lip,kl,nkioljo,ij->n", weight, weight, together, hessian, torch.eye(width).double())
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)
