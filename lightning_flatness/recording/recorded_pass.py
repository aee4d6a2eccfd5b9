"""What may follow the monitored convolution: the recorded tail and its classifier."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from lightning_flatness.recording.graph import Tape
from lightning_flatness.recording.operation import raised

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
CLASSIFIERS = (nn.Linear, *CONVOLUTIONS)
_MATRIX_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "einsum", "convolution")
_LOG_SOFTMAX = ("_log_softmax", "log_softmax", "cross_entropy_loss")
_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


class UnsupportedTailError(ValueError):
    """The network's tail is not one for which the closed form is exact."""


class NonFiniteError(ValueError):
    """The network's outputs hold NaN, so there is nothing to measure."""


class Call(NamedTuple):
    """One call of a module after the monitored convolution."""

    name: str
    inputs: Tensor
    output: Tensor  # a copy, flattened to (n, features)
    weights: tuple[Tensor, Tensor] | None  # a linear module's `V` and its bias; None for another
    slot: int | None  # of the output on the tape
    end: int  # operations on the tape when it returned


@dataclass(frozen=True)
class Recording:
    """One forward pass from the monitored convolution to the logits."""

    tape: Tape
    layer: str
    convolution: nn.Module
    weight: Tensor  # W, shape (k, d)
    bias: Tensor  # shape (k,)
    roots: tuple[tuple[int, int, int], ...]  # (slot of z, constant of z, constant of A) of each call
    classifier: Call

    @property
    def path(self) -> str:
        """Return the recorded steps from the convolution to the logits."""
        steps = [operation.name for operation in self.tape.operations[: self.classifier.end]]
        return " > ".join([self.layer, *steps, self.classifier.name])

    @property
    def signature(self) -> tuple[Any, ...]:
        """Return what must not change for a certificate to stay valid."""
        names = tuple(operation.name for operation in self.tape.operations[: self.classifier.end])
        return names, self.classifier.name, tuple(self.classifier.inputs.shape[1:]), len(self.roots)


class WeightCopies:
    """Copies of weights, made while a module runs: a moving average may swap the weights around the pass."""

    def __init__(self) -> None:
        """Start with none."""
        self._known: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def of(self, module: nn.Module) -> tuple[Tensor, Tensor]:
        """Return the weight of a linear module or a convolution, one row per output, and its bias, if only zeros.

        While the values stay the same, so do the tensors that are returned.
        """
        weight, bias = cast(Tensor, module.weight).detach(), cast("Tensor | None", module.bias)
        if hasattr(weight, "full_tensor") or weight.numel() == 0:
            raise UnsupportedTailError(
                f"A weight must be whole on every process; that of {module} is sharded (FSDP). Keep this layer out of "
                "the sharding, or measure a gathered copy of the model with `measure`."
            )
        with torch.inference_mode(False):
            bias = weight.new_zeros(len(weight)) if bias is None else bias.detach()
            rows, known = weight.flatten(1), self._known.get(module)
            # To compare values the host would have to wait for an accelerator, which copies in no time.
            if known is None or weight.is_cuda or not all(map(_equal, known, (rows, bias))):
                known = self._known[module] = raised(rows.clone()), raised(bias.clone())
        return known


def _equal(copy: Tensor, value: Tensor) -> bool:
    return copy.shape == value.shape and copy.device == value.device and torch.equal(copy, raised(value))


def refusal(recording: Recording, reason: str) -> UnsupportedTailError:
    """Return the error for a tail that cannot be measured exactly."""
    return UnsupportedTailError(
        f"The closed form needs every filter of `{recording.layer}` to reach one input of a linear classifier "
        f"on its own (normalisation in eval mode, activation, skip, pooling): {reason}.\n"
        f"  path: {recording.path}\n"
        f"  Name another convolution (`layer=...`) or the classifier (`classifier=...`)."
    )


def require_own_weight(recording: Recording, modules: dict[str, nn.Module]) -> None:
    """Refuse a convolution whose weight is also that of another module."""
    weight = recording.convolution.weight
    owners = sum(parameter is weight for module in modules.values() for parameter in module._parameters.values())
    if owners > 1:
        raise refusal(recording, f"the weight of `{recording.layer}` is shared with another module")


def choose_classifier(tape: Tape, layer: str, calls: list[Call], outputs: list[Call]) -> Call:
    """Return the call that ends the tail: the classifier whose output the network and the loss use as logits.

    Args:
        tape: of the forward pass.
        layer: name of the monitored convolution.
        calls: of linear modules after it and dependent on it, in order.
        outputs: what the modules around the convolution returned, one call for each tensor.

    Raises:
        UnsupportedTailError: if there is none, or if it is not the last step before the loss.
    """
    outermost = _outermost(outputs)
    candidates = calls or outermost[:1]  # no linear module: the convolution itself is the classifier
    if not candidates:
        raise UnsupportedTailError(
            f"A linear classifier must run after `{layer}`, on what that computed; none did{_because(tape)}. "
            "Name them: `layer=...`, `classifier=...`."
        )
    returned = [call for out in outermost for call in candidates if _same_prediction(call.output, out.output)]
    chosen = returned[0] if returned else candidates[-1]
    around = any(chosen.name.startswith(f"{out.name}." if out.name else "") for out in outermost)
    if (around and not returned) or not _ends_tail(tape, chosen):
        what = f"`{chosen.name}`" if chosen.weights else "the network"
        path = " > ".join([layer, *(operation.name for operation in tape.operations)])
        remedy = f" If the loss is that of this very output, say so: `classifier={chosen.name!r}`." * bool(
            chosen.weights
        )
        raise UnsupportedTailError(
            f"The network and the loss must use the logits as they leave the classifier; after {what} they are "
            f"changed.{remedy}\n  path: {path}"
        )
    return chosen


def named_classifier(tape: Tape, layer: str, name: str, calls: list[Call], outputs: list[Call]) -> Call:
    """Return the call of the classifier that the user named, or that an earlier pass settled on.

    Raises:
        UnsupportedTailError: if it did not run after the convolution.
    """
    for call in (*calls, *outputs):
        if call.name == name:
            return call
    raise UnsupportedTailError(
        f"The classifier `{name}` must run after `{layer}`, on what that computed; it did not{_because(tape)}. "
        f"Linear modules that did: {sorted({call.name for call in calls})}."
    )


def _because(tape: Tape) -> str:
    doubt = tape.doubt(len(tape.operations) + 1)
    return f" ({doubt})" if doubt else ""


def _outermost(outputs: list[Call]) -> list[Call]:
    """Return the outputs of the outermost module that was called."""
    depth = min((len(call.name.split(".")) * bool(call.name) for call in outputs), default=0)
    return [call for call in outputs if len(call.name.split(".")) * bool(call.name) == depth]


def _same_prediction(logits: Tensor, other: Tensor) -> bool:
    """Return whether two outputs are the same up to a shift of each sample's logits, as log_softmax makes."""
    if logits.shape != other.shape:
        return False
    rounding = 100 * torch.finfo(other.dtype).eps * (1 + logits.abs().nan_to_num(0, 0, 0).max())
    first, second = logits.double().log_softmax(-1), other.double().log_softmax(-1)
    return bool(first.isclose(second, rtol=0, atol=float(rounding), equal_nan=True).all())


def _ends_tail(tape: Tape, call: Call) -> bool:
    """Return whether what follows on the tape (the user's loss) takes the call's output as logits."""
    later = tape.descendants(call.slot, call.end)
    if any(operation.name in _MATRIX_PRODUCTS for operation in later):
        return False
    read = [tape.tensor(operation.args[0]) for operation in later if operation.name in _LOG_SOFTMAX]
    return not read or any(_same_prediction(call.output, logits.detach().flatten(1)) for logits in read)


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
