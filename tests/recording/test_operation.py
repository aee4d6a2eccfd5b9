"""Operations and the trees of their arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_flatness.errors import GraphError
from lightning_flatness.recording.operation import (
    Captured,
    Node,
    Operation,
    map_tree,
    tensors,
)

ATEN = torch.ops.aten
A, B, C = (torch.full((), float(number)) for number in range(3))
# A tree, its leaves in order, and the same with every leaf as a string.
TREES: dict[str, tuple[Any, list[Any], Any]] = {
    "leaf": (A, [A], "0.0"),
    "list": ([A, B], [A, B], ("0.0", "1.0")),
    "nested": ((A, [B, {"k": C}], ()), [A, B, C], ("0.0", ("1.0", {"k": "2.0"}), ())),
    "dictionary": ({"a": A, "b": [B]}, [A, B], {"a": "0.0", "b": ("1.0",)}),
    "others": ((1, None, "text", 2.5, A), [A], ("1", "None", "text", "2.5", "0.0")),
    "empty": ([], [], ()),
}


def text(leaf: Any) -> str:
    return str(leaf.item() if isinstance(leaf, Tensor) else leaf)


@pytest.mark.parametrize(("tree", "leaves", "changed"), TREES.values(), ids=TREES)
def test_trees(tree: Any, leaves: list[Tensor], changed: Any) -> None:
    assert [id(tensor) for tensor in tensors(tree)] == [id(leaf) for leaf in leaves]
    assert map_tree(tree, text) == changed


def test_nodes_and_captured_values_are_leaves() -> None:
    assert map_tree([Node(3), (Captured(4),)], lambda leaf: leaf.index) == (3, (4,))
    assert map_tree([Node(3), Captured(3)], type) == (Node, Captured)


@pytest.mark.parametrize(
    ("args", "kwargs", "nodes", "piecewise_linear"),
    [
        ((Node(0), 2), {}, [0], True),
        ((2, Node(0)), {}, [0], False),
        (((Node(0), Node(1)), 1), {}, [0, 1], False),
        ((Captured(0),), {"other": Node(5)}, [5], False),
        ((Captured(0),), {}, [], False),
    ],
)
def test_which_arguments_depend_on_the_inputs(args: Any, kwargs: Any, nodes: list[int], piecewise_linear: bool) -> None:
    """A quotient is piecewise linear in its first argument only."""
    operation = Operation(ATEN.div.Tensor, args, kwargs, (9,))
    assert operation.nodes == [Node(index) for index in nodes]
    assert all(isinstance(captured, Captured) for captured in operation.captured)
    assert len(operation.captured) == str((args, kwargs)).count("Captured(")
    assert operation.is_piecewise_linear == piecewise_linear
    assert operation.name == "div"


class Recorded(TorchDispatchMode):
    """The operations as the tracer would record them."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations.append(Operation(func, args, kwargs or {}, ()))
        return func(*args, **(kwargs or {}))


Z, STATISTICS = torch.rand(3, 4, 2, 2), (torch.zeros(4), torch.ones(4))
# What a network does, and why it cannot be repeated; None: it can.
CALLS: dict[str, tuple[Callable[[], Any], str | None]] = {
    "relu": (lambda: Z.relu(), None),
    "batch norm": (lambda: F.batch_norm(Z, *STATISTICS), None),
    "batch norm in training mode": (lambda: F.batch_norm(Z, *STATISTICS, training=True), "mixes samples"),
    "batch norm without statistics": (lambda: F.batch_norm(Z, None, None, training=True), "mixes samples"),
    "instance norm": (lambda: F.instance_norm(Z), "mixes samples"),
    "dropout that is off": (lambda: F.dropout(Z, 0.5, training=False), None),
    "dropout": (lambda: F.dropout(Z, 0.5), "random"),
    "dropout of channels": (lambda: F.dropout2d(Z, 0.5), "random"),
    "alpha dropout": (lambda: F.alpha_dropout(Z, 0.5, training=True), "random"),
    "randomized relu": (lambda: F.rrelu(Z, training=True), "random"),
    "randomized relu that is off": (lambda: F.rrelu(Z), None),
    "noise": (lambda: Z + torch.randn_like(Z), "random"),
    "noise in place": (lambda: Z.clone().normal_(), "random"),
    "stochastic depth": (lambda: Z * torch.empty(3, 1, 1, 1).bernoulli_(0.9), "random"),
    "fractional pooling": (lambda: F.fractional_max_pool2d(Z, 2, output_size=1), "random"),
    "attention": (lambda: F.scaled_dot_product_attention(Z, Z, Z), None),
    "attention with dropout": (lambda: F.scaled_dot_product_attention(Z, Z, Z, dropout_p=0.5), "random"),
}


def refused(operation: Operation) -> str | None:
    try:
        return operation.require_repeatable()
    except GraphError as error:
        return str(error)


@pytest.mark.parametrize(("call", "reason"), CALLS.values(), ids=CALLS)
def test_what_can_be_repeated(call: Callable[[], Any], reason: str | None) -> None:
    with torch.no_grad(), Recorded() as record:
        call()
    refusals = [refusal for operation in record.operations if (refusal := refused(operation))]
    assert bool(refusals) == bool(reason)
    for refusal in refusals:
        assert reason in refusal
        assert "eval mode" in refusal


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("parameters", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("dims", [0, 1, 2, 3])
def test_a_repeated_batch_norm_is_the_same_one(dims: int, parameters: tuple[bool, bool], mode: Any) -> None:
    mean, variance, *given = torch.rand(4, 3, dtype=torch.float64) + 0.5
    weight, bias = (value if wanted else None for value, wanted in zip(given, parameters, strict=True))
    x = torch.randn(2, 3, *[4] * dims, dtype=torch.float64)
    with mode(), Recorded() as record:
        expected = F.batch_norm(x, mean, variance, weight, bias, eps=0.1)
    operation = next(operation for operation in record.operations if "batch_norm" in operation.name)
    repeated, *statistics = tensors(operation.repeat(operation.args, operation.kwargs))
    torch.testing.assert_close(repeated, expected)
    assert [part.numel() for part in statistics] == [0, 0] * (operation.name == "native_batch_norm")


X = torch.randn(2, 3, 4, 5, dtype=torch.float64)
MEANS: dict[str, Callable[[], Tensor]] = {
    "of all": lambda: X.mean(),
    "of maps": lambda: X.mean((2, 3)),
    "of no map": lambda: X[:, :, :0].mean((2, 3)),
    "of columns, in another dtype": lambda: X.mean(-1, keepdim=True, dtype=torch.float32),
    "pooled to one position": lambda: F.adaptive_avg_pool2d(X, 1),
    "of signals, pooled": lambda: F.adaptive_avg_pool1d(X[0], 1),
    "of volumes, pooled": lambda: F.adaptive_avg_pool3d(X, 1),
    "pooled to a map": lambda: F.adaptive_avg_pool2d(X, (2, 1)),
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("call", MEANS.values(), ids=MEANS)
def test_a_repeated_mean_is_the_same_one(call: Callable[[], Tensor], mode: Any) -> None:
    with mode(), Recorded() as record:
        call()
    (step,) = (step for step in record.operations if "mean" in step.name or "pool" in step.name)
    leaf = step.args[0].clone().requires_grad_()
    values = step.repeat((leaf, *step.args[1:]), step.kwargs), step.function(leaf, *step.args[1:], **step.kwargs)
    torch.testing.assert_close(*values, equal_nan=True)
    cotangent = torch.rand_like(values[0])
    torch.testing.assert_close(*(torch.autograd.grad(value, leaf, cotangent)[0] for value in values))
