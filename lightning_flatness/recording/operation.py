"""One recorded operation, and the trees of tensors that are its arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

_Argument = TypeVar("_Argument")
LOW_PRECISION = (torch.float16, torch.bfloat16)
_ADAPTIVE_MEANS = ("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d")


class Slot(NamedTuple):
    """Stands for a tensor that depends on a root."""

    number: int


class Constant(NamedTuple):
    """Stands for a tensor that does not."""

    number: int


class Operation(NamedTuple):
    """One recorded operation; tensors in its arguments are replaced by `Slot` and `Constant`."""

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: tuple[int, ...]

    @property
    def name(self) -> str:
        """Return the operation's plain name, such as `relu_`."""
        return self.function.overloadpacket.__name__

    @property
    def slots(self) -> list[Slot]:
        """Return the arguments that depend on a root."""
        return self._arguments(Slot)

    @property
    def constants(self) -> list[Constant]:
        """Return the arguments that are tensors and do not depend on a root."""
        return self._arguments(Constant)

    def _arguments(self, kind: type[_Argument]) -> list[_Argument]:
        found: list[_Argument] = []
        transform((self.args, self.kwargs), lambda item: found.append(item) if isinstance(item, kind) else None)
        return found

    @property
    def depends_on_first_alone(self) -> bool:
        """Return whether the first argument, and no other, depends on a root."""
        return len(self.slots) == 1 and isinstance(self.args[0], Slot)

    def require_repeatable(self) -> None:
        """Refuse an operation that draws random numbers or updates running statistics."""
        schema = self.function._schema.arguments
        named = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
        named.update({argument.name: value for argument, value in zip(schema, self.args, strict=False)} | self.kwargs)
        training = named.get("train", named.get("training"))
        drawn = training is not False and named.get("dropout_p") != 0
        if "batch_norm" in self.name and training:
            raise TapeError(f"`{self.name}` runs in training mode: it mixes samples. Put the model in eval mode")
        if torch.Tag.nondeterministic_seeded in self.function.tags and drawn:
            raise TapeError(f"`{self.name}` draws random numbers. Put the model in eval mode")

    def repeat(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what the operation returns for these arguments, under autograd."""
        if self.name == "detach":  # to autograd the end; to the loss as a function, the identity
            return args[0]
        if self.name in ("batch_norm", "native_batch_norm") and len(args) >= 8:
            output = _normalized(args)
            return output if self.name == "batch_norm" else (output, args[3][:0], args[4][:0])
        if self.name == "mean":
            return _averaged(*args, **kwargs)
        if self.name in _ADAPTIVE_MEANS and set(args[1]) == {1}:
            return _averaged(args[0], tuple(range(-len(args[1]), 0)), True)
        return self.function(*args, **kwargs)


def _averaged(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Return the mean as a multiple of the sum: its own backward pass fills whole maps with one number."""
    if x.numel() == 0:
        return torch.mean(x, *args, **kwargs)
    total = torch.sum(x, *args, **kwargs)
    return total * (total.numel() / x.numel())


def _normalized(args: tuple[Any, ...]) -> Tensor:
    """Return batch norm in eval mode as the affine map that it is: its own backward pass is slow on small maps."""
    x, weight, bias, mean, variance, _, _, eps = args[:8]
    scale = (variance + eps).rsqrt() if weight is None else weight * (variance + eps).rsqrt()
    shift = -mean * scale if bias is None else bias - mean * scale
    shape = (-1, *[1] * (x.dim() - 2))
    return x * scale.reshape(shape) + shift.reshape(shape)


class TapeError(RuntimeError):
    """The recorded computation cannot be repeated faithfully."""


def is_low_precision(tensor: Tensor) -> bool:
    """Return whether the tensor is in half precision."""
    return tensor.dtype in LOW_PRECISION


def raised(tensor: Tensor) -> Tensor:
    """Return the tensor in float32 if it is in half precision, else as it is."""
    return tensor.float() if is_low_precision(tensor) else tensor


def transform(tree: Any, change: Callable[[Any], Any]) -> Any:
    """Return nested lists, tuples and dictionaries with every leaf changed; lists become tuples."""
    if isinstance(tree, (list, tuple)) and not isinstance(tree, (Slot, Constant)):
        return tuple(transform(item, change) for item in tree)
    if isinstance(tree, dict):
        return {key: transform(item, change) for key, item in tree.items()}
    return change(tree)


def tensors(tree: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested lists, tuples and dictionaries."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            yield from tensors(item)
    elif isinstance(tree, dict):
        yield from tensors(list(tree.values()))
