"""The dispatcher: tracers start and stop in any order, one by thread, and other modes see what they would."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

from lightning_flatness.errors import GraphError
from lightning_flatness.recording.dispatch import GraphTracer, dispatcher, not_recorded


def fresh() -> Tensor:
    return torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(1))


def following(tensor: Tensor) -> GraphTracer:
    tracer = GraphTracer()
    tracer.start()
    tracer.graph.add_input(tensor)
    return tracer


def names(tracer: GraphTracer) -> list[str]:
    return [operation.name for operation in tracer.graph.operations]


def replayed(tracer: GraphTracer, output: Tensor) -> Tensor:
    graph = tracer.graph
    return graph.replay({0: graph.captures.value(0)}, len(graph.operations))[graph.node(output)]


def test_tracers_do_not_hear_each_other() -> None:
    outer = following(z := fresh())
    y = z * 2
    inner = GraphTracer()
    inner.start()
    with not_recorded():
        inner.graph.add_input(y)
        y.sin()
    output = y.relu()
    outer.stop()  # not the last to start
    later = output.exp()
    inner.stop()
    assert names(outer) == ["mul", "relu"]
    assert names(inner) == ["relu", "exp"]
    assert torch.equal(replayed(outer, output), output)
    assert torch.equal(replayed(inner, later), later)
    assert _get_current_dispatch_mode() is None


class Counting(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_a_mode_inside_the_record_sees_everything() -> None:
    tracer = following(z := fresh())
    with Counting() as mode:
        middle = z.relu()
    output = middle.exp()
    tracer.stop()
    assert (mode.count, names(tracer)) == (1, ["relu", "exp"])
    assert torch.equal(replayed(tracer, output), output)


def test_does_not_start_inside_a_mode_that_may_end_first() -> None:
    with Counting() as mode:
        with pytest.raises(GraphError, match="Counting"):
            GraphTracer().start()
        assert _get_current_dispatch_mode() is mode
    assert _get_current_dispatch_mode() is None


def test_a_retained_dispatcher_stays_until_it_is_released() -> None:
    mode = dispatcher()
    mode.retain()
    mode.retain()
    following(fresh()).stop()
    assert _get_current_dispatch_mode() is mode
    mode.release()
    assert _get_current_dispatch_mode() is mode
    mode.release()
    assert _get_current_dispatch_mode() is None


def test_backward_inside_the_record() -> None:
    """A validation step may take gradients (adversarial examples)."""
    gradients = []
    for traced in (False, True):
        x = fresh().requires_grad_()
        z = F.silu(x)
        tracer = following(z) if traced else GraphTracer()
        z.relu().square().sum().backward()
        tracer.stop()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


def test_each_thread_has_a_dispatcher_of_its_own() -> None:
    """Two threads that trace at the same time record their own operations, and pausing one does not pause the other."""
    both, found = threading.Barrier(2), {}

    def work(name: str, paused: bool) -> None:
        tracer = following(z := fresh())
        both.wait()
        if paused:
            with not_recorded():
                both.wait()
                z.sin()
                both.wait()
        else:
            both.wait()
            z.cos()
            both.wait()
        tracer.stop()
        found[name] = names(tracer), dispatcher(), _get_current_dispatch_mode()

    threads = [threading.Thread(target=work, args=args) for args in (("sin", True), ("cos", False))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert (found["sin"][0], found["cos"][0]) == ([], ["cos"])
    assert len({id(dispatcher()), id(found["sin"][1]), id(found["cos"][1])}) == 3
    assert found["sin"][2] is found["cos"][2] is None
