"""Which modules matter: the convolutions and linear layers of a model, by name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from lightning_flatness.errors import UnsupportedTailError

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
CLASSIFIERS = (nn.Linear, *CONVOLUTIONS)
_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def modules_by_name(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of a model by their names, without what compilers and wrappers put into them."""
    return {
        ".".join(part for part in name.split(".") if part not in _WRAPPERS): module
        for name, module in model.named_modules()
    }


def refuse_programs(model: nn.Module) -> None:
    """Refuse a network that was compiled into a program: nobody can look inside.

    Raises:
        UnsupportedTailError: names what it is.
    """
    if (kind := program_kind(model.modules())) is not None:
        raise UnsupportedTailError(
            f"The network must run step by step; it is {kind}. Measure the eager network that it was made from."
        )


def program_kind(modules: Iterable[nn.Module]) -> str | None:
    """Return what kind of program holds the convolutions of a model; None if it has some that run step by step."""
    modules = list(modules)
    if any(isinstance(module, CONVOLUTIONS) and not isinstance(module, torch.jit.ScriptModule) for module in modules):
        return None
    if any(isinstance(module, torch.jit.ScriptModule) for module in modules):
        return "a scripted or traced program (TorchScript)"
    if any("GraphModule" in type(module).__name__ for module in modules):
        return "an exported or traced graph"
    return None


def require_name(
    modules: dict[str, nn.Module], name: str | None, argument: str, kinds: tuple[type[nn.Module], ...]
) -> None:
    """Refuse the name of a module that is not there or of another kind.

    Raises:
        ValueError: lists the candidates.
    """
    candidates = [candidate for candidate, module in modules.items() if isinstance(module, kinds)]
    if name is not None and name not in candidates:
        raise ValueError(
            f"`{argument}` must name one of {candidates}; got {name!r}. Names are those of `model.named_modules()`."
        )


def depth_of(name: str) -> int:
    """Return how many modules are around a module of this name."""
    return len(name.split(".")) if name else 0


def outer(known: tuple[str | None, Any], name: str, output: Any) -> tuple[str | None, Any]:
    """Return a module's name and output if it is further out than the one that is known, else that one's."""
    return (name, output) if known[0] is None or depth_of(name) < depth_of(known[0]) else known
