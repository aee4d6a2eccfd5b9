"""The table of operators: what it calls piecewise linear is, by its second derivative."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_flatness.recording.dispatch import GraphTracer
from lightning_flatness.recording.operators import OPERATORS, Trait, traits

STRAIGHT: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "leaky relu": F.leaky_relu,
    "hardtanh": F.hardtanh,
    "clamp": lambda z: z.clamp(-0.3, 0.4),
    "abs": torch.abs,
    "threshold": lambda z: F.threshold(z, 0.1, 0.0),
    "max pool": lambda z: F.max_pool2d(z, 2),
    "average pool": lambda z: F.avg_pool2d(z, 2),
    "batch norm": lambda z: F.batch_norm(z, torch.zeros(4).double(), torch.ones(4).double()),
    "product with a constant": lambda z: z * 3.0,
    "quotient by a constant": lambda z: z / 3.0,
    "layer": lambda z: F.linear(z, torch.ones(2, 4).double()),
    "rearranged": lambda z: z.transpose(1, 2).reshape(2, -1).unsqueeze(0),
}
CURVED: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "tanh": torch.tanh,
    "square": torch.square,
    "product with itself": lambda z: z * z,
    "reciprocal": lambda z: 1 / (z + 9),
    "layer norm": lambda z: F.layer_norm(z, (4,)),
}


def second_derivative(function: Callable[[Tensor], Tensor], z: Tensor) -> float:
    z = z.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(z).sum(), z, create_graph=True)
    if not gradient.requires_grad:
        return 0.0
    (second,) = torch.autograd.grad((gradient * torch.rand_like(gradient)).sum(), z, materialize_grads=True)
    return float(second.abs().max())


def is_piecewise_linear(function: Callable[[Tensor], Tensor], z: Tensor) -> bool:
    tracer = GraphTracer()
    tracer.start()
    tracer.graph.add_input(z)
    function(z)
    tracer.stop()
    return all(operation.is_piecewise_linear for operation in tracer.graph.operations)


@pytest.mark.parametrize("name", [*STRAIGHT, *CURVED])
def test_piecewise_linear_is_what_has_no_second_derivative(name: str) -> None:
    function, z = {**STRAIGHT, **CURVED}[name], torch.randn(2, 4, 4, 4, dtype=torch.float64)
    assert is_piecewise_linear(function, z) == (name in STRAIGHT)
    assert (second_derivative(function, z) == 0) == (name in STRAIGHT)


def test_no_operator_is_both_straight_and_curved() -> None:
    straight = Trait.PIECEWISE_LINEAR | Trait.LINEAR_IN_EACH | Trait.LINEAR_IN_FIRST
    assert not [name for name, known in OPERATORS.items() if Trait.POINTWISE in known and known & straight]
    assert all(hasattr(torch.ops.aten, name) for name in OPERATORS)


def test_in_place_variants_share_a_row_and_unknown_operators_have_no_trait() -> None:
    assert traits("relu_") == traits("relu") == Trait.PIECEWISE_LINEAR | Trait.BY_SAMPLE
    assert traits("_log_softmax") == Trait.LOG_SOFTMAX
    assert traits("linalg_inv") == Trait.NONE
