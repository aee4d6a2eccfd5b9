"""The callback: one line in the Trainer, exact flatness after every validation."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from lightning_flatness.actions import action_text
from lightning_flatness.alerting import RuleRunner
from lightning_flatness.curvature.methods import Choice, LayerName, MethodName, Tools, method_for, require_method
from lightning_flatness.data.batches import require_data
from lightning_flatness.data.samples import SampleHistory
from lightning_flatness.data.verification import Verification
from lightning_flatness.errors import NonFiniteError, require_counts, require_optional_counts
from lightning_flatness.keys import CHURN, LABELLED, SCALE_FREE, checked_name, chosen_keys, keys_of
from lightning_flatness.losses import as_loss
from lightning_flatness.recording.kept import KeptRecorders
from lightning_flatness.recording.layers_recorder import LayersRecorder
from lightning_flatness.reporting.display import Display, Displayed
from lightning_flatness.reporting.failures import Failures
from lightning_flatness.reporting.logged import collision, forget, keys_of_others, log_values, mark_missing
from lightning_flatness.reporting.loggers import log_layers
from lightning_flatness.rules import Alert, AllOf, AnyOf, Rule
from lightning_flatness.schedule import PARTIAL, Schedule, counts, notices
from lightning_flatness.validation import MeasuredValidation, Request, RunState


class FlatnessMonitor(Displayed):
    """Logs the exact Hessian trace and relative flatness of one layer in every validation.

    The layer is the deepest convolution if that has an exact value, else the classifier. One line at the start of the
    run says which, and why. The choice is made at the first batch, and kept for the run.

    With `data="val"` it records validation's own forward passes from that layer on, and repeats only that part.
    Training is not touched: with and without the monitor it is equal to the last bit.

    It logs `flatness/relative`, `flatness/trace`, `margin/mean` and the other keys of `docs/keys.md`; with several
    validation loaders they end like Lightning's, `/dataloader_idx_1`. They are in `trainer.callback_metrics`, for
    `ModelCheckpoint`, `EarlyStopping` and `ReduceLROnPlateau`. A key that the module logs itself stays the module's.

    What cannot be measured has no value: one batch or loader costs the values of its loader in this validation, and
    `trainer.callback_metrics` then has NaN in the place of earlier ones.

    Several monitors in one Trainer need names of their own, `name=...`.

    Args:
        layer: name of the monitored convolution; None: the deepest. For
            `method="jacobian"` the name of any linear layer or convolution, several names, or `"all"`: every one of
            them, and the trace of the whole network.
        classifier: name of the linear classifier; None: found.
        method: `"auto"`: the convolution if that is exact, else the classifier's own weight, see `select_method`; a
            convolution that `layer` names is not replaced. `"pooled"`: the convolution or nothing. `"classifier"`: the
            classifier's own weight. `"jacobian"`: the layers that `layer` names, with keys of their own, such as
            `flatness/relative/<layer>`; they end in `/ggn` where the value is that of the Gauss-Newton part.
        data: `"val"`: validation's own batches; `"train"`: a fixed sample of the training set, in passes of the
            monitor's own; or an iterable of (inputs, targets) batches, in passes of its own.
        max_samples: at most so many samples per evaluation and loader; None: all for `"val"` and for given
            batches, 1024 for `"train"`.
        every_n_validations: of a training, measure the first validation after its start (or resumption) and every
            n-th. Validations outside of `fit` are always measured, and not counted.
        rules: what to watch for and what to do about it; `"default"`: `rules.default()`, which report and never act.
        target: returns the targets of a batch; None: `batch[1]`, or the usual keys of a dictionary.
        loss: None: the loss that `validation_step` returns or logs, else cross-entropy, with a warning; or
            `"cross_entropy"`, `"bce_with_logits"`, a loss of torch, or a function `(output, targets)` that returns one
            number.
        name: suffix of the keys, as in `flatness/relative/<name>`; None: none, but `train` for `data="train"`.
        keys: the keys to log, or names of groups of them, such as `"headline"`, see `docs/keys.md`; None: all. What no
            key needs is not computed. The layers of `method="jacobian"` have all of their keys.
        per_sample: add up what the validations of a training say about each sample; see `samples`.
        strict: raise when a measurement cannot be made; False: warn once, and the training goes on.
        verify: once per run, loader and layer, call the network again on a few samples with moved filters, and compare
            it with what the record predicts; see `docs/concepts/assumptions.md`. All is restored to the last bit.
        prog_bar: show the headline values in Lightning's progress bar.
        figure_every_n_validations: the loggers get the figure of the training (`figure()`) at every alert, in every
            n-th measured validation and at the end of `fit`, if matplotlib is installed. None: as often as drawing
            takes less than one percent of the training's time; 0: never.
        chunk_bytes: how much memory the contraction over filters (for `"jacobian"`, the derivatives) may take at once,
            in bytes: samples are contracted in groups that fit, or one by one. It does not bound what the forward pass
            and its record take, nor for the other methods the derivatives; that grows with the batch. None: 16 MiB, for
            `"jacobian"` 256 MiB, on a CUDA device 512 MiB.

    Attributes:
        measured: what the last validation measured, in words; None: nothing.
        samples: the sharpest, the least certain and the suspicious samples of the last training, a `SampleHistory`;
            None unless `per_sample`. Every process has its own samples. A resumed training starts anew.
        alerts: all alerts so far, oldest first, of earlier trainings too. In processes that `ddp_fork` or `ddp_spawn`
            starts they stay in these processes; checkpoints and loggers have them.
        history: the values of all validations of the last training.

    Raises:
        ValueError: if an argument is not what it must be; at the start of the run if a named module is not there.

    Example:
        >>> trainer = Trainer(callbacks=[FlatnessMonitor()])  # doctest: +SKIP
    """

    def __init__(
        self,
        layer: LayerName = None,
        classifier: str | None = None,
        method: MethodName = "auto",
        data: Literal["val", "train"] | Iterable[Any] = "val",
        max_samples: int | None = None,
        every_n_validations: int = 1,
        rules: Rule | AllOf | AnyOf | Sequence[Rule | AllOf | AnyOf] | Literal["default"] = (),
        target: Callable[[Any], Tensor] | None = None,
        loss: str | nn.Module | Callable[[Any, Any], Tensor] | None = None,
        name: str | None = None,
        per_sample: bool = False,
        keys: str | Sequence[str] | None = None,
        strict: bool = False,
        verify: bool = True,
        prog_bar: bool = False,
        figure_every_n_validations: int | None = None,
        chunk_bytes: int | None = None,
    ) -> None:
        """Check the arguments; the model is looked at when the run starts."""
        _join_other_namespace()
        require_data(data)
        require_counts(every_n_validations=every_n_validations)
        require_optional_counts(max_samples=max_samples, chunk_bytes=chunk_bytes)
        require_method(method, layer, classifier, per_sample)
        if figure_every_n_validations != 0:
            require_optional_counts(figure_every_n_validations=figure_every_n_validations)
        self.layer, self.classifier, self.data = layer, classifier, data
        self.method = "pooled" if method == "auto" and layer is not None else method
        self.max_samples, self.every_n_validations = max_samples, every_n_validations
        self.target, self.loss = target, None if loss is None else as_loss(loss)
        self.name = checked_name("train" if name is None and data == "train" else name or "")
        self.keys = chosen_keys(keys)
        self.samples: SampleHistory | None = None
        self.strict, self.verify, self.prog_bar = strict, verify, prog_bar
        self.per_sample, self.chunk_bytes = per_sample, chunk_bytes
        self._suffix = f"/{self.name}" if self.name else ""
        self.display = Display(self._suffix, figure_every_n_validations, action_text)
        self._runner = RuleRunner(rules, self._suffix, self.display.loggers)
        self._failures = Failures(strict, self.name)
        self._schedule = Schedule(every_n_validations)
        self._state = RunState(Verification(verify))
        self._stage = "fit"  # what the Trainer does
        self._earlier: list[Alert] = []  # alerts of the trainings before
        self._validation: MeasuredValidation | None = None  # while it is measured
        self.measured: str | None = None
        self._measured: dict[str, float] = {}  # in this validation
        self._distributions: dict[str, Tensor] = {}
        self._values: dict[str, float] = {}  # those that rules may judge
        self._logged: set[str] = set()  # keys that this run has logged
        self._layers: dict[str, str] = {}  # which layers it has named to the loggers

    @property
    def alerts(self) -> list[Alert]:
        """All alerts so far, oldest first: those of earlier trainings, and those of the last one.

        In processes that the Trainer forks or spawns (`ddp_fork`, `ddp_spawn`, notebooks) the alerts stay in these
        processes, and this list is empty afterwards.
        """
        return [*self._earlier, *self._runner.alerts]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a second monitor of the same keys; begin anew if a training starts."""
        self._state = RunState(Verification(self.verify))
        self._stage, self._logged, self._layers = stage, set(), {}
        monitors = [c for c in trainer.callbacks if isinstance(c, FlatnessMonitor)]  # type: ignore[attr-defined]
        if sum(monitor.name == self.name for monitor in monitors) > 1:
            raise ValueError(
                f"Monitors in one Trainer must have names of their own; got {[monitor.name for monitor in monitors]}. "
                "Set `name=...`, which ends their keys."
            )
        if stage == "fit":
            self._earlier = self.alerts
            self._runner = RuleRunner(self._runner.rules, self._suffix, self.display.loggers)
            self._schedule.start()
            self.samples = SampleHistory() if self.per_sample else None
            self.display.begin()
        if self.method != "jacobian":  # whose layers may not exist yet
            labelled = [LABELLED[key] for key in self.keys if key in LABELLED]
            self._runner.require_keys([f"{key}{self._suffix}" for key in (*_asked(self), *labelled)])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the names of the modules before the first batch; say what this training will not do."""
        self._runner.resume(trainer)
        self._schedule.catch_up(trainer)
        recorder, _ = _tools(self, pl_module)
        if isinstance(recorder, LayersRecorder):
            self._runner.expect_layers(self.method, recorder.layers, recorder.is_whole)
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        suffixes = [each._suffix for each in callbacks if isinstance(each, FlatnessMonitor)]
        self.display.loggers.start(trainer, suffixes)
        for sentence in notices(trainer, self._runner.rules, self.every_n_validations):
            self._failures.warn_once(f"{self._failures.label} {sentence}")

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start to measure if this validation is due."""
        if not counts(trainer):  # `on_train_start` has not checked the names
            _tools(self, pl_module)
        self._failures.failed, self._values, self._measured, self._distributions = set(), {}, {}, {}
        forget(trainer, self._logged)
        if self._schedule.is_due(trainer):
            is_by_layer = self.method == "jacobian"
            self._validation = MeasuredValidation(
                self._failures,
                partial(_tools, self, pl_module),
                trainer,
                pl_module,
                Request(self.data, self.max_samples, self.target, self.loss, None if is_by_layer else self.keys),
                self._state,
                self.samples if counts(trainer) else None,
                _tools(self, pl_module)[0] if is_by_layer else None,
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
            self._validation.after_batch(outputs, batch, dataloader_idx)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove the hooks, and log the means over all samples of all processes."""
        validation, failures, self._validation = self._validation, self._failures, None
        if validation is None:
            return
        validation.close()
        # Every process decides alike, or the others would wait forever in the exchange of the sums.
        loaders = validation.agree()
        self.measured, choice = validation.measured, self._state.choice
        self.display.note(validation.facts, validation.samples, failures.reason)
        if validation.measured:
            failures.info_once(f"{failures.label} measures {validation.measured}.")
            for assumption in self._state.verification.assumed:
                failures.info_once(f"{failures.label}: {assumption}.")
        lacking, sentences = list[str](), list[str]()
        if choice is not None:
            lacking = [f"{key}{self._suffix}" for key in _asked(self) if key not in keys_of(choice.name)]
            sentences = self._runner.set_aside(lacking, choice.name)
        values: dict[str, Tensor] = {}
        with failures.contained():
            values = validation.values(loaders, self._suffix)
            if broken := [key for key, value in values.items() if not value.isfinite()]:
                failures.report(NonFiniteError(f"Values must be finite; these are not: {broken}."))
            log_values(trainer, pl_module, values, self.prog_bar)
            layers = validation.layers(self._suffix)
            log_layers(trainer, dict(layers.items() - self._layers.items()))
            self._layers |= layers
        if trainer.strategy.reduce_boolean_decision(None in failures.failed, all=False):
            values = {}
        sentences += self._runner.set_aside_labels(values, choice.name if choice else self.method, lacking)
        for sentence in sentences:
            failures.warn_once(f"{failures.label} {sentence}")
        mark_missing(trainer, self._logged - set(values))
        # Rules must not take a loader for another one, which is missing; changed predictions may be missing anywhere,
        # and what the method does not give was that of another one.
        is_whole = {key for key in self._logged if not key.startswith((CHURN, *lacking))} <= set(values)
        if self._schedule.is_resuming and validation.is_part:
            failures.warn_once(f"{failures.label} {PARTIAL}")
            is_whole = False
        self._logged |= set(values)
        self._measured, self._distributions = {k: float(value) for k, value in values.items()}, validation.distributions
        self._values = self._measured if is_whole else {}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the rules judge the new values of a training."""
        if taken := keys_of_others(trainer, self._logged):
            self._failures.warn_once(f"{self._failures.label} {collision(taken)}")
        known = len(self._runner.alerts)
        if self._values and counts(trainer) and self._schedule.is_judged():
            with self._failures.contained(what="finish with its rules and actions"):
                self._runner.observe(self._values, trainer, pl_module)
        with self._failures.contained(what="show its values"):
            if trainer.state.fn == "fit":
                self.display.describe(trainer)
            if self._measured and counts(trainer):
                is_alert = len(self._runner.alerts) > known
                self.display.add(trainer, self._measured, self._distributions, self._runner.alerts, is_alert)
        self._schedule.complete(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, in plain Python types."""
        history = self.display.history.state_dict()
        return {"validations": self._schedule.completed, "history": history, **self._runner.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint, if it is a training that goes on.

        Lightning restores the state in `validate`, `test` and `predict` with a `ckpt_path` too. There it would replace
        the alerts of the training that has just ended by those of the checkpoint.
        """
        if self._stage == "fit":
            self._schedule.resume(state_dict["validations"])
            self._runner.load_state_dict(state_dict)
            if "history" in state_dict:  # not in checkpoints of before there was one
                self.display.history.load_state_dict(state_dict["history"])
            self._earlier = [alert for alert in self._earlier if alert not in self._runner.alerts]

    @property
    def state_key(self) -> str:
        """Key of the state in a checkpoint."""
        data = self.data if isinstance(self.data, str) else "given"
        return self._generate_state_key(name=self.name, data=data, layer=self.layer, classifier=self.classifier)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what Lightning and a run have attached: it would drag the model along."""
        # Lightning 2.6 sets `log` and `log_dict` on every callback.
        return {key: value for key, value in vars(self).items() if key not in ("log", "log_dict")} | {
            "_validation": None,
            "_state": replace(self._state, kept=KeptRecorders()),
        }

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave no hook behind."""
        _close(self)


def _join_other_namespace() -> None:
    """Make the monitor a callback of `pytorch_lightning` too, if that is in use.

    It is the same library under another name, whose Trainer asks for its own `Callback` (up to version 2.5.6).
    """
    other = getattr(sys.modules.get("pytorch_lightning"), "Callback", Callback)
    if not issubclass(FlatnessMonitor, other):
        FlatnessMonitor.__bases__ += (other,)


# Lightning takes a callback with `__wrapped__` for one without a state of its own, and does not compare it with others.
# Of two equal monitors it would complain in its own words before `setup` can say what to do. The state is saved anyway.
FlatnessMonitor.state_dict.__wrapped__ = Callback.state_dict  # type: ignore[attr-defined]


def _tools(monitor: FlatnessMonitor, pl_module: LightningModule, choice: Choice | None = None) -> Tools:
    """Return a new recorder of the module and a new method; raise a `ValueError` if a named module is not there."""
    name = choice.name if choice is not None else monitor.method
    classifier = choice.layer if choice is not None and name == "classifier" else monitor.classifier
    scale_free = SCALE_FREE in monitor.keys
    return method_for(pl_module, name, monitor.layer, classifier, monitor.chunk_bytes, scale_free=scale_free)


def _asked(monitor: FlatnessMonitor) -> list[str]:
    """Return the keys that are asked for and that the method may give."""
    return [key for key in keys_of(monitor.method) if key in monitor.keys]


def _close(monitor: FlatnessMonitor) -> None:
    """End the measurement of a validation, and forget the network."""
    monitor._state.kept = KeptRecorders()
    if monitor._validation is not None:
        monitor._validation.close()
        monitor._validation = None
