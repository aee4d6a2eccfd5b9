"""A call of the network around the measured layer, kept so that it can be repeated on a few samples."""

from __future__ import annotations

from contextlib import ExitStack
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn

from lightning_flatness.recording.graph import OperationGraph
from lightning_flatness.recording.operation import leaves, map_tree, tensors

_FEW = 4  # samples that are kept where the inputs can be cut
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


class NetworkCall:
    """A module's call during which the measured layer ran: copies of its inputs, and what it returned for them.

    Of inputs with a row per sample the first few rows are kept, of others all.

    Args:
        name: of the module.
        module: the module.
        args: of the call.
        kwargs: of the call.

    Attributes:
        outputs: for each returned tensor that is on the record, its position among all, its node and a copy.
        end: the number of operations on the record when the call ended.
        rows: which rows of the outputs belong to the kept inputs.
    """

    def __init__(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Copy the inputs, which the network may overwrite, and note the state of autograd and autocast."""
        self.name, self.module = name, module
        self.outputs: list[tuple[int, int, Tensor]] = []
        self.end = 0
        given = list(leaves((args, kwargs)))
        self.unknown = next((type(i).__name__ for i in given if not isinstance(i, (Tensor, *_PLAIN))), None)
        lengths = {tensor.shape[:1] for tensor in given if isinstance(tensor, Tensor)}
        self._length = lengths.pop() if len(lengths) == 1 else torch.Size()
        self.rows = slice(_FEW) if self._length else slice(None)
        self._args, self._kwargs = map_tree(args, self._kept), map_tree(kwargs, self._kept)
        kind = next((tensor.device.type for tensor in tensors((args, kwargs))), "cpu")
        self._autocast = kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        self._modes = torch.is_inference_mode_enabled(), torch.is_grad_enabled()

    def finished(self, output: Any, graph: OperationGraph) -> NetworkCall:
        """Return the call with what it returned, as a record has it."""
        call = copy(self)
        call.end, call.outputs = len(graph.operations), []
        for position, tensor in enumerate(tensors(output)):
            node = graph.node(tensor)
            if node is not None and tensor.is_floating_point() and self._length in (torch.Size(), tensor.shape[:1]):
                kept = tensor.detach()[self.rows] if tensor.dim() else tensor.detach()
                call.outputs.append((position, node, kept.clone()))
        return call

    @property
    def title(self) -> str:
        """What messages call the module."""
        return self.name or type(self.module).__name__

    def repeat(self, differentiably: bool = False) -> list[Tensor]:
        """Call the module again on the kept inputs.

        Args:
            differentiably: call it under autograd; False: in the modes of the call.

        Returns:
            All tensors that it returns.
        """
        kind, dtype, enabled = self._autocast
        is_inference, has_grad = (False, True) if differentiably else self._modes
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(is_inference))
            stack.enter_context(torch.set_grad_enabled(has_grad))
            stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False))
            args, kwargs = map_tree((self._args, self._kwargs), _copied)
            return list(tensors(self.module(*args, **kwargs)))

    def _kept(self, item: Any) -> Any:
        return item[self.rows].detach().clone() if isinstance(item, Tensor) and item.dim() else _copied(item)


def _copied(item: Any) -> Any:
    return item.detach().clone() if isinstance(item, Tensor) else item
