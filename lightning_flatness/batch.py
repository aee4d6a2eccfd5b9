"""Reads inputs and targets out of the batches that data loaders yield."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import lightning_flatness.functional as LF
from lightning_flatness.operation import tensors

_INPUT_KEYS = ("image", "images", "pixel_values", "img", "x", "input", "inputs")
_TARGET_KEYS = ("label", "labels", "target", "targets", "y", "class")


def batch_inputs(batch: Any) -> Any:
    """Return `batch[0]`, or what a dictionary holds under one of the usual keys.

    Raises:
        ValueError: if the batch is neither.
    """
    return _part(batch, 0, _INPUT_KEYS, "inputs")


def batch_targets(batch: Any) -> Tensor:
    """Return `batch[1]`, or what a dictionary holds under one of the usual keys.

    Raises:
        ValueError: if the batch is neither.
    """
    return _part(batch, 1, _TARGET_KEYS, "targets")


def is_empty(batch: Any, target: Any) -> bool:
    """Return whether a batch holds no sample, inputs and targets alike: the last batch of some loaders does not."""
    parts = tensors(dict(batch) if isinstance(batch, Mapping) else batch)
    inputs = next((part for part in parts if part.dim() and part is not target), None)
    return all(isinstance(part, Tensor) and part.dim() > 0 and len(part) == 0 for part in (inputs, target))


def _part(batch: Any, index: int, keys: tuple[str, ...], what: str) -> Any:
    if isinstance(batch, Mapping):
        for key in keys:
            if key in batch:
                return batch[key]
        came = f"a mapping with the keys {list(batch)}"
    elif isinstance(batch, (list, tuple)) and len(batch) > index:
        return batch[index]
    else:
        came = type(batch).__name__ + (f" of length {len(batch)}" if isinstance(batch, (list, tuple)) else "")
    remedy = " Say where they are: `target=lambda batch: ...`." if what == "targets" else ""
    raise ValueError(
        f"A batch must be a pair (inputs, targets) or a mapping with {what} under one of {list(keys)}; "
        f"got {came}.{remedy}"
    )


def checked_targets(target: Any, samples: int, classes: int, loss: LF.Loss, look: bool = True) -> Tensor:
    """Return the targets in the form that the loss reads, after checking them.

    Cross-entropy reads class indices, shape (n,), or probabilities of the classes, floating, shape (n, c). Binary
    cross-entropy reads labels in [0, 1] of shape (n, c), for one logit also of shape (n,).

    Args:
        target: what the batch holds as targets.
        samples: number of samples `n` that the network saw.
        classes: number of logits `c`.
        loss: of the training.
        look: also compare the values with their range; on an accelerator this waits for the device.

    Raises:
        ValueError: if they are none of these or outside of their range, or the number of logits does not fit the loss.
    """
    _check_weights(loss, classes)
    if not isinstance(target, Tensor) or target.layout != torch.strided:
        came = getattr(target, "layout", type(target).__name__)
        raise ValueError(f"Targets must be a dense tensor; got {came}. Say how to get it: `target=...`.")
    binary = isinstance(loss, LF.BinaryCrossEntropy)
    if binary and target.shape == (samples,) and classes == 1:
        target = target.unsqueeze(1)
    indices = not binary and not target.is_floating_point()
    shape = (samples,) if indices else (samples, classes)
    either = (
        f"integer class indices of shape {(samples,)} or probabilities of the classes of shape {(samples, classes)}"
    )
    wanted = f"labels in [0, 1] of shape {shape}" if binary else either
    if target.shape != shape or target.is_complex() or (indices and target.dtype == torch.bool):
        raise ValueError(
            f"Targets must be {wanted}; got {target.dtype} of shape {tuple(target.shape)}. "
            "Say how to get them: `target=lambda batch: ...`; for another loss than cross-entropy: `loss=...`."
        )
    target = target.long() if indices else target if target.is_floating_point() else target.float()
    if look and samples:
        _check_range(target, classes if indices else None)
    return target


def _check_weights(loss: LF.Loss, classes: int) -> None:
    """Check that the loss is one for so many logits."""
    if classes == 1 and not isinstance(loss, LF.BinaryCrossEntropy):
        raise ValueError('Cross-entropy needs two logits or more; got one. Pass `loss="bce_with_logits"`.')
    for name in ("weight", "pos_weight"):
        weights = getattr(loss, name, None)
        if weights is not None and weights.numel() not in (1, classes):
            raise ValueError(f"`loss.{name}` must have one entry per logit, ({classes},); got {tuple(weights.shape)}.")


def _check_range(target: Tensor, classes: int | None) -> None:
    """Check that class indices lie in [0, c), anything else in [0, 1]."""
    low, high = (bound.item() for bound in torch.aminmax(target))
    if not (low >= 0 and (high <= 1 if classes is None else high < classes)):
        span = "[0, 1]" if classes is None else f"[0, {classes}) for {classes} logits"
        raise ValueError(f"Targets must lie in {span}; got values from {low} to {high}.")
