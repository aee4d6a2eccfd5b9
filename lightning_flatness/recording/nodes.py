"""The tensors that a record follows: each is a node, by which object it is and where its numbers lie in memory."""

from __future__ import annotations

from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from lightning_flatness.errors import GraphError


def storage_of(tensor: Tensor) -> int:
    """Return the address of the tensor's memory."""
    return tensor.untyped_storage().data_ptr()


class Nodes:
    """Numbers for tensors and for the memory that they lie in.

    An id or an address that is given to another tensor, once the first one is gone, is not taken for the first one.

    Args:
        keeps_maps: whether to keep the values of all nodes. If not, floating tensors with more than two dimensions are
            let go as soon as everybody else lets them go; of these only kind and shape are known from then on.
    """

    def __init__(self, keeps_maps: bool = True) -> None:
        """Start with none."""
        self._keeps_maps = keeps_maps
        self._by_id: dict[int, int] = {}  # id of a live tensor -> its node
        self._tensors: list[Tensor] = []  # by node; the tensor itself, or one without numbers in its place
        self._let_go: list[ref[Tensor]] = []
        self._memory: list[int | None] = []  # by node: the first node in the same memory; None: it has no numbers
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}  # by address, with the first node there
        self._views: dict[tuple[Any, ...], int] = {}  # where a node's numbers lie in memory -> node

    def add(self, tensor: Tensor) -> int:
        """Return the node of a tensor, a new one if it has none."""
        node = self._by_id.get(id(tensor))
        if node is None:
            node, memory = len(self._tensors), None
            if tensor.numel() and (memory := self.first_in_memory(tensor)) is None:
                memory = node
                self._storages[storage_of(tensor)] = StorageWeakRef(tensor.untyped_storage()), node
            kept = tensor if self._keeps_maps or not _is_map(tensor) else self._without_numbers(tensor)
            self._views[(memory, *_view_of(tensor))] = self._by_id[id(tensor)] = node
            self._tensors.append(kept)
            self._memory.append(memory)
        return node

    def of(self, tensor: Tensor) -> int | None:
        """Return the node of a tensor, None if it has none; another object for the same numbers is the same node."""
        node = self._by_id.get(id(tensor))
        if node is None and tensor is not None and tensor.numel():
            return self._views.get((self.first_in_memory(tensor), *_view_of(tensor)))
        return node

    def first_in_memory(self, tensor: Tensor) -> int | None:
        """Return the first node in the tensor's memory; None if there is none, or that memory was freed since."""
        storage, node = self._storages.get(storage_of(tensor), (None, None))
        return None if storage is None or storage.expired() else node

    def memory(self, node: int) -> int | None:
        """Return a number that nodes in the same memory share; None for a node without numbers."""
        return self._memory[node]

    def tensor(self, node: int) -> Tensor:
        """Return the tensor of a node, which the network may have changed since; without numbers if it was let go."""
        return self._tensors[node]

    def value(self, node: int) -> Tensor:
        """Return the present value of a node.

        Raises:
            GraphError: if it was let go.
        """
        if self._tensors[node].is_meta:
            raise GraphError("the loss uses a value of the network that was not kept")
        return self._tensors[node].detach()

    def is_floating(self, node: int) -> bool:
        """Return whether a node has derivatives."""
        return self._tensors[node].is_floating_point() or self._tensors[node].is_complex()

    def _without_numbers(self, tensor: Tensor) -> Tensor:
        """Return a tensor of the same kind and shape; forget the id of this one when it is gone."""
        by_id, key = self._by_id, id(tensor)
        self._let_go.append(ref(tensor, lambda _: by_id.pop(key, None)))
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _view_of(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def _is_map(tensor: Tensor) -> bool:
    """Return whether the tensor has more than rows of numbers, in memory that torch allocated and may free."""
    is_plain = type(tensor) is Tensor and tensor.is_floating_point() and not tensor.is_meta
    return is_plain and sum(size > 1 for size in tensor.shape) > 2 and tensor.untyped_storage().resizable()
