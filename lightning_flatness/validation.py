"""The measurement of one validation: its passes are recorded, measured and added up for each loader."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_flatness.curvature.pooled.method import PooledMethod
from lightning_flatness.data.batches import batch_targets, is_empty
from lightning_flatness.data.passes import callable_module, measured_batches, preserved_state, transferred
from lightning_flatness.data.sampling import batches_for_rank, sample_limit
from lightning_flatness.metrics.evaluation import Evaluation
from lightning_flatness.recording.recorder import ForwardRecorder


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
    ) -> None:
        """Start with no samples; record from now on if the validation's own passes are measured."""
        self._recorder, self._method = recorder, method
        self._trainer, self._module = trainer, pl_module
        self._data, self._max_samples, self._target = data, max_samples, target
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

    def after_batch(self, batch: Any, loader: int) -> None:
        """Measure the batch that has just passed through the network."""
        if not self._rides or (left := self._samples_left(loader)) == 0:
            return
        targets = (self._target or batch_targets)(batch)
        if not is_empty(batch, targets):
            recorded = self._recorder.take_pass()
            self._evaluations[loader].update(self._method.quantities(recorded, targets, slice(left)))

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
        self._recorder.__exit__()

    def _measure_own_batches(self) -> None:
        with preserved_state(self._module):
            batches, limit = batches_for_rank(self._data, self._trainer, self._max_samples)
            model, prepared = callable_module(self._module), transferred(batches, self._trainer, self._module)
            for quantities in measured_batches(self._recorder, self._method, model, prepared, limit, self._target):
                self._evaluations[0].update(quantities)

    def _samples_left(self, loader: int) -> int | None:
        """Return how many more samples this process may measure; None: no limit."""
        limit = sample_limit(self._trainer, loader, self._max_samples)
        return None if limit is None else max(0, limit - self._evaluations[loader].samples)
