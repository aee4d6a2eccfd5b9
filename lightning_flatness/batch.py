"""Reads inputs and targets out of the batches that data loaders yield."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

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


def class_indices(target: Any, samples: int, classes: int, look: bool = True) -> Tensor:
    """Return the targets as class indices, shape (n,), after checking them.

    Args:
        target: what the batch holds as targets.
        samples: number of samples `n` that the network saw.
        classes: number of logits `c`.
        look: also compare the values with `classes`; on an accelerator this waits for the device.

    Raises:
        ValueError: if they are not `n` integers in [0, c).
    """
    if not isinstance(target, Tensor):
        raise ValueError(f"Targets must be a tensor of class indices, shape ({samples},); got {type(target).__name__}.")
    if target.shape != (samples,) or target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise ValueError(
            f"Targets must be integer class indices of shape ({samples},); got {target.dtype} of shape "
            f"{tuple(target.shape)}. Say how to get them: `target=lambda batch: ...`."
        )
    if look and samples:
        low, high = (int(bound) for bound in torch.aminmax(target))
        if low < 0 or high >= classes:
            raise ValueError(
                f"Targets must lie in [0, {classes}) for {classes} logits; got values from {low} to {high}."
            )
    return target.long()
