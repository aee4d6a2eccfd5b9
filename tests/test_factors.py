"""The small tensors of one batch: precision in float32."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import Case
from networks import Net, conv2d, residual
from torch import Tensor, nn

from lightning_flatness.factors import TailFactors
from lightning_flatness.tap import Tap

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "relu": lambda: Net(conv2d(32, inputs=16), head=nn.Linear(32, 10)),
    "residual": lambda: Net(conv2d(32, inputs=32), tail=residual, head=nn.Linear(32, 10)),
    "silu": lambda: Net(conv2d(32, inputs=16), nn.SiLU(), head=nn.Linear(32, 10)),
    "depthwise": lambda: Net(conv2d(32, inputs=32, groups=32), head=nn.Linear(32, 10)),
}


def tapped(name: str, scale: float) -> TailFactors:
    """Factors of a float32 network whose logits have standard deviation `scale`."""
    case = Case(name, NETWORKS[name], (64, 2, 7, 7))
    model, (x, y) = case.model().float().eval(), case.data()
    x = x.float()
    with torch.no_grad():
        spread = model(x).std() / scale
        model.head.weight.div_(spread)
        model.head.bias.div_(spread)
        with Tap(model) as tap:
            model(x)
            return tap.factors(y)


def assert_precise(value: Tensor, reference: Tensor) -> None:
    assert (value.dtype, reference.dtype) == (torch.float32, torch.float64)
    comparable = reference.abs() > 1e-30
    torch.testing.assert_close(value[comparable].double(), reference[comparable], rtol=1e-4, atol=0)


@pytest.mark.parametrize("scale", [1.0, 4.0, 16.0, 30.0])
@pytest.mark.parametrize("name", NETWORKS)
def test_float32_keeps_its_precision_for_confident_predictions(name: str, scale: float) -> None:
    factors = tapped(name, scale)
    exact = factors.to(torch.float64)
    assert_precise(factors.confidence, exact.confidence)
    assert_precise(factors.hessian_trace, exact.hessian_trace)
    assert_precise(factors.relative_flatness, exact.relative_flatness)
