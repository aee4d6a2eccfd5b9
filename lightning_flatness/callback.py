"""The callback: one line in the Trainer, exact flatness after every validation."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torchmetrics import MetricCollection

from lightning_flatness.batch import batch_targets
from lightning_flatness.factors import TailFactors
from lightning_flatness.measure import batch_factors, undisturbed
from lightning_flatness.metrics import Confidence, HessianTrace, OutputMargin, RelativeFlatness
from lightning_flatness.probe import moved, network, training_probe
from lightning_flatness.tail import NonFiniteError, UnsupportedTailError
from lightning_flatness.tap import Tap

_TRAINING_SAMPLES = 1024


class FlatnessMonitor(Callback):
    """Logs the exact Hessian trace and relative flatness of the last convolution in every validation.

    With `data="val"` it rides on validation's own forward passes: it records what follows the last convolution
    and repeats only that. Training is not touched: with and without the monitor it is equal to the last bit.

    Keys, all lower is flatter but for the margin: `flatness/relative`, `flatness/trace`, `flatness/confidence`,
    `margin/mean`; with several validation loaders they end like Lightning's, `/dataloader_idx_1`. They are in
    `trainer.callback_metrics`, for `ModelCheckpoint`, `EarlyStopping` and `ReduceLROnPlateau`.

    Args:
        layer: name of the monitored convolution; None: the last one that runs on a map larger than 1 x 1.
        classifier: name of the linear classifier; None: found.
        data: `"val"`: validation's own batches; `"train"`: a fixed sample of the training set, in passes of its
            own; or an iterable of (inputs, targets) batches, in passes of its own.
        max_samples: at most so many samples per evaluation and loader; None: all for `"val"` and for given
            batches, 1024 for `"train"`.
        every_n_validations: measure in the first validation and then in every n-th.
        target: returns the class indices of a batch; None: `batch[1]`, or the usual keys of a dictionary.
        name: suffix of the keys, as in `flatness/relative/<name>`; None: none, but `train` for `data="train"`.
        strict: raise when a measurement cannot be made; False: warn once, and the training goes on.

    Raises:
        ValueError: if an argument is not what it must be; at the start of the run if a named module is not there.

    Example:
        >>> trainer = Trainer(callbacks=[FlatnessMonitor()])  # doctest: +SKIP
    """

    def __init__(
        self,
        layer: str | None = None,
        classifier: str | None = None,
        data: Literal["val", "train"] | Iterable[Any] = "val",
        max_samples: int | None = None,
        every_n_validations: int = 1,
        target: Callable[[Any], Tensor] | None = None,
        name: str | None = None,
        strict: bool = False,
    ) -> None:
        """Check the arguments; the model is looked at when the run starts."""
        if isinstance(data, str) and data not in ("val", "train"):
            raise ValueError(f'`data` must be "val", "train" or an iterable of batches; got {data!r}.')
        for argument, value in (("max_samples", max_samples), ("every_n_validations", every_n_validations)):
            if value is not None and value < 1:
                raise ValueError(f"`{argument}` must be at least 1; got {value}.")
        self.layer = layer
        self.classifier = classifier
        self.data = data
        self.max_samples = _TRAINING_SAMPLES if max_samples is None and data == "train" else max_samples
        self.every_n_validations = every_n_validations
        self.target = target
        self.name = name if name is not None else "train" if data == "train" else ""
        self.strict = strict
        self._validations = 0
        self._tap: Tap | None = None
        self._metrics: dict[int, MetricCollection] = {}
        self._failed = False  # in this validation
        self._refused = False  # in this run: the tail is not one that can be measured
        self._warned: set[str] = set()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget what an earlier run found out about another model."""
        self._refused = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the names of the modules before the first batch."""
        Tap(pl_module, self.layer, self.classifier)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the tap if this validation is to be measured."""
        self._metrics, self._failed = {}, False
        due = trainer.sanity_checking or self._validations % self.every_n_validations == 0
        self._validations += not trainer.sanity_checking
        if due and not self._refused:
            self._tap = Tap(pl_module, self.layer, self.classifier)
            if self.data == "val":
                self._tap.__enter__()

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Record this batch's forward pass, or run the monitor's own ones before the first batch."""
        if self._tap is None:
            return
        if self.data != "val":
            if batch_idx == dataloader_idx == 0 and not (trainer.sanity_checking and self.data == "train"):
                self._attempt(lambda tap: self._measure_own(tap, trainer, pl_module))
        elif self._samples_left(trainer, dataloader_idx) == 0:
            self._tap.skip()
        else:
            self._tap.clear()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Measure the batch that has just passed through the network."""
        left = self._samples_left(trainer, dataloader_idx)
        if self._tap is not None and self.data == "val" and left != 0:
            target = self.target or batch_targets
            self._attempt(
                lambda tap: self._add(tap.factors(target(batch)).select(slice(left)), pl_module, dataloader_idx)
            )

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the tap, and log the means over all samples of all processes."""
        measured = self._tap is not None
        self._close()
        if not measured or trainer.strategy.reduce_boolean_decision(self._failed, all=False):
            return
        loaders = len(trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches)
        for index, metrics in sorted(self._metrics.items()):
            suffix = f"/dataloader_idx_{index}" if self.data == "val" and loaders > 1 else ""
            name = f"/{self.name}" if self.name else ""
            values = {f"{key}{name}{suffix}": value for key, value in metrics.compute().items()}
            if broken := [key for key, value in values.items() if not value.isfinite()]:
                self._report(NonFiniteError(f"Values must be finite; these are not: {broken}."))
            # Already synchronised: the same on every process.
            pl_module.log_dict(values, sync_dist=False, rank_zero_only=False, add_dataloader_idx=False)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no hook behind."""
        self._close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave no hook behind."""
        self._close()

    def _close(self) -> None:
        if self._tap is not None:
            self._tap.__exit__()
            self._tap = None

    def _samples_left(self, trainer: Trainer, loader: int) -> int | None:
        """Return how many more samples this process may measure; None: no limit."""
        if self.max_samples is None:
            return None
        share = self.max_samples // trainer.world_size + (trainer.global_rank < self.max_samples % trainer.world_size)
        return max(
            0,
            share - (int(self._metrics[loader]["flatness/trace"].samples) if loader in self._metrics else 0),
        )

    def _attempt(self, measurement: Callable[[Tap], None]) -> None:
        """Make a measurement; one that fails ends this validation's, never the training, unless `strict`."""
        assert self._tap is not None
        try:
            measurement(self._tap)
        except Exception as error:
            self._failed = True
            self._close()
            self._report(error)

    def _report(self, error: Exception) -> None:
        if self.strict:
            raise error
        self._refused = self._refused or isinstance(error, UnsupportedTailError)
        if str(error) not in self._warned:
            self._warned.add(str(error))
            rank_zero_warn(f"FlatnessMonitor did not measure: {error}", category=UserWarning)

    def _add(self, factors: TailFactors, pl_module: LightningModule, loader: int = 0) -> None:
        if loader not in self._metrics:
            metrics = {
                "flatness/relative": RelativeFlatness(),
                "flatness/trace": HessianTrace(),
                "flatness/confidence": Confidence(),
                "margin/mean": OutputMargin(),
            }
            # Compute groups would join metrics whose first values happen to be equal.
            self._metrics[loader] = MetricCollection(metrics, compute_groups=False).to(pl_module.device)
        self._metrics[loader].update(factors)

    def _measure_own(self, tap: Tap, trainer: Trainer, pl_module: LightningModule) -> None:
        batches = self.data
        with undisturbed(pl_module):
            if self.data == "train":
                batches = training_probe(trainer, self.max_samples or _TRAINING_SAMPLES)
            for factors in batch_factors(
                tap, network(pl_module), moved(batches, trainer, pl_module), self.max_samples, self.target
            ):
                self._add(factors, pl_module)
