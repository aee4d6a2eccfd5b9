from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import callbacks
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning_runs import KEYS, Classifier, Values, everything, firings, images, trainer
from torch.utils.data import ConcatDataset, DataLoader

from lightning_flatness import Action, Alert, AllOf, AnyOf, FlatnessMonitor, Notify, ReduceLR, Rule, StopTraining
from lightning_flatness.alerting import RuleRunner
from lightning_flatness.rules import divergence, label_noise
from lightning_flatness.rules.alert import ActionError

ALWAYS: dict[str, Any] = {"monitor": "flatness/trace", "above": 0.0}


def test_each_alert_is_recorded_and_escalates(tmp_path: Any) -> None:
    seen: list[str] = []
    rule = Rule(**ALWAYS, action=[Notify(lambda alert: seen.append(alert.reason)), ReduceLR(0.5), StopTraining()])
    monitor, module = FlatnessMonitor(rules=[rule], strict=True), Classifier()
    run = trainer(tmp_path, monitor, max_epochs=9)
    run.fit(module)
    assert [alert.step for alert in monitor.alerts] == [5, 11, 17]  # as in the logs; not in the sanity check
    assert [alert.epoch for alert in monitor.alerts] == [0, 1, 2]
    assert seen == [monitor.alerts[0].reason]
    assert run.current_epoch == 3
    assert [(alert.rule, alert.number) for alert in monitor.alerts] == [(rule, 1), (rule, 2), (rule, 3)]
    watched = float(run.callback_metrics["flatness/trace"])
    assert monitor.alerts[-1].value == pytest.approx(watched)


def test_a_cut_learning_rate_stays_cut(tmp_path: Any) -> None:
    class Rates(Values):
        def on_train_epoch_end(self, run: Any, module: Any) -> None:
            self.seen.append(run.optimizers[0].param_groups[0]["lr"])

    rates = []
    for rules in ([Rule(**ALWAYS, warmup=1, cooldown=99, action=ReduceLR(0.1))], []):
        watch = Rates()
        trainer(tmp_path, FlatnessMonitor(rules=rules), watch, max_epochs=4).fit(Classifier())
        rates.append([rate for rate in watch.seen if isinstance(rate, float)])
    cut, full = rates
    assert cut == pytest.approx([full[0], full[1] * 0.1, full[2] * 0.1, full[3] * 0.1])


@pytest.mark.parametrize("knows_its_rate", [True, False])
def test_an_alert_knows_how_the_learning_rate_changed(tmp_path: Any, knows_its_rate: bool) -> None:
    """An optimizer that finds its own rate, as Adafactor does, has none."""

    class Raise(Values):
        def on_train_epoch_end(self, run: Any, module: Any) -> None:
            (group,) = run.optimizers[0].param_groups
            group["lr"] = 10 * group["lr"]

        def on_validation_start(self, run: Any, module: Any) -> None:
            (group,) = run.optimizers[0].param_groups
            self.seen.append(group["lr"])
            group["lr"] = group["lr"] if knows_its_rate else None

        def on_validation_end(self, run: Any, module: Any) -> None:
            run.optimizers[0].param_groups[0]["lr"] = self.seen[-1]

    class Constant(Classifier):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=1e-6)

    raised = Raise()
    monitor = FlatnessMonitor(rules=[Rule(**ALWAYS)])
    trainer(tmp_path, monitor, raised, max_epochs=3, num_sanity_val_steps=0).fit(Constant())
    rates = [alert.violations[0].after.get("learning_rate") for alert in monitor.alerts]
    assert rates == (pytest.approx([1e-6, 1e-5, 1e-4]) if knows_its_rate else [None] * 3)


def test_the_rate_is_the_largest_of_all_optimizers(tmp_path: Any) -> None:
    class Two(Classifier):
        automatic_optimization = False

        def configure_optimizers(self) -> Any:
            first, *others = self.parameters()
            groups = [{"params": [first], "lr": torch.tensor(1e-3)}, {"params": others[:1], "lr": 1e-5}]
            return torch.optim.SGD(groups, lr=0.1), torch.optim.SGD(others[1:], lr=1e-2)

        def training_step(self, batch: Any, index: int) -> None:
            """Step with neither."""

    monitor = FlatnessMonitor(rules=[Rule(**ALWAYS)])
    trainer(tmp_path, monitor, max_epochs=1).fit(Two())
    assert monitor.alerts[0].violations[0].after["learning_rate"] == 1e-2


def test_min_epochs_is_respected(tmp_path: Any) -> None:
    run = trainer(tmp_path, FlatnessMonitor(rules=[Rule(**ALWAYS, action=StopTraining())]), max_epochs=9, min_epochs=4)
    run.fit(Classifier())
    assert run.current_epoch == 4


def test_a_stop_that_waits_survives_a_resume(tmp_path: Any) -> None:
    """The rule fires once, in the first validation."""

    def run(checkpoint: Any, *callbacks: Any) -> Any:
        monitor = FlatnessMonitor(rules=[Rule(**ALWAYS, cooldown=99, action=StopTraining())], strict=True)
        run = trainer(tmp_path, monitor, *callbacks, max_epochs=9, min_epochs=4, enable_checkpointing=True)
        run.fit(Classifier(), ckpt_path=checkpoint)
        assert len(monitor.alerts) == 1
        return run.current_epoch, run.global_step

    assert run(None, ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)) == (4, 24)
    assert run(tmp_path / "epoch=1.ckpt") == (4, 24)


class ByHand(Classifier):
    """Two optimizers, stepped by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), 0.1) for part in (self.net.conv1, self.net.head)]

    def training_step(self, batch: Any, index: int) -> None:
        self.manual_backward(self.loss(batch))
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("kind", [Classifier, ByHand])
@pytest.mark.parametrize("flags", [{}, {"val_check_interval": 2}, {"accumulate_grad_batches": 2}])
def test_an_alert_names_the_step_of_the_logs(tmp_path: Any, kind: Any, flags: dict[str, Any]) -> None:
    if kind is ByHand and "accumulate_grad_batches" in flags:
        pytest.skip("Lightning refuses it")
    monitor, logger = FlatnessMonitor(rules=[Rule(**ALWAYS)], strict=True), CSVLogger(tmp_path, version=0)
    trainer(tmp_path, monitor, logger=logger, **flags).fit(kind())
    rows = csv.DictReader((tmp_path / "lightning_logs" / "version_0" / "metrics.csv").open())
    logged = {int(row["step"]): float(row["flatness/trace"]) for row in rows if row["flatness/trace"]}
    assert {alert.step: alert.value for alert in monitor.alerts} == pytest.approx(logged)


class Fails(Action):
    def __init__(self, error: Exception) -> None:
        self.error = error

    def __repr__(self) -> str:
        return "Fails()"

    def act(self, alert: Any, run: Any, module: Any) -> str:
        raise self.error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("fault"), r"Fails\(\) failed after an alert, which is recorded: RuntimeError\('fault'\)"),
        (ActionError("cut the first, not the second"), "cut the first, not the second"),
    ],
)
def test_an_alert_is_shown_before_its_action_fails(tmp_path: Any, error: Exception, message: str) -> None:
    stop, logger = StopTraining(), CSVLogger(tmp_path)
    rules = [Rule(**ALWAYS, action=Fails(error)), Rule(**ALWAYS, warmup=1, action=stop)]
    monitor = FlatnessMonitor(rules=rules)
    run = trainer(tmp_path, monitor, logger=logger, max_epochs=9)
    with pytest.warns(UserWarning, match=message) as caught:
        run.fit(Classifier())
    assert sum("FlatnessMonitor" in str(each.message) for each in caught) == 1
    lines = Path(logger.log_dir, "alerts.jsonl").read_text().splitlines()
    failed = message if isinstance(error, ActionError) else "RuntimeError('fault')"
    texts = [json.loads(line)["action"] for line in lines]
    assert [text.endswith(end) for text, end in zip(texts, [failed, f"{failed} Training stops."], strict=True)] == [
        True
    ] * 2
    assert len(monitor.alerts) == 2
    assert len(firings(monitor)) == 3
    assert run.current_epoch == 2


def test_what_happens_is_said_in_order(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("lightning_flatness.alerting.say", said.append)
    trainer(tmp_path, FlatnessMonitor(rules=[Rule(**ALWAYS, action=ReduceLR(0.5))]), max_epochs=1).fit(Classifier())
    assert [text.split(": ")[0] for text in said] == ["Flatness alert", "Flatness action"]
    assert said[1].startswith("Flatness action: Learning rate cut from ")


def once(at: int, **options: Any) -> Rule:
    """A rule that fires in one validation."""
    return Rule(**ALWAYS, warmup=at, cooldown=99, **options)


@pytest.mark.parametrize(
    ("at", "events"),
    [
        ((0, 0, 0), [(0, 0, 0)]),
        ((1, 0, 1), [(0, 1, 1)]),  # the first one carries those of the next validation
        ((0, 1, 2), [(0, 1), (2,)]),  # and no later ones
        ((2, 0, 5), [(0,), (2,), (5,)]),
    ],
)
def test_rules_that_fire_for_one_event_are_one_alert(tmp_path: Any, at: tuple[int, ...], events: list[Any]) -> None:
    acted: list[tuple[str, int, int]] = []
    rules = [
        once(
            when,
            name=f"rule {i}",
            action=Notify(lambda alert: acted.append((alert.rule_name, alert.epoch, alert.number))),
        )
        for i, when in enumerate(at)
    ]
    monitor = FlatnessMonitor(rules=rules, strict=True)
    trainer(tmp_path, monitor, max_epochs=7).fit(Classifier())
    assert [tuple(each.epoch for each in (alert, *alert.others)) for alert in monitor.alerts] == events
    assert sorted(acted) == [(f"rule {i}", when, 1) for i, when in enumerate(at)]  # each acts in its own validation
    assert all(alert.done == "Notified: <lambda>." for alert in firings(monitor))
    names = [f"rule {i}" for i, when in enumerate(at) if when == min(at)]
    assert monitor.alerts[0].rule_names[: len(names)] == tuple(names)


def test_a_rule_that_fires_again_is_a_new_alert(tmp_path: Any) -> None:
    monitor = FlatnessMonitor(rules=[Rule(**ALWAYS), Rule(**ALWAYS)], strict=True)
    trainer(tmp_path, monitor, max_epochs=3).fit(Classifier())
    assert [(alert.epoch, alert.number, [each.number for each in alert.others]) for alert in monitor.alerts] == [
        (0, 1, [1]),
        (1, 2, [2]),
        (2, 3, [3]),
    ]


def test_an_event_goes_on_after_a_resume(tmp_path: Any) -> None:
    """The second rule fires in the first validation after the checkpoint; both cuts are taken up."""

    def run(checkpoint: Any, *callbacks: Any) -> list[Any]:
        rules = [once(1, action=ReduceLR(0.5)), once(2, action=ReduceLR(0.5))]
        monitor = FlatnessMonitor(rules=rules, strict=True)
        trainer(tmp_path, monitor, *callbacks, max_epochs=4, enable_checkpointing=True).fit(
            Classifier(), ckpt_path=checkpoint
        )
        return [(alert.done, [each.done for each in alert.others]) for alert in monitor.alerts]

    whole = run(None, ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1))
    assert len(whole) == 1
    assert "Learning rate cut from" in whole[0][0]
    assert len(whole[0][1]) == 1
    assert run(tmp_path / "epoch=1.ckpt") == whole
    assert run(tmp_path / "epoch=2.ckpt") == whole


def test_rules_that_are_not_armed_change_nothing(tmp_path: Any) -> None:
    """Neither in the training nor in one that goes on from its checkpoint."""
    actions = [ReduceLR(0.1, armed=False), StopTraining(armed=False)]
    left, said = [], []
    for rules in ([Rule(**ALWAYS, action=actions)], []):
        folder = tmp_path / str(len(rules))
        checkpoint = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
        for path in (None, folder / "epoch=1.ckpt"):
            monitor, module = FlatnessMonitor(rules=rules, strict=True), Classifier()
            run = trainer(tmp_path, monitor, checkpoint, max_epochs=4, enable_checkpointing=True)
            run.fit(module, ckpt_path=path)
            left.append(everything(module, run))
            said.append([alert.done for alert in monitor.alerts])
    assert left[:2] == left[2:]
    assert said[0] == said[1]
    assert said[0][0].startswith("Would have cut the learning rate from ")
    assert said[0][1:] == ["Would have stopped here (not armed)."] * 3


def test_validate_alone_is_not_judged(tmp_path: Any) -> None:
    monitor = FlatnessMonitor(rules=[Rule(**ALWAYS)])
    trainer(tmp_path, monitor).validate(Classifier(), verbose=False)
    assert monitor.alerts == []


def test_with_several_loaders_a_plain_key_is_that_of_the_first(tmp_path: Any) -> None:
    rules = [Rule("flatness/trace", above=0.0), Rule("flatness/trace/dataloader_idx_1", above=0.0)]
    monitor = FlatnessMonitor(rules=rules)
    run = trainer(tmp_path, monitor, max_epochs=1)
    run.fit(Classifier(loaders=2))
    for index, alert in enumerate(firings(monitor)):
        assert alert.value == pytest.approx(float(run.callback_metrics[f"flatness/trace/dataloader_idx_{index}"]))
    assert len(firings(monitor)) == 2


BAD: dict[str, tuple[Any, str]] = {
    "unknown key": ([Rule("flatness/relativ", above=1.0)], "got `flatness/relativ`. Logged: .*flatness/relative"),
    "key of another monitor": ([Rule("flatness/relative/train", above=1.0)], "got `flatness/relative/train`"),
    "not a rule": ([{"monitor": "flatness/trace"}], "got .*monitor"),
    "not a set": ("defaults", "got 'defaults'"),
    "not an action": ([Rule(**ALWAYS, action="stop")], "got 'stop'"),
    "one of several": ([AllOf([Rule(**ALWAYS), Rule(**ALWAYS)], action=[StopTraining(), 3])], "got 3"),
}


@pytest.mark.parametrize(("rules", "message"), BAD.values(), ids=BAD)
def test_bad_rules_are_refused_before_the_first_batch(tmp_path: Any, rules: Any, message: str) -> None:
    module = Classifier()
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, FlatnessMonitor(rules=rules)).fit(module)
    assert not module.losses


def test_the_built_in_rules_watch_logged_keys(tmp_path: Any) -> None:
    for name in (None, "mine"):
        trainer(tmp_path, FlatnessMonitor(rules="default", name=name)).fit(Classifier())


def summary(monitor: FlatnessMonitor) -> list[Any]:
    return [
        (alert.step, alert.epoch, alert.key, alert.value, alert.number, str(alert), len(alert.others))
        for alert in monitor.alerts
    ]


@pytest.mark.parametrize(
    ("flags", "where"),
    [({}, "epoch=1"), ({"val_check_interval": 3}, "epoch=1-step=8")],
    ids=["end of an epoch", "middle of an epoch"],
)
def test_a_resumed_run_fires_the_same_alerts(tmp_path: Any, flags: dict[str, Any], where: str) -> None:
    class Ordered(Classifier):
        def train_dataloader(self) -> Any:
            # In the middle of an epoch Lightning resumes with the epoch's first batch: let all be alike.
            return DataLoader(ConcatDataset([images(4, 1)] * 6), batch_size=4)

        def training_step(self, batch: Any, index: int) -> Any:
            self.net.drop.p = 0.0
            return super().training_step(batch, index)

    def monitor() -> FlatnessMonitor:
        rules = [
            Rule("flatness/trace", rise=0.02, reference="previous", cooldown=1),
            AnyOf([Rule("margin/mean", below=99.0), Rule("flatness/relative", above=1e-9)], patience=2, cooldown=2),
        ]
        return FlatnessMonitor(rules=rules, every_n_validations=1, strict=True)

    unbroken = monitor()
    checkpoint = ModelCheckpoint(
        tmp_path, filename="{epoch}-{step}", save_top_k=-1, every_n_train_steps=4 if flags else None
    )
    trainer(tmp_path, unbroken, checkpoint, max_epochs=8, enable_checkpointing=True, **flags).fit(Ordered())
    saved = sorted(tmp_path.glob(f"{where}*.ckpt"))[0]
    torch.load(saved, weights_only=True)  # plain types only
    resumed = monitor()
    trainer(tmp_path, resumed, max_epochs=8, **flags).fit(Ordered(), ckpt_path=saved)
    missed = [(a, b) for a, b in zip(summary(unbroken), summary(resumed), strict=False) if a != b]
    assert len(firings(unbroken)) > 2
    assert summary(resumed) == summary(unbroken), missed


@pytest.mark.parametrize("knows_its_keys", [True, False])
def test_a_rule_that_another_one_was_in_the_place_of_starts_over(knows_its_keys: bool) -> None:
    """Checkpoints used not to say which keys a rule reads; its memory has them."""
    before = AllOf([Rule("flatness/scale_free", rise=0.3), Rule("flatness/confidence", above=0.4)], name="memorisation")
    saved = RuleRunner([label_noise(), divergence(), before], "")
    keys = [f"flatness/{name}" for name in ("scale_free", "confidence", "features")] + [
        "margin/mean",
        "margin/negative",
    ]
    values = dict.fromkeys(keys, 1.0)
    for epoch in range(9):
        for tracker in saved._trackers:
            tracker.observe(values, epoch)
    state = saved.state_dict()
    state["alerts"] = [saved._saved(Alert(rule, rule.keys[0], 1.0, 1.0, 1, 0, "")) for rule in saved.rules]
    for each in state["rules"] if not knows_its_keys else ():
        del each["keys"]
    resumed = RuleRunner("default", "")
    with pytest.warns(UserWarning, match="no values of `margin/negative`, which the rule `misclassification` watches"):
        resumed.load_state_dict(state)
    assert [tracker.seen for tracker in resumed._trackers] == [9, 9, 0]
    assert [alert.rule_name for alert in resumed.alerts] == ["label_noise", "divergence"]
    for tracker in resumed._trackers:
        tracker.observe(values, 9)


def test_resuming_with_other_rules_starts_them_anew(tmp_path: Any) -> None:
    checkpoint = ModelCheckpoint(tmp_path, filename="saved")
    trainer(tmp_path, FlatnessMonitor(rules=[Rule(**ALWAYS)]), checkpoint, enable_checkpointing=True).fit(Classifier())
    other = FlatnessMonitor(rules=[Rule(**ALWAYS), Rule(**ALWAYS)])
    with pytest.warns(UserWarning, match="remembers 1 rules and the monitor has 2"):
        trainer(tmp_path, other, max_epochs=3).fit(Classifier(), ckpt_path=tmp_path / "saved.ckpt")


def others(tmp_path: Any) -> list[Any]:
    if not hasattr(callbacks, "WeightAveraging"):
        pytest.skip("Lightning has it from 2.6 on")
    return [
        EarlyStopping("flatness/relative", patience=99),
        ModelCheckpoint(tmp_path, monitor="flatness/relative"),
        LearningRateMonitor(),
        callbacks.WeightAveraging(),
    ]


@pytest.mark.parametrize("index", range(4), ids=["EarlyStopping", "ModelCheckpoint", "LearningRateMonitor", "EMA"])
def test_the_order_of_callbacks_does_not_matter(tmp_path: Any, index: int) -> None:
    results = []
    for first in (True, False):
        monitor = FlatnessMonitor(rules=[Rule(**ALWAYS, patience=2, action=ReduceLR(0.5))], strict=True)
        other = others(tmp_path / str(first))[index]
        both = [monitor, other] if first else [other, monitor]
        run = trainer(tmp_path, *both, max_epochs=4, enable_checkpointing=True, logger=CSVLogger(tmp_path))
        run.fit(Classifier())
        values = {key: float(run.callback_metrics[key]) for key in KEYS}
        results.append((values, summary(monitor), run.optimizers[0].param_groups[0]["lr"]))
    assert results[0] == results[1]
