"""The callback: one line in the Trainer, exact flatness after every validation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from lightning_flatness.alerting import RuleRunner
from lightning_flatness.curvature.pooled.derivatives import CHUNK_BYTES
from lightning_flatness.curvature.pooled.method import PooledMethod
from lightning_flatness.errors import NonFiniteError, require_counts
from lightning_flatness.keys import keys_of
from lightning_flatness.losses import as_loss
from lightning_flatness.recording.recorder import ForwardRecorder
from lightning_flatness.reporting.failures import Failures
from lightning_flatness.rules import AllOf, AnyOf, Rule
from lightning_flatness.validation import MeasuredValidation


class FlatnessMonitor(Callback):
    """Logs the exact Hessian trace and relative flatness of the last convolution in every validation.

    With `data="val"` it records validation's own forward passes from the last convolution on, and repeats only that
    part. Training is not touched: with and without the monitor it is equal to the last bit.

    It logs `flatness/relative`, `flatness/trace`, `margin/mean` and the other keys of `docs/keys.md`; with several
    validation loaders they end like Lightning's, `/dataloader_idx_1`. They are in `trainer.callback_metrics`, for
    `ModelCheckpoint`, `EarlyStopping` and `ReduceLROnPlateau`.

    Args:
        layer: name of the monitored convolution; None: the last one that runs on a map larger than 1 x 1.
        classifier: name of the linear classifier; None: found.
        data: `"val"`: validation's own batches; `"train"`: a fixed sample of the training set, in passes of the
            monitor's own; or an iterable of (inputs, targets) batches, in passes of its own.
        max_samples: at most so many samples per evaluation and loader; None: all for `"val"` and for given
            batches, 1024 for `"train"`.
        every_n_validations: measure in the first validation and then in every n-th.
        rules: what to watch for and what to do about it; `"default"`: the built-in rules, which report and never act.
        target: returns the targets of a batch; None: `batch[1]`, or the usual keys of a dictionary.
        loss: the training loss: `"cross_entropy"`, `"bce_with_logits"`, or the `nn.CrossEntropyLoss` or
            `nn.BCEWithLogitsLoss` that is used.
        name: suffix of the keys, as in `flatness/relative/<name>`; None: none, but `train` for `data="train"`.
        strict: raise when a measurement cannot be made; False: warn once, and the training goes on.
        chunk_bytes: how much memory temporary tensors may take at once: samples are computed in groups that fit, or
            one by one.

    Attributes:
        alerts: all alerts so far, oldest first.

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
        loss: str | nn.Module | Callable[[Any, Any], Tensor] | None = None,
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
        self.loss = None if loss is None else as_loss(loss)
        self.name = name if name is not None else "train" if data == "train" else ""
        self.strict = strict
        self.chunk_bytes = chunk_bytes
        self._suffix = f"/{self.name}" if self.name else ""
        self._runner = RuleRunner(rules, self._suffix)
        self.alerts = self._runner.alerts
        self._failures = Failures(strict)
        self._validations = 0  # so far
        self._is_due = False  # whether this validation is to be measured
        self._validation: MeasuredValidation | None = None  # while it is measured
        self._values: dict[str, float] = {}  # of this validation

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a second monitor of the same keys; forget what an earlier run found out about a model."""
        self._failures.is_refused = False
        monitors = [c for c in trainer.callbacks if isinstance(c, FlatnessMonitor)]  # type: ignore[attr-defined]
        if sum(monitor.name == self.name for monitor in monitors) > 1:
            raise ValueError(
                f"Monitors in one Trainer must have names of their own; got {[monitor.name for monitor in monitors]}. "
                "Set `name=...`, which ends their keys."
            )
        self._runner.require_keys([f"{key}{self._suffix}" for key in keys_of(PooledMethod.name)])

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the names of the modules before the first batch."""
        ForwardRecorder(pl_module, self.layer, self.classifier)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start to measure if this validation is due."""
        if trainer.state.fn != "fit":  # where there was no `on_fit_start`, check the names here
            ForwardRecorder(pl_module, self.layer, self.classifier)
        self._failures.occurred = False
        is_due = trainer.sanity_checking or self._validations % self.every_n_validations == 0
        self._validations += not trainer.sanity_checking
        self._is_due, self._values = is_due and not self._failures.is_refused, {}
        if self._is_due:
            with self._failures.contained(self._close):
                recorder = ForwardRecorder(pl_module, self.layer, self.classifier)
                method = PooledMethod(self.chunk_bytes)
                self._validation = MeasuredValidation(
                    recorder, method, trainer, pl_module, self.data, self.max_samples, self.target, self.loss
                )

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Record this batch's forward pass, or run the monitor's own passes before the first batch."""
        if self._validation is not None:
            with self._failures.contained(self._close):
                self._validation.before_batch(dataloader_idx, is_first=batch_idx == dataloader_idx == 0)

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
        if self._validation is not None:
            with self._failures.contained(self._close):
                self._validation.after_batch(outputs, batch, dataloader_idx)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove the hooks, and log the means over all samples of all processes."""
        validation, failures = self._validation, self._failures
        self._close()
        if not self._is_due:
            return
        # Every process decides alike, or the others would wait for ever in the exchange of the sums.
        failures.is_refused = trainer.strategy.reduce_boolean_decision(failures.is_refused, all=False)
        if trainer.strategy.reduce_boolean_decision(failures.occurred, all=False) or validation is None:
            return
        failures.info_once(f"FlatnessMonitor measures {validation.measured}.")
        with failures.contained(self._close):
            for values in validation.values(self._suffix):
                if broken := [key for key, value in values.items() if not value.isfinite()]:
                    failures.report(NonFiniteError(f"Values must be finite; these are not: {broken}."))
                # Already synchronised: the same on every process.
                self._values.update({key: float(value) for key, value in values.items()})
                pl_module.log_dict(values, sync_dist=False, rank_zero_only=False, add_dataloader_idx=False)
        if trainer.strategy.reduce_boolean_decision(failures.occurred, all=False):
            self._values = {}  # rules must not judge a part of the values, nor some processes without the others

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the rules judge the new values of a training."""
        if self._values and trainer.state.fn == "fit" and not trainer.sanity_checking:
            with self._failures.contained(self._close):
                self._runner.observe(self._values, trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, in plain Python types."""
        return {"validations": self._validations, **self._runner.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._validations = state_dict["validations"]
        self._runner.load_state_dict(state_dict)

    @property
    def state_key(self) -> str:
        """Key of the state in a checkpoint."""
        data = self.data if isinstance(self.data, str) else "given"
        return self._generate_state_key(name=self.name, data=data, layer=self.layer, classifier=self.classifier)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what Lightning and a run have attached: it would drag the model along."""
        # Lightning 2.6 sets `log` and `log_dict` on every callback.
        return {key: value for key, value in vars(self).items() if key not in ("log", "log_dict")} | {
            "_validation": None
        }

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no hook behind."""
        self._close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave no hook behind."""
        self._close()

    def _close(self) -> None:
        if self._validation is not None:
            self._validation.close()
            self._validation = None
