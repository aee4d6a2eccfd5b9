"""Records what a network does with one tensor, and does it again under autograd."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_LOW_PRECISION = (torch.float16, torch.bfloat16)


class _Slot(NamedTuple):
    """Stands for a tensor that depends on a root."""

    number: int


class _Constant(NamedTuple):
    """Stands for a tensor that does not."""

    number: int


class Operation(NamedTuple):
    """One recorded operation; tensors in its arguments are replaced by `_Slot` and `_Constant`."""

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: tuple[int, ...]

    @property
    def name(self) -> str:
        """Return the operation's plain name, such as `relu_`."""
        return self.function.overloadpacket.__name__

    @property
    def slots(self) -> list[_Slot]:
        """Return the arguments that depend on a root."""
        found: list[_Slot] = []
        _transform((self.args, self.kwargs), lambda item: found.append(item) if isinstance(item, _Slot) else None)
        return found

    @property
    def depends_on_first_alone(self) -> bool:
        """Return whether the first argument, and no other, depends on a root."""
        return len(self.slots) == 1 and isinstance(self.args[0], _Slot)

    def require_repeatable(self) -> None:
        """Refuse an operation that draws random numbers or updates running statistics."""
        schema = self.function._schema.arguments
        named = {argument.name: value for argument, value in zip(schema, self.args, strict=False)} | self.kwargs
        training = named.get("train", named.get("training"))
        if "batch_norm" in self.name and training:
            raise TapeError(f"`{self.name}` runs in training mode: it mixes samples. Put the model in eval mode")
        if torch.Tag.nondeterministic_seeded in self.function.tags and training is not False:
            raise TapeError(f"`{self.name}` draws random numbers. Put the model in eval mode")


class TapeError(RuntimeError):
    """The recorded computation cannot be repeated faithfully."""


def is_low_precision(tensor: Tensor) -> bool:
    """Return whether the tensor is in half precision."""
    return tensor.dtype in _LOW_PRECISION


def raised(tensor: Tensor) -> Tensor:
    """Return the tensor in float32 if it is in half precision, else as it is."""
    return tensor.float() if is_low_precision(tensor) else tensor


def _transform(tree: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(tree, (list, tuple)) and not isinstance(tree, (_Slot, _Constant)):
        return tuple(_transform(item, change) for item in tree)
    if isinstance(tree, dict):
        return {key: _transform(item, change) for key, item in tree.items()}
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


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Tape(TorchDispatchMode):
    """While active, records every operation that depends on a root; the computation itself is untouched.

    The record works below autograd, autocast and inference mode: nothing that the user's code computes,
    returns or can observe changes. Gradients are taken later, on a `replay`.
    """

    def __init__(self) -> None:
        """Start with no root."""
        super().__init__()
        self.operations: list[Operation] = []
        self.failure: str | None = None  # why nothing was recorded from the last operation on
        self._slots: dict[int, int] = {}  # id of a live tensor -> slot
        self._alive: list[Tensor] = []  # keeps ids from being given to other tensors
        self._dependent_storages: set[int] = set()
        self._constants: list[Tensor] = []
        self._constant_ids: dict[int, int] = {}
        self._versions: list[int | None] = []
        self._overwritten: set[int] = set()
        self._roots: dict[int, int] = {}  # slot -> constant

    def add_root(self, tensor: Tensor) -> tuple[int, int]:
        """Follow `tensor` from now on; return its slot and the constant that keeps its present value."""
        constant = self.keep(tensor)
        slot = self._bind(tensor)
        self._roots[slot] = constant
        return slot, constant

    def keep(self, tensor: Tensor) -> int:
        """Keep the present value of `tensor`, also if the network later changes it in place."""
        index = self._constant_ids.get(id(tensor))
        if index is None or self._constants[index] is not tensor:
            index = len(self._constants)
            self._constants.append(tensor)
            self._constant_ids[id(tensor)] = index
            self._versions.append(None if tensor.is_inference() else tensor._version)
        return index

    def value(self, constant: int) -> Tensor:
        """Return a kept value, fit for autograd and free to be overwritten where the network did so."""
        tensor, version = self._constants[constant], self._versions[constant]
        if version is not None and tensor._version != version:
            raise TapeError("a tensor that the network's tail uses was changed in place after the forward pass")
        with torch.inference_mode(False):
            copied = tensor.is_inference() or constant in self._overwritten
            return tensor.clone() if copied else tensor.detach()

    def replay(self, roots: dict[int, Tensor], end: int) -> dict[int, Tensor]:
        """Repeat the first `end` operations with other values for the roots, under autograd.

        Half-precision numbers are raised to float32, so that derivatives are taken in full precision.

        Args:
            roots: value to use, by slot of the root.
            end: how many operations to repeat.

        Returns:
            Every tensor that depends on a root, by slot, with its graph back to the roots.

        Raises:
            TapeError: if an operation cannot be repeated faithfully (it is random, or it updates statistics).
        """
        constants: dict[int, Tensor] = {}

        def decode(item: Any) -> Any:
            if isinstance(item, _Slot):
                return known[item.number]
            if isinstance(item, _Constant):
                if item.number not in constants:
                    constants[item.number] = raised(self.value(item.number))
                return constants[item.number]
            return torch.float32 if isinstance(item, torch.dtype) and item in _LOW_PRECISION else item

        with torch.inference_mode(False), torch.enable_grad():
            known = {
                slot: value.clone() if self._roots[slot] in self._overwritten else value
                for slot, value in roots.items()
            }
            for operation in self.operations[:end]:
                operation.require_repeatable()
                args, kwargs = _transform(operation.args, decode), _transform(operation.kwargs, decode)
                # To autograd, detach is the end; to the loss as a function, it is the identity.
                result = args[0] if operation.name == "detach" else operation.function(*args, **kwargs)
                known.update(zip(operation.results, tensors(result), strict=True))
        return known

    def slot(self, tensor: Tensor) -> int | None:
        """Return the slot of a tensor that depends on a root, else None."""
        return self._slots.get(id(tensor))

    def descendants(self, slot: int | None, start: int) -> list[Operation]:
        """Return the operations from number `start` on that use the tensor in `slot` or what came of it."""
        reached, found = {slot}, []
        for operation in self.operations[start:]:
            if reached & {slot.number for slot in operation.slots}:
                reached.update(operation.results)
                found.append(operation)
        return found

    def tensor(self, argument: Any) -> Tensor:
        """Return the live tensor that a recorded argument stands for."""
        return self._alive[argument.number] if isinstance(argument, _Slot) else self._constants[argument.number]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation as it is and note it if it depends on a root."""
        kwargs = kwargs or {}
        recorded = None
        if self.failure is None:
            try:
                recorded = self._before(func, args, kwargs)
            except Exception as error:  # the user's forward pass must go on
                self.failure = f"recording `{func}` failed: {error!r}"
        result = func(*args, **kwargs)
        if recorded is not None:
            slots = tuple(self._bind(item) for item in tensors(result))
            self.operations.append(Operation(func, *recorded, slots))
        return result

    def _before(self, func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        dependent = any(id(tensor) in self._slots for tensor in tensors((args, kwargs)))
        recorded = None
        if dependent:
            if func is torch.ops.aten._local_scalar_dense.default and args[0].is_floating_point():
                self.failure = "a number was read out of the tail with `.item()` and may be used in it"
                return None
            recorded = (_transform(args, self._encode), _transform(kwargs, self._encode))
        elif any(_storage(tensor) in self._dependent_storages for tensor in tensors((args, kwargs))):
            self._note_alias(func)
        if func._schema.is_mutable:
            self._preserve(func, args, kwargs)
        return recorded

    def _encode(self, item: Any) -> Any:
        if not isinstance(item, Tensor):
            return item
        if id(item) in self._slots:
            return _Slot(self._slots[id(item)])
        if _storage(item) in self._dependent_storages:
            self._note_alias("the tail")
        return _Constant(self.keep(item))

    def _note_alias(self, where: Any) -> None:
        self.failure = f"`{where}` reads memory of the tail through a tensor that was made outside it"

    def _preserve(self, func: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Copy kept values that `func` is about to overwrite."""
        for position, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            value = kwargs.get(argument.name, args[position] if position < len(args) else None)
            for target in tensors(value):
                for index, kept in enumerate(self._constants):
                    if _storage(kept) == _storage(target):
                        self._constants[index] = copy = kept.clone()
                        self._versions[index] = None if copy.is_inference() else copy._version
                        self._overwritten.add(index)

    def _bind(self, tensor: Tensor) -> int:
        slot = self._slots.setdefault(id(tensor), len(self._alive))
        if slot == len(self._alive):
            self._alive.append(tensor)
            if tensor.numel():
                self._dependent_storages.add(_storage(tensor))
        return slot
