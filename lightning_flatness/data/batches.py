"""Reads inputs and targets out of the batches that data loaders yield."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from lightning_flatness.recording.operation import tensors

_INPUT_KEYS = ("image", "images", "pixel_values", "img", "x", "input", "inputs")
_TARGET_KEYS = ("label", "labels", "target", "targets", "y", "class")


def require_batches(batches: Any, argument: str) -> None:
    """Refuse what is not an iterable of batches: one batch alone, or a data set, which has samples.

    Args:
        batches: the batches.
        argument: the name of the argument.

    Raises:
        ValueError: says what to give instead.

    Example:
        >>> require_batches([({"x": 1}, 0)], "batches")
    """
    kind = type(batches).__name__
    if isinstance(batches, Dataset) and not isinstance(batches, Iterable):
        raise ValueError(
            f"`{argument}` must be an iterable of batches; got a data set of samples, {kind}. Wrap it: "
            "`DataLoader(dataset, batch_size=64)`."
        )
    parts = list(batches.values()) if isinstance(batches, Mapping) else batches
    parts = parts if isinstance(parts, (list, tuple)) else ()
    if isinstance(batches, Tensor) or (parts and all(isinstance(part, Tensor) for part in parts)):
        raise ValueError(
            f"`{argument}` must be an iterable of batches; got one batch alone, of type {kind}. Put it into a list: "
            "`[(inputs, targets)]`."
        )
    if not isinstance(batches, Iterable):
        raise ValueError(
            f"`{argument}` must be an iterable of (inputs, targets); got {kind}. Pass a `DataLoader` or a list of "
            "batches."
        )


def require_data(data: Any) -> None:
    """Refuse data for a monitor that is neither named nor batches that can be read in every validation.

    Args:
        data: `"val"`, `"train"` or batches.

    Raises:
        ValueError: says what to give instead.

    Example:
        >>> require_data("train")
    """
    if isinstance(data, str):
        if data not in ("val", "train"):
            raise ValueError(f'`data` must be "val", "train" or an iterable of batches; got {data!r}.')
        return
    require_batches(data, "data")
    if isinstance(data, Iterator):
        raise ValueError(f"`data` must be iterable in every validation anew, as a list is; got {type(data).__name__}.")


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


def output_logits(output: Any) -> Tensor:
    """Return the logits in what a network returned: a tensor, or `logits` of a dictionary or an object, or the first.

    Raises:
        ValueError: if there are none.
    """
    if isinstance(output, Mapping) and "logits" in output:
        output = output["logits"]
    elif isinstance(getattr(output, "logits", None), Tensor):
        output = output.logits
    elif isinstance(output, (tuple, list)) and len(output):
        output = output[0]
    if not isinstance(output, Tensor):
        raise ValueError(
            "The network must return its logits: a tensor, a mapping or an object with `logits`, or a tuple that "
            f"begins with them; got {type(output).__name__}. Say how the loss is computed: "
            "`loss=lambda output, targets: ...`."
        )
    return output


def is_empty(batch: Any, target: Any) -> bool:
    """Return whether a batch holds no sample, inputs and targets alike, as the last batch of some loaders does."""
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
    remedy = (
        "Say where they are: `target=lambda batch: ...`." if what == "targets" else "Let the loader yield one of these."
    )
    raise ValueError(
        f"A batch must be a pair (inputs, targets) or a mapping with {what} under one of {list(keys)}; "
        f"got {came}. {remedy}"
    )
