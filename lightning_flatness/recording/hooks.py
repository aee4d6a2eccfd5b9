"""The hooks of a recorder on the modules of a network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import nn

_WITH_KWARGS = frozenset({"before_network", "before_layer", "after_linear"})
_ALWAYS = frozenset({"after_convolution", "after_layer"})  # also if the module's call ends with an error


class Wanted(NamedTuple):
    """What is to be called around each call of a module.

    Attributes:
        name: of the module.
        module: the module.
        before: name of a method of the record's builder; None: nothing.
        after: likewise.
    """

    name: str
    module: nn.Module
    before: str | None
    after: str | None


class Hooks:
    """Calls methods of the record's builder before and after the calls of modules.

    Args:
        listen: returns a hook, given the name of the builder's method and that of the module.
    """

    def __init__(self, listen: Callable[[str, str], Callable[..., None]]) -> None:
        """Start with none."""
        self._listen = listen
        self._wanted: list[Wanted] = []
        self._handles: list[Any] = []

    def install(self, wanted: Iterable[Wanted]) -> None:
        """Install these hooks in the place of those that are installed."""
        self.remove()
        self._wanted = list(wanted)
        self._register()

    def remove(self) -> None:
        """Remove them."""
        while self._handles:
            self._handles.pop().remove()

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Have no hooks within."""
        self.remove()
        try:
            yield
        finally:
            self._register()

    @property
    def layers(self) -> list[nn.Module]:
        """The modules with a weight that are listened to."""
        return [each.module for each in self._wanted if "weight" in each.module._parameters]

    def around(self, module: nn.Module, args: tuple[Any, ...], call: Callable[[], Any]) -> Any:
        """Call what stands for a call of a module, with the hooks that this would have run; return its output."""
        wanted = [each for each in self._wanted if each.module is module]
        for each in wanted:
            if each.before is not None:
                self._listen(each.before, each.name)(module, args, *[{}] * (each.before in _WITH_KWARGS))
        output = call()
        for each in wanted:
            if each.after is not None:
                self._listen(each.after, each.name)(module, args, *[{}] * (each.after in _WITH_KWARGS), output)
        return output

    def _register(self) -> None:
        for name, module, before, after in self._wanted:
            if before is not None:
                hook, with_kwargs = self._listen(before, name), before in _WITH_KWARGS
                self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=with_kwargs))
            if after is not None:
                hook, with_kwargs = self._listen(after, name), after in _WITH_KWARGS
                options = {"with_kwargs": with_kwargs, "always_call": after in _ALWAYS}
                self._handles.append(module.register_forward_hook(hook, **options))
