from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning_runs import (
    KEYS,
    Broken,
    Classifier,
    Network,
    Values,
    assert_same,
    everything,
    firings,
    given_batches,
    hooks,
    images,
    report_of,
    trainer,
    values_of,
)
from lightning_utilities.core import rank_zero
from recorded import brute_force
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_flatness import FlatnessMonitor, ReduceLR, Rule, StopTraining, measure
from lightning_flatness.rules import divergence, label_noise


@pytest.mark.parametrize("inference_mode", [True, False])
def test_fit_and_validate_log_what_measure_returns(tmp_path: Any, inference_mode: bool) -> None:
    module, monitor = Classifier(), FlatnessMonitor(strict=True)
    run = trainer(tmp_path, monitor, inference_mode=inference_mode)
    run.validate(module, verbose=False)
    assert_same(values_of(run), report_of(module, module.val_dataloader()))
    run.fit(module)  # the same callback object, after inference mode
    assert_same(values_of(run), report_of(module, module.val_dataloader()))
    fitted = values_of(run)
    run.validate(module, verbose=False)
    assert_same(values_of(run), fitted)


@pytest.mark.parametrize("inference_mode", [True, False])
@pytest.mark.parametrize("workers", [0, 1])
def test_iterable_dataset_in_inference_mode(tmp_path: Any, inference_mode: bool, workers: int) -> None:
    class Stream(IterableDataset):
        def __iter__(self) -> Any:
            return iter(images(10, 2))

    module, run = Classifier(), trainer(tmp_path, FlatnessMonitor(strict=True), inference_mode=inference_mode)
    run.validate(module, DataLoader(Stream(), batch_size=4, num_workers=workers), verbose=False)
    assert_same(values_of(run), report_of(module, module.val_dataloader()))


NEUTRAL: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "validation batches": ({}, {}),
    "training batches": ({"data": "train"}, {}),
    "given batches": ({"data": given_batches()}, {}),
    "some samples": ({"max_samples": 5, "every_n_validations": 2}, {}),
    "validation amid accumulated gradients": ({}, {"accumulate_grad_batches": 4, "val_check_interval": 3}),
}


@pytest.mark.parametrize(("options", "flags"), NEUTRAL.values(), ids=NEUTRAL)
def test_training_is_equal_to_the_last_bit(tmp_path: Any, options: dict[str, Any], flags: dict[str, Any]) -> None:
    results = []
    for callbacks in ([FlatnessMonitor(**options, strict=True)], []):
        random.seed(3), np.random.seed(3)
        module, run = Classifier(), trainer(tmp_path, *callbacks, max_epochs=3, **flags)
        run.fit(module)
        results.append(everything(module, run))
        assert bool(callbacks) == any(key.startswith("flatness/") for key in run.callback_metrics)
    assert results[0] == results[1]


@pytest.mark.parametrize("error", [RuntimeError("mine"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("hook", ["on_validation_batch_start", "on_validation_batch_end", "on_validation_epoch_end"])
def test_nothing_is_left_after_an_error(tmp_path: Any, hook: str, error: BaseException) -> None:
    module = Classifier()
    with pytest.raises((RuntimeError, SystemExit, KeyboardInterrupt)):
        trainer(tmp_path, FlatnessMonitor(), Broken(hook, error)).fit(module)
    assert hooks(module) == 0
    assert _get_current_dispatch_mode() is None
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("place", ["act2", "head"])
def test_nothing_is_left_after_an_error_within_the_tail(tmp_path: Any, place: str) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("mine")

    module = Classifier()
    handle = getattr(module.net, place).register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="mine"):
        trainer(tmp_path, FlatnessMonitor()).validate(module, verbose=False)
    handle.remove()
    assert hooks(module) == 0
    assert _get_current_dispatch_mode() is None


def test_each_loader_has_its_keys(tmp_path: Any) -> None:
    module, run = Classifier(loaders=2), trainer(tmp_path, FlatnessMonitor(strict=True))
    run.fit(module)
    for index, loader in enumerate(module.val_dataloader()):
        assert_same(values_of(run, f"/dataloader_idx_{index}"), report_of(module, loader))


def test_every_second_validation_and_always_the_first(tmp_path: Any) -> None:
    watch, module = Values(), Classifier()
    trainer(tmp_path, FlatnessMonitor(every_n_validations=2), watch, max_epochs=4).fit(module)
    sanity, *values = [value for _, _, value in watch.seen]
    assert sanity is not None
    assert values[0] == values[1] != values[2] == values[3]


def test_max_samples_cuts_in_the_middle_of_a_batch(tmp_path: Any) -> None:
    module, run = Classifier(), trainer(tmp_path, FlatnessMonitor(max_samples=6, strict=True))
    run.validate(module, verbose=False)
    assert_same(values_of(run), report_of(module, module.val_dataloader(), max_samples=6))


FLAGS: dict[str, tuple[dict[str, Any], bool]] = {
    "fast_dev_run": ({"fast_dev_run": True}, True),
    "limit_val_batches": ({"limit_val_batches": 1}, True),
    "half of the batches": ({"limit_val_batches": 0.5}, True),
    "no validation": ({"limit_val_batches": 0}, False),
    "twice an epoch": ({"val_check_interval": 0.5}, True),
    "by step": ({"val_check_interval": 5, "check_val_every_n_epoch": None}, True),
    "no sanity check": ({"num_sanity_val_steps": 0}, True),
    "barebones": ({"barebones": True}, False),
}


@pytest.mark.parametrize(("flags", "logged"), FLAGS.values(), ids=FLAGS)
def test_flags_of_the_trainer(tmp_path: Any, flags: dict[str, Any], logged: bool) -> None:
    run = trainer(tmp_path, FlatnessMonitor(strict=True), **flags)
    run.fit(Classifier())
    assert logged == (set(run.callback_metrics) >= KEYS)


def test_other_callbacks_and_schedulers_can_use_the_keys(tmp_path: Any) -> None:
    class Plateau(Classifier):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), 0.1)
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=1e9)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "flatness/relative"}}

    module = Plateau()
    checkpoint = ModelCheckpoint(tmp_path, monitor="flatness/relative", save_top_k=1, mode="min")
    stopping = EarlyStopping("flatness/trace", patience=2, min_delta=1e9, mode="min")
    run = trainer(tmp_path, stopping, FlatnessMonitor(), checkpoint, max_epochs=9, enable_checkpointing=True)
    run.fit(module)
    assert run.current_epoch == 3  # stopped
    assert checkpoint.best_model_score is not None
    assert run.optimizers[0].param_groups[0]["lr"] < 0.1


def silent(module: Classifier, batch: Any) -> Tensor:
    return torch.zeros(())


BAD: dict[str, tuple[str, Callable[[], Classifier], Callable[[TensorDataset], Any]]] = {
    "no targets": ("got list of length 1", lambda: Classifier(silent), lambda d: TensorDataset(d.tensors[0])),
    "targets out of range": (
        r"Targets must lie in \[0, 3\) .* got values from 0 to 7",
        lambda: Classifier(called),
        lambda d: TensorDataset(d.tensors[0], d.tensors[1].index_fill(0, torch.tensor(1), 7).clamp_min(0)),
    ),
    "float targets": (
        "got torch.float64 of shape",
        lambda: Classifier(called),
        lambda d: TensorDataset(d.tensors[0], d.tensors[1].double()),
    ),
    "NaN in the images": (
        "the loss is NaN, and the output of `net.conv2` is the first",
        Classifier,
        lambda d: TensorDataset(with_nan(d.tensors[0]), d.tensors[1]),
    ),
    "network never called": (
        "must run a convolution that is more than a linear layer",
        lambda: Classifier(silent),
        lambda d: d,
    ),
    "samples that see each other": (
        "couples the samples|one sample depend",
        lambda: Classifier(lambda m, b: F.cross_entropy((z := F.normalize(m(b[0]))) @ z.mT, torch.arange(len(z)))),
        lambda d: d,
    ),
    "several losses": (
        r"one loss; it logged \['first', 'second', 'val_loss'\]",
        lambda: Classifier(several),
        lambda d: d,
    ),
}


def called(module: Classifier, batch: Any) -> Tensor:
    """Computes no loss, so that one is assumed."""
    module(batch[0])
    return torch.zeros(())


def several(module: Classifier, batch: Any) -> Tensor:
    logits = module(batch[0])
    module.log("first", F.cross_entropy(logits, batch[1]))
    module.log("second", logits.square().mean())
    return F.cross_entropy(logits / 2, batch[1])


def with_nan(x: Tensor) -> Tensor:
    return x.clone().index_fill_(0, torch.tensor(2), torch.nan)


@pytest.mark.parametrize(("message", "build", "change"), BAD.values(), ids=BAD)
def test_what_cannot_be_measured_is_one_warning(
    tmp_path: Any, message: str, build: Callable[[], Classifier], change: Callable[[TensorDataset], Any]
) -> None:
    loader = DataLoader(change(images(10, 2)), batch_size=4)
    module, run = build(), trainer(tmp_path, FlatnessMonitor(), num_sanity_val_steps=0)
    with pytest.warns(UserWarning, match=message) as caught:
        run.fit(module, val_dataloaders=loader)
    assert sum("FlatnessMonitor" in str(warning.message) for warning in caught) == 1
    assert run.current_epoch == 2
    assert not KEYS & set(run.callback_metrics)
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, FlatnessMonitor(strict=True)).validate(build(), loader, verbose=False)


ARGUMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "data": ({"data": "test"}, "got 'test'"),
    "name": ({"name": "twin", "layer": "net.conv1"}, r"got \['twin', 'twin'\]. Set `name"),
    "max_samples": ({"max_samples": 0}, "got 0"),
    "every_n_validations": ({"every_n_validations": -1}, "got -1"),
    "every_n_validations left open": ({"every_n_validations": None}, "got None"),
    "chunk_bytes": ({"chunk_bytes": 0.5}, "got 0.5"),
    "data set": ({"data": images(6, 9)}, r"`data` .* got a data set of samples, TensorDataset. Wrap it"),
    "batch": ({"data": images(6, 9).tensors}, "`data` .* got one batch alone"),
    "iterator": ({"data": iter(given_batches())}, "iterable in every validation anew"),
    "rule without a call": ({"rules": label_noise}, r"got the function `label_noise`. Call it: `rules=label_noise\("),
    "rules without a call": ({"rules": [Rule(above=0.0), divergence]}, "got the function `divergence`"),
    "layer": ({"layer": "net.conv9"}, r"net.conv1', 'net.conv2'\]; got 'net.conv9'"),
    "classifier": ({"classifier": "net"}, "got 'net'"),
}


@pytest.mark.parametrize(("arguments", "message"), ARGUMENTS.values(), ids=ARGUMENTS)
def test_bad_arguments_stop_before_the_first_batch(tmp_path: Any, arguments: dict[str, Any], message: str) -> None:
    module = Classifier()
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, FlatnessMonitor(**arguments), FlatnessMonitor(name="twin")).fit(module)
    assert not module.losses


def test_equal_monitors_are_told_to_take_names(tmp_path: Any) -> None:
    run = trainer(tmp_path, FlatnessMonitor(), FlatnessMonitor(), enable_checkpointing=True)
    with pytest.raises(ValueError, match=r"names of their own; got \['', ''\]. Set `name="):
        run.fit(Classifier())


@pytest.fixture
def log(tmp_path: Any) -> Iterator[Path]:
    """What Lightning and its callbacks log."""
    handler = logging.FileHandler(tmp_path / "log.txt")
    rank_zero.log.addHandler(handler)
    yield tmp_path / "log.txt"
    rank_zero.log.removeHandler(handler)
    handler.close()


@pytest.mark.parametrize("sanity", [0, 2])
@pytest.mark.parametrize("data", ["val", "train", given_batches()], ids=["val", "train", "given"])
def test_each_monitor_says_what_it_measures(tmp_path: Any, log: Any, data: Any, sanity: int) -> None:
    monitors = [FlatnessMonitor(data=data, name="one", strict=True), FlatnessMonitor(name="two", strict=True)]
    trainer(tmp_path, *monitors, num_sanity_val_steps=sanity).fit(Classifier())
    what = "measures `net.conv2` up to the loss"
    lines = [line for line in log.read_text().splitlines() if "FlatnessMonitor" in line]
    assert [line.split(",")[0].rstrip(".") for line in sorted(lines)] == [
        f"FlatnessMonitor `one` {what}",
        f"FlatnessMonitor `two` {what}",
    ]


@pytest.mark.parametrize("data", ["train", given_batches()], ids=["train", "given"])
def test_own_batches(tmp_path: Any, data: Any) -> None:
    module = Classifier()
    own = [FlatnessMonitor(data=data, name=name, max_samples=5, strict=True) for name in ("one", "two")]
    run = trainer(tmp_path, own[0], FlatnessMonitor(strict=True), own[1])
    run.fit(module)
    if data == "train":
        chosen = torch.randperm(24, generator=torch.Generator().manual_seed(0))[:5].sort().values
        data = [images(24, 1)[chosen]]
    for suffix in ("/one", "/two"):
        assert_same(values_of(run, suffix), report_of(module, data, max_samples=5))
    assert_same(values_of(run), report_of(module, module.val_dataloader()))  # undisturbed by the others


def test_two_monitors_ride_on_the_same_pass(tmp_path: Any) -> None:
    module = Classifier()
    late = FlatnessMonitor(layer="net.conv2", name="late", strict=True)
    run = trainer(tmp_path, FlatnessMonitor(strict=True), late)
    run.fit(module)
    assert_same(values_of(run), report_of(module, module.val_dataloader()))
    assert_same(values_of(run, "/late"), values_of(run))


def test_training_data_is_not_there_in_validate(tmp_path: Any) -> None:
    with pytest.warns(UserWarning, match="got NoneType. Give the monitor its batches"):
        trainer(tmp_path, FlatnessMonitor(data="train")).validate(Classifier(), verbose=False)


def test_target_says_where_the_classes_are(tmp_path: Any) -> None:
    class Triples(Classifier):
        def val_dataloader(self) -> Any:
            x, y = images(10, 2).tensors
            return DataLoader(TensorDataset(x, torch.arange(10), y), batch_size=4)

        def loss(self, batch: Any) -> Tensor:
            return F.cross_entropy(self(batch[0]), batch[-1])

    module, run = Triples(), trainer(tmp_path, FlatnessMonitor(target=lambda batch: batch[-1], strict=True))
    run.fit(module)
    assert_same(values_of(run), report_of(module, Classifier.val_dataloader(module)))


def per_sample_mean(step: Callable[..., Tensor], module: Classifier) -> dict[str, float]:
    """Trace and flatness of the step's loss over the validation set, by autograd."""
    totals, count = torch.zeros(2, dtype=torch.float64), 0
    for batch in module.val_dataloader():
        values = brute_force(module.eval(), "net.conv2", lambda m, *batch: step(m, batch), *batch)
        totals += len(batch[0]) * torch.stack(values)
        count += len(batch[0])
    return dict(zip(("flatness/trace", "flatness/relative"), (totals / count).tolist(), strict=True))


def focal(module: Classifier, batch: Any) -> Tensor:
    each = F.cross_entropy(module(batch[0]), batch[1], reduction="none")
    return ((1 - (-each).exp()).square() * each).mean()


def with_accuracy(module: Classifier, batch: Any) -> Tensor:
    logits = module(batch[0])
    module.log("accuracy", (logits.argmax(1) == batch[1]).double().mean())
    module.log_dict({"examples": float(len(logits)), "spread": logits.detach().argmax(1).double().std()})
    return F.cross_entropy(logits, batch[1])


STEPS: dict[str, Callable[[Classifier, Any], Tensor]] = {
    "temperature in the loss": lambda m, b: F.cross_entropy(m(b[0]) / 2, b[1]),
    "label smoothing": lambda m, b: F.cross_entropy(m(b[0]), b[1], label_smoothing=0.1),
    "soft labels": lambda m, b: F.cross_entropy(m(b[0]), F.one_hot(b[1], 3) * 0.7 + 0.1),
    "remapped labels": lambda m, b: F.cross_entropy(m(b[0]), (b[1] + 1) % 3),
    "multi-label": lambda m, b: F.binary_cross_entropy_with_logits(m(b[0]), F.one_hot(b[1], 3).double()),
    "squared error": lambda m, b: F.mse_loss(m(b[0]), F.one_hot(b[1], 3).double()),
    "focal": focal,
    "of the features": lambda m, b: nn.Sequential(*list(m.net)[:-1])(b[0]).square().mean(),
    "accuracy besides": with_accuracy,
}


@pytest.mark.parametrize("returned", [True, False])
@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_the_loss_that_the_step_computes_is_measured(
    tmp_path: Any, step: Callable[[Classifier, Any], Tensor], returned: bool
) -> None:
    """Returned, or given to the logging, which Lightning multiplies by the batch size afterwards."""

    class Returning(Classifier):
        def validation_step(self, batch: Any, index: int) -> Any:
            loss = self.step(self, batch)
            if returned:
                return {"loss": loss}
            self.log("val_loss", loss)
            return None

    module, run = Returning(step), trainer(tmp_path, FlatnessMonitor(strict=True))
    run.validate(module, verbose=False)
    module.log = module.log_dict = lambda *_, **__: None
    for key, value in per_sample_mean(step, module).items():
        assert float(run.callback_metrics[key]) == pytest.approx(value, rel=1e-8)


@pytest.mark.parametrize("loss", [None, F.cross_entropy, "cross_entropy"], ids=["assumed", "given", "named"])
def test_a_step_without_a_loss(tmp_path: Any, loss: Any) -> None:
    """Its logits are taken for those of cross-entropy, unless the loss is said."""
    module, run = Classifier(called), trainer(tmp_path, FlatnessMonitor(strict=True, loss=loss))
    run.validate(module, verbose=False)
    assert_same(values_of(run), report_of(module, module.val_dataloader()))


def in_the_other_namespace(other: Any) -> Any:
    class Module(other.LightningModule):
        loss, forward = Classifier.loss, Classifier.forward
        training_step, validation_step = Classifier.training_step, Classifier.validation_step
        train_dataloader, val_dataloader = Classifier.train_dataloader, Classifier.val_dataloader
        configure_optimizers = Classifier.configure_optimizers
        step, loaders = None, 1

        def __init__(self) -> None:
            super().__init__()
            self.net, self.losses = Network().double(), []

    return Module()


@pytest.mark.parametrize("data", ["val", "train"])
def test_works_under_the_other_namespace(tmp_path: Any, data: Any) -> None:
    """With actions and a resumption; Trainers before 2.6 ask for a callback of their own namespace.

    By hand with such a one: `pip install --no-deps pytorch_lightning==2.5.3` into an environment of its own.
    """
    other = pytest.importorskip("pytorch_lightning")
    suffix = "/train" if data == "train" else ""

    def fit(epochs: int, checkpoint: str | None = None) -> tuple[FlatnessMonitor, Any]:
        rule = Rule(f"flatness/trace{suffix}", above=0.0, action=[ReduceLR(0.5), StopTraining()])
        monitor = FlatnessMonitor(data=data, rules=[rule], every_n_validations=2, strict=True)
        assert isinstance(monitor, other.Callback)
        saving = other.callbacks.ModelCheckpoint(tmp_path, "last", enable_version_counter=False)
        stopping = other.callbacks.EarlyStopping(f"flatness/trace{suffix}", patience=9)
        flags = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
        run = other.Trainer(max_epochs=epochs, callbacks=[stopping, monitor, saving], **flags)
        run.fit(in_the_other_namespace(other), ckpt_path=checkpoint)
        return monitor, run

    monitor, run = fit(2)
    assert set(run.callback_metrics) >= {f"{key}{suffix}" for key in KEYS}
    assert [alert.epoch for alert in monitor.alerts] == [0]
    monitor, run = fit(6, str(tmp_path / "last.ckpt"))
    assert [alert.epoch for alert in monitor.alerts] == [0, 2]
    assert run.current_epoch == 3


class Attention(nn.Module):
    """Patches by a convolution, a block of a transformer, a linear layer on the first token."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.head = nn.Conv2d(2, 4, 2, 2), nn.Linear(4, 3)
        self.block = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.patches(x).flatten(2).mT)[:, 0])


def attentive(loaders: int = 1) -> Classifier:
    module = Classifier(loaders=loaders)
    module.net = Attention().double()
    return module


@pytest.mark.parametrize("data", ["val", "train", given_batches()], ids=["val", "train", "given"])
def test_a_transformer_has_the_values_of_its_classifier_and_says_so_once(tmp_path: Any, log: Any, data: Any) -> None:
    module, monitor = attentive(), FlatnessMonitor(data=data, strict=True)
    run = trainer(tmp_path, monitor, max_epochs=3)
    run.fit(module)
    suffix = "/train" if data == "train" else ""
    batches = {"val": module.val_dataloader(), "train": DataLoader(images(24, 1), batch_size=4)}
    loader = batches[data] if isinstance(data, str) else data
    assert_same(values_of(run, suffix), report_of(module, loader, method="classifier"))
    assert f"flatness/head{suffix}" in run.callback_metrics
    assert f"flatness/kernel{suffix}" not in run.callback_metrics
    (said,) = [message for message in log.read_text().splitlines() if "measures" in message]
    for part in ("`net.head` up to the loss", "classifier's own weight", "filter of `net.patches`", 'method="pooled"'):
        assert part in said
    assert hooks(module) == 0


def test_a_transformer_is_trained_the_same_to_the_last_bit(tmp_path: Any) -> None:
    states = []
    for callbacks in ([], [FlatnessMonitor(strict=True)]):
        module = attentive()
        run = trainer(tmp_path, *callbacks)
        run.fit(module)
        states.append((module.state_dict(), torch.get_rng_state()))
    (first, random_state), (second, other) = states
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(random_state, other)


def test_each_loader_of_a_transformer_is_measured_at_the_same_layer(tmp_path: Any) -> None:
    module, run = attentive(loaders=2), trainer(tmp_path, FlatnessMonitor(strict=True))
    run.fit(module)
    for index, loader in enumerate(module.val_dataloader()):
        assert_same(values_of(run, f"/dataloader_idx_{index}"), report_of(module, loader))


def test_pooled_alone_refuses_a_transformer(tmp_path: Any) -> None:
    run = trainer(tmp_path, FlatnessMonitor(method="pooled"))
    with pytest.warns(UserWarning, match="did not measure: The closed form needs every pooled feature"):
        run.fit(attentive())
    assert not any(key.startswith("flatness") for key in run.callback_metrics)


def test_the_classifier_of_any_network_can_be_asked_for(tmp_path: Any) -> None:
    module, run = Classifier(), trainer(tmp_path, FlatnessMonitor(method="classifier", strict=True))
    run.fit(module)
    assert_same(values_of(run), report_of(module, module.val_dataloader(), method="classifier"))


def test_the_method_of_the_first_batch_is_kept(tmp_path: Any) -> None:
    """A network that has been measured at its convolution is not measured at its classifier under the same keys."""
    module = Classifier(lambda m, batch: F.cross_entropy(m.net(m.changed(batch[0])), batch[1]))
    gates: list[Any] = []

    def changed(x: Tensor) -> Tensor:
        if module.losses and len(module.losses) % 3 == 0 and not gates:  # from the second validation on
            gates.append(module.net.act2)
            module.net.act2 = nn.Softmax(1)
        return x

    module.changed = changed
    run = trainer(tmp_path, FlatnessMonitor(), num_sanity_val_steps=0)
    with pytest.warns(UserWarning, match="did not measure: The closed form needs"):
        run.fit(module)
    assert gates
    assert run.callback_metrics["flatness/trace"].isnan()


def test_a_rule_on_a_key_that_the_method_lacks_is_inactive_and_named_once(tmp_path: Any) -> None:
    rules = [Rule("flatness/kernel", above=0.0, name="large filters"), Rule("flatness/trace", above=0.0)]
    monitor = FlatnessMonitor(rules=rules, strict=True)
    with pytest.warns(UserWarning, match="cannot evaluate the rule") as caught:
        trainer(tmp_path, monitor, max_epochs=3).fit(attentive())
    (said,) = [str(warning.message) for warning in caught if "FlatnessMonitor" in str(warning.message)]
    assert "the rule `large filters`, which watches `flatness/kernel`" in said
    assert [alert.key for alert in monitor.alerts] == ["flatness/trace"] * 3
    with pytest.raises(ValueError, match="got `flatness/kernel`"):
        trainer(tmp_path, FlatnessMonitor(rules=rules, method="classifier")).fit(attentive())


class Smooth(Classifier):
    """The first convolution lies before a curved step."""

    def __init__(self) -> None:
        super().__init__(loaders=2)
        self.net.act = torch.nn.SiLU()


@pytest.mark.parametrize("layer", ["all", "net.conv1", ("net.conv1", "net.head")])
def test_layers_have_keys_of_their_own_with_the_values_of_measure(tmp_path: Any, layer: Any) -> None:
    rules = [Rule("flatness/trace/net.conv1/ggn/x", above=0.0), Rule("flatness/relative/net.conv1/x", above=0.0)]
    left = []
    for callbacks in ([FlatnessMonitor(layer, method="jacobian", name="x", rules=rules, strict=True)], []):
        module = Smooth()
        run = trainer(tmp_path, *callbacks)
        with (
            pytest.warns(UserWarning, match="`flatness/relative/net.conv1/x`.*inactive") if callbacks else nullcontext()
        ):
            run.fit(module)
        left.append(everything(module, run))
        if callbacks:
            (monitor,), metrics = callbacks, dict(run.callback_metrics)
    assert left[0] == left[1]
    for index, loader in enumerate(module.val_dataloader()):
        report, end = measure(module, loader, layer, method="jacobian"), f"/x/dataloader_idx_{index}"
        expected = {f"flatness/confidence{end}": report.confidence, f"margin/mean{end}": report.margins["mean"]}
        for name, own in report.layers.items():
            label = "/ggn" if own.curvature == "ggn" else ""
            expected[f"flatness/relative/{name}{label}{end}"] = own.relative_flatness
            expected[f"flatness/trace/{name}{label}{end}"] = own.hessian_trace
        if layer == "all":
            expected[f"flatness/trace/network/ggn{end}"] = report.network_trace
        logged = {
            key: float(value) for key, value in metrics.items() if key.endswith(end) and key.startswith("flatness/")
        }
        assert set(logged) | {f"margin/mean{end}"} == set(expected)
        assert {key: float(metrics[key]) for key in expected} == pytest.approx(expected, rel=1e-12)
    assert {alert.key for alert in firings(monitor)} == {"flatness/trace/net.conv1/ggn/x"}


def test_jacobian_refuses_before_the_first_batch(tmp_path: Any) -> None:
    for options, message in (
        ({}, "needs the layers"),
        ({"layer": "all", "per_sample": True}, "per_sample"),
    ):
        with pytest.raises(ValueError, match=message):
            FlatnessMonitor(method="jacobian", **options)
    unknown = Rule("flatness/trace/net.conv3", above=0.0)
    for monitor, message in (
        (FlatnessMonitor("net.conv3", method="jacobian"), "must name one of.*net.conv3"),
        (FlatnessMonitor("all", method="jacobian", rules=[unknown]), "net.conv3.*flatness/trace/net.conv1/ggn"),
        (FlatnessMonitor("all", method="jacobian", rules="default"), "got `flatness/"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer(tmp_path, monitor, num_sanity_val_steps=0).fit(Classifier())
    module = Classifier()
    module.network = torch.nn.Linear(2, 2).double()
    with pytest.raises(ValueError, match="`network` as well"):
        trainer(tmp_path, FlatnessMonitor("all", method="jacobian")).validate(module, verbose=False)


@pytest.mark.parametrize("name", [None, "mine"])
def test_the_gauss_newton_part_has_keys_of_its_own(
    tmp_path: Any, name: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where the Hessian behind a curved head would take too long; never in the place of the Hessian's value."""
    monkeypatch.setattr("lightning_flatness.curvature.pooled.method._HEAD_SIZE", 0.1)
    suffix = f"/{name}" if name else ""
    rules = [
        Rule(monitor=f"flatness/relative{suffix}", rise=1.0, name="of the Hessian"),
        Rule(monitor=f"flatness/relative/ggn{suffix}", above=0.0, patience=1, name="of the part"),
    ]
    module, monitor = Classifier(loaders=2), FlatnessMonitor(rules=rules, name=name, method="pooled")
    module.net.head = nn.Sequential(nn.Linear(4, 6), nn.SiLU(), nn.Linear(6, 3)).double()
    run = trainer(tmp_path, monitor)
    with caplog.at_level(logging.INFO), pytest.warns(UserWarning, match="`of the Hessian`.*inactive"):
        run.fit(module)
    assert "the Gauss-Newton part of trace and relative flatness alone" in str(monitor.measured)
    assert {alert.rule_name for alert in monitor.alerts} == {"of the part"}
    for index, loader in enumerate(module.val_dataloader()):
        report = measure(module, loader, method="pooled")
        assert (report.exact, report.curvature, report.scale_free_flatness) == (False, "ggn", None)
        assert str(report).count("of the Gauss-Newton part") == 2
        logged = {key: float(value) for key, value in run.callback_metrics.items() if key.endswith(f"idx_{index}")}
        for key, value in (("relative", report.relative_flatness), ("trace", report.hessian_trace)):
            assert logged[f"flatness/{key}/ggn{suffix}/dataloader_idx_{index}"] == pytest.approx(value)
            assert f"flatness/{key}{suffix}/dataloader_idx_{index}" not in logged
        assert not any("scale_free" in key and "margin" not in key for key in logged)
    for wrong in ("ggn", "ggn/mine"):
        with pytest.raises(ValueError, match=r"`name` must not be"):
            FlatnessMonitor(name=wrong)
