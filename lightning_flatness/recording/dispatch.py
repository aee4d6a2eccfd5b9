"""Listens to torch's dispatcher: each operation that depends on a traced tensor is added to a graph."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from inspect import currentframe
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

from lightning_flatness.errors import GraphError
from lightning_flatness.recording.graph import OperationGraph
from lightning_flatness.recording.nodes import storage_of
from lightning_flatness.recording.operation import (
    Captured,
    Node,
    Operation,
    leaves,
    map_tree,
    named_arguments,
    tensors,
    written,
)
from lightning_flatness.recording.operators import CONVOLUTIONS, Trait, traits


class GraphTracer:
    """Between `start` and `stop`, adds every operation that depends on an input of the graph to it.

    It works below autograd, autocast and inference mode: nothing that the user's code computes, returns or can
    observe changes. Gradients are taken later, on a replay of the graph.

    Args:
        finds_functions: whether to note which operations run within a custom `torch.autograd.Function`.
        keeps_maps: see `Nodes`.

    Attributes:
        graph: what has been recorded.
        is_convolving: whether the monitored convolution runs, which may read its weight.
    """

    def __init__(self, finds_functions: bool = False, keeps_maps: bool = True) -> None:
        """Start with an empty graph."""
        self.graph = OperationGraph(keeps_maps)
        self._finds_functions = finds_functions
        self._forbidden: list[torch.UntypedStorage] = []  # alive, or their memory would be given to others
        self._has_read_numbers = False
        self.is_convolving = False  # whether the monitored convolution runs, which may read its weight

    def start(self) -> None:
        """Trace from now on, in this thread.

        Raises:
            GraphError: if a dispatch mode of somebody else is active: it may end before this one.
        """
        dispatcher().attach(self)

    def stop(self) -> None:
        """Trace no more."""
        dispatcher().detach(self)

    def is_listening(self) -> bool:
        """Return whether operations are still seen: an inference mode that ends takes the dispatch mode with it."""
        count, tensor = len(self.graph.operations), self.graph.tensor_of(0)
        tensor.view(tensor.shape)
        is_seen = len(self.graph.operations) > count
        del self.graph.operations[count:]
        return is_seen

    def finalize(self) -> None:
        """Trace no more, and make the graph independent of what happens to the network later."""
        self.stop()
        self.graph.captures.finalize()

    def forbid_storage(self, tensor: Tensor) -> None:
        """Mark the graph incomplete from the moment on when the network reads this memory."""
        self._forbidden.append(tensor.untyped_storage())

    def before(self, func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        """Return the encoded arguments of an operation that depends on an input; keep what it will overwrite."""
        try:
            return self._before(func, args, kwargs)
        except Exception as error:  # the user's forward pass must go on
            self._note_error(func, error)
            return None

    def after(self, func: Any, encoded: tuple[Any, Any] | None, result: Any) -> None:
        """Record an operation that `before` returned the arguments of."""
        if encoded is None:
            return
        try:
            results = tuple(self.graph.add_node(item) for item in tensors(result))
            if self._finds_functions and (name := _custom_function()) is not None:
                self.graph.functions[len(self.graph.operations)] = name
            self.graph.operations.append(Operation(func, *encoded, results))
        except Exception as error:  # such as a result without memory of its own kind
            self._note_error(func, error)

    def _before(self, func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        graph, encoded = self.graph, None
        read = tensors((args, kwargs))
        nodes = {id(tensor): node for tensor in read if (node := graph.node(tensor)) is not None}
        if nodes:
            if Trait.READS_NUMBER in traits(func.overloadpacket.__name__) and args[0].is_floating_point():
                self._has_read_numbers = True
            elif self._has_read_numbers and any(map(_looks_computed, leaves((args, kwargs)))):
                graph.mark_incomplete(f"a number was read out with `.item()`, and `{func}` uses a computed number")
            encode = partial(self._encode, nodes)
            encoded = (map_tree(args, encode), map_tree(kwargs, encode) if kwargs else {})
        elif any(map(graph.shares_memory, read)):
            graph.mark_incomplete(f"`{func}` reads memory of the tail through a tensor that was made outside it")
        if not self.is_convolving and self._is_forbidden(read):
            graph.mark_incomplete(f"`{func}` uses the weight of the convolution once more")
        for tensor in written(func, args, kwargs):  # copy captured values that it is about to overwrite
            graph.captures.preserve(storage_of(tensor))
        return encoded

    def _is_forbidden(self, read: list[Tensor]) -> bool:
        """Return whether a tensor lies in memory of the weight; a sharded one is moved, and has none meanwhile."""
        present = {storage.data_ptr() for storage in self._forbidden} - {0}
        return not present.isdisjoint(map(storage_of, read))

    def _encode(self, nodes: dict[int, int], item: Any) -> Any:
        if not isinstance(item, Tensor):
            return item
        if (node := nodes.get(id(item))) is not None:
            return Node(node)
        if self.graph.shares_memory(item):
            self.graph.mark_incomplete("the tail reads its own memory through a tensor that was made outside it")
        return Captured(self.graph.captures.add(item))

    def _note_error(self, func: Any, error: Exception) -> None:
        self.graph.mark_incomplete(f"recording `{func}` failed: {error!r}")
        if isinstance(error, torch.OutOfMemoryError):
            self.graph.out_of_memory = error


class ConvolutionWatch:
    """Waits for the convolution within a module's call: the record begins at the operation's own output.

    Args:
        on_convolution: called with the input, the output and the arguments of each convolution that runs.
    """

    def __init__(self, on_convolution: Callable[[Tensor, Tensor, dict[str, Any]], None]) -> None:
        self._on_convolution = on_convolution

    def before(self, func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        """Keep the arguments of a convolution."""
        return (args, kwargs) if func.overloadpacket.__name__ in CONVOLUTIONS else None

    def after(self, func: Any, encoded: tuple[Any, Any] | None, result: Any) -> None:
        """Hand a convolution on."""
        if encoded is not None:
            named = named_arguments(func, *encoded)
            if not named.get("transposed"):
                self._on_convolution(named.pop("input"), result, named)


def _custom_function() -> str | None:
    """Return the name of the `torch.autograd.Function` that runs, other than torch's own; its backward may be any."""
    frame = currentframe()
    while frame is not None:
        if frame.f_code.co_name == "apply" and frame.f_code.co_filename == torch.autograd.function.__file__:
            function = frame.f_locals["cls"]
            if function.__module__.partition(".")[0] != "torch":
                return str(function.__name__)
        frame = frame.f_back
    return None


class Listener(Protocol):
    """Is told of every operation: `after` gets what `before` returned. Neither may raise."""

    def before(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Look at an operation that is about to run."""

    def after(self, func: Any, encoded: Any, result: Any) -> None:
        """Look at what it returned."""


def _looks_computed(number: Any) -> bool:
    """Return whether a floating number has more digits than one that people write."""
    return isinstance(number, float) and float(f"{number:.6g}") != number


class Dispatcher(TorchDispatchMode):
    """The one dispatch mode of a thread, through which all of its tracers listen: they start and stop in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.tracers: list[Listener] = []
        self.is_paused = False
        self._retained = 0  # by how many the mode is kept on the stack while no tracer listens
        self._entered = False

    def attach(self, tracer: Listener) -> None:
        """Let a tracer listen, if it does not."""
        self.settle()
        if (other := _get_current_dispatch_mode()) not in (None, self):
            raise GraphError(f"another dispatch mode is active: {type(other).__name__}")
        if tracer not in self.tracers:
            self.tracers.append(tracer)
        self._enter()

    def detach(self, tracer: Listener) -> None:
        """Let a tracer listen no more."""
        if tracer in self.tracers:
            self.tracers.remove(tracer)
        self.settle()

    def retain(self) -> None:
        """Stay on the stack until `release`: a mode entered within a compiled module's call ends with that call."""
        self._retained += 1
        self._enter()

    def release(self) -> None:
        """Undo one `retain`."""
        self._retained -= 1
        self.settle()

    def renew(self) -> None:
        """Enter the stack anew: a mode that was entered within a compiled module's call ends with that call."""
        if self._entered and _get_current_dispatch_mode() is self:
            self.__exit__(None, None, None)
            self.__enter__()

    def _enter(self) -> None:
        if not self._entered:
            self._entered = True
            self.__enter__()

    def settle(self) -> None:
        """Leave the stack once nobody listens; below a mode that the user entered since, wait for its end.

        Within an operation that cannot be done: it is to be called again afterwards.
        """
        if self._entered and not self.tracers and not self._retained and _get_current_dispatch_mode() is self:
            self._entered = False
            self.__exit__(None, None, None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and record it for each tracer that it concerns."""
        kwargs = kwargs or {}
        # Private, as of torch 2.13: whether the backward pass is running, which is not the network.
        running_backward = torch._C._current_graph_task_id() != -1
        if self.is_paused or running_backward or not self.tracers:
            return func(*args, **kwargs)
        pending = [(tracer, tracer.before(func, args, kwargs)) for tracer in self.tracers]
        result = func(*args, **kwargs)
        for tracer, arguments in pending:  # a watch may start another tracer
            tracer.after(func, arguments, result)
        return result


class _OfThread(threading.local):
    """What each thread has of its own: torch's stack of modes is by thread, too."""

    def __init__(self) -> None:
        self.dispatcher = Dispatcher()


_THREAD = _OfThread()


def dispatcher() -> Dispatcher:
    """Return the dispatcher of this thread."""
    return _THREAD.dispatcher


@contextmanager
def not_recorded() -> Iterator[None]:
    """Hide what is computed within, which is not the user's, from every tracer of this thread."""
    mode = dispatcher()
    before, mode.is_paused = mode.is_paused, True
    try:
        yield
    finally:
        mode.is_paused = before
