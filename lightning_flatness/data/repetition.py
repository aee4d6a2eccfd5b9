"""Repeats a call of the network amid somebody else's validation, and leaves everything as it was."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.nn.modules import module as hooks_of_all
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_flatness.data.passes import is_plain, write
from lightning_flatness.data.randomness import is_generator, restore, state_of
from lightning_flatness.data.verification import Repetition, verify
from lightning_flatness.errors import UnsupportedTailError
from lightning_flatness.recording.dispatch import not_recorded
from lightning_flatness.recording.network_call import NetworkCall
from lightning_flatness.recording.recorded_pass import RecordedPass
from lightning_flatness.recording.recorder import only_for

_KNOWN = ("torch", "lightning_flatness")  # whose hooks may run once more
_CONTAINERS = (dict, list, tuple, set, deque)
_LARGE = 1000  # items
_PLAIN = (bool, int, float, str, type(None))
_HOOKS = {name for name in vars(nn.Module()) if "hooks" in name}  # no pass adds any
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
    if len(now) != len(then) or any(new is not old for new, old in zip(now, then, strict=True)):
        container.clear()
        fill(before)


def _ignore(*args: Any, **kwargs: Any) -> None:
    """Do nothing."""
