"""The loss of a validation step: returned, logged, given by the user, or assumed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from lightning_flatness.data.batches import batch_targets, is_empty
from lightning_flatness.data.passes import computed_loss, is_number, loss_name
from lightning_flatness.errors import UnsupportedTailError
from lightning_flatness.losses import Loss
from lightning_flatness.recording.both import BothRecorder
from lightning_flatness.recording.recorder import ForwardRecorder


class StepLoss(NamedTuple):
    """The loss of one batch.

    Attributes:
        value: a single number; None: the batch is empty.
        words: where it comes from.
        is_assumed: whether nothing says that it is the step's own.
    """

    value: Tensor | None
    words: str = ""
    is_assumed: bool = False


def step_loss(
    recorder: ForwardRecorder | BothRecorder,
    outputs: Any,
    logged: Sequence[tuple[str, Tensor]],
    batch: Any,
    target: Callable[[Any], Tensor] | None = None,
    loss: Loss | Callable[[Any, Any], Tensor] | None = None,
) -> StepLoss:
    """Return the loss that a step computed, or what is assumed to be.

    Args:
        recorder: has recorded the step.
        outputs: what the step returned.
        logged: what it logged, by name.
        batch: the batch.
        target: returns the targets of a batch; None: they are found.
        loss: of the user; None: the one that the step computes.

    Raises:
        UnsupportedTailError: if the step logs several losses, or computes its loss from another branch.
    """
    if loss is None:
        returned = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(returned, Tensor) and recorder.depends(returned) and returned.numel() == 1:
            return StepLoss(returned, "returned by validation_step")
        found = {name: value for name, value in logged if value.numel() == 1 and recorder.depends(value)}
        if len({id(value) for value in found.values()}) > 1:
            raise UnsupportedTailError(
                f"The step must hand over one loss; it logged {sorted(found)}. Return the loss from "
                "`validation_step`, or say how it is computed: `loss=lambda output, targets: ...`."
            )
        if found:
            return StepLoss(next(iter(found.values())), f"logged by validation_step as {' and '.join(found)}")
        numbers = [value for value in (returned, *(value for _, value in logged)) if is_number(value)]
        if (bypassing := recorder.bypassing(numbers)) is not None:
            return StepLoss(bypassing)  # which is refused: it is the loss of another branch
    targets = (target or batch_targets)(batch)
    if is_empty(batch, targets):
        return StepLoss(None)
    recorder.require_recorded()
    return StepLoss(computed_loss(loss, recorder.output, targets), loss_name(loss), loss is None)
