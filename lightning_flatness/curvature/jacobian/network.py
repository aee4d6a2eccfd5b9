"""What a record is made of for its layers: the network up to its end, and the loss as a function of that end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from lightning_flatness.curvature.jacobian.factor import loss_factor
from lightning_flatness.curvature.jacobian.plan import Plan
from lightning_flatness.curvature.objective import Objective, objective
from lightning_flatness.errors import NonFiniteError, Refusal
from lightning_flatness.losses import Differentiated
from lightning_flatness.precision import upcast
from lightning_flatness.recording.graph import Cut, is_overwritten
from lightning_flatness.recording.recorded_layers import RecordedLayers

_Factor: TypeAlias = Callable[[Objective], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Network:
    """A record with all that does not depend on which samples are measured.

    Attributes:
        recorded: the record.
        cut: where the network ends.
        values: of the cut, shape (n, ...).
        goal: the loss as a function of the cut.
        plan: where the parameters are used.
        make_factor: makes the rows of the loss's curvature at the cut, see `factor.py`.
        columns: how many there are for each sample.
        grams: `W W^T` by the name of the weight.
    """

    recorded: RecordedLayers
    cut: Cut
    values: Tensor
    goal: Objective
    plan: Plan
    make_factor: _Factor
    columns: int
    grams: dict[str, Tensor]

    def factor(self, samples: slice) -> tuple[Tensor, Tensor | None]:
        """Return the rows of some samples, shape (m, n, j), and their signs, shape (m, n); None: all positive."""
        rows, signs = self.make_factor(_selected(self.goal, samples))
        return rows.to(self.values.dtype), signs


def network_of(recorded: RecordedLayers, factor: _Factor = loss_factor, columns: int | None = None) -> Network:
    """Return what a record is made of.

    Args:
        recorded: one pass.
        factor: makes the rows of the loss's curvature, see `factor.py`.
        columns: how many rows it makes for each sample; None: as many as for the first one.

    Raises:
        UnsupportedTailError: if the logits or the uses of a layer's weight are not what they must be.
        NonFiniteError: if the logits hold NaN.
    """
    return _network_up_to(recorded, network_end(recorded), factor, columns)


def _network_up_to(recorded: RecordedLayers, cut: Cut, make_factor: _Factor, columns: int | None) -> Network:
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
        return _network_up_to(recorded, goal.cut, make_factor, columns)
    plan = Plan(recorded, cut, len(values))
    if not recorded.is_whole and not all(map(plan.is_weight, recorded.layers.values())):
        reasons = "; ".join(f"`{name}`: {plan.left_out.get(name, 'it is none')}" for name in recorded.layers.values())
        raise Refusal(
            f"Each layer to measure must use its weight in a linear layer or a convolution alone; {reasons}. "
            f"Name other layers.\n  path: {recorded.path}"
        ).error()
    columns = columns or len(make_factor(_selected(goal, slice(1)))[0])
    captures, inputs = recorded.graph.captures, recorded.graph.inputs
    weights = {name: upcast(captures.value(inputs[recorded.parameters[name]])) for name in recorded.layers.values()}
    grams = {name: rows @ rows.mT for name, rows in ((name, weight.flatten(1)) for name, weight in weights.items())}
    return Network(recorded, cut, values, goal, plan, make_factor, columns, grams)


def network_end(recorded: RecordedLayers) -> Cut:
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


def _selected(goal: Objective, samples: slice) -> Objective:
    """Return the objective of some of the samples, without the curvature of the head."""
    head = goal.head if goal.head.dim() == 2 else goal.head[samples]
    target = None if goal.target is None else goal.target[samples]
    return Objective(goal.cut, goal.counted[samples], goal.logits[samples], head, goal.loss.select(samples), target)


def _values(recorded: RecordedLayers, cut: Cut) -> Tensor:
    """Return the values of the cut as the network computed them."""
    graph = recorded.graph
    if not is_overwritten(graph, cut.node, cut.end - 1):
        values = upcast(graph.tensor_of(cut.node).detach())
        return values.clone() if values.is_inference() else values  # so that one can differentiate by it
    inputs = {node: graph.captures.value(index) for node, index in graph.inputs.items()}
    only = frozenset(graph.ancestry(cut.node, in_steps=True))
    return graph.replay(inputs, cut.end, only=only)[cut.node].detach()
