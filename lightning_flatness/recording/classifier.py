"""Hooks on a model that record its forward passes, from the classifier's own output to the loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple, cast

from torch import Tensor, nn

from lightning_flatness.errors import Refusal, UnsupportedTailError
from lightning_flatness.recording.builder import PassBuilder, ended_by, is_own_weight, start_at
from lightning_flatness.recording.dispatch import ConvolutionWatch, GraphTracer, dispatcher
from lightning_flatness.recording.graph import OperationGraph
from lightning_flatness.recording.hooks import Wanted
from lightning_flatness.recording.layers import CLASSIFIERS
from lightning_flatness.recording.memories import DependenceWatch
from lightning_flatness.recording.network_call import NetworkCall
from lightning_flatness.recording.operation import named_arguments, tensors
from lightning_flatness.recording.recorded_pass import ConvolutionCall, RecordedPass
from lightning_flatness.recording.recorder import ForwardRecorder, holders_of, weight_is_shared
from lightning_flatness.recording.weights import WeightCopies

_NONE = (
    "The model has none. Modules in a plain list or dictionary are not part of a model: assign the network to an "
    "attribute, or use `nn.ModuleList`."
)
_KEPT = 4  # layers: what runs behind the classifier need not reach the loss
_PRODUCTS = {"addmm": ("mat1", "mat2"), "mm": ("self", "mat2"), "linear": ("input", "weight")}


class _Candidate(NamedTuple):
    """A layer that may be the last one, and what has been recorded from its output on if it is linear.

    Attributes:
        name: of the layer.
        source: its number, see `DependenceWatch`.
        tracer: of the operations; None: the layer is not linear, and nothing is recorded.
        calls: of the layer.
        copies: of its weight.
        network_call: the outermost call of a module during which it ran.
    """

    name: str
    source: int
    tracer: GraphTracer | None
    calls: list[ConvolutionCall]
    copies: WeightCopies
    network_call: NetworkCall | None


class _LinearWatch(ConvolutionWatch):
    """Waits for the operation of a linear layer or a convolution within a module's call.

    Args:
        on_product: called with the input, the output and the weight of the product, one row per output; None in the
            place of the weight for a convolution that is no linear layer.
    """

    def __init__(self, on_product: Callable[[Tensor, Tensor, Tensor | None], None]) -> None:
        super().__init__(self._of_convolution)
        self._on_product = on_product

    def before(self, func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        """Keep the arguments of a product or a convolution."""
        known = func.overloadpacket.__name__ in _PRODUCTS
        return (args, kwargs) if known else super().before(func, args, kwargs)

    def after(self, func: Any, encoded: tuple[Any, Any] | None, result: Any) -> None:
        """Hand a product on."""
        name = func.overloadpacket.__name__
        if encoded is None or name not in _PRODUCTS:
            super().after(func, encoded, result)
            return
        named = named_arguments(func, *encoded)
        if named.get("beta", 1) == named.get("alpha", 1) == 1:
            inputs, weight = (named[argument] for argument in _PRODUCTS[name])
            self._on_product(inputs, result, weight if name == "linear" else weight.t())

    def _of_convolution(self, inputs: Tensor, output: Tensor, arguments: dict[str, Any]) -> None:
        """Hand a convolution on: one that sees all of its input at once, from a single position, is a linear layer."""
        weight = arguments["weight"]
        sees_all = inputs.shape[1:].numel() == weight.shape[1:].numel() and output.shape[2:].numel() == 1
        is_linear = sees_all and arguments["groups"] == 1 and not any(arguments["padding"])
        self._on_product(inputs, output, weight if is_linear else None)


class ClassifierBuilder(PassBuilder):
    """What has been recorded so far, from each of the last layers on.

    The classifier is the last layer that the loss depends on, if that is a linear one. Which one that is shows only
    when the loss is known, so the last few that ran are followed. Each linear one has a record of its own. For the
    others it is enough to watch what depends on them.

    Attributes:
        candidates: the layers that are followed, in the order in which they ran first.
        watch: knows what depends on them; None once the classifier is known.
    """

    def __init__(self, wanted: str | None, copies: WeightCopies | None, names: Iterable[str] = ()) -> None:
        """Start with nothing."""
        self._names = tuple(names)
        super().__init__(wanted, copies)
        self.choice = None  # between convolutions
        self.candidates: list[_Candidate] = []
        self.watch = None if self._keeps_copies else DependenceWatch(len(self._names))

    def before_layer(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Wait for the product within the call of a module."""
        samples = next((len(tensor) for tensor in tensors([args, kwargs]) if tensor.dim()), 0)

        def begin(inputs: Tensor, output: Tensor, weight: Tensor | None) -> None:
            try:
                self._begin_layer(name, module, samples, inputs, output, weight)
            except UnsupportedTailError:  # its weight is sharded; another one's need not be
                self._drop(name)
            except Exception as error:  # the user's forward pass must go on
                self.fail(error)

        self._end_watch()  # a layer within another one
        if self.watch is not None:
            dispatcher().attach(self.watch)
        self._watch = _LinearWatch(begin)
        dispatcher().attach(self._watch)
        self._set_running(name, True)

    def after_layer(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """End the wait when the module's call has ended."""
        self._end_watch()
        self._set_running(name, False)

    def stop(self) -> None:
        """Record no more."""
        for candidate in self.candidates:
            if candidate.tracer is not None:
                candidate.tracer.stop()
        if self.watch is not None:
            dispatcher().detach(self.watch)
        self._end_watch()

    def reaches(self, candidate: _Candidate, tensor: Tensor) -> bool:
        """Return whether a tensor depends on a candidate, and not only in steps, as an accuracy does."""
        if candidate.tracer is None:
            return self.watch is not None and self.watch.depends(tensor, candidate.source)
        node = candidate.tracer.graph.node(tensor)
        return node is not None and candidate.tracer.graph.is_moved(node)

    def reads_of(self, graph: OperationGraph, other: _Candidate) -> bool:
        """Return whether an operation of a graph uses floating numbers that only another candidate made."""
        captured = {each.index for operation in graph.operations for each in operation.captured}
        originals = filter(Tensor.is_floating_point, map(graph.captures.original, captured))
        if other.tracer is not None:
            return any(other.tracer.graph.node(original) is not None for original in originals)
        watch = cast(DependenceWatch, self.watch)
        return any(watch.depends(original, other.source, in_steps=True) for original in originals)

    def refusal(self, modules: dict[str, nn.Module]) -> Refusal | None:
        """Return why there is nothing to measure; None if there is."""
        failed = self._failed() or ended_by(None if self.watch is None else self.watch.failure)
        if failed is not None or self.candidates:
            return failed
        there = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
        remedy = f"Name one that runs with `classifier=...`: {there}." if there else _NONE
        return Refusal(f"A forward pass must run a linear layer with its own weight; none did. {remedy}")

    def _begin_layer(
        self, name: str, module: nn.Module, samples: int, inputs: Tensor, output: Tensor, weight: Tensor | None
    ) -> None:
        if self._watch is None or not (weight is None or _is_own_weight(module, weight)):
            return
        if len(output) == 0:
            raise ValueError(f"A batch must hold at least one sample; `{name}` got none.")
        dispatcher().detach(self._watch)
        found = next((candidate for candidate in self.candidates if candidate.name == name), None)
        if found is None:
            if name in self._have_run:  # and is followed no more: not all of its calls would be on the record
                return
            found = self._followed(name, module, weight is not None)
        if self.watch is not None:
            self.watch.add(output, found.source)
        self.tracer, self.layer = found.tracer, name
        if found.tracer is None:
            return
        graph = found.tracer.graph
        node, captured = graph.add_input(output)
        if weight is not None:
            weights, geometry = found.copies.of(module), {"samples": samples}
            found.calls.append(ConvolutionCall(node, captured, graph.captures.add(inputs), *weights, geometry))

    def _followed(self, name: str, module: nn.Module, is_linear: bool) -> _Candidate:
        """Follow a layer, and no longer the one that ran first."""
        copies = self.copies if self._keeps_copies else WeightCopies()
        tracer = GraphTracer(finds_functions=not self._keeps_copies) if is_linear else None
        found = _Candidate(name, len(self._have_run), tracer, [], copies, self._open_call)
        self._have_run.add(name)
        self.candidates.append(found)
        if tracer is not None:
            start_at(module, tracer)
        for old in self.candidates[:-_KEPT]:
            self._drop(old.name)
        return found

    def _finish(self, call: NetworkCall, output: Any) -> None:
        """Keep what a call returned, for each layer that ran during it."""
        for number, each in enumerate(self.candidates):
            if each.network_call is call and each.tracer is not None:
                self.candidates[number] = each._replace(network_call=call.finished(output, each.tracer.graph))

    def _set_running(self, name: str, is_running: bool) -> None:
        for candidate in self.candidates:
            if candidate.name == name and candidate.tracer is not None:
                candidate.tracer.is_convolving = is_running

    def _drop(self, name: str) -> None:
        """Follow a layer no more."""
        for candidate in [candidate for candidate in self.candidates if candidate.name == name]:
            if candidate.tracer is not None:
                candidate.tracer.stop()
            self.candidates.remove(candidate)
        last = self.candidates[-1] if self.candidates else None
        self.tracer, self.layer = (None, None) if last is None else (last.tracer, last.name)


class ClassifierRecorder(ForwardRecorder):
    """Records the forward passes of a model from its classifier on, without touching them.

    The classifier is the last layer that the loss depends on, which must be linear; a convolution that sees all of its
    input at once is. Use it as a `ForwardRecorder`.

    Args:
        model: any module whose forward pass will run.
        classifier: name of the linear layer; None: found.

    Raises:
        ValueError: if the named module does not exist or is of the wrong kind; lists the candidates.

    Example:
        >>> with ClassifierRecorder(model) as recorder:  # doctest: +SKIP
        ...     loss = criterion(model(images), labels)
        ...     recorded = recorder.take_pass(loss)
    """

    _builder_type = ClassifierBuilder

    def __init__(self, model: nn.Module, classifier: str | None = None) -> None:
        """Check the name against the model."""
        super().__init__(model, None, classifier)
        self.layer = classifier
        self._builder = ClassifierBuilder(classifier, None, self._modules)

    def depends(self, tensor: Tensor) -> bool:
        """Return whether a tensor depends on one of the last layers, and not only in steps."""
        builder = cast(ClassifierBuilder, self._builder)
        return any(builder.reaches(candidate, tensor) for candidate in builder.candidates)

    def _verdict(self, loss: Tensor) -> RecordedPass | Refusal:
        builder = cast(ClassifierBuilder, self._builder)
        found = [candidate for candidate in builder.candidates if builder.reaches(candidate, loss)]
        if not found or loss.numel() != 1:
            names = [candidate.name for candidate in builder.candidates]
            what = f"has shape {tuple(loss.shape)}" if found else "does not"
            return Refusal(
                f"The loss must be one number that depends on the output of one of the last layers, which are {names}; "
                f"it {what}. Return it from the step, or name the classifier (`classifier=...`)."
            )
        name, _, tracer, calls, copies, network_call = found[-1]
        if tracer is None or not calls:
            return Refusal(
                f"A network must end in a linear layer; the last layer that the loss depends on is `{name}`, which is "
                f"none. Name another one with `classifier=...`."
            )
        if tracer.graph.out_of_memory is not None:
            raise tracer.graph.out_of_memory
        tracer.finalize()
        graph, module = tracer.graph, self._modules[name]
        node = cast(int, graph.node(loss))
        if not self.is_settled:
            self._copies, self.is_settled, self.layer, self.classifier = copies, True, name, name
            self._weight_is_shared = weight_is_shared(module, self._modules)
            self._install()
        cuts = tuple(graph.cuts([call.node for call in calls], node))
        return RecordedPass(
            graph,
            name,
            module,
            tuple(calls),
            node,
            cuts,
            weight_is_shared=self._weight_is_shared,
            network_call=network_call,
            is_alone=not any(map(partial(builder.reads_of, graph), found[:-1])),
        )

    def _wanted(self) -> Iterator[Wanted]:
        linear = {
            name
            for name, module in self._modules.items()
            if isinstance(module, CLASSIFIERS) and self.layer in (None, name)
        }
        holders = holders_of(linear)
        for name, module in self._modules.items():
            if name in linear:
                yield Wanted(name, module, "before_layer", "after_layer")
            if name in holders or (name == "" and name in linear):
                yield Wanted(name, module, "before_network", "after_network")


def _is_own_weight(module: nn.Module, used: Tensor) -> bool:
    """Return whether a product uses the weight of the module; that of a square weight's transpose does not."""
    is_computed = "weight" not in module._parameters
    return is_own_weight(module, used) and (is_computed or used.stride() == cast(Tensor, module.weight).stride())
