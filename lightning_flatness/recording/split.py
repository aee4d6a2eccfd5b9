"""A compiled network that is recorded: compiled up to the measured layer, and run by operations from there on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial
from inspect import getclosurevars
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from lightning_flatness.recording.dispatch import dispatcher
from lightning_flatness.recording.eager import EAGER
from lightning_flatness.recording.hooks import Hooks

_PRODUCTS = (torch.conv1d, torch.conv2d, torch.conv3d, F.linear)
_REGIONS = ("autocast", "grad_enabled", "inference_mode", "saved_tensors", "vmap")  # parts of names of functions


class _Compiled(NamedTuple):
    """A module that is compiled, as a whole.

    Attributes:
        module: the network itself.
        holder: the module whose attribute is the compiled call.
        attribute: its name.
        call: calls the network as it is.
        backend: what compiles a graph.
    """

    module: nn.Module
    holder: nn.Module
    attribute: str
    call: Callable[..., Any]
    backend: Callable[..., Any]


class _Unsplit(Exception):
    """Says why a compiled network is not split."""


class Split:
    """A second compilation of a compiled module: what runs before a layer is compiled, the rest runs by operations.

    A compiled graph runs no hooks. In the rest, those that are given here run. The user's own graphs are not used and
    stay as they are. What cannot be split runs eagerly, and with it the modules' hooks.

    Args:
        model: the model.
        layer: the layer from whose call on everything runs by operations.

    Attributes:
        problem: why the network runs eagerly; None: it does not, as far as is known.
    """

    def __init__(self, model: nn.Module, layer: nn.Module) -> None:
        """Compile nothing yet."""
        self.problem: str | None = None
        self._layer = layer
        self._has_compiled = self._has_run = False
        try:
            self._compiled = _compiled_around(model, layer)
        except _Unsplit as reason:
            self.problem = str(reason)
            return
        call = self._compiled.call

        def run(*args: Any, **kwargs: Any) -> Any:
            return call(*args, **kwargs)

        run.__code__ = run.__code__.replace()  # graphs belong to code objects; these are those of this network alone
        self._run = torch.compile(run, backend=self._compile, fullgraph=True)

    def install(self, hooks: Hooks, forget: Callable[[], None]) -> None:
        """Let the calls of the module go through the split network.

        Args:
            hooks: of the recorder; they are installed as well.
            forget: is called when nothing of a call has been recorded that went wrong.
        """
        holder, attribute = self._compiled.holder, self._compiled.attribute
        self._hooks, self._forget, self._before = hooks, forget, getattr(holder, attribute)
        setattr(holder, attribute, self._call)

    def uninstall(self) -> None:
        """Let them go where they went before."""
        setattr(self._compiled.holder, self._compiled.attribute, self._before)

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        try:
            is_split, output = self._tried(args, kwargs)
            return output if is_split else self._before(*args, **kwargs)
        finally:
            dispatcher().renew()

    def _tried(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[bool, Any]:
        """Return whether the split network could be called, and what it returned."""
        # Nothing is compiled while a record is made, as in a second call of one step.
        if self.problem is not None or _get_current_dispatch_mode() is not None:
            return False, None
        with EAGER.lifted("fail_on_recompile" if self._has_compiled else "default") as is_alone:
            if not is_alone:
                return False, None
            self._has_run = False
            try:
                # A hook would become part of what is compiled.
                with nullcontext() if self._has_compiled else self._hooks.suspended():
                    output = self._run(*args, **kwargs)
            except Exception as error:  # the user's own comes again
                if self._has_compiled and not self._has_run:  # a batch of another size, or another mode
                    return False, None
                error = getattr(error, "inner_exception", error)  # of what dynamo says about a backend
                self.problem = str(error).strip().partition("\n")[0] or repr(error)
                self._forget()
                return False, None
        self._has_compiled = True
        if self._has_run:
            self._hooks.around(self._compiled.module, args, lambda: output)
        return True, output

    def _compile(self, graph_module: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        """Return what runs the graph of the network; dynamo calls it as its backend."""
        first, last, used = _parts(graph_module, self._layer, self._hooks.layers, self._heard)
        prefix = self._compiled.backend(first, inputs)

        def call(*arguments: Any) -> Any:
            self._has_run = True
            return last.forward(*[arguments[index] for index in used], *prefix(*arguments))

        return call

    def _heard(self, module: nn.Module, product: Callable[..., Any]) -> Callable[..., Any]:
        """Return what runs a product of the rest with the hooks of its module around it."""

        def heard(given: Any, *others: Any, **named: Any) -> Any:
            return self._hooks.around(module, (given,), partial(product, given, *others, **named))

        return heard


def _compiled_around(model: nn.Module, layer: nn.Module) -> _Compiled:
    """Return the compiled module around a layer, if nothing else is compiled.

    Raises:
        _Unsplit: if something is, or it is not known how it is compiled.
    """
    found = [module for module in model.modules() if is_compiled(module)]
    if len(found) != 1:
        raise _Unsplit(f"{len(found)} of its modules are compiled")
    holder = cast(Any, found[0])
    try:
        from torch._dynamo.eval_frame import innermost_backend  # there once something is compiled, else slow to import

        if hasattr(holder, "_orig_mod"):
            module, where, call = holder._orig_mod, "forward", holder._orig_mod.__call__
            backend = innermost_backend(holder.dynamo_ctx.callback)
        elif holder._compiled_call_impl is not None:
            module, where, call = holder, "_compiled_call_impl", holder._call_impl
            backend = innermost_backend(getclosurevars(holder._compiled_call_impl).nonlocals["callback"])
        else:
            raise _Unsplit("a method is compiled, and no module")
    except (ImportError, AttributeError, KeyError, TypeError) as error:  # names of torch 2.13
        raise _Unsplit(f"this version of torch keeps what compiles a module elsewhere ({error!r})") from error
    if layer not in module.modules():
        raise _Unsplit("the measured layer is outside of what is compiled")
    return _Compiled(module, holder, where, call, backend)


def is_compiled(module: nn.Module) -> bool:
    """Return whether a module is compiled, or one of its methods: the dispatch mode ends with such a call."""
    methods = (value for value in vars(module).values() if callable(value))
    return (
        hasattr(module, "_orig_mod")
        or module._compiled_call_impl is not None
        or any(hasattr(method, "_torchdynamo_orig_callable") for method in methods)
    )


def _parts(
    graph_module: fx.GraphModule,
    layer: nn.Module,
    modules: Iterable[nn.Module],
    heard: Callable[[nn.Module, Callable[..., Any]], Callable[..., Any]],
) -> tuple[fx.GraphModule, fx.GraphModule, list[int]]:
    """Return the graph up to a layer, the rest, and the positions of the graph's inputs that the rest uses.

    The first part returns what the rest needs of it; the rest takes these inputs, then that.

    Args:
        graph_module: the graph.
        layer: the layer.
        modules: whose products are heard in the rest.
        heard: returns what runs a product of a module there.

    Raises:
        _Unsplit: if the layer does not run exactly once, or there is doubt.
    """
    nodes = list(graph_module.graph.nodes)
    inputs = [node for node in nodes if node.op == "placeholder"]
    owners = {id(module.weight): module for module in modules}
    examples = {node: argument.example for node in inputs if (argument := node.meta.get("grapharg")) is not None}
    weights = {node: owners[id(example)] for node, example in examples.items() if id(example) in owners}
    calls = {node: weights[a] for node in nodes for a in node.all_input_nodes if a in weights}
    cuts = [index for index, node in enumerate(nodes) if calls.get(node) is layer]
    if len(cuts) != 1 or nodes[cuts[0]].target not in _PRODUCTS:
        raise _Unsplit(f"the weight of the measured layer is used {len(cuts)} times, or not by a product")
    if any(part in str(node.target) for node in nodes for part in _REGIONS):
        raise _Unsplit("the network sets modes of its own")
    head, rest = [node for node in nodes[: cuts[0]] if node not in inputs], nodes[cuts[0] :]
    crossing = [node for node in head if any(user in rest for user in node.users)]
    if not all(isinstance(node.meta.get("example_value"), Tensor) for node in crossing):
        raise _Unsplit("what the measured layer is given is not all tensors")
    if not any(node.target in _PRODUCTS for node in head):
        raise _Unsplit("nothing that is worth it runs before the measured layer")
    first, last = fx.Graph(), fx.Graph()
    known: dict[fx.Node, fx.Node] = {}
    for node in inputs + head:
        known[node] = first.node_copy(node, known.__getitem__)
    first.output(tuple(known[node] for node in crossing))
    used = [index for index, node in enumerate(inputs) if any(user in rest for user in node.users)]
    known = {node: last.placeholder(node.name) for node in [*(inputs[index] for index in used), *crossing]}
    for node in rest:
        known[node] = last.node_copy(node, known.__getitem__)
        if node in calls and node.target in _PRODUCTS:
            known[node].target = heard(calls[node], cast("Callable[..., Any]", node.target))
    return fx.GraphModule(graph_module, first), fx.GraphModule(graph_module, last), used
