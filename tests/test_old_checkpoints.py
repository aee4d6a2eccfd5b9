"""Checkpoints of earlier versions still load, and the rules go on from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning_runs import Classifier, firings, trainer

from lightning_flatness import Alert, AllOf, FlatnessMonitor, ReduceLR, Rule, rules

# Written after 12 of the 24 epochs of the run below.
OLD = sorted((Path(__file__).parent / "checkpoints").glob("*.ckpt"))
# The rule had two conditions then.
MEMORISATION = AllOf(
    [Rule("flatness/scale_free", rise=0.3), Rule("flatness/confidence", above=0.4)],
    patience=3,
    cooldown=10,
    name="memorisation",
)


def watched(tmp_path: Any, checkpoint: Path | None, last: AllOf = MEMORISATION) -> FlatnessMonitor:
    """A run whose rules have every kind of memory; they fire 32 times in all."""
    monitor = FlatnessMonitor(
        strict=True,
        rules=[
            Rule("flatness/relative", rise=0.05, reference="previous", action=ReduceLR(factor=0.5), cooldown=2),
            Rule("flatness/trace", rise=0.1, reference="ema", patience=2),
            Rule("flatness/scale_free", rise=0.1),
            Rule("margin/mean", shift_up=0.5),
            AllOf([Rule("flatness/confidence", below=0.6), Rule("margin/mean", above=-1.0)], patience=2, cooldown=3),
            rules.label_noise(),
            rules.divergence(),
            last,
        ],
    )
    trainer(tmp_path, monitor, max_epochs=24).fit(Classifier(), ckpt_path=checkpoint)
    return monitor


def by_time(monitor: FlatnessMonitor) -> list[Alert]:
    """Checkpoints used to have one alert for each rule; now rules that fire together share one."""
    names = [str(rule) for rule in monitor._runner.rules]
    return sorted(firings(monitor), key=lambda alert: (alert.epoch, names.index(alert.rule_name)))


@pytest.mark.parametrize("checkpoint", OLD, ids=[path.stem for path in OLD])
def test_a_run_goes_on_with_the_alerts_of_one_that_was_not_interrupted(tmp_path: Any, checkpoint: Path) -> None:
    whole, resumed = (by_time(watched(tmp_path, path)) for path in (None, checkpoint))
    assert len(whole) == 32
    assert [(alert.key, alert.epoch) for alert in resumed] == [(alert.key, alert.epoch) for alert in whole]
    # An alert used to name `trainer.global_step`, which is one more than the step of the logs.
    saved = [alert.epoch < 12 for alert in resumed]
    assert 0 < sum(saved) < 32
    assert [alert.step - old for alert, old in zip(resumed, saved, strict=True)] == [alert.step for alert in whole]


@pytest.mark.parametrize("checkpoint", OLD, ids=[path.stem for path in OLD])
def test_a_rule_with_other_conditions_starts_over_and_the_others_go_on(tmp_path: Any, checkpoint: Path) -> None:
    with pytest.warns(
        UserWarning, match="remembers 2 conditions of the rule `memorisation`, which has 3: it starts over"
    ):
        resumed = by_time(watched(tmp_path, checkpoint, rules.memorisation()))
    expected = by_time(watched(tmp_path, checkpoint))
    others = [
        [(alert.key, alert.epoch) for alert in alerts if alert.rule_name != "memorisation"]
        for alerts in (resumed, expected)
    ]
    assert others[0] == others[1]
