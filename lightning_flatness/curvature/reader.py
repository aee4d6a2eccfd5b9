"""Reads the objective of one pass after another, where little but the data changes between two of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_flatness.curvature.forms import EXACT, RecordedFunction, candidates
from lightning_flatness.curvature.objective import Objective, counted_by, objective
from lightning_flatness.errors import Refusal, require_numbers
from lightning_flatness.losses import BinaryCrossEntropy, CrossEntropy, Differentiated
from lightning_flatness.recording.graph import Captures, Cut
from lightning_flatness.recording.recorded_pass import RecordedPass


class _Known(NamedTuple):
    """An affine head, `phi = V p + b`, that was proved for one pass, and what that depends on."""

    pooled: Cut
    cut: Cut  # where the logits are
    steps: tuple[Any, ...]  # see `_steps`
    captures: Captures
    used: tuple[int, ...]  # indices of the values that the head captured
    head: Tensor
    shift: Tensor
    sizes: tuple[Tensor, Tensor]  # of the entries of head and shift
    form: type[CrossEntropy | BinaryCrossEntropy]


class ObjectiveReader:
    """Reads the objective of one pass after another, and proves of an affine head only what may have changed.

    That a head is affine and keeps the samples apart is proved once. It holds for a later pass with the same steps up
    to the loss and equal captured values in the head, if `phi = V p + b` holds for each of its samples. The form of the
    loss is proved, and its labels are read, in every pass.
    """

    def __init__(self) -> None:
        """Start with nothing proved."""
        self._known: _Known | None = None

    def again(
        self, recorded: RecordedPass, pooled: Cut, features: Tensor, samples: slice
    ) -> tuple[Objective | None, Tensor | bool, Tensor | bool]:
        """Return the objective of a pass in which what is known of the head and the form of the loss are the same.

        Args:
            recorded: the pass; the first three arguments are those of `objective`.
            pooled: the pooled features.
            features: their values.
            samples: which samples are to be measured.

        Returns:
            The objective, None if it needs a proof; whether it holds; and whether all samples are to be measured. The
            last two are questions, see `answers`.
        """
        found = None if self._known is None else _again(self._known, recorded, pooled, features)
        if found is None:
            return None, False, False
        goal, holds = found
        return goal, holds, goal.kept(samples).all()

    def proved(self, recorded: RecordedPass, pooled: Cut, features: Tensor) -> Objective | Refusal:
        """Return what `objective` returns, and know it from now on; arguments are the same.

        Raises:
            NonFiniteError: if the logits hold NaN; says in how many samples.
        """
        verdict = objective(recorded, pooled, features)
        self._known = None
        if isinstance(verdict, Objective):
            require_numbers(verdict.logits)
            self._known = _known(recorded, pooled, features, verdict)
        return verdict


def _known(recorded: RecordedPass, pooled: Cut, features: Tensor, goal: Objective) -> _Known | None:
    form = goal.loss
    if isinstance(form, Differentiated) or goal.head.dim() > 2:
        return None
    used = _used(recorded, pooled, goal.cut)
    shift = goal.logits[0] - goal.head @ features.detach()[0].double()
    steps = _steps(recorded, pooled)
    return _Known(
        pooled,
        goal.cut,
        steps,
        recorded.graph.captures,
        used,
        goal.head,
        shift,
        (goal.head.abs(), shift.abs()),
        type(form),
    )


def _again(known: _Known, recorded: RecordedPass, pooled: Cut, features: Tensor) -> tuple[Objective, Tensor] | None:
    """Return the objective, and whether what is known of the head and the loss holds for this pass as well."""
    if pooled != known.pooled or _steps(recorded, pooled) != known.steps:
        return None
    captures, cut = recorded.graph.captures, known.cut
    pairs = zip(known.used, _used(recorded, pooled, cut), strict=True)
    differing = [known.captures.differ(old, captures, new) for old, new in pairs]
    if any(differs is True for differs in differing):
        return None
    tail = RecordedFunction(recorded, cut, recorded.cuts[-1])
    form = next((each for each in candidates(tail, len(features)) if type(each.form) is known.form), None)
    if form is None:
        return None
    features = features.detach().double()
    logits = RecordedFunction(recorded, pooled, cut)(features).detach()
    expected = torch.addmm(known.shift, features, known.head.mT)
    size = torch.addmm(known.sizes[1], features.abs(), known.sizes[0].mT)
    holds = ((logits - expected).abs() <= EXACT * size).all() & form.holds  # false as well where a logit is NaN
    for differs in differing:
        holds = holds & ~differs if isinstance(differs, Tensor) else holds
    counted = counted_by((form.form, form.target))
    return Objective(cut, counted, logits, known.head, form.form, form.target), holds


def _used(recorded: RecordedPass, pooled: Cut, cut: Cut) -> tuple[int, ...]:
    """Return the indices of the values that the head captured."""
    operations = recorded.graph.operations[pooled.end : cut.end]
    return tuple(captured.index for operation in operations for captured in operation.captured)


def _steps(recorded: RecordedPass, pooled: Cut) -> tuple[Any, ...]:
    """Return the operations from the pooled features to the loss with their arguments and wiring."""
    return recorded.encoded(sorted(number for number in recorded.ancestry if number >= pooled.end))
