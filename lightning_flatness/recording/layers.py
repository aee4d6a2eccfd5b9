"""Which modules matter: the convolutions and classifiers of a model, and the call that ends the tail."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_flatness.errors import Refusal
from lightning_flatness.recording.graph import OperationGraph
from lightning_flatness.recording.operators import Trait
from lightning_flatness.recording.recorded_pass import ModuleCall

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


def choose_classifier(
    graph: OperationGraph, layer: str, calls: list[ModuleCall], outputs: list[ModuleCall]
) -> ModuleCall | Refusal:
    """Return the call that ends the tail: the classifier whose output the network and the loss use as logits.

    Args:
        graph: of the forward pass.
        layer: name of the monitored convolution.
        calls: of linear modules after it and dependent on it, in order.
        outputs: what the modules around the convolution returned, one call for each tensor.

    Returns:
        The call, or why there is none: no linear module ran, or it is not the last step before the loss.
    """
    outermost = _outermost(outputs)
    candidates = calls or outermost[:1]  # no linear module: the convolution itself is the classifier
    if not candidates:
        return Refusal(
            f"A linear classifier must run after `{layer}`, on what that computed; none did{_because(graph)}. "
            "Name them: `layer=...`, `classifier=...`."
        )
    returned = [call for out in outermost for call in candidates if _same_prediction(call.output, out.output)]
    chosen = returned[0] if returned else candidates[-1]
    is_inside = any(chosen.name.startswith(f"{out.name}." if out.name else "") for out in outermost)
    if (returned or not is_inside) and _ends_tail(graph, chosen):
        return chosen
    path = " > ".join([layer, *(operation.name for operation in graph.operations)])
    remedy = f" If the loss is that of this very output, say so: `classifier={chosen.name!r}`."
    return Refusal(
        "The network and the loss must use the logits as they leave the classifier; after "
        f"{f'`{chosen.name}`' if chosen.weights else 'the network'} they are changed."
        f"{remedy if chosen.weights else ''}\n  path: {path}"
    )


def named_classifier(
    graph: OperationGraph, layer: str, name: str, calls: list[ModuleCall], outputs: list[ModuleCall]
) -> ModuleCall | Refusal:
    """Return the call of the classifier that the user named, or that an earlier pass found; or that it did not run."""
    for call in (*calls, *outputs):
        if call.name == name:
            return call
    return Refusal(
        f"The classifier `{name}` must run after `{layer}`, on what that computed; it did not{_because(graph)}. "
        f"Linear modules that did: {sorted({call.name for call in calls})}."
    )


def _because(graph: OperationGraph) -> str:
    reason = graph.incomplete_because(len(graph.operations) + 1)
    return f" ({reason})" if reason else ""


def _outermost(outputs: list[ModuleCall]) -> list[ModuleCall]:
    """Return the outputs of the outermost module that was called."""
    depth = min((_depth(call) for call in outputs), default=0)
    return [call for call in outputs if _depth(call) == depth]


def _depth(call: ModuleCall) -> int:
    return len(call.name.split(".")) if call.name else 0


def _same_prediction(logits: Tensor, other: Tensor) -> bool:
    """Return whether two outputs are the same up to a shift of each sample's logits, as log_softmax makes."""
    if logits.shape != other.shape:
        return False
    rounding = 100 * torch.finfo(other.dtype).eps * (1 + logits.abs().nan_to_num(0, 0, 0).max())
    first, second = logits.double().log_softmax(-1), other.double().log_softmax(-1)
    return bool(first.isclose(second, rtol=0, atol=float(rounding), equal_nan=True).all())


def _ends_tail(graph: OperationGraph, call: ModuleCall) -> bool:
    """Return whether what follows in the graph (the user's loss) takes the call's output as logits."""
    later = graph.descendants(call.node, call.end)
    if any(Trait.MATRIX_PRODUCT in operation.traits for operation in later):
        return False
    read = [graph.tensor(operation.args[0]) for operation in later if Trait.LOG_SOFTMAX in operation.traits]
    return not read or any(_same_prediction(call.output, logits.detach().flatten(1)) for logits in read)
