"""The measurement of one validation: its passes are recorded, measured and added up for each loader."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import isfinite
from typing import Any, NamedTuple, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_flatness.curvature.grouping import BatchGroups
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
from lightning_flatness.data.churn import PredictionChurn
from lightning_flatness.data.listening import LoggedValues
from lightning_flatness.data.passes import (
    ASSUMED,
    SQUASHED,
    batch_counts,
    callable_module,
    loss_name,
    measured_batches,
    preserved_state,
    transferred,
)
from lightning_flatness.data.repetition import verify_call
from lightning_flatness.data.samples import SampleHistory
from lightning_flatness.data.sampling import batches_for_rank, ordered_source, sample_indices, sample_limit
from lightning_flatness.data.step_loss import step_loss
from lightning_flatness.data.verification import UNVERIFIED, Verification
from lightning_flatness.keys import CHURN
from lightning_flatness.losses import Loss
from lightning_flatness.metrics.evaluation import Evaluation
from lightning_flatness.metrics.layers import LayerEvaluation, LayerExchange, evaluation_of
from lightning_flatness.recording.kept import KeptRecorders
from lightning_flatness.recording.recorded_layers import RecordedLayers
from lightning_flatness.reporting.failures import Failures
from lightning_flatness.reporting.loggers import LAYER


def loader_count(trainer: Trainer, data: Any) -> int:
    """Return how many loaders have values of their own; the monitor's own batches count as one loader."""
    if not _rides(data):
        return 1
    return len(batch_counts(trainer))


class Request(NamedTuple):
    """What to measure; see the arguments of `FlatnessMonitor`.

    Attributes:
        data: whose batches.
        max_samples: of each loader.
        target: returns the targets of a batch.
        loss: that is measured.
        keys: what to evaluate of a single layer; None: all.
    """

    data: Any = "val"
    max_samples: int | None = None
    target: Callable[[Any], Tensor] | None = None
    loss: Loss | Callable[[Any, Any], Tensor] | None = None
    keys: Sequence[str] | None = None


@dataclass
class RunState:
    """What one validation of a run leaves to the next.

    Attributes:
        verification: says for which loaders the record is still to be verified.
        churn: has the predictions of the last validation.
        kept: recorders of compiled networks.
        choice: the method that has been chosen; None: none, or it was named.
    """

    verification: Verification
    churn: PredictionChurn = field(default_factory=PredictionChurn)
    kept: KeptRecorders = field(default_factory=KeptRecorders)
    choice: Choice | None = None


class MeasuredValidation:
    """Records a validation's own passes, or runs passes of its own before the first batch.

    Each loader is measured on its own, with a recorder and a method of its own, so that one which cannot be measured
    takes nothing from the others. The hooks are installed while the batches of a loader come, until something fails.

    Args:
        failures: of the monitor; they say which loaders are not measured.
        tools: makes the recorder of the network and the method that measures the recorded passes; it is given what has
            been chosen before.
        trainer: the Trainer that validates.
        pl_module: the module that it validates.
        request: what to measure.
        state: of the run, which this validation continues.
        samples: adds up what the validations say about each sample; None: nobody asks.
        layers: a recorder of several layers; None: a single layer is measured.

    Attributes:
        measured: what is measured, in words; None: nothing so far.
        facts: what is measured and how, by name.
        samples: how many samples the loaders with values have, in all processes.
        distributions: the values of all samples by name, shape (n,), for each of these loaders.
    """

    def __init__(
        self,
        failures: Failures,
        tools: Callable[[Choice | None], tuple[Recorder, Method]],
        trainer: Trainer,
        pl_module: LightningModule,
        request: Request,
        state: RunState,
        samples: SampleHistory | None = None,
        layers: Recorder | None = None,
    ) -> None:
        """Start with no samples."""
        self._failures, self._tools, self._trainer, self._module = failures, tools, trainer, pl_module
        self._request, self._state = request, state
        self._logged = LoggedValues(pl_module)
        self._count = loader_count(trainer, request.data)
        self._batches = [0] * self._count
        self._groups = [BatchGroups() for _ in range(self._count)]
        self._limit = partial(sample_limit, trainer, max_samples=request.max_samples)  # of a loader
        self._recorder: Recorder | None = None  # of the loader whose batches come
        self._loader = -1  # its index
        self.measured: str | None = None
        self._layers: dict[int, str] = {}  # by loader
        self._assumed = ""
        self.facts: dict[str, str] = {}
        self.samples = 0
        self.distributions: dict[str, Tensor] = {}
        self._churned: dict[int, float] = {}
        state.churn.start()
        self._samples = samples
        if samples is not None:
            samples.start()
        self._evaluations: list[Evaluation | LayerEvaluation] = []
        self._exchange = LayerExchange(layers, self._count)
        with failures.contained(self.close):
            self._evaluations = [evaluation_of(layers, pl_module.device, keys=request.keys) for _ in range(self._count)]

    def before_batch(self, loader: int, is_first: bool) -> None:
        """Record the pass of the batch that comes, or run the own passes before the first one."""
        if not _rides(self._request.data):
            own = is_first and not (self._trainer.sanity_checking and self._request.data == "train")
            if own and not self._failures.excludes(0):
                with self._failures.contained(self.close, 0):
                    self._measure_own_batches()
            return
        self._batches[loader] += 1
        if self._failures.excludes(loader):
            return
        with self._failures.contained(self.close, loader):
            if self._groups[loader].left(self._limit(loader)) == 0:
                self.close()  # the network runs on without hooks, and compiled if it was
                return
            self._opened(loader).clear()
            self._logged.start()

    def after_batch(self, outputs: Any, batch: Any, loader: int) -> None:
        """Measure the batch that has just passed through the network."""
        self._logged.stop()
        if not _rides(self._request.data) or self._failures.excludes(loader):
            return
        with self._failures.contained(self.close, loader):
            if (left := self._groups[loader].left(self._limit(loader))) != 0:
                self._measure(outputs, batch, loader, left)

    def agree(self) -> list[int]:
        """Return the indices of the loaders that have values; every process has to call this.

        A loader has values if it has samples and nothing failed in any process. None has values if processes have
        chosen different methods. A choice by which nothing was measured is forgotten.
        """
        failures, loaders = self._failures, range(self._count)
        self._add_waiting()
        samples = [self._evaluations[index].samples if self._evaluations else 0 for index in loaders]
        failed = [failures.excludes(index) for index in loaders]
        changed = [None if self._trainer.sanity_checking else self._state.churn.changed(index) for index in loaders]
        known, unknown = [count or 0 for count in changed], [count is None for count in changed]
        # On the device of the network: NCCL exchanges no others.
        chosen = [code := encoded_choice(self._state.choice, self._module), code**2, int(code > 0)]
        numbers = [*samples, *failed, *known, *unknown, *chosen, *self._exchange.numbers(self._evaluations)]
        table = torch.tensor(numbers, dtype=torch.int64, device=self._module.device)
        sums = self._trainer.strategy.reduce(table, reduce_op="sum").tolist()
        samples, failed, counts, unknown = (sums[row * self._count : (row + 1) * self._count] for row in range(4))
        self._exchange.agree(self._evaluations, sums[4 * self._count + 3 :])
        failures.failed |= {index for index in loaders if failed[index]}
        self._state.kept.forget(filter(failures.excludes, loaders))
        with failures.contained():
            self._state.choice = common_choice(self._state.choice, self._module, *sums[4 * self._count :][:3])
        valid = [index for index in loaders if samples[index] and not failures.excludes(index)]
        self.samples = sum(samples[index] for index in valid)
        self._state.choice = self._state.choice if any(samples) else None
        self._churned = {index: counts[index] / samples[index] for index in valid if not unknown[index]}
        self._state.churn.finish([] if self._trainer.sanity_checking else valid)
        return valid

    def values(self, loaders: Sequence[int], suffix: str) -> dict[str, Tensor]:
        """Return the values of these loaders by key, over the samples of all processes; every process has to call it.

        Args:
            loaders: their indices.
            suffix: of the keys, before that of the loader.
        """
        if self._samples is not None:
            for index in loaders:
                given = self._request.data, self._trainer, index
                indices = partial(sample_indices, *given, self._request.max_samples)
                self._samples.finish(index, ordered_source(*given), indices)
        values = {index: self._evaluations[index].compute() for index in loaders}
        for index in self._churned if self._request.keys is None or CHURN in self._request.keys else ():
            like = next(iter(values[index].values()), torch.zeros((), dtype=torch.float64))
            values[index][CHURN] = like.new_tensor(self._churned[index])
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
        expected = batch_counts(self._trainer) if _rides(self._request.data) else ()
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
            self._add_waiting()
            recorder, self._method = self._tools(self._state.choice)
            self._recorder, self._loader = self._state.kept.continued(loader, recorder).__enter__(), loader
        return self._recorder

    def _measure(self, outputs: Any, batch: Any, loader: int, left: int | None) -> None:
        recorder = self._opened(loader)
        loss = self._loss_of(recorder, outputs, batch)
        if loss is None:
            return
        recorded = recorder.take_pass(loss)
        quantities = self._groups[loader].add(self._method, recorded, slice(left))
        if self._state.verification.is_due(loader, recorder.layer):
            context = self._trainer.precision_plugin.val_step_context
            of_layers = isinstance(recorded, RecordedLayers)
            obstacle = UNVERIFIED if of_layers else verify_call(chosen_record(recorded, self._method), context)
            self._state.verification.note(loader, recorder.layer, obstacle)
        self._add(quantities, loader)
        if recorded.takes_probabilities:
            self._failures.warn_once(f"{self._failures.label} {SQUASHED}")
        self._note_success(recorder, self._method, loader)
        if reason := self._state.kept.keep(loader, recorder):
            self._failures.info_once(f"{self._failures.label} runs the compiled network eagerly: {reason}.")

    def _add(self, quantities: Sequence[Quantities], loader: int) -> None:
        source = ordered_source(self._request.data, self._trainer, loader) if quantities else None
        for each in quantities:
            cast(Any, self._evaluations[loader]).update(each)
            own = next(iter(each.by_layer.values())) if isinstance(each, LayerQuantities) else each
            if self._samples is not None:
                self._samples.add(loader, own)
            self._state.churn.add(loader, own.prediction, source)

    def _add_waiting(self) -> None:
        """Add the samples that wait for the rest of their group, when no more batches of the last loader come."""
        loader = self._loader
        if loader >= 0 and not self._failures.excludes(loader):
            with self._failures.contained(self.close, loader):
                self._add(self._groups[loader].rest(), loader)

    def _loss_of(self, recorder: Recorder, outputs: Any, batch: Any) -> Tensor | None:
        """Return the loss that the step computed, or what is assumed to be; None for an empty batch."""
        found = step_loss(recorder, outputs, self._logged.values, batch, self._request.target, self._request.loss)
        self.facts |= {"loss": found.words} if found.words else {}
        if found.is_assumed:
            self._failures.warn_once(
                f"{self._failures.label} has to assume the loss: {ASSUMED}, since the step neither returns nor logs "
                "one. Return the loss from `validation_step`, or say how it is computed: `loss=...`."
            )
        return found.value

    def _measure_own_batches(self) -> None:
        recorder, method = self._tools(self._state.choice)
        with preserved_state(self._module):
            batches, limit = batches_for_rank(self._request.data, self._trainer, self._request.max_samples)
            if description := getattr(batches, "description", ""):
                self._assumed = f", on {description}"
                self.facts["data"] = description
            self.facts["loss"] = loss_name(self._request.loss)
            model, prepared = callable_module(self._module), transferred(batches, self._trainer, self._module)
            options = limit, self._request.target, self._request.loss, self._state.verification
            for quantities in measured_batches(recorder, method, model, prepared, *options):
                self._add([quantities], 0)
                self._note_success(recorder, method, 0)

    def _note_success(self, recorder: Recorder, method: Method, loader: int) -> None:
        self._layers[loader] = self.facts["layer"] = str(recorder.layer)
        if isinstance(method, AutoMethod):
            self._state.choice = method.choice
        method_name = self.facts["method"] = method.name if self._state.choice is None else self._state.choice.name
        if self._state.choice is not None and self._state.choice.reason and method_name != "pooled":
            self.facts["because"] = self._state.choice.reason
        layers = "every layer" if getattr(recorder, "is_whole", False) else f"`{recorder.layer}`"
        label = self._evaluations[loader].label
        self.measured = self.measured or f"{layers} up to the loss{self._assumed}{reason_of(self._state.choice)}{label}"


def _rides(data: Any) -> bool:
    """Return whether the validation's own passes are measured."""
    return isinstance(data, str) and data == "val"


def _ending(loader: int, count: int) -> str:
    """Return how the names of a loader end, of so many."""
    return f"/dataloader_idx_{loader}" if count > 1 else ""
