"""A record of the first samples alone, where the recorded steps treat each sample on its own."""

from __future__ import annotations

from collections.abc import Container
from copy import copy
from dataclasses import replace
from typing import Any

from lightning_flatness.recording.graph import OperationGraph
from lightning_flatness.recording.operation import Operation, named_arguments
from lightning_flatness.recording.operators import Trait
from lightning_flatness.recording.recorded_pass import RecordedPass

_SIZED = ("view", "_unsafe_view", "reshape")
_RESHAPING = (*_SIZED, "flatten", "squeeze")
_REDUCING = ("mean", "sum", "amax", "amin")


def first_samples(recorded: RecordedPass, end: int, count: int) -> RecordedPass | None:
    """Return the record that the first samples alone would have left, up to an operation.

    Its recorded tensors (`OperationGraph.tensor_of`) are still those of all samples.

    Args:
        recorded: one pass.
        end: the number of operations that are to be repeated.
        count: how many samples.

    Returns:
        The record. None if there are no more samples than that, or if it is not known of each operation that row i of
        its result depends on row i of its arguments alone, in the same way for every i.
    """
    graph, samples = recorded.graph, len(recorded)
    operations = graph.operations[:end]
    if samples <= count or not all(is_by_sample(graph, operation, samples) for operation in operations):
        return None
    maps = {index for call in recorded.calls for index in (call.output, call.inputs)}
    rows = maps | {i for operation in operations for i in _with_rows(graph, operation, samples)}
    part = copy(graph)
    part.captures = graph.captures.first_rows(rows, count)
    part.operations = [_resized(operation, count) for operation in operations]
    return replace(recorded, graph=part)


def is_by_sample(
    graph: OperationGraph, operation: Operation, samples: int, constants: Container[int] = frozenset()
) -> bool:
    """Return whether row i of the result is that of sample i, and depends on these rows of the arguments alone.

    Args:
        graph: the record.
        operation: one of its operations.
        samples: n.
        constants: nodes that depend on no sample.
    """
    results = [r for r in map(graph.tensor_of, operation.results) if r.numel()]
    read = [graph.tensor_of(node.index) for node in operation.nodes if node.index not in constants]
    if Trait.BY_SAMPLE not in operation.traits or any(t.shape[:1] != (samples,) for t in (*results, *read)):
        return False
    if operation.name in _REDUCING:
        dims = named_arguments(operation.function, operation.args, operation.kwargs).get("dim")
        reduced: Any = [dims] if isinstance(dims, int) else dims or [0]
        return all(dim % read[0].dim() for dim in reduced)
    # Of arguments with fewer dimensions than the result the first one would stand beside another of its.
    return operation.name in _RESHAPING or {t.dim() for t in read} == {t.dim() for t in results}


def _with_rows(graph: OperationGraph, operation: Operation, samples: int) -> list[int]:
    """Return the indices of captured values that have a row for each sample: they stand beside the result's."""
    dims = graph.tensor_of(operation.results[0]).dim()
    values = ((captured.index, graph.captures.peek(captured.index)) for captured in operation.captured)
    return [index for index, value in values if value.dim() == dims and len(value) == samples]


def _resized(operation: Operation, count: int) -> Operation:
    """Return the operation; of the sizes that it is given, the first one is the number of samples."""
    if operation.name not in _SIZED:
        return operation
    first, sizes, *others = operation.args
    return operation._replace(args=(first, (count, *sizes[1:]), *others))
