"""The random numbers of data sets: fixed while a sample is loaded, and afterwards as they were."""

from __future__ import annotations

import random
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from types import BuiltinMethodType, FunctionType, MethodType, ModuleType
from typing import Any
from zlib import crc32

import torch
from lightning.pytorch.utilities.seed import isolate_rng

_PLAIN = (str, bytes, int, float, torch.Tensor, type(None), type)
_LONGEST = 256
_MOST = 10_000


class Randomness:
    """The random generators that an object uses: the global ones, and those that it holds.

    The object's own generators are looked for in its attributes, in containers of at most 256 items, in the functions
    of its classes and what those read from their module, and so on, among 10,000 objects in all.

    Args:
        holder: the object, such as a data set.
    """

    def __init__(self, holder: Any) -> None:
        self._holder = holder
        self._own: list[Any] | None = None  # found when needed, in the process that needs them

    def seed(self, key: Any) -> None:
        """Put all generators of the CPU in a state that depends on the key only."""
        seed = crc32(repr(key).encode())
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        if numpy := _numpy():
            numpy.random.seed(seed)
        for generator in self._generators():
            _seed(generator, seed)

    @contextmanager
    def preserved(self) -> Iterator[None]:
        """Leave all generators of the CPU as they were."""
        states = [(generator, state_of(generator)) for generator in self._generators()]
        everywhere = isolate_rng(include_cuda=False)
        everywhere.__enter__()
        try:
            yield
        finally:
            # Without the exception: given one, the context manager would not restore the generators.
            everywhere.__exit__(None, None, None)
            for generator, state in states:
                restore(generator, state)

    def _generators(self) -> list[Any]:
        if self._own is None:
            self._own = list(_generators_in(self._holder))
        return self._own


def _numpy() -> Any:
    """Return NumPy if something has imported it; else nobody draws from it."""
    return sys.modules.get("numpy")


def is_generator(each: Any) -> bool:
    """Return whether an object is a random generator with a state."""
    kinds: tuple[type, ...] = (torch.Generator, random.Random)
    if numpy := _numpy():
        kinds += (numpy.random.Generator, numpy.random.RandomState)
    return _isa(each, kinds) and not _isa(each, random.SystemRandom)  # that one has no state


def _isa(each: Any, kinds: type | tuple[type, ...]) -> bool:
    """Return whether an object is of a kind, without asking the object: it may be a proxy."""
    return issubclass(type(each), kinds)


def _generators_in(holder: Any) -> Iterator[Any]:
    """Yield the random generators that can be reached from an object, breadth first."""
    seen: dict[int, Any] = {}  # holds the objects, so that no other gets their id
    queue = deque([holder])
    while queue and len(seen) < _MOST:
        each = queue.popleft()
        if _isa(each, _PLAIN) or id(each) in seen:
            continue
        seen[id(each)] = each
        if is_generator(each):
            yield each
        else:
            queue.extend(_parts(each))


def _parts(each: Any) -> Iterable[Any]:
    """Return what an object consists of."""
    if _isa(each, ModuleType):
        return ()
    if _isa(each, dict):
        return list(each.values()) if len(each) <= _LONGEST else ()
    if _isa(each, (list, tuple, set, frozenset, deque)):
        return list(each) if len(each) <= _LONGEST else ()
    if _isa(each, FunctionType):
        return _read_by(each)
    if _isa(each, MethodType):
        return each.__self__, each.__func__
    if _isa(each, BuiltinMethodType):
        return (each.__self__,)
    if _isa(each, partial):
        return each.func, each.args, each.keywords
    attributes = getattr(type(each), "__dictoffset__", 0) and object.__getattribute__(each, "__dict__")
    methods = [f for kind in type(each).__mro__ for f in vars(kind).values() if _isa(f, FunctionType)]
    return [*attributes.values(), *methods] if attributes else methods


def _read_by(function: FunctionType) -> list[Any]:
    """Return the closure of a function, and the generators and functions of its own module that it reads."""
    cells = []
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # empty
            cells.append(cell.cell_contents)
    named = [function.__globals__.get(name) for name in function.__code__.co_names]
    return cells + [
        each
        for each in named
        if is_generator(each) or (_isa(each, FunctionType) and each.__module__ == function.__module__)
    ]


def state_of(generator: Any) -> Any:
    """Return the state of a generator of torch, NumPy or the standard library."""
    if hasattr(generator, "bit_generator"):  # of NumPy
        return generator.bit_generator.state
    return generator.getstate() if isinstance(generator, random.Random) else generator.get_state()


def restore(generator: Any, state: Any) -> None:
    """Put a generator in a state that `state_of` returned."""
    if hasattr(generator, "bit_generator"):
        generator.bit_generator.state = state
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.set_state(state)


def _seed(generator: Any, seed: int) -> None:
    if hasattr(generator, "bit_generator"):
        generator.bit_generator.state = type(generator.bit_generator)(seed).state
    elif isinstance(generator, torch.Generator):
        generator.manual_seed(seed)
    else:
        generator.seed(seed)
