"""The measurement of one validation: its passes are recorded, measured and added up for each loader."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_flatness.curvature.pooled.method import PooledMethod
from lightning_flatness.data.batches import batch_targets, is_empty
from lightning_flatness.data.passes import (
    ASSUMED,
    callable_module,
    computed_loss,
    measured_batches,
    preserved_state,
    transferred,
)
from lightning_flatness.data.sampling import batches_for_rank, sample_limit
from lightning_flatness.errors import UnsupportedTailError
from lightning_flatness.losses import CrossEntropy, Loss
from lightning_flatness.metrics.evaluation import Evaluation
from lightning_flatness.recording.recorder import ForwardRecorder


class LoggedValues:
    """The tensors that a module's step gives to its logging.

    Args:
        module: the module.
    """

    def __init__(self, module: LightningModule) -> None:
        self._module = module
        self.values: list[tuple[str, Tensor]] = []

    def start(self) -> None:
        """Listen from now on: the module's own `log` is called all the same."""
        self.values = []
        log = self._module.log

        def listening(name: str, value: Any, *args: Any, **kwargs: Any) -> None:
            if isinstance(value, Tensor):
                self.values.append((name, value))
            log(name, value, *args, **kwargs)

        self._module.__dict__["log"] = listening

    def stop(self) -> None:
        """Listen no more."""
        self._module.__dict__.pop("log", None)


class MeasuredValidation:
    """Records a validation's own passes, or runs passes of its own before the first batch.

    Args:
        recorder: of the network.
        method: what measures the recorded passes.
        trainer: the Trainer that validates.
        pl_module: the module that it validates.
        data: of the `FlatnessMonitor`.
        max_samples: of the `FlatnessMonitor`.
        target: of the `FlatnessMonitor`.
    """

    def __init__(
        self,
        recorder: ForwardRecorder,
        method: PooledMethod,
        trainer: Trainer,
        pl_module: LightningModule,
        data: Any,
        max_samples: int | None,
        target: Callable[[Any], Tensor] | None,
        loss: Loss | Callable[[Any, Any], Tensor] | None,
    ) -> None:
        """Start with no samples; record from now on if the validation's own passes are measured."""
        self._recorder, self._method = recorder, method
        self._trainer, self._module = trainer, pl_module
        self._data, self._max_samples, self._target, self._loss = data, max_samples, target, loss
        self._logged = LoggedValues(pl_module)
        self._rides = isinstance(data, str) and data == "val"
        loaders = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
        count = len(loaders) if self._rides else 1
        self._evaluations = [Evaluation(pl_module.device, method.name) for _ in range(count)]
        if self._rides:
            recorder.__enter__()

    @property
    def measured(self) -> str:
        """What is measured, in words."""
        return f"`{self._recorder.layer}` up to `{self._recorder.classifier or 'the logits'}`"

    def before_batch(self, loader: int, is_first: bool) -> None:
        """Record the pass of the batch that comes, or run the own passes before the first one."""
        if not self._rides:
            if is_first and not (self._trainer.sanity_checking and self._data == "train"):
                self._measure_own_batches()
        elif self._samples_left(loader) == 0:
            self._recorder.ignore_passes()
        else:
            self._recorder.clear()
            self._logged.start()

    def after_batch(self, outputs: Any, batch: Any, loader: int) -> None:
        """Measure the batch that has just passed through the network."""
        self._logged.stop()
        if not self._rides or (left := self._samples_left(loader)) == 0:
            return
        found = self._loss_of(outputs, batch)
        if found is not None:
            recorded = self._recorder.take_pass(*found)
            self._evaluations[loader].update(self._method.quantities(recorded, slice(left)))

    def _loss_of(self, outputs: Any, batch: Any) -> tuple[Tensor, tuple[str, ...]] | None:
        """Return the loss that the step computed, and what about it is assumed; None for an empty batch."""
        if self._loss is None:
            returned = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
            if isinstance(returned, Tensor) and self._recorder.depends(returned) and returned.numel() == 1:
                return returned, ()
            logged = {n: v for n, v in self._logged.values if v.numel() == 1 and self._recorder.depends(v)}
            if len({id(value) for value in logged.values()}) > 1:
                raise UnsupportedTailError(
                    f"The step must hand over one loss; it logged {sorted(logged)}. Return the loss from "
                    "`validation_step`, or say how it is computed: `loss=lambda output, targets: ...`."
                )
            if logged:
                return next(iter(logged.values())), ()
        targets = (self._target or batch_targets)(batch)
        if is_empty(batch, targets):
            return None
        self._recorder.require_recorded()
        value = computed_loss(self._loss or CrossEntropy(), self._recorder.output, targets)
        return value, () if self._loss is not None else (ASSUMED,)

    def values(self, suffix: str) -> Iterator[dict[str, Tensor]]:
        """Yield the values of each loader by key, over the samples of all processes; every process has to call it.

        Args:
            suffix: of the keys, before that of the loader.
        """
        for index, evaluation in enumerate(self._evaluations):
            samples = self._trainer.strategy.reduce(torch.tensor(float(evaluation.samples)), reduce_op="sum")
            if samples:
                loader = f"/dataloader_idx_{index}" if len(self._evaluations) > 1 else ""
                yield {f"{key}{suffix}{loader}": value for key, value in evaluation.compute().items()}

    def close(self) -> None:
        """Remove the hooks."""
        self._logged.stop()
        self._recorder.__exit__()

    def _measure_own_batches(self) -> None:
        with preserved_state(self._module):
            batches, limit = batches_for_rank(self._data, self._trainer, self._max_samples)
            model, prepared = callable_module(self._module), transferred(batches, self._trainer, self._module)
            for quantities in measured_batches(
                self._recorder, self._method, model, prepared, limit, self._target, self._loss
            ):
                self._evaluations[0].update(quantities)

    def _samples_left(self, loader: int) -> int | None:
        """Return how many more samples this process may measure; None: no limit."""
        limit = sample_limit(self._trainer, loader, self._max_samples)
        return None if limit is None else max(0, limit - self._evaluations[loader].samples)
