from __future__ import annotations

import importlib
import math
import random
from itertools import groupby
from pathlib import Path

import pytest

from lightning_flatness import rules
from lightning_flatness.rules import AllOf, Rule, RuleTracker


def firings(rule: Rule | AllOf, curves: list[dict[str, float]]) -> list[int]:
    tracker = RuleTracker(rule)
    return [step for step, values in enumerate(curves) if tracker.observe(values, step=step)]


def training(disturbance: str, seed: int) -> list[dict[str, float]]:
    """Curves with the shapes of real ones: growth of three orders of magnitude, then a level with noise."""
    numbers, curves = random.Random(seed), []
    for epoch in range(40):
        noise = {key: math.exp(numbers.gauss(0, 0.05)) for key in ("confidence", "scale_free", "relative", "features")}
        learned, late = 1 - math.exp(-epoch / 4), epoch >= 25
        unsure = disturbance == "memorisation" or (disturbance == "label_noise" and late)
        thrown, wrong = disturbance == "divergence" and late, disturbance == "misclassification" and late
        growing = math.exp(0.05 * epoch) if disturbance == "memorisation" else 2.5 if unsure else 1.0
        curves.append(
            {
                "flatness/relative": (0.2 + 200 * learned**3) * growing * noise["relative"],
                "flatness/scale_free": (30 + 20 * learned) * growing * noise["scale_free"],
                "flatness/confidence": (0.5 if unsure else 0.9 - 0.82 * learned) * noise["confidence"],
                "margin/negative": (0.85 - 0.8 * learned) * noise["confidence"] + (0.1 if wrong else 0.0),
                "margin/mean": (8 * learned - 1) * noise["relative"] - (2.0 if wrong else 0.0),
                "flatness/features": 300 * learned * noise["features"] * (0.4 if thrown else 1),
            }
        )
    return curves


@pytest.mark.parametrize("suffix", ["", "/train"])
@pytest.mark.parametrize("disturbance", ["healthy", "label_noise", "divergence", "memorisation", "misclassification"])
def test_each_built_in_rule_fires_in_its_own_case(disturbance: str, suffix: str) -> None:
    for seed in range(10):
        curves = [{f"{key}{suffix}": v for key, v in values.items()} for values in training(disturbance, seed)]
        fired = {}
        for make in (rules.label_noise, rules.divergence, rules.memorisation, rules.misclassification):
            rule = make(action="stop", suffix=suffix)
            assert rule.action == "stop"
            assert str(rule) == make.__name__
            fired[make.__name__] = firings(rule, curves)
        for name, steps in fired.items():
            if name == disturbance:
                assert steps
                assert name == "memorisation" or steps[0] in (25, 26, 27, 28)
            elif (name, disturbance) != ("memorisation", "label_noise"):  # wrong labels are then memorised
                assert not steps, (name, seed)


def test_a_few_samples_that_flicker_are_no_misclassification() -> None:
    """Nothing was wrong before, so the first wrong samples are any multiple of the noise; the margins stay."""
    numbers = random.Random(0)
    margins = [5 * math.exp(numbers.gauss(0, 0.05)) for _ in range(40)]
    curves = [{"margin/negative": 0.01 * (epoch in (20, 21, 30)), "margin/mean": m} for epoch, m in enumerate(margins)]
    assert not firings(rules.misclassification(), curves)
    lost = [{"margin/negative": 0.2, "margin/mean": 2.0}] * 2
    assert firings(rules.misclassification(), curves[:20] + lost) == [21]


def test_a_network_that_has_learnt_little_does_not_memorise() -> None:
    """Its scale-free flatness grows as in memorisation, and it is as unsure, but it is wrong about many samples."""
    for seed in range(10):
        curves = training("memorisation", seed)
        assert firings(rules.memorisation(), curves)
        assert not firings(rules.memorisation(), [{**values, "margin/negative": 0.3} for values in curves])


@pytest.mark.slow
def test_the_published_results_are_what_these_rules_do(monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).parents[2]
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    judge = importlib.import_module("judge")
    results = judge.results()
    assert judge.lines(results) == judge.OUTPUT.read_text(encoding="utf-8")
    assert judge.table(results) in (root / "docs" / "how-to" / "rules.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_onsets_and_causes_are_as_published(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the recorded runs: the last validation before the disturbance is the twentieth."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    signals = importlib.import_module("signals")
    onsets: dict[str, list[int]] = {"label_noise": [], "lr_x10": []}
    causes: dict[tuple[str, bool], list[bool]] = {}
    first: list[set[int]] = []
    for (_, disturbance, seed), rows in groupby(signals.read(), key=lambda row: row[:3]):
        if disturbance not in onsets:
            continue
        trackers, found = {str(rule): RuleTracker(rule) for rule in rules.default()}, {}
        for row in rows:
            for name, tracker in trackers.items():
                alert = tracker.observe(row.values, step=row.epoch)
                if alert is not None and row.epoch >= signals.DISTURBED_AT:
                    found.setdefault(name, alert)
        named = found.get("label_noise" if disturbance == "label_noise" else "divergence")
        onsets[disturbance].append(named.onset_step)
        if "divergence" in found:
            is_report = seed in signals.REPORT
            causes.setdefault((disturbance, is_report), []).append(found["divergence"].causes.startswith("labels"))
        if disturbance == "label_noise":
            first.append({alert.step for alert in found.values()})
    assert [len(steps) for steps in onsets.values()] == [80, 80]
    assert onsets["label_noise"].count(19) == 79
    assert onsets["lr_x10"].count(19) == 58
    assert sum(abs(step - 19) == 1 for step in onsets["lr_x10"]) == 16
    assert (sum(causes["label_noise", True]), len(causes["label_noise", True])) == (40, 40)
    assert (sum(causes["lr_x10", True]), len(causes["lr_x10", True])) == (2, 40)
    assert sum(max(steps) - min(steps) <= 1 for steps in first) == 74
