"""The graph: nobody notices the record, what it repeats is what was computed, and what it cannot repeat it says."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from lightning_flatness.errors import GraphError
from lightning_flatness.precision import upcast
from lightning_flatness.recording.dispatch import GraphTracer
from lightning_flatness.recording.graph import OperationGraph

SHAPE = (2, 4, 3, 3)
OTHER = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))
WEIGHT = torch.randn(3, 4, generator=torch.Generator().manual_seed(4))
MEAN, VARIANCE = torch.tensor([0.1, -0.2, 0.3, 0.0]), torch.tensor([0.5, 1.0, 2.0, 3.0])


class Swish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        return z * z.sigmoid()


@torch.jit.script
def scripted(z: Tensor) -> Tensor:
    return z * z.sigmoid() + 1


def into(make: Callable[[Tensor], Tensor], change: Callable[[Tensor, Tensor], Any]) -> Callable[[Tensor], Tensor]:
    """A function that writes into the tensor that `make` returns and returns that one."""

    def function(z: Tensor) -> Tensor:
        target = make(z)
        change(target, z)
        return F.relu(target)

    return function


def then(change: Callable[[Tensor], Any], use: Callable[[Tensor], Tensor] = torch.exp) -> Callable[[Tensor], Tensor]:
    """A function that first changes its argument."""

    def function(z: Tensor) -> Tensor:
        change(z)
        return use(z)

    return function


def strided(z: Tensor) -> Tensor:
    return F.relu(z.to(memory_format=torch.channels_last)).flatten(2).mT


def kept_then_overwritten(z: Tensor) -> Tensor:
    skip = OTHER.to(z.dtype).clone()
    first = z + skip
    skip.mul_(5)
    return first * skip


def one_half_of_the_other(z: Tensor) -> Tensor:
    first, second = z.chunk(2, 1)
    return torch.cat([second, first.sigmoid() * second], 1)


def inner_no_grad(z: Tensor) -> Tensor:
    with torch.no_grad():
        scale = z.abs().amax((2, 3), keepdim=True)
    return z / scale


FAITHFUL: dict[str, Callable[[Tensor], Tensor]] = {
    "activation": F.silu,
    "activation in place": then(torch.relu_),
    "activation of a view in place": then(lambda z: z[:, :2].relu_()),
    "scaled through a view": then(lambda z: z.view(2, -1).mul_(2)),
    "detached, then in place": then(lambda z: z.detach().mul_(2)),
    "data in place": then(lambda z: z.data.mul_(2)),
    "channel assigned": then(lambda z: z.__setitem__((slice(None), 0), 0.5)),
    "masked in place": into(torch.clone, lambda out, z: out.__setitem__(z < 0, 0)),
    "detach": lambda z: z.detach() * z,
    "no_grad inside": inner_no_grad,
    "identity += z": into(lambda z: OTHER.to(z.dtype).clone(), lambda out, z: out.__iadd__(z)),
    "identity.add_(z)": into(lambda z: OTHER.to(z.dtype).clone(), lambda out, z: out.add_(z, alpha=0.5)),
    "buffer filled whole": into(torch.empty_like, lambda out, z: out.copy_(z)),
    "buffer[:] = z": into(torch.empty_like, lambda out, z: out.__setitem__(slice(None), z)),
    "constant overwritten later": kept_then_overwritten,
    "written by hand": lambda z: torch.where(z > 0, z, z.exp() - 1),
    "mask": lambda z: z * (z > 0),
    "selected": lambda z: z[z > 0],
    "branch on the data": lambda z: z * 2 if bool((z > 0).any()) else z,
    "integers": lambda z: OTHER.flatten().to(z.dtype)[(z.abs() * 3).long().clamp(max=9)] * z,
    "index read out": lambda z: z.flatten(1)[:, int(z[0].argmax())],
    "topk": lambda z: z.flatten(2).topk(3).values,
    "max and its place": lambda z: torch.add(*z.flatten(2).max(-1)),
    "gathered": lambda z: z.flatten(2).gather(2, z.flatten(2).argsort(2)),
    "cat of a list": lambda z: torch.cat([z, OTHER.to(z.dtype), z.neg()], 1),
    "chunks": one_half_of_the_other,
    "unbind and stack": lambda z: torch.stack([part.exp() for part in z.unbind(1)][::-1], 1),
    "foreach": lambda z: torch._foreach_mul([z, z.neg()], 2.0)[1],
    "einsum": lambda z: torch.einsum("nkhw,ck->nc", z, WEIGHT.to(z.dtype)),
    "linear": lambda z: F.linear(z.mean((2, 3)), WEIGHT.to(z.dtype)),
    "batch norm": lambda z: F.batch_norm(z, MEAN.to(z.dtype), VARIANCE.to(z.dtype)),
    "dropout in eval": lambda z: F.dropout(z, 0.5, training=False),
    "interpolated": lambda z: F.interpolate(z, scale_factor=2, mode="bilinear"),
    "channels last": strided,
    "complex": lambda z: torch.fft.rfft2(z.float()).abs(),
    "autograd function": Swish.apply,
    "scripted": scripted,
    "through dlpack": lambda z: torch.from_dlpack(z.detach()) * 2,
    "vmap": torch.vmap(F.silu),
}
# `detach` and `no_grad` end autograd, but not the loss as a function: the same functions without them.
WITH_GRAPH: dict[str, Callable[[Tensor], Tensor]] = {
    "detach": lambda z: z * z,
    "detached, then in place": lambda z: (2 * z).exp(),
    "data in place": lambda z: (2 * z).exp(),
    "no_grad inside": lambda z: z / z.abs().amax((2, 3), keepdim=True),
    "autograd function": F.silu,
    "through dlpack": lambda z: z * 2,
}
MODES: dict[str, Callable[[], Any]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "enable_grad": torch.enable_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


def fresh(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)).to(dtype)


@contextlib.contextmanager
def recording(*inputs: Tensor) -> Any:
    tracer = GraphTracer()
    tracer.start()
    try:
        for tensor in inputs:
            tracer.graph.add_input(tensor)
        yield tracer.graph
    finally:
        tracer.stop()


def replayed(graph: OperationGraph, output: Tensor) -> Tensor:
    """What `output` is again if the first input is what it was."""
    return graph.replay({0: upcast(graph.captures.value(0))}, len(graph.operations))[graph.node(output)]


def facts(output: Tensor) -> tuple[Any, ...]:
    return output.dtype, output.shape, output.stride(), output.requires_grad, output.is_inference(), output._is_view()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FAITHFUL)
def test_unnoticed_and_repeated(name: str, mode: str) -> None:
    with MODES[mode]():
        plain, traced = fresh(), fresh()
        expected = FAITHFUL[name](plain)
        with recording(traced) as graph:
            output = FAITHFUL[name](traced)
    assert facts(output) == facts(expected)
    assert torch.equal(output, expected)
    assert torch.equal(traced, plain)
    assert graph.incomplete_because(len(graph.operations)) is None
    again = replayed(graph, output)
    rounding = 0.02 if mode == "autocast" else 1e-6
    torch.testing.assert_close(again, output.to(again.dtype), rtol=rounding, atol=rounding)
    assert _get_current_dispatch_mode() is None


@pytest.mark.parametrize("name", FAITHFUL)
def test_its_gradient_is_that_of_the_function(name: str) -> None:
    """In float64, from a record made in inference mode, where there is no graph."""
    with torch.inference_mode(), recording(z := fresh(torch.float64)) as graph:
        output = FAITHFUL[name](z)
    point, twin = (fresh(torch.float64).requires_grad_() for _ in range(2))
    again = graph.replay({0: point}, len(graph.operations))[graph.node(output)]
    expected = WITH_GRAPH.get(name, FAITHFUL[name])(twin.clone())
    cotangent = torch.randn_like(expected)
    (value,) = torch.autograd.grad(again, point, cotangent)
    (reference,) = torch.autograd.grad(expected, twin, cotangent)
    torch.testing.assert_close(value, reference, rtol=1e-6 if name == "complex" else 1e-12, atol=1e-12)


def aliased(z: Tensor) -> Tensor:
    buffer = torch.zeros(2, 8, 3, 3)
    buffer[:, :4] = z
    return F.relu(buffer)


def written_through_an_old_view(z: Tensor) -> Tensor:
    identity = OTHER.clone()
    view = identity[:, 0]
    identity += z
    view.zero_()
    return identity.exp()


UNFOLLOWED: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "number read out": ("item", lambda z: z / z.abs().max().item()),
    "slice of a buffer": ("memory of the tail", aliased),
    "old view": ("memory of the tail", written_through_an_old_view),
    "no storage": ("SparseTensorImpl", lambda z: z * torch.mm(torch.eye(3).to_sparse(), torch.ones(3, 3))),
}
UNREPEATABLE: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "dropout": ("random", lambda z: F.dropout(z, 0.5)),
    "feature dropout": ("random", lambda z: F.dropout2d(z, 0.5)),
    "bernoulli": ("random", lambda z: z * torch.bernoulli(z.sigmoid())),
    "noise in place": ("random", lambda z: (z + 1).normal_()),
    "rrelu": ("random", lambda z: F.rrelu(z, training=True)),
    "batch statistics": ("mixes samples", lambda z: F.batch_norm(z, None, None, training=True)),
    "running statistics": ("mixes samples", lambda z: F.batch_norm(z, MEAN.clone(), VARIANCE.clone(), training=True)),
}
MAIN_MODES = ["no_grad", "inference_mode", "enable_grad"]


@pytest.mark.parametrize("mode", MAIN_MODES)
@pytest.mark.parametrize("name", UNFOLLOWED)
def test_says_what_it_cannot_follow(name: str, mode: str) -> None:
    """And never takes it for a constant."""
    reason, function = UNFOLLOWED[name]
    with MODES[mode]():
        expected = function(fresh())
        with recording(z := fresh()) as graph:
            output = function(z)
    assert torch.equal(output, expected)
    assert reason in graph.incomplete_because(len(graph.operations) + 1)
    if graph.node(output) is not None:
        with pytest.raises(GraphError, match=reason):
            replayed(graph, output)


@pytest.mark.parametrize("mode", MAIN_MODES)
@pytest.mark.parametrize("name", UNREPEATABLE)
def test_refuses_to_repeat_what_differs_each_time(name: str, mode: str) -> None:
    reason, function = UNREPEATABLE[name]
    with MODES[mode]():
        torch.manual_seed(0)
        expected = function(fresh())
        torch.manual_seed(0)
        with recording(z := fresh()) as graph:
            output = function(z)
    assert torch.equal(output, expected)
    with pytest.raises(GraphError, match=reason):
        replayed(graph, output)


def test_half_precision_is_upcast() -> None:
    with recording(z := fresh(torch.bfloat16)) as graph:
        output = (z.half().float().bfloat16() * OTHER.bfloat16()).to(torch.float16)
    point = fresh()
    again = graph.replay({0: point}, len(graph.operations))[graph.node(output)]
    assert torch.equal(again, point * OTHER.bfloat16().float())


@pytest.mark.parametrize("mode", MAIN_MODES)
@pytest.mark.parametrize("size", [3, 64], ids=["small", "large"])
def test_a_constant_changed_after_the_pass_counts_as_it_was_or_is_noticed(size: int, mode: str) -> None:
    for change in (torch.relu_, lambda skip: skip.data.copy_(skip.relu()) if size == 3 else skip.mul_(2)):
        with MODES[mode]():
            skip, z = torch.randn(2, 2, 4, size, size).unbind()
            skip = skip.clone()
            with recording(z) as graph:
                output = z * skip
            graph.captures.finalize()
            change(skip)
        with contextlib.suppress(GraphError):
            assert torch.equal(replayed(graph, output), output)
            assert mode == "inference_mode" or size == 3


@pytest.mark.parametrize("mode", MAIN_MODES)
def test_a_constant_changed_before_the_end_of_the_pass_counts_as_it_was(mode: str) -> None:
    with MODES[mode]():
        skip, z = torch.randn(2, 2, 4, 64, 64).unbind()
        skip = skip.clone()
        with recording(z) as graph:
            output = z * skip
            skip.mul_(2)
        graph.captures.finalize()
    assert torch.equal(replayed(graph, output), output)


def test_memory_that_must_not_be_read() -> None:
    weight = torch.ones(4, 1, 1)
    tracer = GraphTracer()
    with recording(z := fresh()):
        tracer.start()
        tracer.graph.add_input(z)
        tracer.forbid_storage(weight)
        output = z.relu() * weight.mean()
        tracer.stop()
    graph = tracer.graph
    assert graph.incomplete_because(1) is None
    with pytest.raises(GraphError, match="once more"):
        replayed(graph, output)


def test_a_weight_is_where_its_memory_is_at_present() -> None:
    """Sharding frees the memory of a weight, which others get then, and gives it memory again later."""
    z, reused = torch.ones(1), 0
    for size in [2**power for power in range(4, 19)] * 4:
        tracer, weight = GraphTracer(), torch.ones(size)
        tracer.graph.add_input(z)
        tracer.forbid_storage(weight)
        storage, first = weight.untyped_storage(), weight.data_ptr()
        storage.resize_(0)
        other = torch.ones(size)
        reused += other.data_ptr() == first
        tracer.start()
        z + other
        gap = tracer.graph.incomplete_because(99)
        storage.resize_(4 * size)
        z + weight
        tracer.stop()
        assert (gap, "once more" in str(tracer.graph.incomplete_because(99))) == (None, True)
    assert reused


def test_several_inputs() -> None:
    """An input made of another keeps its dependence; unrelated ones can be set apart."""
    first, third = fresh(), OTHER.clone()
    with recording(first, third) as graph:
        second = F.relu(first)
        graph.add_input(second)
        output = second * third + first
    values = {graph.node(root): fresh() + i for i, root in enumerate((first, third, second))}
    again = graph.replay(values, len(graph.operations))[graph.node(output)]
    torch.testing.assert_close(again, F.relu(fresh()) * (fresh() + 1) + fresh(), rtol=0, atol=0)


def test_a_wrapper_of_a_tensor_is_the_same_node() -> None:
    class Wrapped(Tensor):
        pass

    with recording(z := fresh()) as graph:
        output = torch.relu(z.as_subclass(Wrapped))
        again = output.as_subclass(Tensor)
        assert graph.node(again) == graph.node(output) is not None
        result = again.exp()
    torch.testing.assert_close(replayed(graph, result), fresh().relu().exp())


def test_detach_is_a_constant_for_gradients_if_that_is_wanted() -> None:
    with recording(z := fresh(torch.float64)) as graph:
        output = (z * z.detach()).sum()
    for detach, factor in ((False, 2), (True, 1)):
        point = fresh(torch.float64).requires_grad_()
        again = graph.replay({0: point}, len(graph.operations), detach=detach)[graph.node(output)]
        (gradient,) = torch.autograd.grad(again, point)
        torch.testing.assert_close(gradient, factor * fresh(torch.float64))


def test_a_part_may_be_repeated_in_another_dtype() -> None:
    """From a later node on, and without what does not lead to the result."""
    with recording(z := fresh()) as graph:
        middle = z.relu()
        start = len(graph.operations)
        _ = middle.exp()
        output = middle * OTHER.float() + 1
    only = set(graph.ancestry(graph.node(output)))
    point = fresh(torch.float64)
    nodes = graph.replay(
        {graph.node(middle): point}, len(graph.operations), start=start, only=only, dtype=torch.float64
    )
    torch.testing.assert_close(nodes[graph.node(output)], point * OTHER.double() + 1)
    assert len(nodes) == 3  # the exponential is not among them


# (function, names of the operations that end in a cut)
CUTS: dict[str, tuple[Callable[[Tensor], Tensor], list[str]]] = {
    "chain": (lambda z: z.relu().mean((2, 3)).exp().sum(), ["relu", "mean", "exp", "sum"]),
    "skip": (lambda z: (z.relu() + z).exp().sum(), ["add", "exp", "sum"]),
    "two branches": (lambda z: (z.relu().mean() * z.exp().mean()).sum(), ["mul", "sum"]),
    "a step": (lambda z: (z.exp() * (z > 0)).sum(), ["exp", "mul", "sum"]),
    "an index": (lambda z: z.flatten(1).exp()[:, int(z[0].argmax())].sum(), ["flatten", "exp", "select", "sum"]),
    "in place": (
        lambda z: then(torch.relu_, torch.exp)(z * 2).sum(),
        ["mul", "exp", "sum"],
    ),  # one node before and after
    "unused": (lambda z: (z.exp(), z.sin())[0].sum(), ["exp", "sum"]),
}


@pytest.mark.parametrize("name", CUTS)
def test_cuts_are_where_all_influence_passes(name: str) -> None:
    function, expected = CUTS[name]
    with torch.no_grad(), recording(z := fresh()) as graph:
        output = function(z)
    cuts = graph.cuts([0], graph.node(output))
    assert cuts[0].node == 0
    assert cuts[-1].node == graph.node(output)
    names = [graph.operations[cut.end - 1].name for cut in cuts[1:]]
    assert [name for name in names if "view" not in name and "slice" not in name] == [
        name for name in expected if name != "flatten"
    ]


def test_several_inputs_have_a_cut_where_they_meet() -> None:
    with torch.no_grad(), recording(first := fresh(), second := OTHER.clone()) as graph:
        output = (first.exp() + second.relu()).mean((2, 3)).sum()
    cuts = graph.cuts([0, 1], graph.node(output))
    assert [graph.operations[cut.end - 1].name for cut in cuts] == ["add", "mean", "sum"]


def test_what_moves_in_steps_alone_is_not_moved() -> None:
    with torch.no_grad(), recording(z := fresh()) as graph:
        accuracy, smooth, other = (z > 0).double().mean(), z.mean(), z.argmax()
    assert [graph.is_moved(graph.node(tensor)) for tensor in (z, accuracy, smooth, other)] == [True, False, True, False]
