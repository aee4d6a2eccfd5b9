"""A recorded computation: its operations in order, the values they captured, and how to repeat it under autograd."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_flatness.errors import GraphError
from lightning_flatness.precision import LOW_PRECISION, upcast
from lightning_flatness.recording.operation import Captured, Node, Operation, map_tree, tensors

_SMALL = 2**14  # numbers; the parameters of a normalisation are fewer


def storage_of(tensor: Tensor) -> int:
    """Return the address of the tensor's memory."""
    return tensor.untyped_storage().data_ptr()


class _Capture(NamedTuple):
    """A value that an operation used and that does not depend on an input of the graph."""

    original: Tensor
    value: Tensor  # a copy, or the original itself
    copied: bool
    version: int | None  # of the original; None: its changes leave no trace (inference tensors)
    overwritten: bool = False  # the network changes it in place, and so must every replay


class Captures:
    """The values that a graph captured, by index."""

    def __init__(self) -> None:
        """Start with none."""
        self._captures: list[_Capture] = []
        self._indices: dict[int, int] = {}  # id of a captured tensor -> index of its present value

    def add(self, tensor: Tensor) -> int:
        """Capture the present value of `tensor`, also if it is later changed in place; return its index."""
        index = self._indices.get(id(tensor))
        if index is None:
            index = self._indices[id(tensor)] = len(self._captures)
            copied = tensor.numel() <= _SMALL  # weights may be swapped after the pass without a trace
            with torch.inference_mode(False):
                value = tensor.clone() if copied else tensor
            version = None if tensor.is_inference() else tensor._version
            self._captures.append(_Capture(tensor, value.detach(), copied, version))
        return index

    def finalize(self) -> None:
        """Copy the values in which later changes would leave no trace."""
        with torch.inference_mode(False):
            for index, capture in enumerate(self._captures):
                if not capture.copied and capture.version is None:
                    self._captures[index] = capture._replace(value=capture.value.clone(), copied=True)

    def preserve(self, storage: int) -> None:
        """Copy the values in memory that is about to be overwritten."""
        for index, capture in enumerate(self._captures):
            if storage_of(capture.original) == storage:
                with torch.inference_mode(False):
                    own = capture.value if capture.copied else capture.value.clone()
                self._captures[index] = capture._replace(value=own, copied=True, overwritten=True)
                self._indices.pop(id(capture.original), None)

    def value(self, index: int) -> Tensor:
        """Return a value, fit for autograd and free to be overwritten where the network did so.

        Raises:
            GraphError: if it has been changed in place since.
        """
        capture = self._captures[index]
        if not capture.copied and capture.original._version != capture.version:
            raise GraphError("a tensor that the network's tail uses was changed in place after the forward pass")
        return capture.value.clone() if capture.overwritten else capture.value

    def peek(self, index: int) -> Tensor:
        """Return a value to look at, whatever has happened to it since."""
        return self._captures[index].value

    def is_overwritten(self, index: int) -> bool:
        """Return whether the network changed the value in place."""
        return self._captures[index].overwritten


class OperationGraph:
    """Every operation that depended on one of the inputs, in the order in which they ran.

    Attributes:
        operations: in order.
        captures: the values that the operations used beside the nodes.
        out_of_memory: the exception that ended the record, if it was one; it says nothing about the network.
    """

    def __init__(self) -> None:
        """Start with no input."""
        self.operations: list[Operation] = []
        self.captures = Captures()
        self.out_of_memory: torch.OutOfMemoryError | None = None
        self._gaps: list[tuple[int, str]] = []  # from which operation on, and why, the record is incomplete
        self._nodes: dict[int, int] = {}  # id of a live tensor -> its node
        self._alive: list[Tensor] = []  # keeps ids from being given to other tensors
        self._storages: set[int] = set()
        self._inputs: dict[int, int] = {}  # node -> index of its captured value

    def add_input(self, tensor: Tensor) -> tuple[int, int]:
        """Follow `tensor` from now on; return its node and the index of its captured value."""
        index = self.captures.add(tensor)
        node = self.add_node(tensor)
        self._inputs[node] = index
        return node, index

    def add_node(self, tensor: Tensor) -> int:
        """Return the node of a tensor that depends on an input, a new one if it has none."""
        node = self._nodes.setdefault(id(tensor), len(self._alive))
        if node == len(self._alive):
            self._alive.append(tensor)
            if tensor.numel():
                self._storages.add(storage_of(tensor))
        return node

    def node(self, tensor: Tensor) -> int | None:
        """Return the node of a tensor that depends on an input, else None."""
        return self._nodes.get(id(tensor))

    def shares_memory(self, tensor: Tensor) -> bool:
        """Return whether the tensor lies in memory of a node."""
        return storage_of(tensor) in self._storages

    def mark_incomplete(self, reason: str) -> None:
        """Note that from here on the record is not all that the network did."""
        self._gaps.append((len(self.operations), reason))

    def incomplete_because(self, end: int) -> str | None:
        """Return why the first `end` operations are not all that the network did with the inputs; None if they are."""
        return next((reason for start, reason in self._gaps if start < end), None)

    def descendants(self, node: int | None, start: int) -> list[Operation]:
        """Return the operations from number `start` on that use the node or what came of it."""
        reached, found = {node}, []
        for operation in self.operations[start:]:
            if reached & {argument.index for argument in operation.nodes}:
                reached.update(operation.results)
                found.append(operation)
        return found

    def tensor(self, argument: Node | Captured) -> Tensor:
        """Return the tensor that a recorded argument stands for."""
        return self._alive[argument.index] if isinstance(argument, Node) else self.captures.peek(argument.index)

    def replay(self, inputs: dict[int, Tensor], end: int) -> dict[int, Tensor]:
        """Repeat the first `end` operations with other values for the inputs, under autograd.

        Numbers in half precision are upcast to float32, so that derivatives are taken in full precision.

        Args:
            inputs: value to use, by node of the input.
            end: how many operations to repeat.

        Returns:
            Every tensor that depends on an input, by node, with its graph back to the inputs.

        Raises:
            GraphError: if an operation cannot be repeated faithfully (it is random, or it updates statistics), or
                what depends on an input was also used in ways that are not recorded.
        """
        if reason := self.incomplete_because(end):
            raise GraphError(reason)
        values: dict[int, Tensor] = {}

        def decode(item: Any) -> Any:
            if isinstance(item, Node):
                return known[item.index]
            if isinstance(item, Captured):
                if item.index not in values:
                    values[item.index] = upcast(self.captures.value(item.index))
                return values[item.index]
            return torch.float32 if isinstance(item, torch.dtype) and item in LOW_PRECISION else item

        with torch.inference_mode(False), torch.enable_grad():
            known = {
                node: value.clone() if self.captures.is_overwritten(self._inputs[node]) else value
                for node, value in inputs.items()
            }
            for operation in self.operations[:end]:
                operation.require_repeatable()
                args, kwargs = map_tree(operation.args, decode), map_tree(operation.kwargs, decode)
                known.update(zip(operation.results, tensors(operation.repeat(args, kwargs)), strict=True))
        return known
