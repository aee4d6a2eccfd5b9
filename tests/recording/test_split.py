"""A compiled network is recorded with its beginning compiled: the same record; any doubt ends in eager execution."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.utils import parametrizations

from lightning_flatness import ClassifierMethod, ClassifierRecorder, ForwardRecorder, PooledMethod
from lightning_flatness.recording.eager import EAGER

pytestmark = pytest.mark.usefixtures("nothing_compiled")


class Body(nn.Module):
    """Two convolutions, and whatever else a test puts between or around them."""

    def __init__(self, between: Callable[[Body, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.last, self.norm2 = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm(self.first(x)))
        if self.between is not None:
            h = self.between(self, h)
        return F.relu(self.norm2(self.last(h)) + h).mean((2, 3))


class Network(nn.Module):
    def __init__(self, body: Body | None = None) -> None:
        super().__init__()
        self.body, self.head = body or Body(), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class Model(nn.Module):
    def __init__(self, body: Body | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = Network(body)
        self.to(torch.float64).eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def wrapped(name: str) -> Callable[[nn.Module, Any], None]:
    return lambda model, backend: model.set_submodule(name, torch.compile(model.get_submodule(name), backend=backend))


def in_place(name: str) -> Callable[[nn.Module, Any], None]:
    return lambda model, backend: model.get_submodule(name).compile(backend=backend)


WAYS = {
    "network": wrapped("net"),
    "network in place": in_place("net"),
    "body": wrapped("net.body"),
    "body in place": in_place("net.body"),
}
DATA = torch.randn(8, 2, 5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64), torch.arange(8) % 3


def measured(recorder: ForwardRecorder, model: nn.Module, n: int = 8, dtype: Any = torch.float64) -> tuple[Any, bool]:
    """The quantities of a pass, and whether its beginning ran compiled."""
    recorder.clear()
    if recorder.split is not None:
        recorder.split._has_run = False
    with torch.no_grad():
        loss = F.cross_entropy(model(DATA[0][:n].to(dtype)), DATA[1][:n])
    method = ClassifierMethod() if isinstance(recorder, ClassifierRecorder) else PooledMethod()
    quantities = method.quantities(recorder.take_pass(loss))
    return quantities, recorder.split is not None and recorder.split._has_run


def assert_equal(quantities: Any, expected: Any, rtol: float = 1e-12) -> None:
    for name in ("hessian_trace", "relative_flatness", "output_margin", "affine_hessian_trace"):
        torch.testing.assert_close(getattr(quantities, name), getattr(expected, name), rtol=rtol, atol=rtol)


def settled(recorder: ForwardRecorder, model: nn.Module) -> Any:
    """The quantities of a first pass, which is eager."""
    with recorder:
        quantities, is_split = measured(recorder, model)
    assert not is_split
    return quantities


@pytest.mark.parametrize("kind", [ForwardRecorder, ClassifierRecorder])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_records_what_eager_execution_records(way: Any, kind: type[ForwardRecorder]) -> None:
    model = Model()
    expected = settled(kind(model), model)
    way(model, "aot_eager")
    with torch.no_grad():
        model(DATA[0]), model(DATA[0][:5])  # there are graphs for both sizes, which call no hook
    own, recorder = counters["stats"]["unique_graphs"], kind(model)
    assert_equal(settled(recorder, model), expected)
    is_inside = kind is ForwardRecorder or way in (WAYS["network"], WAYS["network in place"])
    for _ in range(2):
        with recorder:
            for n, compiled in ((8, is_inside), (8, is_inside), (5, False)):  # another size is not compiled anew
                quantities, is_split = measured(recorder, model, n)
                assert is_split == compiled
                assert_equal(quantities.select(slice(5)), expected.select(slice(5)))
    with torch.no_grad():
        model(DATA[0])
    assert counters["stats"]["unique_graphs"] == own + is_inside  # one of the recorder, none of the user's
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == 0


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_in_single_precision() -> None:
    model = Model().float()
    with (recorder := ForwardRecorder(model)):
        expected, _ = measured(recorder, model, dtype=torch.float32)
    model.net.compile()
    recorder = ForwardRecorder(model)
    for first in (True, False):
        with recorder:
            quantities, is_split = measured(recorder, model, dtype=torch.float32)
        assert is_split != first
        assert_equal(quantities, expected, 1e-6)


def broken_graph(body: Body, h: Tensor) -> Tensor:
    torch._dynamo.graph_break()
    return h


def autocast(body: Body, h: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return h * 1.0


def with_gradients(body: Body, h: Tensor) -> Tensor:
    with torch.enable_grad():
        return (h * 1.0).detach()


def reads_the_weight(body: Body, h: Tensor) -> Tensor:
    return h + body.last.weight.mean() * 0


# What is between the convolutions, what is compiled, and why nothing is split.
DOUBTS: dict[str, tuple[Any, Callable[[nn.Module, Any], None], str]] = {
    "graph break": (broken_graph, wrapped("net"), "graph_break|fullgraph|break"),
    "autocast": (autocast, wrapped("net"), "modes of its own"),
    "gradients": (with_gradients, wrapped("net"), "modes of its own"),
    "weight read": (reads_the_weight, wrapped("net"), "used 2 times"),
    "first layer": (None, wrapped("net.body.last"), "before the measured layer"),
    "outside": (None, wrapped("net.head"), "outside"),
    "two": (None, lambda *way: (wrapped("net.head")(*way), wrapped("net.body")(*way)), "2 of its modules"),
}


@pytest.mark.parametrize(("between", "way", "problem"), DOUBTS.values(), ids=DOUBTS)
def test_doubt_ends_in_eager_execution(between: Any, way: Any, problem: str) -> None:
    model = Model(Body(between))
    expected = settled(ForwardRecorder(model, layer="net.body.last"), model)
    way(model, "aot_eager")
    recorder = ForwardRecorder(model, layer="net.body.last")
    settled(recorder, model)
    for _ in range(2):
        with recorder:
            for _ in range(2):
                quantities, is_split = measured(recorder, model)
                assert not is_split
                assert_equal(quantities, expected)
    assert recorder.split.problem is not None
    assert re.search(problem, recorder.split.problem), recorder.split.problem


def test_a_computed_weight_is_not_found_in_the_graph() -> None:
    model = Model()
    parametrizations.weight_norm(model.net.body.last)
    expected = settled(ForwardRecorder(model), model)
    wrapped("net")(model, "aot_eager")
    recorder = ForwardRecorder(model)
    settled(recorder, model)
    with recorder:
        quantities, is_split = measured(recorder, model)
    assert not is_split
    assert recorder.split.problem is not None
    assert_equal(quantities, expected)


def method(model: nn.Module, backend: Any) -> None:
    model.net.forward = torch.compile(model.net.forward, backend=backend)


def moved_names(model: nn.Module, backend: Any) -> None:
    wrapped("net")(model, backend)
    model.net.dynamo_ctx = object()


@pytest.mark.parametrize(("way", "problem"), [(moved_names, "elsewhere"), (method, "a method is compiled")])
def test_what_is_compiled_in_an_unknown_way_runs_eagerly(way: Any, problem: str) -> None:
    model = Model()
    expected = settled(ForwardRecorder(model), model)
    way(model, "aot_eager")
    recorder = ForwardRecorder(model)
    settled(recorder, model)
    with recorder:
        quantities, is_split = measured(recorder, model)
    assert not is_split
    assert problem in str(recorder.split.problem)
    assert_equal(quantities, expected)


def test_a_backend_that_fails_and_a_network_that_fails() -> None:
    calls: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        calls.append(len(inputs))
        if len(calls) == 2:  # the recorder's
            raise ValueError("no memory for this")
        return graph.forward

    model = Model()
    wrapped("net")(model, backend)
    with torch.no_grad():
        model(DATA[0])
    recorder = ForwardRecorder(model)
    expected = settled(recorder, model)
    with recorder:
        quantities, is_split = measured(recorder, model)
        assert not is_split
        assert "no memory for this" in str(recorder.split.problem)
        assert_equal(quantities, expected)
    model = Model()
    wrapped("net")(model, "aot_eager")
    recorder = ForwardRecorder(model)
    settled(recorder, model)
    with recorder, pytest.raises(RuntimeError, match="channels"):
        model(torch.zeros(2, 3, 5, 5, dtype=torch.float64))
    assert type(model.net).__name__ == "OptimizedModule"
    assert "forward" in vars(model.net)


def test_two_calls_and_another_user_of_eager_execution() -> None:
    model = Model()
    wrapped("net")(model, "aot_eager")
    recorder = ForwardRecorder(model)
    expected = settled(recorder, model)
    with recorder:
        with torch.no_grad():
            model(DATA[0])
            second = model(DATA[0].flip(0))
            loss = F.cross_entropy(second, DATA[1].flip(0))
        torch.testing.assert_close(
            PooledMethod().quantities(recorder.take_pass(loss)).hessian_trace.flip(0), expected.hessian_trace
        )
        EAGER.enter()  # such as a monitor in another thread
        try:
            quantities, is_split = measured(recorder, model)
        finally:
            EAGER.leave()
        assert not is_split
        assert_equal(quantities, expected)
        assert measured(recorder, model)[1]
