"""Measures recorded passes of any network, layer by layer, by backward passes from the logits."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_flatness.curvature.jacobian.contributions import Layout, Structure, arranged, layer_flatness, vector
from lightning_flatness.curvature.jacobian.factor import loss_factor
from lightning_flatness.curvature.jacobian.plan import Plan, Use
from lightning_flatness.curvature.jacobian.replay import Replay, Tap
from lightning_flatness.curvature.objective import Objective, objective
from lightning_flatness.curvature.quantities import SampleQuantities
from lightning_flatness.errors import GraphError, NonFiniteError, Refusal, require_counts
from lightning_flatness.losses import Differentiated
from lightning_flatness.precision import allclose_for_dtype, full_precision, upcast
from lightning_flatness.recording.dispatch import not_recorded
from lightning_flatness.recording.graph import Cut, is_overwritten
from lightning_flatness.recording.recorded_layers import RecordedLayers

Curvature = Literal["hessian", "ggn"]
CHUNK_BYTES = 128 * 2**20
"""What the derivatives of a group of samples may take at once by default."""

_FUSED = " Let attention run step by step: `torch.backends.mha.set_fastpath_enabled(False)`."


@dataclass(frozen=True)
class LayerQuantities:
    """The quantities of one batch for each layer, and for the whole network if it was asked for.

    Attributes:
        by_layer: quantities of each sample, by the layer's name. `curvature` says whether they belong to the Hessian or
            to its Gauss-Newton part.
        network: trace with respect to all parameters that are covered, shape (n,); loss per squared parameter. None
            where single layers were named.
        left_out: names of parameters that `network` does not cover.
        network_curvature: whether `network` belongs to the Hessian or to its Gauss-Newton part.
    """

    by_layer: dict[str, SampleQuantities]
    network: Float[Tensor, " n"] | None = None
    left_out: tuple[str, ...] = ()
    network_curvature: Curvature = "hessian"

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(next(iter(self.by_layer.values())))

    @property
    def curvature(self) -> dict[str, Curvature]:
        """What the values of each layer belong to."""
        return {name: quantities.curvature for name, quantities in self.by_layer.items()}


@dataclass(frozen=True)
class _Network:
    """A record with all that does not depend on which samples are measured."""

    recorded: RecordedLayers
    cut: Cut
    values: Tensor  # of the cut
    goal: Objective
    plan: Plan
    factor: Tensor  # of the loss's curvature at the cut, shape (m, n, j)
    signs: Tensor | None  # of the factor's rows, shape (m, n); None: all positive
    grams: dict[str, Tensor]  # `W W^T` by the name of the weight


class JacobianMethod:
    r"""The Hessian trace and relative flatness of any linear layer or convolution, for every sample.

    The curvature of the loss in the logits has \(C - 1\) factors for cross-entropy, one for each logit for other
    losses. A backward pass of each reaches all layers; a layer's input and the cotangent at its output give what the
    factor contributes. The values are the Hessian's where the network is piecewise linear behind the layer, else those
    of its generalized Gauss-Newton part; `SampleQuantities.curvature` says which.

    Args:
        chunk_bytes: how much memory the derivatives may take at once; samples are measured in groups that fit.

    Raises:
        ValueError: if `chunk_bytes` is not a whole number, at least 1.

    Example:
        >>> method = JacobianMethod()
        >>> method.quantities(recorder.take_pass(loss)).by_layer["conv1"].hessian_trace  # doctest: +SKIP
    """

    name = "jacobian"

    def __init__(self, chunk_bytes: int = CHUNK_BYTES) -> None:
        """Check the argument."""
        require_counts(chunk_bytes=chunk_bytes)
        self._chunk_bytes = chunk_bytes

    def quantities(self, recorded: RecordedLayers, samples: slice = slice(None)) -> LayerQuantities:
        """Return the quantities of a recorded pass, for the samples that the loss depends on.

        Args:
            recorded: the pass.
            samples: which of its samples to measure.

        Raises:
            UnsupportedTailError: if the samples are coupled, or a step cannot be repeated or differentiated.
            NonFiniteError: if the logits hold NaN.
        """
        device = recorded.graph.tensor_of(recorded.loss).device
        with ExitStack() as stack:
            for context in (not_recorded(), torch.inference_mode(False), full_precision(device)):
                stack.enter_context(context)
            try:
                return self._quantities(_network(recorded), samples)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # what cannot be repeated, or has no derivative
                is_fused = "_native_multi_head" in recorded.path or "_transformer_encoder" in recorded.path
                raise Refusal(
                    "The steps from the layers to the loss must be repeatable, differentiable and of each sample on "
                    f"its own; {error}.{_FUSED if is_fused else ''}\n  path: {recorded.path}",
                    error,
                ).error() from error

    def _quantities(self, network: _Network, samples: slice) -> LayerQuantities:
        goal, n = network.goal, len(network.values)
        kept = goal.kept(samples)
        step = max(1, min(n, self._chunk_bytes // max(1, _bytes_per_sample(network))))
        try:
            sums = self._by_chunks(network, kept, step)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            if step >= n:
                raise
            sums = self._by_chunks(network, kept, n)  # a step mixes the samples' places
        traces = {name: trace[kept] for name, (trace, _) in sums.items() if name not in network.plan.left_out}
        by_layer = {}
        for layer, weight in network.recorded.layers.items():
            if weight in traces and network.plan.is_weight(weight):
                by_layer[layer] = _of_layer(network, weight, traces[weight], sums[weight][1][kept], kept)
        if not network.recorded.is_whole:
            return LayerQuantities(by_layer)
        is_exact = all(map(network.plan.is_exact, traces))
        total = torch.stack(list(traces.values())).sum(0)
        return LayerQuantities(by_layer, total, tuple(network.plan.left_out), "hessian" if is_exact else "ggn")

    def _by_chunks(self, network: _Network, kept: Tensor, step: int) -> dict[str, tuple[Tensor, Tensor]]:
        """Return trace and relative flatness of every parameter, shape (n,), zero where a sample is not kept."""
        n = len(kept)
        sums = {
            name: (kept.new_zeros(n, dtype=torch.float64), kept.new_zeros(n, dtype=torch.float64))
            for name in network.recorded.parameters
        }
        for start in range(0, n, step):
            part = slice(start, min(start + step, n))
            if bool(kept[part].any()):
                for name, values in _chunk(network, part, self._chunk_bytes).items():
                    for total, value in zip(sums[name], values, strict=True):
                        total[part] += value
        return sums


def _network(recorded: RecordedLayers) -> _Network:
    return _network_up_to(recorded, _network_end(recorded))


def _network_up_to(recorded: RecordedLayers, cut: Cut) -> _Network:
    values = _values(recorded, cut)
    if broken := int(values.flatten(1).isnan().any(1).sum()):
        raise NonFiniteError(
            f"A measurement needs numbers; got logits that are NaN in {broken} of {len(values)} samples. "
            "Look for an overflow in the network."
        )
    with torch.enable_grad():
        goal = objective(recorded, cut, values.flatten(1))
    if isinstance(goal, Refusal):
        raise goal.error()
    if goal.head_curvature is not None and goal.is_own_logit:
        form = Differentiated(goal.head[:, 0], goal.head_curvature.dense())
        identity = torch.eye(goal.head.shape[2]).to(goal.head)
        goal = Objective(cut, goal.counted, values.flatten(1).double(), identity, form)
    elif goal.head_curvature is not None:  # the same end whichever layers are measured
        return _network_up_to(recorded, goal.cut)
    plan = Plan(recorded, cut, len(values))
    if not recorded.is_whole and not all(map(plan.is_weight, recorded.layers.values())):
        reasons = "; ".join(f"`{name}`: {plan.left_out.get(name, 'it is none')}" for name in recorded.layers.values())
        raise Refusal(
            f"Each layer to measure must use its weight in a linear layer or a convolution alone; {reasons}. "
            f"Name other layers.\n  path: {recorded.path}"
        ).error()
    factor, signs = loss_factor(goal)
    captures, inputs = recorded.graph.captures, recorded.graph.inputs
    weights = {name: upcast(captures.value(inputs[recorded.parameters[name]])) for name in recorded.layers.values()}
    grams = {name: rows @ rows.mT for name, rows in ((name, weight.flatten(1)) for name, weight in weights.items())}
    return _Network(recorded, cut, values, goal, plan, factor.to(values.dtype), signs, grams)


def _network_end(recorded: RecordedLayers) -> Cut:
    """Return where the network ends: the first of the narrowest tensors that all influence passes through.

    Raises:
        UnsupportedTailError: if there is none with a row for each sample.
    """
    shapes = {cut: recorded.graph.tensor_of(cut.node).shape for cut in recorded.cuts[:-1]}
    rows = {cut: shape for cut, shape in shapes.items() if shape and sum(size > 1 for size in shape[1:]) <= 1}
    wide = {cut: shape for cut, shape in rows.items() if shape[1:].numel() > 1} or rows
    if wide:
        last, shape = list(wide.items())[-1]
        plan = Plan(recorded, last, shape[0])
        found = [cut for cut in wide if wide[cut][0] == shape[0] and not plan.is_made(cut.node)]
        if found:
            return min(found, key=lambda cut: wide[cut].numel())
    raise Refusal(
        "All influence of the layers on the loss must pass through one tensor with a row per sample; none was found. "
        f"A loss with a penalty of the weights is no function of the outputs.\n  path: {recorded.path}"
    ).error()


def _values(recorded: RecordedLayers, cut: Cut) -> Tensor:
    """Return the values of the cut as the network computed them."""
    graph = recorded.graph
    if not is_overwritten(graph, cut.node, cut.end - 1):
        values = upcast(graph.tensor_of(cut.node).detach())
        return values.clone() if values.is_inference() else values  # so that one can differentiate by it
    inputs = {node: graph.captures.value(index) for node, index in graph.inputs.items()}
    only = frozenset(graph.ancestry(cut.node, in_steps=True))
    return graph.replay(inputs, cut.end, only=only)[cut.node].detach()


def _bytes_per_sample(network: _Network) -> int:
    """Return an estimate of what the derivatives of one sample take."""
    graph = network.recorded.graph
    taps = sum(graph.tensor_of(graph.operations[number].results[0]).numel() for number in network.plan.uses)
    return 2 * (len(network.factor) + 1) * taps // len(network.values) * network.values.element_size()


def _chunk(network: _Network, part: slice, chunk_bytes: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Return what the samples of a part have of the trace and relative flatness of each parameter."""
    n = len(network.values)
    replay = Replay(network.recorded, network.plan, network.cut, n, part)
    if not allclose_for_dtype(replay.output.detach(), network.values[part]):
        raise GraphError("repeating the recorded steps does not give the values that the network computed")
    columns = network.factor[:, part]
    signs = None if network.signs is None else network.signs[:, part]
    per_column = _bytes_per_sample(network) // (len(network.factor) + 1) * columns.shape[1]
    step = max(1, chunk_bytes // max(1, per_column))
    sums: dict[str, tuple[Tensor, Tensor]] = {}
    for start in range(0, len(columns), step):
        group = slice(start, start + step)
        found = _of_columns(network, replay, columns[group])
        for name, values in found.items():
            if signs is not None:
                values = values[0] * signs[group].T, values[1] * signs[group].T
            trace, relative = (value.double().sum(1) for value in values)
            before = sums.get(name)
            sums[name] = (trace, relative) if before is None else (before[0] + trace, before[1] + relative)
    return sums


def _of_columns(network: _Network, replay: Replay, columns: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Return trace and relative flatness that each column contributes to each parameter, shape (n, m)."""
    plan, graph, samples = network.plan, network.recorded.graph, columns.shape[1]
    generator = torch.Generator().manual_seed(3)
    drawn = (torch.rand(size, generator=generator, dtype=torch.float64) + 0.5 for size in (len(columns), samples))
    weights, factors = (values.to(columns) for values in drawn)
    structure = Structure(weights, factors)
    tested = (torch.tensordot(weights, columns, 1) * factors.unsqueeze(1)).unsqueeze(0)
    pulled = _pulled_back(replay, torch.cat([columns, tested]).reshape(-1, *replay.output.shape))
    layers: dict[str, list[tuple[Tap, Use, Tensor, Layout]]] = {}
    vectors: dict[str, Tensor] = {}
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for tap in replay.taps:
        cotangents = pulled.pop(0)
        if (layout := structure.layout(cotangents, tap.has_channels)) is None:
            raise GraphError("the logits of one sample depend on another sample")
        chosen = [arranged(one, samples, layout) for one in cotangents[:-1]]
        del cotangents
        for use in tap.uses:
            if use.role == "weight":
                layers.setdefault(use.parameter, []).append((tap, use, torch.stack(chosen, 1), layout))
                continue
            shape = graph.tensor_of(use.node).shape
            gradients = [vector(tap, use, one, layout, shape) for one in chosen]
            if any(gradient is None for gradient in gradients):
                plan.left_out[use.parameter] = "each sample has numbers of its own in it"
                continue
            gradient = torch.stack([one.flatten(1) for one in gradients if one is not None], 1)
            vectors[use.parameter] = vectors[use.parameter] + gradient if use.parameter in vectors else gradient
        for name in [name for name, calls in layers.items() if len(calls) == len(plan.uses_of(name))]:
            trace, relative = layer_flatness(layers.pop(name), network.grams.get(name))
            found[name] = trace, trace if relative is None else relative
    found |= {name: (gradient.square().sum(2),) * 2 for name, gradient in vectors.items()}
    return {name: values for name, values in found.items() if name not in plan.left_out}


def _pulled_back(replay: Replay, outputs: Tensor) -> list[list[Tensor]]:
    """Return the cotangents at every tap, one of its shape for each output."""
    values = [tap.value for tap in replay.taps]
    rows = (
        torch.autograd.grad(replay.output, values, row, retain_graph=True, materialize_grads=True) for row in outputs
    )
    return list(map(list, zip(*rows, strict=True)))


def _of_layer(network: _Network, weight: str, trace: Tensor, relative: Tensor, kept: Tensor) -> SampleQuantities:
    goal = network.goal
    loss, logits, target = goal.loss.select(kept), goal.logits[kept], goal.target
    margins: dict[str, Any] = {}
    if target is not None and not isinstance(loss, Differentiated):
        margins["output_margin"] = loss.output_margin(logits, target[kept])
        margins["softmax_margin"] = loss.softmax_margin(logits, target[kept])
    return SampleQuantities(
        hessian_trace=trace,
        relative_flatness=relative,
        confidence=loss.curvature_trace(logits, None if target is None else target[kept]),
        kernel_squared_norm=network.grams[weight].diagonal().sum(),
        prediction=None if isinstance(loss, Differentiated) else loss.prediction(logits),
        curvature="hessian" if network.plan.is_exact(weight) else "ggn",
        **margins,
    )
