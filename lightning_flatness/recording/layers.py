"""Which modules matter: the convolutions and linear layers of a model, by name."""

from __future__ import annotations

from torch import nn

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
CLASSIFIERS = (nn.Linear, *CONVOLUTIONS)
_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def modules_by_name(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of a model by their names, without what compilers and wrappers put into them."""
    return {
        ".".join(part for part in name.split(".") if part not in _WRAPPERS): module
        for name, module in model.named_modules()
    }


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
