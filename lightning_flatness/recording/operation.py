"""One recorded operation, and the trees of tensors that are its arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from lightning_flatness.errors import GraphError, UnrepeatableError
from lightning_flatness.recording.operators import Trait, traits

_Leaf = TypeVar("_Leaf")


@dataclass(frozen=True)
class Node:
    """Stands for a tensor that depends on an input of the graph."""

    index: int


@dataclass(frozen=True)
class Captured:
    """Stands for a tensor that does not: its value is kept beside the graph."""

    index: int


class Operation(NamedTuple):
    """One recorded operation; tensors in its arguments are replaced by `Node` and `Captured`."""

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: tuple[int, ...]

    @property
    def name(self) -> str:
        """The operator's plain name, such as `relu_`."""
        return self.function.overloadpacket.__name__

    @property
    def traits(self) -> Trait:
        """What is known about the operator."""
        return traits(self.name)

    @property
    def nodes(self) -> list[Node]:
        """The arguments that depend on an input of the graph."""
        return _of_kind(Node, (self.args, self.kwargs))

    @property
    def captured(self) -> list[Captured]:
        """The arguments that are tensors and do not depend on an input of the graph."""
        return _of_kind(Captured, (self.args, self.kwargs))

    @property
    def is_piecewise_linear(self) -> bool:
        """Whether its second derivative in what depends on the graph's inputs is zero almost everywhere."""
        known, dependent = self.traits, len(self.nodes)
        if Trait.LINEAR_IN_EACH in known:
            return dependent == 1
        if Trait.LINEAR_IN_FIRST in known:
            return dependent == 1 and isinstance(self.args[0], Node)
        return Trait.PIECEWISE_LINEAR in known

    def require_repeatable(self) -> None:
        """Refuse an operation that draws random numbers or updates running statistics.

        Raises:
            GraphError: if it does; `UnrepeatableError` if it is random.
        """
        named = named_arguments(self.function, self.args, self.kwargs)
        training = named.get("train", named.get("training"))
        drawn = training is not False and named.get("dropout_p") != 0
        if "batch_norm" in self.name and training:
            raise GraphError(f"`{self.name}` runs in training mode: it mixes samples. Put the model in eval mode")
        if torch.Tag.nondeterministic_seeded in self.function.tags and drawn:
            raise UnrepeatableError(
                f"`{self.name}` draws random numbers. Put the model in eval mode, and let it be off there "
                "(`training=self.training`)"
            )

    def repeat(self, args: tuple[Any, ...], kwargs: dict[str, Any], detach: bool = False) -> Any:
        """Return what the operation returns for these arguments, under autograd.

        Args:
            args: as recorded, with tensors in the place of nodes.
            kwargs: likewise.
            detach: whether `detach` makes a constant, as for gradients, or is the identity, as for the function.
        """
        if self.name == "detach":
            return args[0].detach() if detach else args[0]
        if self.name in ("batch_norm", "native_batch_norm") and len(args) >= 8:
            output = _normalized(args)
            return output if self.name == "batch_norm" else (output, args[3][:0], args[4][:0])
        if self.name == "mean":
            return _averaged(*args, **kwargs)
        if Trait.GLOBAL_MEAN in self.traits and set(args[1]) == {1}:
            return _averaged(args[0], tuple(range(-len(args[1]), 0)), True)
        return self.function(*args, **kwargs)


class _Signature(NamedTuple):
    """What a schema says of an operator's arguments; to ask it takes as long as a small operation."""

    names: tuple[str, ...]
    defaults: dict[str, Any]
    written: tuple[int, ...]  # positions of those that are changed in place


@cache
def _signature(function: Any) -> _Signature:
    schema = function._schema
    written = [
        position
        for position, argument in enumerate(schema.arguments if schema.is_mutable else ())
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    defaults = {each.name: each.default_value for each in schema.arguments if each.has_default_value()}
    return _Signature(tuple(each.name for each in schema.arguments), defaults, tuple(written))


def named_arguments(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call of an operator by their names, with its defaults."""
    names, defaults, _ = _signature(function)
    return defaults | dict(zip(names, args, strict=False)) | kwargs


def _averaged(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Return the mean as a multiple of the sum: torch's backward pass of a mean fills whole maps with one number."""
    if x.numel() == 0:
        return torch.mean(x, *args, **kwargs)
    total = torch.sum(x, *args, **kwargs)
    return total * (total.numel() / x.numel())


def _normalized(args: tuple[Any, ...]) -> Tensor:
    """Return batch norm in eval mode as an affine map: torch's own backward pass is slow on small maps."""
    x, weight, bias, mean, variance, _, _, eps = args[:8]
    scale = (variance + eps).rsqrt() if weight is None else weight * (variance + eps).rsqrt()
    shift = -mean * scale if bias is None else bias - mean * scale
    shape = (-1, *[1] * (x.dim() - 2))
    return torch.addcmul(shift.reshape(shape), x, scale.reshape(shape))


def written(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """Yield the tensors among the arguments of an operator that it changes in place."""
    names, _, positions = _signature(function)
    for position in positions:
        yield from tensors(kwargs.get(names[position], args[position] if position < len(args) else None))


def map_tree(tree: Any, change: Callable[[Any], Any]) -> Any:
    """Return nested lists, tuples and dictionaries with every leaf changed; lists become tuples."""
    if isinstance(tree, (list, tuple)):
        return tuple([map_tree(item, change) for item in tree])
    if isinstance(tree, dict):
        return {key: map_tree(item, change) for key, item in tree.items()}
    return change(tree)


def leaves(tree: Any) -> Iterator[Any]:
    """Yield what nested lists, tuples and dictionaries hold."""
    if isinstance(tree, (list, tuple)):
        for item in tree:
            yield from leaves(item)
    elif isinstance(tree, dict):
        yield from leaves(list(tree.values()))
    else:
        yield tree


def tensors(tree: Any) -> list[Tensor]:
    """Return the tensors in nested lists, tuples and dictionaries."""
    return _of_kind(Tensor, tree)


def _of_kind(kind: type[_Leaf], tree: Any) -> list[_Leaf]:
    found: list[_Leaf] = []
    _collect(kind, tree, found)
    return found


def _collect(kind: type[_Leaf], tree: Any, found: list[_Leaf]) -> None:
    if isinstance(tree, kind):
        found.append(tree)
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            _collect(kind, item, found)
    elif isinstance(tree, dict):
        for item in tree.values():
            _collect(kind, item, found)
