"""A recorded tail as a function: repeated at the recorded values or others, for all samples or an excerpt."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lightning_flatness.recording.graph import Tape
from lightning_flatness.recording.operation import Operation, TapeError, is_low_precision, raised
from lightning_flatness.recording.recorded_pass import Recording

_EXCERPT = 32  # samples; fewer would leave less to tell a coincidence from a rule
_SHAPED = ("view", "_unsafe_view", "reshape")  # their second argument is a shape
# What does the same to every sample, whatever the others are.
_SAMPLE_BY_SAMPLE = frozenset(
    "batch_norm native_batch_norm _native_batch_norm_legit_no_training cudnn_batch_norm dropout add mean "
    "relu leaky_relu hardtanh clamp clamp_min clamp_max silu gelu hardswish elu mish softplus "
    "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d view _unsafe_view reshape flatten detach "
    "addmm linear".split()
)


def replayed_features(recording: Recording, points: dict[int, Tensor]) -> Tensor:
    """Return the classifier's input, shape (n, j), as a function of the roots."""
    call = recording.classifier
    slot = recording.tape.slot(call.inputs)
    if slot is None:
        reason = recording.tape.doubt(call.end)
        raise TapeError(reason or "the classifier's input does not depend on the convolution")
    if len(call.inputs) != len(next(iter(points.values()))):
        raise TapeError("the batch is folded between the convolution and the classifier")
    features = recording.tape.replay(points, call.end)[slot]
    if features.shape[2:].numel() != 1:
        raise TapeError(f"the classifier's input must have shape (n, features), got {tuple(features.shape)}")
    return features.flatten(1)


def recorded_points(recording: Recording) -> dict[int, Tensor]:
    """Return the recorded value of each root by its slot, fit to differentiate by."""
    tape = recording.tape
    return {slot: raised(tape.value(constant)).requires_grad_() for slot, constant, _ in recording.roots}


def excerpt(recording: Recording) -> Recording | None:
    """Return the recording of some 32 samples of a large batch, as if the others had not been there.

    Returns:
        The recording; None if the batch is not large, if its samples may be wired in different ways, or if the excerpt
        alone does not give what the network computed for these samples.
    """
    call = recording.classifier
    samples = len(call.inputs)
    step = samples // _EXCERPT
    if step < 2 or not _wired_alike(recording, samples):
        return None
    inputs = call.inputs[::step]
    tape = _Excerpt(recording.tape, samples, step, call.inputs, inputs)
    part = replace(recording, tape=tape, classifier=call._replace(inputs=inputs))
    try:
        features = replayed_features(part, recorded_points(part)).detach()
    except Exception:  # if it is not the excerpt's fault, the whole batch will say so
        return None
    observed = inputs.flatten(1)
    same = features.shape == observed.shape and bool(observed.isfinite().all()) and agree(features, observed)
    return part if same else None


def _wired_alike(recording: Recording, samples: int) -> bool:
    """Return whether the samples differ in their numbers alone.

    What is added to a whole map, a skip connection, can put filters to sleep, which later batches look out for. A
    factor, an index or a mask for each sample could connect filters in one sample and not in another.
    """
    tape = recording.tape
    maps = {tape.value(z).shape for _, z, _ in recording.roots}
    for operation in tape.operations[: recording.classifier.end]:
        name = operation.name.rstrip("_")
        if name not in _SAMPLE_BY_SAMPLE:
            return False
        for value in (tape.value(constant.number) for constant in operation.constants):
            if has_rows_of_samples(value, samples) and not (name == "add" and value.shape in maps):
                return False
    return True


def has_rows_of_samples(value: Tensor, samples: int) -> bool:
    """Return whether the tensor may have a row for each sample: its first dimension of several is their number."""
    return value.dim() > 1 and len(value) == samples


class _Excerpt(Tape):
    """The same operations on every `step`-th sample."""

    def __init__(self, tape: Tape, samples: int, step: int, features: Tensor, part: Tensor) -> None:
        vars(self).update(vars(tape))
        self._samples, self._step = samples, step
        self.operations = [_of_fewer(operation, samples, len(part)) for operation in tape.operations]
        slot = tape.slot(features)
        self._slots = self._slots if slot is None else {**self._slots, id(part): slot}

    def value(self, constant: int) -> Tensor:
        """Return a kept value, of the chosen samples if it has a row for each."""
        value = super().value(constant)
        return value[:: self._step] if has_rows_of_samples(value, self._samples) else value


def _of_fewer(operation: Operation, samples: int, fewer: int) -> Operation:
    """Return the operation with the number of samples changed where it is written in a shape."""
    shaped = operation.name in _SHAPED and isinstance(operation.args[1], tuple)
    if not shaped or operation.args[1][:1] != (samples,):
        return operation
    tensor, (_, *shape), *others = operation.args
    return operation._replace(args=(tensor, (fewer, *shape), *others))


def agree(computed: Tensor, observed: Tensor) -> bool:
    """Return whether two results agree within the rounding of the observed one's arithmetic."""
    tolerance = (
        0.05
        if is_low_precision(observed)
        else 1e-9
        if observed.dtype == torch.float64
        else 1e-2
        if observed.is_cuda
        else 1e-3
    )
    finite = observed.isfinite()
    difference = (computed.to(observed.dtype) - observed).abs()[finite]
    return difference.numel() == 0 or bool(difference.max() <= tolerance * observed[finite].abs().max())
