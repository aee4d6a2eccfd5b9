"""Repeats a call of the network amid somebody else's validation, and leaves everything as it was."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.modules import module as hooks_of_all
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_flatness.data.unchanged import unchanged
from lightning_flatness.data.verification import Repetition, verify
from lightning_flatness.errors import UnsupportedTailError
from lightning_flatness.recording.dispatch import not_recorded
from lightning_flatness.recording.network_call import NetworkCall
from lightning_flatness.recording.recorded_pass import RecordedPass
from lightning_flatness.recording.recorder import only_for

_KNOWN = ("torch", "lightning_flatness")  # whose hooks may run once more
_COLLECTIVES = ("c10d", "_c10d_functional", "c10d_functional")


def verify_call(recorded: RecordedPass, context: Callable[[], AbstractContextManager[Any]]) -> str | None:
    """Verify a record by calling the network once more on a few samples, with its own filters and with moved ones.

    The calls are hidden from all recorders. Modes, buffers, other attributes of modules and random generators are as
    before to the last bit; objects that the modules hold, other than containers and tensors, are not looked into.

    Args:
        recorded: the first pass of a recorder.
        context: in which the network is called, such as the Trainer's precision.

    Returns:
        None if the record predicts what the network computes; else why nothing can be said.

    Raises:
        UnsupportedTailError: if it predicts something else.
    """
    call = recorded.network_call
    obstacle: str | None
    if call is None:
        obstacle = f"`{recorded.layer}` is called by itself, or the network's inputs cannot be copied"
    else:
        obstacle = _obstacle(call) or _verified(recorded, call, context)
    _require_known_derivatives(recorded, 0 if call is None or obstacle else call.end)
    return obstacle


def _obstacle(call: NetworkCall) -> str | None:
    """Return why a call cannot be repeated, as far as that is known without trying."""
    if call.unknown is not None:
        return f"`{call.title}` is called with an object of type `{call.unknown}`"
    hook = _foreign_hook(call.module)
    return None if hook is None else f"the network has hooks, which would run once more: `{hook}`"


def _verified(
    recorded: RecordedPass, call: NetworkCall, context: Callable[[], AbstractContextManager[Any]]
) -> str | None:
    """Repeat the call and verify the outputs that the loss depends on."""
    used = {recorded.loss, *(node.index for n in recorded.ancestry for node in recorded.graph.operations[n].nodes)}
    outputs = [output for output in call.outputs if output[1] in used]
    if not outputs:
        return f"the loss depends on no tensor with a row per sample that `{call.title}` returns"

    def computed(use: Callable[[list[Tensor]], Any], differentiably: bool = False) -> Any:
        with only_for(computed), not_recorded(), unchanged(call.module), _Alone(), context():
            found = call.repeat(differentiably)
            return use([found[position] for position, _, _ in outputs])

    def run() -> list[Tensor]:
        try:
            return cast(list[Tensor], computed(list))
        except Exception as error:  # of the user's code, which was not made for another call
            raise _Unrepeatable(f"the network cannot be called once more ({type(error).__name__}: {error})") from error

    what, (_, nodes, observed) = f"the output of `{call.title}`", zip(*outputs, strict=True)
    try:
        differentiate = partial(computed, differentiably=True)
        return verify(recorded, Repetition(what, nodes, call.end, observed, call.rows, run, differentiate))
    except _Unrepeatable as error:
        return str(error)


def _require_known_derivatives(recorded: RecordedPass, start: int) -> None:
    """Refuse a custom function among the operations from `start` on: its backward is not compared with anything."""
    functions = recorded.graph.functions
    if custom := sorted({functions[number] for number in recorded.ancestry & functions.keys() if number >= start}):
        raise UnsupportedTailError(
            f"The loss must be made of operations whose derivatives are known; it uses the `torch.autograd.Function`s "
            f"{custom}, whose backward may be any. Say how the loss is computed without them: "
            "`loss=lambda output, targets: ...`."
        )


class _Unrepeatable(Exception):
    """The network cannot be called once more."""


class _Alone(TorchDispatchMode):
    """Refuses to exchange tensors with other processes: they do not call their networks once more, or not now."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation."""
        if func.namespace in _COLLECTIVES:
            raise RuntimeError(f"`{func}` exchanges tensors with other processes")
        return func(*args, **(kwargs or {}))


def _foreign_hook(network: nn.Module) -> str | None:
    """Return the name of a hook on a network's passes that is neither torch's nor ours."""
    holders = [vars(module) for module in network.modules()]
    kinds = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
    every = [hook for own in holders for kind in kinds for hook in own.get(kind, {}).values()]
    every += [*hooks_of_all._global_forward_hooks.values(), *hooks_of_all._global_forward_pre_hooks.values()]
    foreign = (hook for hook in every if (getattr(hook, "__module__", None) or "").partition(".")[0] not in _KNOWN)
    return next((getattr(hook, "__qualname__", type(hook).__name__) for hook in foreign), None)
