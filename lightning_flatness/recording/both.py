"""Records a pass from the last convolution and from the classifier at the same time, until one of them is chosen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from lightning_flatness.errors import Refusal, UnsupportedTailError
from lightning_flatness.recording.classifier import ClassifierRecorder
from lightning_flatness.recording.recorded_pass import RecordedPass
from lightning_flatness.recording.recorder import ForwardRecorder


class RecordedPasses(NamedTuple):
    """One pass through the network, recorded twice.

    Attributes:
        pooled: from the last convolution on, or why there is no such record.
        classifier: from the classifier on, or why there is no such record.
    """

    pooled: RecordedPass | Refusal
    classifier: RecordedPass | Refusal


class BothRecorder:
    """Records the forward passes of a model twice: from its last convolution on, and from its classifier on.

    Use it as a `ForwardRecorder`. Once `follow` has chosen one of the two, only that one records.

    Args:
        model: any module whose forward pass will run.
        classifier: name of the linear classifier; None: found.

    Attributes:
        parts: the recorders that record: both, or the one that was chosen.

    Raises:
        ValueError: if the named module does not exist or is of the wrong kind; lists the candidates.

    Example:
        >>> with BothRecorder(model) as recorder:  # doctest: +SKIP
        ...     loss = criterion(model(images), labels)
        ...     choice = select_method(recorder.take_pass(loss))
    """

    def __init__(self, model: nn.Module, classifier: str | None = None) -> None:
        """Check the name against the model."""
        self.parts: list[ForwardRecorder] = [
            ForwardRecorder(model, None, classifier),
            ClassifierRecorder(model, classifier),
        ]

    def __enter__(self) -> BothRecorder:
        """Install the hooks."""
        for part in self.parts:
            part.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        """Remove the hooks and stop recording."""
        for part in self.parts:
            part.__exit__()

    def follow(self, kind: type[ForwardRecorder]) -> None:
        """Let only the recorder of this very class record from now on."""
        for part in [part for part in self.parts if type(part) is not kind]:
            part.__exit__()
            self.parts.remove(part)

    @property
    def layer(self) -> str | None:
        """Name of the layer that is recorded from, as far as it is known."""
        return self.parts[-1].layer

    @property
    def classifier(self) -> str | None:
        """Name of the classifier, as far as it is known."""
        return self.parts[-1].classifier

    def clear(self) -> None:
        """Forget what was recorded."""
        for part in self.parts:
            part.clear()

    def ignore_passes(self) -> None:
        """Let forward passes go unrecorded until the next `clear`."""
        for part in self.parts:
            part.ignore_passes()

    def depends(self, tensor: Tensor) -> bool:
        """Return whether a tensor depends on one of the layers that are recorded from, and not only in steps."""
        return any(part.depends(tensor) for part in self.parts)

    @property
    def has_run(self) -> bool:
        """Whether a layer that is recorded has run since the last pass, or tried to."""
        return any(part.has_run for part in self.parts)

    @property
    def output(self) -> Any:
        """What the outermost recorded module returned in the first pass since the last call; None if none has run."""
        return next((part.output for part in self.parts[::-1] if part.output is not None), None)

    def require_recorded(self) -> None:
        """Refuse a pass of which nothing could be recorded, or not all until now.

        Raises:
            UnsupportedTailError: says why.
        """
        found = [verdict(part.require_recorded) for part in self.parts]
        refusals = [each for each in found if isinstance(each, Refusal)]
        if len(refusals) == len(self.parts):
            raise joined(refusals).error()

    def take_pass(self, loss: Tensor) -> RecordedPass | RecordedPasses:
        """Return what has been recorded since the last call, up to the loss, and forget it.

        Args:
            loss: what the step computed, a single number.

        Returns:
            Both records; the record of the chosen layer once one has been chosen.

        Raises:
            UnsupportedTailError: if there is neither; the message has the reasons of both.
        """
        if len(self.parts) == 1:
            return self.parts[0].take_pass(loss)
        first, second = self.parts
        pooled, classifier = verdict(lambda: first.take_pass(loss)), verdict(lambda: second.take_pass(loss))
        if isinstance(pooled, Refusal) and isinstance(classifier, Refusal):
            raise joined([pooled, classifier]).error()
        return RecordedPasses(pooled, classifier)


def joined(refusals: list[Refusal]) -> Refusal:
    """Return one refusal with the reasons of several; those with the same first line are one."""
    messages: dict[str, str] = {}
    for refusal in refusals:
        messages.setdefault(refusal.message.splitlines()[0], refusal.message)
    return Refusal("\n".join(messages.values()), refusals[0].cause)


def verdict(judged: Callable[[], Any]) -> Any:
    """Return what a function returns, or its refusal as a value."""
    try:
        return judged()
    except UnsupportedTailError as error:
        return Refusal(str(error), error.__cause__ if isinstance(error.__cause__, Exception) else None)
