"""A recorded computation: its operations in order, the values they captured, and how to repeat it under autograd."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_flatness.errors import GraphError
from lightning_flatness.precision import LOW_PRECISION, upcast
from lightning_flatness.recording.nodes import Nodes, storage_of
from lightning_flatness.recording.operation import Captured, Node, Operation, map_tree, tensors

_SMALL = 2**14  # numbers; the parameters of a normalisation are fewer


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

    def differ(self, index: int, other: Captures, other_index: int) -> Tensor | bool:
        """Return whether a value is another one than one that another graph captured.

        Where a device has to compare them, the answer is a tensor.
        """
        first, second = self._captures[index], other._captures[other_index]
        if first.original is second.original and first.version == second.version is not None:
            return False
        if first.value.shape != second.value.shape or first.value.device != second.value.device:
            return True
        return (
            (first.value != second.value).any() if first.value.is_cuda else not torch.equal(first.value, second.value)
        )

    def first_rows(self, indices: Collection[int], count: int) -> Captures:
        """Return the same values, but of some of them the first rows alone."""
        part = Captures()
        part._captures = [
            capture._replace(value=capture.value[:count]) if index in indices else capture
            for index, capture in enumerate(self._captures)
        ]
        return part

    def peek(self, index: int) -> Tensor:
        """Return a value to look at, whatever has happened to it since."""
        return self._captures[index].value

    def original(self, index: int) -> Tensor:
        """Return the tensor that was captured, whose value may have changed since."""
        return self._captures[index].original

    def of_storages(self, storages: set[int]) -> Iterator[int]:
        """Yield the values that lay in this memory."""
        for index, capture in enumerate(self._captures):
            if capture.original.numel() and storage_of(capture.original) in storages:
                yield index

    def is_overwritten(self, index: int) -> bool:
        """Return whether the network changed the value in place."""
        return self._captures[index].overwritten


class Cut(NamedTuple):
    """A point of a graph where everything that follows depends on one node alone.

    Attributes:
        end: number of operations that have run.
        node: the node.
    """

    end: int
    node: int


class OperationGraph:
    """Every operation that depended on one of the inputs, in the order in which they ran.

    Args:
        keeps_maps: see `Nodes`.

    Attributes:
        operations: in order.
        nodes: the tensors that depend on an input, and what is known of them.
        captures: the values that the operations used beside the nodes.
        functions: the custom `torch.autograd.Function` within which an operation ran, by the operation's number.
        inputs: index of the captured value of each input, by its node.
        out_of_memory: the exception that ended the record, if it was one; it says nothing about the network.
    """

    def __init__(self, keeps_maps: bool = True) -> None:
        """Start with no input."""
        self.operations: list[Operation] = []
        self.captures = Captures()
        self.functions: dict[int, str] = {}
        self.out_of_memory: torch.OutOfMemoryError | None = None
        self._gaps: list[tuple[int, str]] = []  # from which operation on, and why, the record is incomplete
        self.nodes = Nodes(keeps_maps)
        self.inputs: dict[int, int] = {}

    def add_input(self, tensor: Tensor) -> tuple[int, int]:
        """Follow `tensor` from now on; return its node and the index of its captured value."""
        index = self.captures.add(tensor)
        node = self.add_node(tensor)
        self.inputs[node] = index
        return node, index

    def add_node(self, tensor: Tensor) -> int:
        """Return the node of a tensor that depends on an input, a new one if it has none."""
        return self.nodes.add(tensor)

    def node(self, tensor: Tensor) -> int | None:
        """Return the node of a tensor that depends on an input, else None.

        Another object for the same numbers in memory, as wrappers and subclasses of tensors make, is the same node.
        """
        return self.nodes.of(tensor)

    def shares_memory(self, tensor: Tensor) -> bool:
        """Return whether the tensor lies in memory of a node."""
        return self.nodes.first_in_memory(tensor) is not None

    def tensor_of(self, node: int) -> Tensor:
        """Return the live tensor of a node, which the network may have changed since; without numbers if let go."""
        return self.nodes.tensor(node)

    def mark_incomplete(self, reason: str) -> None:
        """Note that from here on the record is not all that the network did."""
        self._gaps.append((len(self.operations), reason))

    def incomplete_because(self, end: int) -> str | None:
        """Return why the first `end` operations are not all that the network did with the inputs; None if they are."""
        return next((reason for start, reason in self._gaps if start < end), None)

    def ancestry(self, output: int, *, in_steps: bool = False) -> list[int]:
        """Return the numbers of the operations that a node depends on through floating numbers, in order.

        What passes through whole numbers and truth values alone moves in steps: it has no derivative. With `in_steps`
        it counts all the same.
        """
        needed, found = {output}, []
        for number in range(len(self.operations) - 1, -1, -1):
            operation = self.operations[number]
            if needed.intersection(operation.results) or self.writes_into(operation, needed):
                found.append(number)
                read = (argument.index for argument in operation.nodes)
                needed.update(read if in_steps else filter(self.nodes.is_floating, read))
        return found[::-1]

    def is_moved(self, node: int) -> bool:
        """Return whether a node depends on an input through floating numbers."""
        if not self.nodes.is_floating(node):
            return False
        numbers = self.ancestry(node)
        read = {argument.index for number in numbers for argument in self.operations[number].nodes}
        return bool(self.inputs.keys() & (read | {node}))

    def writes_into(self, operation: Operation, nodes: set[int]) -> bool:
        """Return whether the operation changes one of the nodes through another view of its memory."""
        if not operation.function._schema.is_mutable:
            return False
        written = set(map(self.nodes.memory, operation.results)) - {None}
        return any(self.nodes.memory(node) in written for node in nodes)

    def cuts(self, inputs: Collection[int], output: int) -> list[Cut]:
        """Return the nodes through which all influence of the inputs on a node passes, in order.

        The inputs themselves are the first cut if there is only one; the output is the last.
        """
        numbers = self.ancestry(output)
        last_use = {output: len(self.operations)}
        for number in numbers:
            read = (argument.index for argument in self.operations[number].nodes)
            last_use.update(dict.fromkeys(filter(self.nodes.is_floating, read), number))
        last_use[output] = len(self.operations)
        alive = {node for node in inputs if node in last_use}
        cuts = [Cut(numbers[0] if numbers else 0, node) for node in alive if len(alive) == 1]
        for number in numbers:
            if alive.intersection(argument.index for argument in self.operations[number].nodes):
                alive.update(node for node in self.operations[number].results if node in last_use)
            alive = {node for node in alive if last_use[node] > number}
            if len(alive) == 1:
                (node,) = alive
                if not cuts or cuts[-1].node != node:
                    cuts.append(Cut(number + 1, node))
        return cuts

    def replay(
        self,
        inputs: dict[int, Tensor],
        end: int,
        *,
        start: int = 0,
        only: Collection[int] | None = None,
        dtype: torch.dtype | None = None,
        detach: bool = False,
        repeat: Callable[[int, Operation, tuple[Any, ...], dict[str, Any]], Any] | None = None,
        captured: Callable[[int, Tensor], Tensor] | None = None,
    ) -> dict[int, Tensor]:
        """Repeat recorded operations with other values for some nodes, under autograd.

        Numbers in half precision are upcast to float32, so that derivatives are taken in full precision.

        Args:
            inputs: value to use, by node.
            end: repeat the operations before this number.
            start: repeat the operations from this number on; the inputs have their values at this point.
            only: numbers of the operations to repeat; None: all.
            dtype: compute in this floating dtype; None: in that of the values.
            detach: whether `detach` makes a constant, as for gradients; False: it is the identity, as in the function.
            repeat: called with number, operation and arguments instead of repeating the operation; returns its results.
            captured: returns what to use for a captured value, given its index and the value.

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
                # A node that the inputs do not move, or only in steps, has the value that it had.
                return known[item.index] if item.index in known else _cast(self.nodes.value(item.index), dtype)
            if isinstance(item, Captured):
                if item.index not in values:
                    value = _cast(self.captures.value(item.index), dtype)
                    values[item.index] = captured(item.index, value) if captured else value
                return values[item.index]
            if isinstance(item, torch.dtype) and item.is_floating_point:
                return dtype or (torch.float32 if item in LOW_PRECISION else item)
            return item

        with torch.inference_mode(False), torch.enable_grad():
            known = {node: self._own(node, value) for node, value in inputs.items()}
            for number in range(start, end):
                if only is not None and number not in only:
                    continue
                operation = self.operations[number]
                operation.require_repeatable()
                args, kwargs = map_tree(operation.args, decode), map_tree(operation.kwargs, decode)
                results = repeat(number, operation, args, kwargs) if repeat else operation.repeat(args, kwargs, detach)
                known.update(zip(operation.results, tensors(results), strict=True))
        return known

    def _own(self, node: int, value: Tensor) -> Tensor:
        """Return a value that may be overwritten where the network overwrites its node."""
        is_overwritten = node not in self.inputs or self.captures.is_overwritten(self.inputs[node])
        return value.clone() if is_overwritten else value


def _cast(value: Tensor, dtype: torch.dtype | None) -> Tensor:
    return value.to(dtype) if dtype is not None and value.is_floating_point() else upcast(value)


def sharing_memory(graph: OperationGraph, nodes: Collection[int], among: Collection[int]) -> list[int]:
    """Return those of some nodes that lie in memory of one of others."""
    used = set(map(graph.nodes.memory, nodes)) - {None}
    return [node for node in among if graph.nodes.memory(node) in used]


def is_overwritten(graph: OperationGraph, node: int, after: int) -> bool:
    """Return whether an operation later than number `after` changes the memory of a node in place."""
    return any(graph.writes_into(operation, {node}) for operation in graph.operations[after + 1 :])
