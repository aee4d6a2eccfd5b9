"""Restores what a forward pass changes in a network."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from operator import is_
from typing import Any, TypeGuard

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from lightning_flatness.data.randomness import is_generator, restore, state_of

_CONTAINERS = (dict, list, tuple, set, deque)
_LARGE = 1000  # items
_PLAIN = (bool, int, float, str, type(None))
_HOOKS = {name for name in vars(nn.Module()) if "hooks" in name}  # no pass adds any


@contextmanager
def unchanged(network: nn.Module) -> Iterator[None]:
    """Restore what a forward pass changes in a network: modes, buffers, attributes, random generators.

    LightningModules do not log meanwhile.
    """
    restorers = [_restorer(value) for module in network.modules() for value in _values_of(vars(module))]
    generators = isolate_rng()
    generators.__enter__()
    try:
        for module in network.modules():
            if isinstance(module, LightningModule):
                vars(module).update(log=_ignore, log_dict=_ignore)
        yield
    finally:
        for restore_value in filter(None, restorers):
            restore_value()
        # Without the exception: given one, the context manager would not restore the generators.
        generators.__exit__(None, None, None)


def _values_of(own: dict[str, Any]) -> Iterator[Any]:
    """Yield the attributes of a module as a container, each of them, and what those hold that are containers."""
    yield own
    for name, value in own.items():
        if name not in _HOOKS and not isinstance(value, _PLAIN):
            yield value
            # A large container is data, which a forward pass does not change.
            if isinstance(value, _CONTAINERS) and len(value) <= _LARGE:
                yield from value.values() if isinstance(value, dict) else value


def _restorer(value: Any) -> Callable[[], None] | None:
    """Return what puts a value back in its present state: a container, a tensor that is no parameter, a generator."""
    if isinstance(value, dict):
        return partial(_refill, value, dict(value), value.update)
    if isinstance(value, (list, set, deque)):
        return partial(_refill, value, list(value), value.update if isinstance(value, set) else value.extend)
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter) and is_plain(value):
        with torch.inference_mode(False), torch.no_grad():
            return partial(write, value, value.detach().clone())
    if is_generator(value):
        return partial(restore, value, state_of(value))
    return None


def _refill(container: Any, before: Any, fill: Callable[[Any], None]) -> None:
    """Give a container its earlier items, unless it has them."""
    now, then = ([*each, *(each.values() if isinstance(each, dict) else ())] for each in (container, before))
    if len(now) != len(then) or not all(map(is_, now, then)):
        container.clear()
        fill(before)


def _ignore(*args: Any, **kwargs: Any) -> None:
    """Do nothing."""


def is_plain(buffer: Tensor | None) -> TypeGuard[Tensor]:
    """Return whether a buffer holds plain numbers: it is not None, lazy, sparse, quantised or on the meta device."""
    return (
        isinstance(buffer, Tensor)
        and not nn.parameter.is_lazy(buffer)
        and buffer.layout is torch.strided
        and not (buffer.is_meta or buffer.is_quantized)
    )


def write(buffer: Tensor, value: Tensor) -> None:
    """Give the buffer its earlier value. One that has it stays untouched: a graph may need it for its backward pass."""
    with torch.inference_mode(buffer.is_inference()), torch.no_grad():
        fits = (buffer.shape, buffer.dtype, buffer.device) == (value.shape, value.dtype, value.device)
        if fits and type(buffer) is Tensor and torch.equal(_bits(buffer), _bits(value)):
            return
        if fits and 0 not in buffer.stride():
            buffer.copy_(value)
        else:
            buffer.data = value


def _bits(tensor: Tensor) -> Tensor:
    """Return the bytes of a tensor; compared as numbers, NaN would differ from itself and 0 would equal -0."""
    return tensor.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
