"""Records what a network does with one tensor, and does it again under autograd."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

from lightning_flatness.recording.operation import (
    LOW_PRECISION,
    Constant,
    Operation,
    Slot,
    TapeError,
    raised,
    tensors,
    transform,
)

_SMALL = 2**14  # numbers; the parameters of a normalisation are fewer
_READS_A_NUMBER = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.item.default)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class _Kept(NamedTuple):
    """A value that an operation used and that does not depend on a root."""

    original: Tensor
    value: Tensor  # a copy, or the original itself
    copied: bool
    version: int | None  # of the original; None: its changes leave no trace (inference tensors)
    overwritten: bool = False  # the network changes it in place, and so must every replay


class Tape:
    """Between `start` and `stop`, records every operation that depends on a root; nothing else is touched.

    The record works below autograd, autocast and inference mode: nothing that the user's code computes,
    returns or can observe changes. Gradients are taken later, on a `replay`.
    """

    def __init__(self) -> None:
        """Start with no root."""
        self.operations: list[Operation] = []
        self.exhausted: torch.OutOfMemoryError | None = None  # says nothing about the network
        self._doubts: list[tuple[int, str]] = []  # from which operation on, and why, the record is not the whole story
        self._slots: dict[int, int] = {}  # id of a live tensor -> slot
        self._alive: list[Tensor] = []  # keeps ids from being given to other tensors
        self._dependent_storages: set[int] = set()
        self._forbidden: dict[int, Tensor] = {}  # by storage; alive, or their memory would be given to others
        self._kept: list[_Kept] = []
        self._kept_ids: dict[int, int] = {}  # id of a kept tensor -> constant that has its present value
        self._roots: dict[int, int] = {}  # slot -> constant

    def start(self) -> None:
        """Record from now on.

        Raises:
            TapeError: if a dispatch mode of somebody else is active; its end would be taken for ours.
        """
        RECORDER.listen(self)

    def stop(self) -> None:
        """Record no more."""
        RECORDER.leave(self)

    def add_root(self, tensor: Tensor) -> tuple[int, int]:
        """Follow `tensor` from now on; return its slot and the constant that keeps its present value."""
        constant = self.keep(tensor)
        slot = self._bind(tensor)
        self._roots[slot] = constant
        return slot, constant

    def keep(self, tensor: Tensor) -> int:
        """Keep the present value of `tensor`, also if it is later changed in place; return its constant."""
        index = self._kept_ids.get(id(tensor))
        if index is None:
            index = self._kept_ids[id(tensor)] = len(self._kept)
            copied = tensor.numel() <= _SMALL  # weights may be swapped after the pass without a trace
            with torch.inference_mode(False):
                value = tensor.clone() if copied else tensor
            version = None if tensor.is_inference() else tensor._version
            self._kept.append(_Kept(tensor, value.detach(), copied, version))
        return index

    def seal(self) -> None:
        """Record no more; copy the kept values in which later changes would leave no trace."""
        self.stop()
        with torch.inference_mode(False):
            for index, kept in enumerate(self._kept):
                if not kept.copied and kept.version is None:
                    self._kept[index] = kept._replace(value=kept.value.clone(), copied=True)

    def forbid(self, tensor: Tensor) -> None:
        """Doubt the record from the moment on when the network reads this memory."""
        self._forbidden[_storage(tensor)] = tensor

    def doubt(self, end: int) -> str | None:
        """Return why the first `end` operations are not all that the network did with the roots; None if they are."""
        return next((reason for start, reason in self._doubts if start < end), None)

    def value(self, constant: int) -> Tensor:
        """Return a kept value, fit for autograd and free to be overwritten where the network did so."""
        kept = self._kept[constant]
        if not kept.copied and kept.original._version != kept.version:
            raise TapeError("a tensor that the network's tail uses was changed in place after the forward pass")
        return kept.value.clone() if kept.overwritten else kept.value

    def replay(self, roots: dict[int, Tensor], end: int) -> dict[int, Tensor]:
        """Repeat the first `end` operations with other values for the roots, under autograd.

        Half-precision numbers are raised to float32, so that derivatives are taken in full precision.

        Args:
            roots: value to use, by slot of the root.
            end: how many operations to repeat.

        Returns:
            Every tensor that depends on a root, by slot, with its graph back to the roots.

        Raises:
            TapeError: if an operation cannot be repeated faithfully (it is random, or it updates statistics), or
                what depends on a root was also used in ways that are not recorded.
        """
        if reason := self.doubt(end):
            raise TapeError(reason)
        constants: dict[int, Tensor] = {}

        def decode(item: Any) -> Any:
            if isinstance(item, Slot):
                return known[item.number]
            if isinstance(item, Constant):
                if item.number not in constants:
                    constants[item.number] = raised(self.value(item.number))
                return constants[item.number]
            return torch.float32 if isinstance(item, torch.dtype) and item in LOW_PRECISION else item

        with torch.inference_mode(False), torch.enable_grad():
            known = {
                slot: value.clone() if self._kept[self._roots[slot]].overwritten else value
                for slot, value in roots.items()
            }
            for operation in self.operations[:end]:
                operation.require_repeatable()
                args, kwargs = transform(operation.args, decode), transform(operation.kwargs, decode)
                known.update(zip(operation.results, tensors(operation.repeat(args, kwargs)), strict=True))
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
        return self._alive[argument.number] if isinstance(argument, Slot) else self._kept[argument.number].value

    def before(self, func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        """Return the encoded arguments of an operation that depends on a root; keep what it will overwrite."""
        try:
            return self._before(func, args, kwargs)
        except Exception as error:  # the user's forward pass must go on
            self._note_error(func, error)
            return None

    def after(self, func: Any, encoded: tuple[Any, Any] | None, result: Any) -> None:
        """Note an operation that `before` returned the arguments of."""
        if encoded is None:
            return
        try:
            slots = tuple(self._bind(item) for item in tensors(result))
            self.operations.append(Operation(func, *encoded, slots))
        except Exception as error:  # such as a result without memory of its own kind
            self._note_error(func, error)

    def _before(self, func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        recorded = None
        read = list(tensors((args, kwargs)))
        if any(id(tensor) in self._slots for tensor in read):
            if func in _READS_A_NUMBER and args[0].is_floating_point():
                self._note("a number was read out of the tail with `.item()` and may be used in it")
            recorded = (transform(args, self._encode), transform(kwargs, self._encode))
        elif any(_storage(tensor) in self._dependent_storages for tensor in read):
            self._note(f"`{func}` reads memory of the tail through a tensor that was made outside it")
        if any(_storage(tensor) in self._forbidden for tensor in read):
            self._note(f"`{func}` uses the weight of the convolution once more")
        if func._schema.is_mutable:
            self._preserve(func, args, kwargs)
        return recorded

    def _encode(self, item: Any) -> Any:
        if not isinstance(item, Tensor):
            return item
        if id(item) in self._slots:
            return Slot(self._slots[id(item)])
        if _storage(item) in self._dependent_storages:
            self._note("the tail reads its own memory through a tensor that was made outside it")
        return Constant(self.keep(item))

    def _note_error(self, func: Any, error: Exception) -> None:
        self._note(f"recording `{func}` failed: {error!r}")
        if isinstance(error, torch.OutOfMemoryError):
            self.exhausted = error

    def _note(self, doubt: str) -> None:
        self._doubts.append((len(self.operations), doubt))

    def _preserve(self, func: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Copy kept values that `func` is about to overwrite."""
        for position, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            value = kwargs.get(argument.name, args[position] if position < len(args) else None)
            for storage in map(_storage, tensors(value)):
                for index, kept in enumerate(self._kept):
                    if _storage(kept.original) == storage:
                        with torch.inference_mode(False):
                            own = kept.value if kept.copied else kept.value.clone()
                        self._kept[index] = kept._replace(value=own, copied=True, overwritten=True)
                        self._kept_ids.pop(id(kept.original), None)

    def _bind(self, tensor: Tensor) -> int:
        slot = self._slots.setdefault(id(tensor), len(self._alive))
        if slot == len(self._alive):
            self._alive.append(tensor)
            if tensor.numel():
                self._dependent_storages.add(_storage(tensor))
        return slot


class _Recorder(TorchDispatchMode):
    """The one mode through which every active tape listens, so that tapes may start and stop in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.tapes: list[Tape] = []
        self.deaf = False
        self.held = 0  # by how many the mode is kept on the stack while no tape listens
        self._entered = False

    def listen(self, tape: Tape) -> None:
        self._take_off()
        if (other := _get_current_dispatch_mode()) not in (None, self):
            raise TapeError(f"another dispatch mode is active: {type(other).__name__}")
        self.tapes.append(tape)
        self._put_on()

    def leave(self, tape: Tape) -> None:
        if tape in self.tapes:
            self.tapes.remove(tape)
        self._take_off()

    def hold(self, change: int) -> None:
        """Keep the mode on, or no more: one that is entered within a compiled module's call ends with that call."""
        self.held += change
        if self.held:
            self._put_on()
        self._take_off()

    def _put_on(self) -> None:
        if not self._entered:
            self._entered = True
            self.__enter__()

    def _take_off(self) -> None:
        """Leave the stack once nobody listens; below a mode that the user entered since, wait for its end."""
        if self._entered and not self.tapes and not self.held and _get_current_dispatch_mode() is self:
            self._entered = False
            self.__exit__(None, None, None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        running_backward = torch._C._current_graph_task_id() != -1
        if self.deaf or running_backward or not self.tapes:
            return func(*args, **kwargs)
        encoded = [tape.before(func, args, kwargs) for tape in self.tapes]
        result = func(*args, **kwargs)
        for tape, arguments in zip(self.tapes, encoded, strict=True):
            tape.after(func, arguments, result)
        return result


RECORDER = _Recorder()


@contextmanager
def unrecorded() -> Iterator[None]:
    """Hide what is computed within, which is not the user's, from every tape."""
    before, RECORDER.deaf = RECORDER.deaf, True
    try:
        yield
    finally:
        RECORDER.deaf = before
