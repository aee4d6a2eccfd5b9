"""Hooks on a model that record its forward passes as functions of the parameters of any layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, cast

from torch import Tensor, nn

from lightning_flatness.errors import Refusal
from lightning_flatness.recording.builder import ended_by
from lightning_flatness.recording.dispatch import GraphTracer, dispatcher
from lightning_flatness.recording.hooks import Wanted
from lightning_flatness.recording.layers import CLASSIFIERS, outer, program_kind, require_name
from lightning_flatness.recording.nodes import storage_of
from lightning_flatness.recording.recorded_layers import RecordedLayers
from lightning_flatness.recording.recorder import ForwardRecorder, holders_of


class LayersBuilder:
    """What has been recorded so far of one pass.

    Args:
        parameters: the inputs of the graph, by name.

    Attributes:
        tracer: of the operations; None as long as no module has run.
        layer: the layers in words.
        nodes: of the parameters, by name.
        output: what the outermost module that has returned so far returned first, with its name.
        choice: None: the layers are named.
        is_ignored: whether nothing is recorded.
        failure: the exception that ended the record.
    """

    def __init__(self, parameters: Mapping[str, Tensor], layer: str) -> None:
        """Start with nothing."""
        self._parameters = parameters
        self.layer = layer
        self.tracer: GraphTracer | None = None
        self.nodes: dict[str, int] = {}
        self.output: tuple[str | None, Any] = None, None
        self.choice = None
        self.is_ignored = False
        self.failure: Exception | None = None

    def before_module(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Start the record at the first module that runs."""
        if self.tracer is None:
            tracer = GraphTracer(keeps_maps=False)  # all of them are computed anew from the parameters
            self.nodes = {name: tracer.graph.add_input(value)[0] for name, value in self._parameters.items()}
            self.tracer = tracer
            tracer.start()

    def after_layer(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Refuse an empty batch."""
        if isinstance(output, Tensor) and output.numel() == 0:
            raise ValueError(f"A batch must hold at least one sample; `{name}` got none.")

    def after_network(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Note what a module around the layers returned, if none further out has."""
        self.output = outer(self.output, name, output)

    def fail(self, error: Exception) -> None:
        """Record no more, because of this error."""
        self.failure = error
        self.stop()

    def stop(self) -> None:
        """Record no more."""
        if self.tracer is not None:
            self.tracer.stop()
        dispatcher().settle()

    def refusal(self, modules: dict[str, nn.Module]) -> Refusal | None:
        """Return why there is nothing to measure; None if there is.

        Raises:
            ValueError: if a batch was empty.
            OutOfMemoryError: if memory was short; that says nothing about the network.
        """
        failure = self.failure or (self.tracer.graph.out_of_memory if self.tracer else None)
        if (failed := ended_by(failure)) is not None or self.tracer is not None:
            return failed
        kind = program_kind(modules.values())
        remedy = f"the network is {kind}; give the eager network that it was made from" if kind else "none did"
        return Refusal(f"A forward pass must run {self.layer}; {remedy}.")


class LayersRecorder(ForwardRecorder):
    """Records the forward passes of a model as functions of layers' parameters, without touching them.

    While entered, everything that depends on the weights of the named layers is recorded, until `take_pass` yields the
    record as a value; the loss is to be computed before that. The pass itself runs as it would without the recorder.

    Args:
        model: any module whose forward pass will run.
        layers: names of linear layers or convolutions; `"all"`: every one, and all other parameters of the network.

    Raises:
        ValueError: if a named module does not exist or is of the wrong kind, or its weight is computed.

    Example:
        >>> with LayersRecorder(model, "all") as recorder:  # doctest: +SKIP
        ...     loss = criterion(model(images), labels)
        ...     recorded = recorder.take_pass(loss)
    """

    def __init__(self, model: nn.Module, layers: tuple[str, ...] | Literal["all"] = "all") -> None:
        """Check the names against the model."""
        super().__init__(model)
        self._model, self.is_whole = model, layers == "all"
        weights = {id(value): name for name, value in model.named_parameters(remove_duplicate=True)}
        owned = {name: weights.get(id(module._parameters.get("weight"))) for name, module in self._modules.items()}
        if layers == "all":
            layers = tuple(n for n, m in self._modules.items() if isinstance(m, CLASSIFIERS) and owned[n] is not None)
        for name in layers:
            require_name(self._modules, name, "layer", CLASSIFIERS)
            if owned[name] is None:
                raise ValueError(
                    f"The weight of `{name}` must be a parameter of its own; it is computed, as by a parametrization. "
                    "Name another layer, or remove the parametrization (`parametrize.remove_parametrizations`)."
                )
        self._weights = {name: cast(str, owned[name]) for name in layers}
        self.layers = layers
        self.layer = "all" if self.is_whole else ", ".join(layers)
        self.clear()

    def clear(self) -> None:
        """Forget what was recorded."""
        super().clear()
        chosen = set(self._weights.values())
        parameters = {name: value for name, value in self._model.named_parameters() if self.is_whole or name in chosen}
        words = "a linear layer or a convolution" if self.is_whole else ", ".join(f"`{name}`" for name in self.layers)
        self._builder = LayersBuilder(parameters, words)  # type: ignore[assignment]

    def _verdict(self, loss: Tensor) -> RecordedLayers | Refusal:  # type: ignore[override]
        builder = cast(LayersBuilder, self._builder)
        tracer = cast(GraphTracer, builder.tracer)
        tracer.finalize()
        graph, node = tracer.graph, tracer.graph.node(loss)
        if node is None or loss.numel() != 1:
            what = "does not depend on it" if node is None else f"has shape {tuple(loss.shape)}"
            return Refusal(
                f"The loss must be one number that depends on {builder.layer}; it {what}. Return it from the step, or "
                "name other layers."
            )
        own = {storage_of(value) for value in (*self._model.parameters(), *self._model.buffers())}
        return RecordedLayers(
            graph,
            builder.nodes,
            self._weights,
            self.is_whole,
            node,
            tuple(graph.cuts(list(builder.nodes.values()), node)),
            frozenset(graph.captures.of_storages(own)),
        )

    def _wanted(self) -> Iterator[Wanted]:
        outer = holders_of(self.layers)
        for name, module in self._modules.items():
            if name in self.layers or name in outer:
                yield Wanted(name, module, "before_module", "after_layer" if name in self.layers else None)
            if name in outer:
                yield Wanted(name, module, None, "after_network")
