"""Forward passes on the monitor's own batches: the model's state is preserved, each batch is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeGuard, cast

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.core.hooks import DataHooks
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from lightning_flatness.curvature.grouping import BatchGroups
from lightning_flatness.curvature.methods import Method, Quantities, Recorder
from lightning_flatness.data.batches import batch_inputs, batch_targets, is_empty, output_logits
from lightning_flatness.data.unchanged import is_plain, unchanged, write
from lightning_flatness.data.verification import UNVERIFIED, Repetition, Verification, verify
from lightning_flatness.losses import BinaryCrossEntropy, CrossEntropy, Loss, checked_targets
from lightning_flatness.recording.layers import CLASSIFIERS, CONVOLUTIONS
from lightning_flatness.recording.layers_recorder import LayersRecorder
from lightning_flatness.recording.recorded_layers import RecordedLayers
from lightning_flatness.recording.recorded_pass import RecordedPass
from lightning_flatness.recording.recorder import only_for

_FEW = 4  # samples on which the record is verified
SQUASHED = (
    "measures a loss that takes logits and is given probabilities, the output of a softmax or sigmoid. The values are "
    "those of this loss; let the network end in its logits if that was not meant."
)
"""Said once about such a network."""
ASSUMED = "the loss is assumed to be the cross-entropy of the network's output with the targets of the batch"


def measured_batches(
    recorder: Recorder,
    method: Method,
    model: nn.Module,
    batches: Iterable[Any],
    max_samples: int | None = None,
    target: Callable[[Any], Tensor] | None = None,
    loss: Loss | Callable[[Any, Any], Tensor] | None = None,
    verification: Verification | None = None,
) -> Iterator[Quantities]:
    """Run the model on each batch and yield quantities, of no more than `max_samples` samples in all.

    Small batches are evaluated together, see `BatchGroups`.

    Args:
        recorder: the recorder of the model.
        method: the method that measures the recorded passes.
        model: the network; it is called with the inputs of each batch.
        batches: an iterable of (inputs, targets).
        max_samples: stop after so many samples; None: all.
        target: returns the targets of a batch; None: `batch[1]`, or the usual keys of a dictionary.
        loss: of the training; None: cross-entropy of the logits, which is assumed.
        verification: says whether the record is still to be verified; None: it is not verified.

    Raises:
        ValueError: if a batch or its targets are not what they must be.
    """
    groups, device, warned = BatchGroups(), device_of(model), False
    with recorder:
        for batch in batches:
            try:
                batch = move_data_to_device(batch, device)
            except NotImplementedError as error:  # such as tensors of the meta device, which hold nothing
                raise ValueError(f"A batch must hold data that can be moved to {device}: {error}") from error
            targets = (target or batch_targets)(batch)
            if is_empty(batch, targets):
                continue
            inputs, step = batch_inputs(batch), partial(_loss_of, model, loss)
            with torch.no_grad(), only_for(recorder), _attention_by_steps(isinstance(recorder, LayersRecorder)):
                value = step(recorder, inputs, targets)
            recorded = recorder.take_pass(value)
            quantities = groups.add(method, recorded, slice(groups.left(max_samples)))
            if recorded.takes_probabilities and not warned:
                rank_zero_warn(f"lightning-flatness {SQUASHED}", category=UserWarning)
                warned = True
            if verification is not None and verification.is_due(0, recorder.layer):
                is_of_layers = isinstance(recorded, RecordedLayers)
                with unchanged(model):
                    obstacle = UNVERIFIED if is_of_layers else _verified_on_few(recorder, step, inputs, targets)
                verification.note(0, recorder.layer, obstacle)
            yield from quantities
            if groups.left(max_samples) == 0:
                break
    yield from groups.rest()


@contextmanager
def _attention_by_steps(is_needed: bool) -> Iterator[None]:
    """Let torch's attention run by single operations, which have derivatives, instead of a fused one."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(before and not is_needed)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _loss_of(model: nn.Module, loss: Any, recorder: Recorder | None, inputs: Any, targets: Any) -> Tensor:
    try:
        output = model(inputs)
    except TypeError as error:
        if "positional argument" not in str(error) and isinstance(inputs, Tensor):
            raise
        raise ValueError(
            f"The network must take the inputs of a batch as one argument; got {type(inputs).__name__}, and it says: "
            f"{error}. Wrap it in a module whose `forward` takes that apart."
        ) from error
    if recorder is not None:
        recorder.require_recorded()
    return computed_loss(loss, output, targets)


def _verified_on_few(recorder: Recorder, step: Callable[..., Tensor], inputs: Any, targets: Any) -> str | None:
    """Verify the record on a few samples where the batch can be cut, else on all; return why that is not possible."""
    if isinstance(inputs, Tensor) and isinstance(targets, Tensor) and len(inputs) == len(targets):
        inputs, targets = inputs[:_FEW], targets[:_FEW]
    with torch.no_grad(), only_for(recorder):
        value = step(recorder, inputs, targets)
    if not bool(value.isfinite()):
        recorder.clear()
        return "the loss of the first samples is not finite"
    recorded = cast(RecordedPass, recorder.take_pass(value))  # one: the method has been chosen

    def run() -> list[Tensor]:
        with torch.no_grad(), only_for(run):
            return [step(None, inputs, targets)]

    def differentiate(use: Callable[..., Any]) -> Any:
        with torch.inference_mode(False), torch.enable_grad(), only_for(run):
            # Copies of what was made in inference mode can be differentiated by.
            copies = (each.clone() if isinstance(each, Tensor) else each for each in (inputs, targets))
            return use([step(None, *copies)])

    end, observed = len(recorded.graph.operations), [value.detach()]
    return verify(recorded, Repetition("the loss", [recorded.loss], end, observed, slice(None), run, differentiate))


def computed_loss(loss: Loss | Callable[[Any, Any], Tensor] | None, output: Any, targets: Any) -> Tensor:
    """Return the loss of what the network returned, a single number; cross-entropy is assumed for None.

    Raises:
        ValueError: if the output, the targets or the loss are not what they must be.
    """
    loss = loss or CrossEntropy()
    if not isinstance(loss, (CrossEntropy, BinaryCrossEntropy)):
        value = loss(output, targets)
        if not isinstance(value, Tensor) or value.numel() != 1:
            came = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"`loss` must return one number as a tensor; got {came}. Reduce it, as with `.mean()`.")
        return value
    logits = output_logits(output)
    if logits.dim() > 2:
        logits = logits.squeeze() if logits.numel() > len(logits) else logits.flatten(1)
        logits = logits.unsqueeze(0) if logits.dim() == 1 and len(output_logits(output)) == 1 else logits
    if logits.dim() == 1:
        logits = logits.unsqueeze(1)
    if logits.dim() != 2:
        raise ValueError(
            f"The logits must have shape (n, c); got {tuple(logits.shape)}. Say how the loss is computed: "
            "`loss=lambda output, targets: ...`."
        )
    return loss.value(logits, checked_targets(targets, len(logits), logits.shape[1], loss, not logits.is_cuda))


@contextmanager
def preserved_state(model: nn.Module) -> Iterator[None]:
    """Put every submodule in eval mode; afterwards restore the modes, the buffers and all random generators.

    Buffers are restored to the last bit: those that the forward pass changes, replaces, deletes or registers. Other
    attributes (a Python counter, a tensor that is not registered as a buffer) and parameters are not.
    """
    modes = [(module, module.training) for module in model.modules()]
    buffers = [_Buffers(module) for module, _ in modes]
    generators = isolate_rng()
    generators.__enter__()
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training
        for kept in buffers:
            kept.restore()
        # Without the exception: given one, the context manager would not restore the generators.
        generators.__exit__(None, None, None)


class _Buffers:
    """The buffers of one module, without its submodules: which there are, and their values."""

    def __init__(self, module: nn.Module) -> None:
        """Copy the values."""
        self.module = module
        self.tensors = dict(module._buffers.items())
        self.temporary = set(module._non_persistent_buffers_set)
        with torch.inference_mode(False), torch.no_grad():
            self.values = {name: value.clone() for name, value in self.tensors.items() if is_plain(value)}

    def restore(self) -> None:
        """Bind the same tensors to the same names in the same order, and copy back the values that have changed."""
        bound = self.module._buffers
        for name in set(bound.keys()) - set(self.tensors):
            del bound[name]
        for name, buffer in self.tensors.items():
            if name not in bound or bound[name] is not buffer:
                bound[name] = buffer
        if list(bound.keys()) != list(self.tensors):
            for name in self.tensors:
                bound[name] = bound.pop(name)
        if self.module._non_persistent_buffers_set != self.temporary:
            self.module._non_persistent_buffers_set = self.temporary
        for name, value in self.values.items():
            write(cast(Tensor, self.tensors[name]), value)


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the model's first parameter."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def transferred(batches: Iterable[Any], trainer: Trainer, pl_module: LightningModule) -> Iterator[Any]:
    """Yield batches as the module's own steps get them: in its precision, on its device, after its hooks."""
    module = trainer.datamodule  # type: ignore[attr-defined]

    def hook(name: str) -> Callable[..., Any]:
        own = module is None or is_overridden(name, pl_module)  # Lightning prefers the LightningModule's
        owner = module if not own and is_overridden(name, module, parent=DataHooks) else pl_module
        return cast(Callable[..., Any], getattr(owner, name))

    for batch in batches:
        batch = hook("on_before_batch_transfer")(trainer.precision_plugin.convert_input(batch), 0)
        batch = hook("transfer_batch_to_device")(batch, pl_module.device, 0)
        yield hook("on_after_batch_transfer")(batch, 0)


def callable_module(pl_module: LightningModule) -> nn.Module:
    """Return what can be called with inputs: the module itself if it defines `forward`, else its one network.

    Raises:
        ValueError: if there is not exactly one.
    """
    if type(pl_module).forward is not LightningModule.forward:
        return pl_module
    holders = _holders(pl_module, CONVOLUTIONS) or _holders(pl_module, CLASSIFIERS)
    if len(holders) != 1:
        raise ValueError(
            f"The monitor must know what to call with its own batches: `{type(pl_module).__name__}` has no `forward`, "
            f"and {len(holders)} networks: {sorted(holders)}. Define `forward(self, inputs)` that returns the logits."
        )
    return next(iter(holders.values()))


def _holders(pl_module: LightningModule, kinds: tuple[type[nn.Module], ...]) -> dict[str, nn.Module]:
    """Return the children that hold modules of some kinds, by name."""
    return {
        name: child
        for name, child in pl_module.named_children()
        if any(isinstance(module, kinds) for module in child.modules())
    }


def is_number(value: Any) -> TypeGuard[Tensor]:
    """Return whether a value is a tensor with one floating number."""
    return isinstance(value, Tensor) and value.numel() == 1 and value.is_floating_point()


def loss_name(loss: Loss | Callable[[Any, Any], Tensor] | None) -> str:
    """Return the name of a loss; None is the one that is assumed."""
    if loss is None:
        return f"{ASSUMED} (assumed)"
    return getattr(loss, "__name__", type(loss).__name__)


def batch_counts(trainer: Trainer) -> Sequence[float]:
    """Return how many batches each loader has; loaders whose batches come together count as one, as for Lightning."""
    counts = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
    loop = trainer.validate_loop if trainer.state.fn == "validate" else trainer.fit_loop.epoch_loop.val_loop
    return counts if loop._is_sequential else [min(counts)]  # private, as seen in Lightning 2.5.3 to 2.6.6
