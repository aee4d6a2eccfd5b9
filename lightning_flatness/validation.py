"""The measurement of one validation: its passes are recorded, measured and added up for each loader."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import isfinite
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_flatness.curvature.jacobian.method import LayerQuantities
from lightning_flatness.curvature.methods import (
    AutoMethod,
    Choice,
    Method,
    Quantities,
    Recorder,
    chosen_record,
    common_choice,
    encoded_choice,
    reason_of,
)
from lightning_flatness.data.batches import batch_targets, is_empty
from lightning_flatness.data.churn import PredictionChurn
from lightning_flatness.data.listening import LoggedValues
from lightning_flatness.data.passes import (
    ASSUMED,
    SQUASHED,
    batch_counts,
    callable_module,
    computed_loss,
    is_number,
    loss_name,
    measured_batches,
    preserved_state,
    transferred,
)
from lightning_flatness.data.repetition import verify_call
from lightning_flatness.data.samples import SampleHistory
from lightning_flatness.data.sampling import batches_for_rank, ordered_source, sample_indices, sample_limit
from lightning_flatness.data.verification import UNVERIFIED, Verification
from lightning_flatness.errors import UnsupportedTailError
from lightning_flatness.keys import CHURN
from lightning_flatness.losses import Loss
from lightning_flatness.metrics.evaluation import Evaluation
from lightning_flatness.metrics.layers import LayerEvaluation, LayerExchange, evaluation_of
from lightning_flatness.recording.recorded_layers import RecordedLayers
from lightning_flatness.reporting.failures import Failures
from lightning_flatness.reporting.loggers import LAYER


def loader_count(trainer: Trainer, data: Any) -> int:
    """Return how many loaders have values of their own; the monitor's own batches count as one loader."""
    if not _rides(data):
        return 1
    return len(batch_counts(trainer))


class MeasuredValidation:
    """Records a validation's own passes, or runs passes of its own before the first batch.

    Each loader is measured on its own, with a recorder and a method of its own, so that one which cannot be measured
    takes nothing from the others. The hooks are installed while the batches of a loader come, until something fails.

    Args:
        failures: of the monitor; they say which loaders are not measured.
        tools: makes the recorder of the network and the method that measures the recorded passes; it is given what has
            been chosen before.
        choice: the method that earlier validations of the run have chosen; None: none has.
        trainer: the Trainer that validates.
        pl_module: the module that it validates.
        data: of the `FlatnessMonitor`.
        max_samples: of the `FlatnessMonitor`.
        target: of the `FlatnessMonitor`.
        loss: of the `FlatnessMonitor`.
        verification: says for which loaders the record is still to be verified.
        churn: has the predictions of the previous validation; None: there is none.
        samples: adds up what the validations say about each sample; None: nobody asks.
        layers: a recorder of several layers; None: a single layer is measured.

    Attributes:
        measured: what is measured, in words; None: nothing so far.
        choice: the method that has been chosen; None: none, or it was named.
        facts: what is measured and how, by name.
        samples: how many samples the loaders with values have, in all processes.
        distributions: the values of all samples by name, shape (n,), for each of these loaders.
    """

    def __init__(
        self,
        failures: Failures,
        tools: Callable[[Choice | None], tuple[Recorder, Method]],
        choice: Choice | None,
        trainer: Trainer,
        pl_module: LightningModule,
        data: Any,
        max_samples: int | None,
        target: Callable[[Any], Tensor] | None,
        loss: Loss | Callable[[Any, Any], Tensor] | None,
        verification: Verification,
        churn: PredictionChurn | None = None,
        samples: SampleHistory | None = None,
        layers: Recorder | None = None,
    ) -> None:
        """Start with no samples."""
        self._failures, self._tools, self.choice = failures, tools, choice
        self._trainer, self._module = trainer, pl_module
        self._data, self._max_samples, self._target, self._loss = data, max_samples, target, loss
        self._verification = verification
        self._logged = LoggedValues(pl_module)
        self._count = loader_count(trainer, data)
        self._batches = [0] * self._count
        self._recorder: Recorder | None = None  # of the loader whose batches come
        self._loader = -1  # its index
        self.measured: str | None = None
        self._layers: dict[int, str] = {}  # by loader
        self._assumed = ""
        self.facts: dict[str, str] = {}
        self.samples = 0
        self.distributions: dict[str, Tensor] = {}
        self._churn, self._churned = churn or PredictionChurn(), dict[int, float]()
        self._churn.start()
        self._samples = samples
        if samples is not None:
            samples.start()
        self._evaluations: list[Evaluation | LayerEvaluation] = []
        self._exchange = LayerExchange(layers, self._count)
        with failures.contained(self.close):
            self._evaluations = [evaluation_of(layers, pl_module.device) for _ in range(self._count)]

    def before_batch(self, loader: int, is_first: bool) -> None:
        """Record the pass of the batch that comes, or run the own passes before the first one."""
        if not _rides(self._data):
            own = is_first and not (self._trainer.sanity_checking and self._data == "train")
            if own and not self._failures.excludes(0):
                with self._failures.contained(self.close, 0):
                    self._measure_own_batches()
            return
        self._batches[loader] += 1
        if self._failures.excludes(loader):
            return
        with self._failures.contained(self.close, loader):
            recorder = self._opened(loader)
            if self._samples_left(loader) == 0:
                recorder.ignore_passes()
            else:
                recorder.clear()
                self._logged.start()

    def after_batch(self, outputs: Any, batch: Any, loader: int) -> None:
        """Measure the batch that has just passed through the network."""
        self._logged.stop()
        if not _rides(self._data) or self._failures.excludes(loader):
            return
        with self._failures.contained(self.close, loader):
            if (left := self._samples_left(loader)) != 0:
                self._measure(outputs, batch, loader, left)

    def agree(self) -> list[int]:
        """Return the indices of the loaders that have values; every process has to call this.

        A loader has values if it has samples and nothing failed in any process. None has values if processes have
        chosen different methods. A choice by which nothing was measured is forgotten.
        """
        failures, loaders = self._failures, range(self._count)
        samples = [self._evaluations[index].samples if self._evaluations else 0 for index in loaders]
        failed = [failures.excludes(index) for index in loaders]
        changed = [None if self._trainer.sanity_checking else self._churn.changed(index) for index in loaders]
        known, unknown = [count or 0 for count in changed], [count is None for count in changed]
        # On the device of the network: NCCL exchanges no others.
        chosen = [code := encoded_choice(self.choice, self._module), code**2, int(code > 0)]
        numbers = [*samples, *failed, *known, *unknown, *chosen, *self._exchange.numbers(self._evaluations)]
        table = torch.tensor(numbers, dtype=torch.int64, device=self._module.device)
        sums = self._trainer.strategy.reduce(table, reduce_op="sum").tolist()
        samples, failed, counts, unknown = (sums[row * self._count : (row + 1) * self._count] for row in range(4))
        self._exchange.agree(self._evaluations, sums[4 * self._count + 3 :])
        failures.failed |= {index for index in loaders if failed[index]}
        with failures.contained():
            self.choice = common_choice(self.choice, self._module, *sums[4 * self._count :][:3])
        valid = [index for index in loaders if samples[index] and not failures.excludes(index)]
        self.samples = sum(samples[index] for index in valid)
        self.choice = self.choice if any(samples) else None
        self._churned = {index: counts[index] / samples[index] for index in valid if not unknown[index]}
        self._churn.finish([] if self._trainer.sanity_checking else valid)
        return valid

    def values(self, loaders: Sequence[int], suffix: str) -> dict[str, Tensor]:
        """Return the values of these loaders by key, over the samples of all processes; every process has to call it.

        Args:
            loaders: their indices.
            suffix: of the keys, before that of the loader.
        """
        if self._samples is not None:
            for index in loaders:
                given = self._data, self._trainer, index
                self._samples.finish(index, ordered_source(*given), partial(sample_indices, *given, self._max_samples))
        values = {index: self._evaluations[index].compute() for index in loaders}
        for index in self._churned:
            values[index][CHURN] = next(iter(values[index].values())).new_tensor(self._churned[index])
        self.distributions = {
            f"{name}{_ending(index, self._count)}": each
            for index in loaders
            for name, each in self._evaluations[index].distributions.items()
        }
        return {f"{key}{suffix}{_ending(i, self._count)}": value for i in loaders for key, value in values[i].items()}

    def layers(self, suffix: str) -> dict[str, str]:
        """Return the names of the measured layers, by hyperparameter of a logger: one for each loader."""
        return {f"{LAYER}{suffix}{_ending(index, self._count)}": layer for index, layer in sorted(self._layers.items())}

    @property
    def is_part(self) -> bool:
        """Whether this validation was over before the end of a loader.

        Lightning leaves batches out where it goes on from a checkpoint that was saved amid a validation.
        """
        expected = batch_counts(self._trainer) if _rides(self._data) else ()
        return any(isfinite(n) and seen < n for seen, n in zip(self._batches, expected, strict=False))

    def close(self) -> None:
        """Remove the hooks."""
        self._logged.stop()
        if self._recorder is not None:
            self._recorder.__exit__()
            self._recorder = None

    def _opened(self, loader: int) -> Recorder:
        """Return the recorder of a loader, with its hooks installed; those of another loader are removed."""
        if self._recorder is None or self._loader != loader:
            self.close()
            recorder, self._method = self._tools(self.choice)
            self._recorder, self._loader = recorder.__enter__(), loader
        return self._recorder

    def _measure(self, outputs: Any, batch: Any, loader: int, left: int | None) -> None:
        recorder = self._opened(loader)
        loss = self._loss_of(recorder, outputs, batch)
        if loss is None:
            return
        recorded = recorder.take_pass(loss)
        quantities = cast(Any, self._method).quantities(recorded, slice(left))
        if self._verification.is_due(loader, recorder.layer):
            context = self._trainer.precision_plugin.val_step_context
            of_layers = isinstance(recorded, RecordedLayers)
            obstacle = UNVERIFIED if of_layers else verify_call(chosen_record(recorded, self._method), context)
            self._verification.note(loader, recorder.layer, obstacle)
        self._add(quantities, loader)
        if recorded.takes_probabilities:
            self._failures.warn_once(f"{self._failures.label} {SQUASHED}")
        self._note_success(recorder, self._method, loader)

    def _add(self, quantities: Quantities, loader: int) -> None:
        cast(Any, self._evaluations[loader]).update(quantities)
        own = next(iter(quantities.by_layer.values())) if isinstance(quantities, LayerQuantities) else quantities
        if self._samples is not None:
            self._samples.add(loader, own)
        self._churn.add(loader, own.prediction, ordered_source(self._data, self._trainer, loader))

    def _loss_of(self, recorder: Recorder, outputs: Any, batch: Any) -> Tensor | None:
        """Return the loss that the step computed, or what is assumed to be; None for an empty batch."""
        if self._loss is None:
            returned = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
            if isinstance(returned, Tensor) and recorder.depends(returned) and returned.numel() == 1:
                self.facts["loss"] = "returned by validation_step"
                return returned
            logged = {n: v for n, v in self._logged.values if v.numel() == 1 and recorder.depends(v)}
            if len({id(value) for value in logged.values()}) > 1:
                raise UnsupportedTailError(
                    f"The step must hand over one loss; it logged {sorted(logged)}. Return the loss from "
                    "`validation_step`, or say how it is computed: `loss=lambda output, targets: ...`."
                )
            if logged:
                self.facts["loss"] = f"logged by validation_step as {' and '.join(logged)}"
                return next(iter(logged.values()))
            numbers = [v for v in (returned, *(v for _, v in self._logged.values)) if is_number(v)]
            if (bypassing := recorder.bypassing(numbers)) is not None:
                return bypassing  # which is refused: it is the loss of another branch
        targets = (self._target or batch_targets)(batch)
        if is_empty(batch, targets):
            return None
        recorder.require_recorded()
        self.facts["loss"] = loss_name(self._loss)
        value = computed_loss(self._loss, recorder.output, targets)
        if self._loss is None:
            self._failures.warn_once(
                f"{self._failures.label} has to assume the loss: {ASSUMED}, since the step neither returns nor logs "
                "one. Return the loss from `validation_step`, or say how it is computed: `loss=...`."
            )
        return value

    def _measure_own_batches(self) -> None:
        recorder, method = self._tools(self.choice)
        with preserved_state(self._module):
            batches, limit = batches_for_rank(self._data, self._trainer, self._max_samples)
            if description := getattr(batches, "description", ""):
                self._assumed = f", on {description}"
                self.facts["data"] = description
            self.facts["loss"] = loss_name(self._loss)
            model, prepared = callable_module(self._module), transferred(batches, self._trainer, self._module)
            options = limit, self._target, self._loss, self._verification
            for quantities in measured_batches(recorder, method, model, prepared, *options):
                self._add(quantities, 0)
                self._note_success(recorder, method, 0)

    def _note_success(self, recorder: Recorder, method: Method, loader: int) -> None:
        self._layers[loader] = self.facts["layer"] = str(recorder.layer)
        if isinstance(method, AutoMethod):
            self.choice = method.choice
        method_name = self.facts["method"] = method.name if self.choice is None else self.choice.name
        if self.choice is not None and self.choice.reason and method_name != "pooled":
            self.facts["because"] = self.choice.reason
        layers = "every layer" if getattr(recorder, "is_whole", False) else f"`{recorder.layer}`"
        label = self._evaluations[loader].label
        self.measured = self.measured or f"{layers} up to the loss{self._assumed}{reason_of(self.choice)}{label}"

    def _samples_left(self, loader: int) -> int | None:
        """Return how many more samples this process may measure; None: no limit."""
        limit = sample_limit(self._trainer, loader, self._max_samples)
        return None if limit is None else max(0, limit - self._evaluations[loader].samples)


def _rides(data: Any) -> bool:
    """Return whether the validation's own passes are measured."""
    return isinstance(data, str) and data == "val"


def _ending(loader: int, count: int) -> str:
    """Return how the names of a loader end, of so many."""
    return f"/dataloader_idx_{loader}" if count > 1 else ""
