"""Certifies that the closed form is exact for a recorded tail."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_flatness.curvature.pooled.subset import (
    agree,
    excerpt,
    has_rows_of_samples,
    recorded_points,
    replayed_features,
)
from lightning_flatness.functional import ConvGeometry, patches
from lightning_flatness.recording.operation import Operation, raised
from lightning_flatness.recording.recorded_pass import NonFiniteError, Recording, refusal

_PIECEWISE_LINEAR = frozenset(
    "relu leaky_relu rrelu rrelu_with_noise hardtanh hardsigmoid relu6 clamp clamp_min clamp_max threshold "
    "prelu _prelu_kernel abs "
    "add sub rsub neg mean sum amax amin cat stack "
    "max_pool1d max_pool2d max_pool3d max_pool2d_with_indices max_pool3d_with_indices "
    "adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d max_pool1d_with_indices "
    "avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d "
    "_adaptive_avg_pool2d _adaptive_avg_pool3d mkldnn_adaptive_avg_pool2d "
    "batch_norm native_batch_norm cudnn_batch_norm miopen_batch_norm _native_batch_norm_legit_no_training "
    "view _unsafe_view reshape flatten unflatten squeeze unsqueeze permute transpose t expand contiguous "
    "clone _to_copy to alias detach copy slice select split split_with_sizes chunk narrow unbind index_select "
    "channel_shuffle native_channel_shuffle pixel_shuffle pixel_unshuffle dropout feature_dropout "
    "constant_pad_nd pad".split()
)
# Curved, but what they connect does not depend on the values.
_POINTWISE = frozenset(
    "silu gelu hardswish sigmoid tanh mish elu celu selu softplus softsign log_sigmoid_forward "
    "exp expm1 log log1p sqrt rsqrt pow square reciprocal sin cos erf softshrink hardshrink".split()
)
# Piecewise linear as long as one of their factors alone belongs to the tail.
_OF_ONE_FACTOR = frozenset("mul mm addmm linear convolution maximum minimum max min where".split())
# With these, a tensor that has a row for each sample only shifts it, or stands beside it, or is a layer's weight.
_ALIKE = frozenset("add sub rsub cat addmm mm linear".split())
# How far, in spreads, samples are moved: activations wake at different heights, and fall asleep again.
_LEVELS = torch.tensor([1.0, 5.0, 30.0])


@dataclass(frozen=True)
class Certificate:
    """What was found to hold for a tail: which feature each filter feeds, and whether the tail is curved."""

    signature: tuple[Any, ...]
    root: int  # which call of the convolution
    channels: Tensor  # (k,)
    silent: Tensor  # filters that reached no feature where it was certified, (k,)
    any_silent: bool  # known to the host: later batches may wake them
    sizes: tuple[Tensor, Tensor]  # of the largest first and second derivative there
    curved: bool
    fixed: bool  # whether what depends on what is the same for all values; if not, certify every batch


def certify(recording: Recording, generic: bool = True) -> Certificate:
    """Certify that feature `p_pi(k)` depends on the map `z_k` alone, and position by position if curved.

    The tail is repeated and differentiated with random cotangents: `d(r p) / dz_k` must equal
    `r_pi(k) dp / dz_k` for every filter, position and sample. The weights are checked against what the
    modules really computed.

    Args:
        recording: of one forward pass.
        generic: certify at random points, where every activation is alive; False: at the recorded values.

    Raises:
        UnsupportedTailError: if any of it does not hold; the message has the path and the step.
    """
    try:
        return _certify(recording, generic)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # TapeError, or an operation without a derivative
        raise refusal(recording, str(error)) from error


def _certify(recording: Recording, generic: bool) -> Certificate:
    with torch.device("cpu"):  # of the random numbers, whatever the default device is
        _check_modules(recording)
        certificate = _certified_somewhere(recording, generic)
        return replace(certificate, channels=_completed(certificate, recording.classifier.inputs.shape[1]))


def _completed(certificate: Certificate, features: int) -> Tensor:
    """Return the channels with the features that no filter was seen to feed given to the silent filters.

    Of the classifier's columns each is then counted once, which is all that the silent ones have to do with.
    """
    channels, silent = certificate.channels.clone(), certificate.silent.nonzero().flatten()
    spare = torch.ones(features, dtype=torch.bool, device=channels.device)
    spare[channels[~certificate.silent]] = False
    left = spare.nonzero().flatten()[: len(silent)]
    channels[silent[: len(left)]] = left
    return channels


def _certified_somewhere(recording: Recording, generic: bool) -> Certificate:
    if not generic:
        return _certified(recording, recorded_points(recording), torch.Generator().manual_seed(0))
    if (part := excerpt(recording)) is not None:
        with suppress(Exception):  # what refuses, and why, is for the whole batch to say
            return _certified_at_generic_points(part)
    return _certified_at_generic_points(recording)


def _certified_at_generic_points(recording: Recording) -> Certificate:
    generator = torch.Generator().manual_seed(0)
    certificates: list[Certificate] = []
    for points in _generic_points(recording, generator):
        # Where all sleep, their derivatives are rounding: they count beside those of the first point.
        least = certificates[0].sizes if certificates else None
        certificates.append(_certified(recording, points, generator, least))
    return _merged(recording, certificates)


def _merged(recording: Recording, certificates: list[Certificate]) -> Certificate:
    """Return what holds at all points: which feature a filter feeds is known from where it is alive."""
    first, *others = certificates
    channels, silent = first.channels, first.silent
    for other in others:
        if (channels != other.channels)[~(silent | other.silent)].any():
            raise refusal(recording, "which feature a filter reaches depends on the values")
        channels = torch.where(silent, other.channels, channels)
        silent = silent & other.silent
    if not _injective(channels, silent):
        raise refusal(recording, "several filters reach one feature, at different values")
    return replace(first, channels=channels, silent=silent, any_silent=bool(silent.any()))


def _injective(channels: Tensor, silent: Tensor) -> bool:
    return channels[~silent].unique().numel() == int((~silent).sum())


def _certified(
    recording: Recording,
    points: dict[int, Tensor],
    generator: torch.Generator,
    least: tuple[Tensor, Tensor] | None = None,
) -> Certificate:
    features = replayed_features(recording, points)
    used = [0]
    if len(points) > 1:
        gradients = torch.autograd.grad(features.sum(), list(points.values()), retain_graph=True, allow_unused=True)
        used = [i for i, gradient in enumerate(gradients) if gradient is not None]
    if len(used) != 1:
        raise refusal(recording, f"{len(used)} calls of `{recording.layer}` reach the classifier in one forward pass")
    point = list(points.values())[used[0]]
    slope, bend = least or (point.new_zeros(()), point.new_zeros(()))
    channels, silent, slope = _channel_map(features, point, generator, slope)
    if channels is None:
        raise refusal(recording, _breaking_step(recording, used[0]))
    operations = recording.tape.operations[: recording.classifier.end]
    curved = not all(map(_is_piecewise_linear, operations))
    by_position, bend = _acts_by_position(features, point, generator, bend) if curved else (True, bend)
    if not by_position:
        raise refusal(recording, "a curved activation acts on several positions of a map at once")
    # With two branches, one may be saturated at this point and hide what the other does elsewhere.
    fixed = all(
        len(step.slots) == 1
        and (_is_piecewise_linear(step) or step.name.rstrip("_") in _POINTWISE)
        and not _differs_by_sample(recording, step)
        for step in operations
    )
    return Certificate(recording.signature, used[0], channels, silent, bool(silent.any()), (slope, bend), curved, fixed)


def _generic_points(recording: Recording, generator: torch.Generator) -> Iterator[dict[int, Tensor]]:
    """Yield roots that wake activations: neighbours up and down in turn, all above the largest, all below the least.

    What two samples or positions share shows only where both are alive.
    """
    moved = {slot: _moved(point.detach(), generator) for slot, point in recorded_points(recording).items()}
    for points in zip(*moved.values(), strict=True):
        yield {slot: point.requires_grad_() for slot, point in zip(moved, points, strict=True)}


def _moved(value: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield `value` moved by several of its spreads: up and down in turn, up from the largest, down from the least."""
    flat, n = value.flatten(2), len(value)
    spread = (flat - flat.mean((0, 2), keepdim=True)).abs().mean()
    spread = torch.where(spread > 0, spread, 1.0)
    samples = torch.arange(n).reshape(-1, 1, 1)
    flip = torch.rand((1, flat.shape[1], 1), generator=generator) - 0.5
    turn = (flip.sign() * (1 - 2 * ((samples + torch.arange(flat.shape[2])) % 2))).to(value)
    drawn = torch.rand(flat.shape, generator=generator)
    yield (flat + turn * spread * 10 ** (2.5 * drawn - 1).to(value)).reshape(value.shape)
    for shift in range(len(_LEVELS) if n < 2 * len(_LEVELS) else 1):  # two samples for each level
        level = _LEVELS[(samples // 2 + shift) % len(_LEVELS)].to(value)
        rise = spread * level * (1 + drawn / 2).to(value)
        yield (flat.amax((0, 2), keepdim=True) + rise).reshape(value.shape)
        yield (flat.amin((0, 2), keepdim=True) - rise).reshape(value.shape)


def _scaled(candidate: Tensor, reference: Tensor, size: Tensor) -> bool:
    """Return whether two tensors agree up to rounding, that of numbers of this size at least."""
    eps = torch.finfo(reference.dtype).eps
    bound = reference.abs()
    largest = torch.maximum(bound.max(), size)
    bound.mul_(1e4 * eps).add_(1e2 * eps * largest)
    return bool(((candidate - reference).abs_() <= bound).all())


def _channel_map(
    output: Tensor, point: Tensor, generator: torch.Generator, size: Tensor
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Return which channel of `output` each channel of `point` feeds, None if it is not one; the silent ones; the size.

    The size is that of the largest derivative, here or before.
    """
    n, channels = output.shape[:2]
    dims = [1] * (output.dim() - 2)
    weight, by_sample = (
        torch.rand(shape, generator=generator, dtype=torch.float64).to(output) + 0.5
        for shape in (output.shape, (n, 1, *dims))
    )

    def pulled_back(code: Tensor) -> Tensor:
        (gradient,) = torch.autograd.grad(output, point, weight * code, retain_graph=True)
        return gradient.flatten(2)

    ones = pulled_back(torch.ones_like(output))
    reach = ones.abs().amax((0, 2))
    size = torch.maximum(reach.max(), size)
    silent = reach <= torch.finfo(ones.dtype).eps * size
    numbers = torch.randperm(channels, generator=generator)
    coded = pulled_back((numbers + 1).to(output).reshape(1, -1, *dims))
    ratio = (coded * ones).sum((0, 2)) / ones.square().sum((0, 2)).clamp_min(torch.finfo(ones.dtype).tiny)
    index = (ratio.nan_to_num().round().long() - 1).clamp(0, channels - 1)
    found = numbers.argsort().to(point.device)[index]
    code = torch.randn(channels, generator=generator, dtype=torch.float64).to(output)
    expected = by_sample.reshape(n, 1, 1) * code[found].reshape(1, -1, 1) * ones
    honest = _scaled(pulled_back(code.reshape(1, -1, *dims) * by_sample), expected, size)
    return (found if honest and _injective(found, silent) else None), silent, size


def _acts_by_position(features: Tensor, point: Tensor, generator: torch.Generator, size: Tensor) -> tuple[bool, Tensor]:
    (slope,) = torch.autograd.grad(features.sum(), point, create_graph=True)
    if not slope.requires_grad:
        return True, size
    direction = torch.rand(point.shape, generator=generator, dtype=torch.float64).to(point) + 0.5
    (ones,) = torch.autograd.grad(slope.sum(), point, retain_graph=True, materialize_grads=True)
    (turned,) = torch.autograd.grad((slope * direction).sum(), point, materialize_grads=True)
    size = torch.maximum(ones.abs().max(), size)
    return _scaled(turned, direction * ones, size), size


def _differs_by_sample(recording: Recording, operation: Operation) -> bool:
    """Return whether the operation may connect filters in one sample and not in another, as a mask for each does."""
    values = (recording.tape.value(constant.number) for constant in operation.constants)
    samples = len(recording.classifier.inputs)
    return operation.name.rstrip("_") not in _ALIKE and any(has_rows_of_samples(value, samples) for value in values)


def _is_piecewise_linear(operation: Operation) -> bool:
    name = operation.name.rstrip("_")
    if name in _OF_ONE_FACTOR:
        return len(operation.slots) == 1
    return operation.depends_on_first_alone if name == "div" else name in _PIECEWISE_LINEAR


def _breaking_step(recording: Recording, used: int) -> str:
    """Name the first step after which a channel no longer depends on one filter alone."""
    generator = torch.Generator().manual_seed(1)
    slot, points = recording.roots[used][0], next(_generic_points(recording, generator))
    for end, operation in enumerate(recording.tape.operations[: recording.classifier.end], start=1):
        outputs = recording.tape.replay(points, end)
        for result in operation.results:
            output = outputs[result]
            if not output.numel() or not output.requires_grad or output.dim() < 2 or len(output) != len(points[slot]):
                continue
            if _channel_map(output, points[slot], generator, output.new_zeros(()))[0] is None:
                return f"step {end}, `{operation.name}`, mixes them (its output has shape {tuple(output.shape)})"
    return "the steps after it mix filters"


def _check_modules(recording: Recording) -> None:
    """Check that the convolution and the classifier computed what their weights say."""
    tape, call = recording.tape, recording.classifier
    _, z, inputs = recording.roots[0]
    for what, value in ((f"the output of `{recording.layer}`", tape.value(z)), ("the logits", call.output)):
        if broken := int(value.flatten(1).isnan().any(1).sum()):
            raise NonFiniteError(f"A measurement needs numbers; {what} is NaN in {broken} of {len(value)} samples.")
    geometry = ConvGeometry.of(recording.convolution)
    rows = patches(raised(tape.value(inputs)[:2]), geometry).to(recording.weight.dtype)
    filters = recording.weight.unflatten(0, (geometry.groups, -1))
    observed = tape.value(z)[:2].flatten(2)
    if not agree((filters @ rows.mT).flatten(1, 2) + recording.bias.unsqueeze(-1), observed):
        raise refusal(recording, f"`{recording.layer}` does more than convolve with its `weight`")
    if call.weights is not None:
        features = raised(call.inputs.detach()).flatten(1)
        if not agree(features @ call.weights[0].mT + call.weights[1], call.output):
            raise refusal(recording, f"`{call.name}` does more than multiply by its `weight`")
