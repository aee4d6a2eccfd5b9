"""Errors and interrupts at every point of a validation: the user's arrive as they are, the monitor's stop nothing."""

from __future__ import annotations

import itertools
import json
import os
import pkgutil
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning_runs import (
    Broken,
    Classifier,
    assert_same,
    everything,
    given_batches,
    hooks,
    images,
    report_of,
    trainer,
    values_of,
)
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.data import DataLoader, TensorDataset

from lightning_flatness import FlatnessMonitor, Notify, Rule
from lightning_flatness.curvature.pooled import closed_form
from lightning_flatness.curvature.pooled.derivatives import PooledDerivatives
from lightning_flatness.recording import recorder
from lightning_flatness.recording.dispatch import dispatcher
from lightning_flatness.recording.eager import EAGER

ERRORS: list[Callable[[], BaseException]] = [lambda: RuntimeError("fault"), KeyboardInterrupt]
each_error = pytest.mark.parametrize("error", ERRORS, ids=["error", "interrupt"])
ALWAYS = Rule("flatness/trace", above=0.0)


@pytest.fixture(autouse=True)
def interrupts_still_arrive() -> Iterator[None]:
    """Lightning ignores SIGINT after the first one."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


def process() -> dict[str, Any]:
    """What the monitor might leave switched on."""
    ours = dispatcher()
    return {
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "modes": _get_current_dispatch_mode_stack(),
        "precision": torch.get_float32_matmul_precision(),
        "stance": torch._dynamo.eval_frame._stance.stance,
        "eager": EAGER._users,
        "dispatcher": (ours.tracers, ours._retained, ours.is_paused, ours._entered),
        "exclusive": recorder._THREAD.exclusive,
    }


class Notes(Callback):
    """Notes before each hook of the monitor what a fault in it must not change."""

    def __init__(self) -> None:
        self.last: list[Any] = []

    def note(self, run: Any, module: Classifier, *_: Any, **__: Any) -> None:
        self.last = self.of(module)

    on_validation_epoch_start = on_validation_batch_start = on_validation_batch_end = note
    on_validation_epoch_end = on_validation_end = note

    @staticmethod
    def of(module: Classifier) -> list[Any]:
        flags = [each.training for each in module.modules()]
        return [flags, [p.requires_grad for p in module.parameters()], torch.get_rng_state().tolist()]


def inject(monkeypatch: pytest.MonkeyPatch, target: str, number: int, error: BaseException) -> None:
    """Let call `number` of a function or method raise."""
    path, name = target.rsplit(".", 1)
    owner = sys.modules.get(path) or pkgutil.resolve_name(path)
    original, calls = getattr(owner, name), itertools.count(1)

    def faulty(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == number:
            raise error
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, faulty)


# Where the monitor fails, in which call of it, after which steps the rules judge all the same, and its arguments.
AFTER_THE_FIRST, BUT_FOR_THE_SECOND, ALL = [11, 17], [5, 17], [5, 11, 17]
OWN, CLASSIFIER = {"data": given_batches()}, {"method": "classifier"}
FAULTS: dict[str, tuple[str, int, list[int], dict[str, Any]]] = {
    "the sums": ("lightning_flatness.validation.Evaluation.__init__", 2, BUT_FOR_THE_SECOND, {}),
    "the recorder": ("lightning_flatness.recording.recorder.ForwardRecorder.__init__", 2, AFTER_THE_FIRST, {}),
    "the stance": ("lightning_flatness.recording.eager.EagerStance.enter", 1, AFTER_THE_FIRST, {}),
    "the dispatcher": ("lightning_flatness.recording.dispatch.Dispatcher.attach", 1, AFTER_THE_FIRST, {}),
    "the hooks": ("lightning_flatness.recording.recorder.ForwardRecorder._install", 1, AFTER_THE_FIRST, {}),
    "counting samples": ("lightning_flatness.validation.sample_limit", 3, AFTER_THE_FIRST, {}),
    "a batch's start": ("lightning_flatness.recording.recorder.ForwardRecorder.clear", 3, AFTER_THE_FIRST, {}),
    "the convolution's hook": ("lightning_flatness.recording.weights.WeightCopies.of", 2, AFTER_THE_FIRST, {}),
    "before an operation": ("lightning_flatness.recording.dispatch.GraphTracer._before", 8, AFTER_THE_FIRST, {}),
    "after an operation": ("lightning_flatness.recording.graph.OperationGraph.add_node", 12, AFTER_THE_FIRST, {}),
    "the depth of a tensor": ("lightning_flatness.recording.depth.DepthWatch.of", 9, AFTER_THE_FIRST, {}),
    "the choice of the layer": ("lightning_flatness.recording.depth.LayerChoice.add", 2, AFTER_THE_FIRST, {}),
    "naming the layer": ("lightning_flatness.callback.log_layers", 1, AFTER_THE_FIRST, {}),
    "listening to the log": ("lightning_flatness.data.listening.LoggedValues.start", 2, AFTER_THE_FIRST, {}),
    "the loss": ("lightning_flatness.validation.MeasuredValidation._loss_of", 2, AFTER_THE_FIRST, {}),
    "the cuts": ("lightning_flatness.recording.graph.OperationGraph.cuts", 2, AFTER_THE_FIRST, {}),
    "the objective": ("lightning_flatness.curvature.pooled.method.ObjectiveReader.again", 2, AFTER_THE_FIRST, {}),
    "a group": ("lightning_flatness.curvature.grouping._Group.takes", 2, AFTER_THE_FIRST, {}),
    "the rest of a group": ("lightning_flatness.curvature.grouping._Group.evaluated", 1, AFTER_THE_FIRST, {}),
    "targets": ("lightning_flatness.data.passes.batch_targets", 2, AFTER_THE_FIRST, OWN),
    "the other hooks": ("lightning_flatness.recording.recorder.ForwardRecorder._install", 2, AFTER_THE_FIRST, {}),
    "certificate": ("lightning_flatness.curvature.pooled.method.certify", 1, AFTER_THE_FIRST, {}),
    "replay": ("lightning_flatness.curvature.pooled.method.features_at", 2, AFTER_THE_FIRST, {}),
    "derivatives": ("lightning_flatness.curvature.pooled.method.PooledDerivatives", 2, AFTER_THE_FIRST, {}),
    "a chunk": ("lightning_flatness.curvature.pooled.closed_form._chunk_flatness", 2, AFTER_THE_FIRST, {}),
    "adding up": ("lightning_flatness.validation.Evaluation.update", 2, AFTER_THE_FIRST, {}),
    "a metric": ("lightning_flatness.metrics.evaluation.MarginStatistics.update", 2, AFTER_THE_FIRST, {}),
    "the means": ("lightning_flatness.validation.Evaluation.compute", 2, BUT_FOR_THE_SECOND, {}),
    "logging": ("lightning_flatness.callback.log_values", 2, BUT_FOR_THE_SECOND, {}),
    "a rule": ("lightning_flatness.rules.tracker.RuleTracker.observe", 2, BUT_FOR_THE_SECOND, {}),
    "an action": ("lightning_flatness.actions.training.Notify.act", 2, ALL, {}),
    "showing an alert": ("lightning_flatness.reporting.loggers.Loggers.show", 2, ALL, {}),
    "drawing samples": ("lightning_flatness.data.sampling.training_sample", 2, BUT_FOR_THE_SECOND, {"data": "train"}),
    "moving batches": ("lightning_flatness.validation.transferred", 2, BUT_FOR_THE_SECOND, OWN),
    "the network": ("lightning_flatness.validation.callable_module", 2, BUT_FOR_THE_SECOND, OWN),
    "own passes": ("lightning_flatness.data.passes.batch_inputs", 2, AFTER_THE_FIRST, OWN),
    "a layer's hook": (
        "lightning_flatness.recording.classifier.ClassifierBuilder._begin_layer",
        1,
        AFTER_THE_FIRST,
        CLASSIFIER,
    ),
    "the classifier's loss": ("lightning_flatness.curvature.classifier._only_call", 2, AFTER_THE_FIRST, CLASSIFIER),
    "the choice": ("lightning_flatness.curvature.methods.AutoMethod._chosen", 1, AFTER_THE_FIRST, {"method": "auto"}),
}
each_fault = pytest.mark.parametrize("where", FAULTS)


def monitored(where: str, monkeypatch: pytest.MonkeyPatch, error: BaseException, **more: Any) -> FlatnessMonitor:
    """A monitor that fails there, and a rule that fires in every validation that it sees."""
    target, number, _, given = FAULTS[where]
    options: dict[str, Any] = {"method": "pooled", **given}  # which does not go over to another layer
    inject(monkeypatch, target, number, error)
    key = "flatness/trace/train" if options.get("data") == "train" else "flatness/trace"
    return FlatnessMonitor(**options, **more, rules=[Rule(key, above=0.0, action=Notify(lambda alert: None))])


def fitted(root: Path, *callbacks: Callback) -> list[Any]:
    """All that a training of three epochs leaves behind."""
    random.seed(3), np.random.seed(3)
    module, run = Classifier(), trainer(root, *callbacks, max_epochs=3, num_sanity_val_steps=0)
    run.fit(module)
    return everything(module, run)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return fitted(tmp_path_factory.mktemp("plain"))


def own_warnings(caught: Any) -> list[str]:
    return [str(warning.message) for warning in caught if "FlatnessMonitor" in str(warning.message)]


@each_fault
def test_an_error_of_the_monitor_is_one_warning(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, plain: list[Any], where: str
) -> None:
    monitor, before = monitored(where, monkeypatch, RuntimeError("fault")), process()
    with pytest.warns(UserWarning, match="fault") as caught:
        assert fitted(tmp_path, monitor) == plain
    assert len(own_warnings(caught)) == 1
    assert process() == before
    assert [alert.step for alert in monitor.alerts] == FAULTS[where][2]


@each_fault
@pytest.mark.parametrize("strict", [True, False])
def test_what_stops_the_run_leaves_nothing_behind(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, where: str, strict: bool
) -> None:
    """An error if `strict`, else an interrupt."""
    error = RuntimeError("fault") if strict else KeyboardInterrupt()
    monitor, before = monitored(where, monkeypatch, error, strict=strict), process()
    notes, module = Notes(), Classifier()
    with pytest.raises((RuntimeError, ValueError) if strict else (SystemExit, KeyboardInterrupt)) as caught:
        trainer(tmp_path, notes, monitor, max_epochs=3, num_sanity_val_steps=0).fit(module)
    assert "fault" in str(caught.value) or not strict
    assert (process(), hooks(module)) == (before, 0)
    assert notes.of(module) == notes.last


class Images(TensorDataset):
    """Fails to load its last image."""

    error: BaseException

    def __getitem__(self, index: int) -> Any:
        if index == len(self) - 1:
            raise self.error
        return super().__getitem__(index)


class Logger(CSVLogger):
    error: BaseException

    def log_metrics(self, metrics: Any, step: Any = None) -> None:
        if "val_loss" in metrics:
            raise self.error


class Step(Classifier):
    """Fails at one place of its second validation batch, or is validated with what fails."""

    def __init__(self, where: str, error: BaseException) -> None:
        super().__init__()
        self.where, self.error, self.batches = where, error, 0
        if where in dict(self.net.named_children()):
            self.net.get_submodule(where).register_forward_hook(lambda *_: self.fail(where))

    def fail(self, here: str) -> None:
        if here == self.where and self.batches == 2 and not self.training:
            raise self.error

    def validation_step(self, batch: Any, index: int) -> None:
        self.batches += 1
        self.fail("before the network")
        super().validation_step(batch, index)
        self.fail("after the network")

    def val_dataloader(self) -> Any:
        data = Images(*images(10, 2).tensors) if self.where == "the data" else images(10, 2)
        data.error = self.error
        return DataLoader(data, batch_size=4)


HOOKS = ["epoch_start", "batch_start", "batch_end", "epoch_end", "end"]
PLACES = ["before the network", *"conv1 act conv2 norm2 act2 flatten head".split(), "after the network"]


@each_error
@pytest.mark.parametrize("where", [*PLACES, "the data", "the logger", *(f"on_validation_{hook}" for hook in HOOKS)])
def test_an_error_of_the_user_arrives_as_it_is(tmp_path: Any, where: str, error: Callable[[], BaseException]) -> None:
    results = []
    for monitors in ([], [FlatnessMonitor(rules=[ALWAYS])]):
        fault, before = error(), process()
        module, notes, logger = Step(where, fault), Notes(), Logger(tmp_path)
        logger.error = fault
        others = [Broken(where, fault)] if where.startswith("on_") else []
        run = trainer(
            tmp_path,
            *others[: len(monitors)],  # before the monitor in its hooks; alone where there is none
            *monitors,
            *others[len(monitors) :],
            notes,
            max_epochs=2,
            num_sanity_val_steps=0,
            logger=logger if where == "the logger" else False,
        )
        with pytest.raises((RuntimeError, SystemExit, KeyboardInterrupt)) as caught:
            run.fit(module)
        assert caught.value is fault or isinstance(caught.value, SystemExit)
        assert process() == before
        results.append((type(caught.value), notes.of(module), hooks(module), run.global_step))
    assert results[0] == results[1]


@pytest.mark.parametrize("fits", [1, 2, 3])
def test_out_of_memory_halves_the_chunk(tmp_path: Any, monkeypatch: pytest.MonkeyPatch, fits: int) -> None:
    """Batches are of four samples."""
    original, sizes = closed_form._chunk_flatness, []

    def limited(chunk: PooledDerivatives, *options: Any) -> Any:
        sizes.append(len(chunk))
        if len(chunk) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return original(chunk, *options)

    module, run = Classifier(), trainer(tmp_path, FlatnessMonitor(strict=True))
    expected = report_of(module, module.val_dataloader())
    monkeypatch.setattr(closed_form, "_chunk_flatness", limited)
    run.validate(module, verbose=False)
    assert_same(values_of(run), expected)
    assert max(sizes) == 4 > fits
    assert min(sizes) >= 1


EXHAUSTED = ["the convolution's hook", "before an operation", "certificate", "replay", "derivatives", "adding up"]


@pytest.mark.parametrize("where", EXHAUSTED)
def test_out_of_memory_skips_one_validation(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, plain: list[Any], where: str
) -> None:
    monitor = monitored(where, monkeypatch, torch.OutOfMemoryError("CUDA out of memory. 2 MiB are free."))
    with pytest.warns(UserWarning, match="out of memory") as caught:
        assert fitted(tmp_path, monitor) == plain
    assert len(own_warnings(caught)) == 1
    assert [alert.step for alert in monitor.alerts] == [11, 17]


def test_out_of_memory_in_every_validation_is_one_warning(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, plain: list[Any]
) -> None:
    free = itertools.count()

    def exhausted(chunk: PooledDerivatives, *options: Any) -> None:
        raise torch.OutOfMemoryError(f"CUDA out of memory. {next(free)} MiB are free.")

    monkeypatch.setattr(closed_form, "_chunk_flatness", exhausted)
    with pytest.warns(UserWarning, match="out of memory") as caught:
        assert fitted(tmp_path, FlatnessMonitor()) == plain
    assert len(own_warnings(caught)) == 1


class Killed(Callback):
    """Writes down what each checkpoint must hold, and kills the process in the middle of an epoch."""

    def on_save_checkpoint(self, run: Any, module: Any, checkpoint: dict[str, Any]) -> None:
        Path("saved.json").write_text(json.dumps(run.callbacks[0].state_dict()))

    def on_train_batch_start(self, run: Any, *_: Any) -> None:
        if run.global_step == 15:
            os.kill(os.getpid(), signal.SIGKILL)


def watched(*callbacks: Callback, **options: Any) -> tuple[FlatnessMonitor, Any]:
    monitor = FlatnessMonitor(strict=True, rules=[Rule("flatness/trace", rise=0.01, reference="previous"), ALWAYS])
    checkpoint = ModelCheckpoint(".", filename="run", save_top_k=1, enable_version_counter=False)
    return monitor, trainer(".", monitor, *callbacks, checkpoint, max_epochs=4, enable_checkpointing=True, **options)


@pytest.mark.timeout(200)
def test_a_killed_run_goes_on_from_its_checkpoint() -> None:
    script = "from test_faults import *; watched(Killed())[1].fit(Classifier())"
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    killed = subprocess.run([sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": path}, timeout=180)
    assert killed.returncode == -signal.SIGKILL
    saved = json.loads(Path("saved.json").read_text())
    assert len(saved["alerts"]) >= 2

    class Resumed(Callback):
        def on_train_start(self, run: Any, module: Any) -> None:
            assert json.loads(json.dumps(run.callbacks[0].state_dict())) == saved

    resumed, run = watched(Resumed())
    run.fit(Classifier(), ckpt_path="run.ckpt")
    Path("run.ckpt").unlink()
    unbroken, run = watched()
    run.fit(Classifier())
    assert [(alert.key, alert.step) for alert in resumed.alerts] == [(a.key, a.step) for a in unbroken.alerts]
