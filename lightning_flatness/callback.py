"""The callback: one line in the Trainer, exact flatness after every validation."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_flatness.alerting import RuleRunner
from lightning_flatness.curvature.pooled.derivatives import CHUNK_BYTES
from lightning_flatness.curvature.pooled.measurement import Tap
from lightning_flatness.data.batches import batch_targets, is_empty
from lightning_flatness.data.sampling import allowance, moved, network, own_batches
from lightning_flatness.losses import Loss, as_loss
from lightning_flatness.measure import batch_factors, require_counts, undisturbed
from lightning_flatness.metrics.evaluation import KEYS, Evaluation
from lightning_flatness.recording.recorded_pass import NonFiniteError, UnsupportedTailError
from lightning_flatness.rules import AllOf, AnyOf, Rule
from lightning_flatness.rules.alert import Alert


class FlatnessMonitor(Callback):
    """Logs the exact Hessian trace and relative flatness of the last convolution in every validation.

    With `data="val"` it rides on validation's own forward passes: it records what follows the last convolution
    and repeats only that. Training is not touched: with and without the monitor it is equal to the last bit.

    It logs `flatness/relative`, `flatness/trace`, `margin/mean` and the other keys of `docs/keys.md`; with several
    validation loaders they end like Lightning's, `/dataloader_idx_1`. They are in `trainer.callback_metrics`, for
    `ModelCheckpoint`, `EarlyStopping` and `ReduceLROnPlateau`.

    Args:
        layer: name of the monitored convolution; None: the last one that runs on a map larger than 1 x 1.
        classifier: name of the linear classifier; None: found.
        data: `"val"`: validation's own batches; `"train"`: a fixed sample of the training set, in passes of its
            own; or an iterable of (inputs, targets) batches, in passes of its own.
        max_samples: at most so many samples per evaluation and loader; None: all for `"val"` and for given
            batches, 1024 for `"train"`.
        every_n_validations: measure in the first validation and then in every n-th.
        rules: what to watch for and what to do about it; `"default"`: the ready-made rules, which only notify.
        target: returns the targets of a batch; None: `batch[1]`, or the usual keys of a dictionary.
        loss: the training loss: `"cross_entropy"`, `"bce_with_logits"`, or the `nn.CrossEntropyLoss` or
            `nn.BCEWithLogitsLoss` that is used.
        name: suffix of the keys, as in `flatness/relative/<name>`; None: none, but `train` for `data="train"`.
        strict: raise when a measurement cannot be made; False: warn once, and the training goes on.
        chunk_bytes: what temporary tensors may take at once: samples are computed in groups that fit, or one by one.

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
        rules: Rule | AllOf | AnyOf | Sequence[Rule | AllOf | AnyOf] | Literal["default"] = (),
        target: Callable[[Any], Tensor] | None = None,
        loss: str | nn.Module | Loss = "cross_entropy",
        name: str | None = None,
        strict: bool = False,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        """Check the arguments; the model is looked at when the run starts."""
        if isinstance(data, str) and data not in ("val", "train"):
            raise ValueError(f'`data` must be "val", "train" or an iterable of batches; got {data!r}.')
        if not isinstance(data, Iterable) or isinstance(data, Iterator):
            raise ValueError(
                f"`data` must be iterable in every validation anew, as a list is; got {type(data).__name__}."
            )
        require_counts(every_n_validations=every_n_validations, chunk_bytes=chunk_bytes)
        if max_samples is not None:
            require_counts(max_samples=max_samples)
        self.layer = layer
        self.classifier = classifier
        self.data = data
        self.max_samples = max_samples
        self.every_n_validations = every_n_validations
        self.target = target
        self.loss = as_loss(loss)
        self.name = name if name is not None else "train" if data == "train" else ""
        self.strict = strict
        self.chunk_bytes = chunk_bytes
        self._alarm = RuleRunner(rules, f"/{self.name}" if self.name else "")
        self._validations = 0
        self._due = False  # whether this validation is to be measured
        self._tap: Tap | None = None
        self._evaluations: list[Evaluation] = []  # of each validation loader
        self._values: dict[str, float] = {}  # of this validation
        self._failed = False  # in this validation
        self._refused = False  # in this run: the tail is not one that can be measured
        self._told: set[str] = set()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a second monitor of the same keys; forget what an earlier run found out about a model."""
        self._refused = False
        monitors = [c for c in trainer.callbacks if isinstance(c, FlatnessMonitor)]  # type: ignore[attr-defined]
        if sum(monitor.name == self.name for monitor in monitors) > 1:
            raise ValueError(
                f"Monitors in one Trainer must have names of their own; got {[monitor.name for monitor in monitors]}. "
                "Set `name=...`, which ends their keys."
            )
        self._alarm.require_keys([self._key(key) for key in KEYS])

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the names of the modules before the first batch."""
        Tap(pl_module, self.layer, self.classifier, self.loss)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the names of the modules where there is no training."""
        if trainer.state.fn != "fit":
            Tap(pl_module, self.layer, self.classifier, self.loss)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the tap if this validation is to be measured."""
        self._failed = False
        due = trainer.sanity_checking or self._validations % self.every_n_validations == 0
        self._validations += not trainer.sanity_checking
        self._due, self._values = due and not self._refused, {}
        if self._due:
            with self._guarded():
                self._open(trainer, pl_module)

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
        with self._guarded():
            if self.data != "val":
                if batch_idx == dataloader_idx == 0 and not (trainer.sanity_checking and self.data == "train"):
                    self._measure_own(self._tap, trainer, pl_module)
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
        if self._tap is None or self.data != "val":
            return
        with self._guarded():
            if (left := self._samples_left(trainer, dataloader_idx)) != 0:
                self._measure_batch(self._tap, batch, dataloader_idx, left)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the tap, and log the means over all samples of all processes."""
        layer, classifier = (self._tap.layer, self._tap.classifier) if self._tap else (None, None)
        self._close()
        if not self._due:
            return
        # On all processes alike, or the others would wait for ever in the exchange of the sums.
        self._refused = trainer.strategy.reduce_boolean_decision(self._refused, all=False)
        if trainer.strategy.reduce_boolean_decision(self._failed, all=False):
            return
        self._tell(f"FlatnessMonitor measures `{layer}` up to `{classifier or 'the logits'}`.")
        with self._guarded():
            self._log_evaluations(trainer, pl_module)
        if trainer.strategy.reduce_boolean_decision(self._failed, all=False):
            self._values = {}  # the rules are not to judge a part of them, nor some processes without the others

    def _open(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._tap = Tap(pl_module, self.layer, self.classifier, self.loss, self.chunk_bytes)
        loaders = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
        count = len(loaders) if self.data == "val" else 1
        self._evaluations = [Evaluation(pl_module.device) for _ in range(count)]
        if self.data == "val":
            self._tap.__enter__()

    def _tell(self, news: str) -> None:
        """Say on the first process, once, which of several networks or branches it is."""
        if news not in self._told:
            self._told.add(news)
            rank_zero_info(news)

    def _log_evaluations(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for index, evaluation in enumerate(self._evaluations):
            samples = trainer.strategy.reduce(torch.tensor(float(evaluation.samples)), reduce_op="sum")
            if samples:
                loader = f"/dataloader_idx_{index}" * (len(self._evaluations) > 1)
                self._log(pl_module, {self._key(key) + loader: value for key, value in evaluation.compute().items()})

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the rules judge the fresh values of a training."""
        if self._values and trainer.state.fn == "fit" and not trainer.sanity_checking:
            with self._guarded():
                self._alarm.observe(self._values, trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, in plain Python types."""
        return {"validations": self._validations, **self._alarm.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._validations = state_dict["validations"]
        self._alarm.load_state_dict(state_dict)

    @property
    def state_key(self) -> str:
        """Key of the state in a checkpoint."""
        data = self.data if isinstance(self.data, str) else "given"
        return self._generate_state_key(name=self.name, data=data, layer=self.layer, classifier=self.classifier)

    @property
    def alerts(self) -> list[Alert]:
        """All alerts so far, oldest first."""
        return self._alarm.alerts

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what Lightning and a run have attached: it would drag the model along."""
        return {key: value for key, value in vars(self).items() if key not in ("log", "log_dict")} | {"_tap": None}

    def _key(self, key: str) -> str:
        return f"{key}/{self.name}" if self.name else key

    def _log(self, pl_module: LightningModule, values: dict[str, Tensor]) -> None:
        if broken := [key for key, value in values.items() if not value.isfinite()]:
            self._report(NonFiniteError(f"Values must be finite; these are not: {broken}."))
        # Already synchronised: the same on every process.
        self._values.update({key: float(value) for key, value in values.items()})
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
        limit = allowance(trainer, loader, self.max_samples)
        return None if limit is None else max(0, limit - self._evaluations[loader].samples)

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Let what fails within end this validation's measurement, never the training, unless `strict`."""
        try:
            yield
        except Exception as error:
            self._failed = True
            self._close()
            self._report(error)

    def _report(self, error: Exception) -> None:
        if self.strict:
            raise error
        self._refused = self._refused or isinstance(error, UnsupportedTailError)
        # How much memory is left differs each time, and is no news.
        kind = type(error).__name__ if isinstance(error, torch.OutOfMemoryError) else str(error)
        if kind not in self._told:
            self._told.add(kind)
            # On the process where it happened: the first one may know nothing of it.
            warnings.warn(f"FlatnessMonitor did not measure: {error}", stacklevel=2)

    def _measure_batch(self, tap: Tap, batch: Any, loader: int, left: int | None) -> None:
        targets = (self.target or batch_targets)(batch)
        if not is_empty(batch, targets):
            self._evaluations[loader].update(tap.factors(targets).select(slice(left)))

    def _measure_own(self, tap: Tap, trainer: Trainer, pl_module: LightningModule) -> None:
        with undisturbed(pl_module):
            batches, limit = own_batches(self.data, trainer, self.max_samples)
            for factors in batch_factors(
                tap, network(pl_module), moved(batches, trainer, pl_module), limit, self.target
            ):
                self._evaluations[0].update(factors)
