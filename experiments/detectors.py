"""Detectors of a change in recorded curves: the rules of this package, and others that they are compared with."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
import pandas as pd
import ruptures

from experiments.layer_traces import KEYS as LAYER_TRACES
from lightning_flatness import AllOf, Rule, rules
from lightning_flatness.rules import RuleTracker

IN_TIME = 5
"""Validations after a disturbance within which an alert counts as a detection."""
WINDOW, DRIFT = 8, 0.5
"""Of the textbook CUSUM: validations that its mean and deviation come from, and what it does not accumulate."""
KEYS = ("flatness/relative", "flatness/scale_free", "flatness/trace", "flatness/confidence", "flatness/features")
KEYS += ("margin/mean", "val_loss", "training_loss")
SHIFTS = {
    "flatness/confidence": "shift_up",
    "flatness/scale_free": "shift_up",
    "margin/mean": "shift_down",
    "val_loss": "shift_up",
    "training_loss": "shift_up",
}
"""Single rules that no built-in one is, for comparison."""
ON_TRAINING = "on training images"
"""Part of the name of a detector that reads a monitor with `data="train"`."""
SUFFIXES = {"": "", f" {ON_TRAINING}": "/train"}
BUILT_IN, BOTH = "built-in rules", f"built-in rules, and misclassification {ON_TRAINING}"
LABELS, RATE = "labels", "learning rate"
"""Causes that an alert of a rule may name."""
AS_IT_IS = "as it is"
THRESHOLDS = (2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 30, 50, 100)
PENALTIES = (5, 12, 30, 80, 200, 500)
PATIENCES = (2, 3, 4, 5, 6, 8, 10, 15, 20)
Values = list[dict[str, float]]
Detector = Callable[[Values], list[tuple[int, str]]]
"""From the validations of a run to those at which it fires, each with the cause that it names."""


class Candidate(NamedTuple):
    """A detector with one threshold."""

    name: str
    threshold: str
    detect: Detector


def fired(rule: Rule | AllOf, values: Values) -> list[tuple[int, str]]:
    """Return when a rule fires, and the cause that its alert names first."""
    tracker, found = RuleTracker(rule), []
    for number, row in enumerate(values):
        if alert := tracker.observe(row, step=number):
            is_rate, is_labels = alert.causes.startswith("a learning rate"), "labels" in alert.causes.split(",")[0]
            found.append((number, RATE if is_rate else LABELS if is_labels else ""))
    return found


def any_fired(chosen: Sequence[Rule | AllOf], values: Values) -> list[tuple[int, str]]:
    """Return when any of several rules fires; as in a monitor, those of the next validation are the same event."""
    events: list[tuple[int, str]] = []
    for number, cause in sorted((alert for rule in chosen for alert in fired(rule, values)), key=lambda each: each[0]):
        if not events or number > events[-1][0] + 1:
            events.append((number, cause))
    return events


def series(values: Values, key: str) -> np.ndarray:
    """Return a key's values, their logarithms unless they are margins; a missing one is the one before."""
    found = pd.Series([row.get(key, math.nan) for row in values]).ffill().to_numpy(dtype=float)
    return found if key.startswith("margin/") else np.log(np.maximum(found, 1e-12))


def cusum(key: str, threshold: float, values: Values) -> list[tuple[int, str]]:
    """Return when the textbook CUSUM of a key fires, in either direction; it starts anew after that."""
    return _cusum(series(values, key), threshold)


def layer_cusum(threshold: float, values: Values) -> list[tuple[int, str]]:
    """Return when the CUSUM of any layer's trace fires; estimates may be negative, so there are no logarithms."""
    layers = [np.array([row[key] for row in values]) for key in LAYER_TRACES if key in values[0]]
    return sorted(set().union(*(_cusum(x, threshold) for x in layers)))


def _cusum(x: np.ndarray, threshold: float) -> list[tuple[int, str]]:
    start, found, up, down = 0, [], 0.0, 0.0
    for now in range(len(x)):
        if now - start < WINDOW:
            continue
        past = x[now - WINDOW : now]
        z = (x[now] - past.mean()) / max(past.std(ddof=1), 1e-12)
        up, down = max(0.0, up + z - DRIFT), max(0.0, down - z - DRIFT)
        if max(up, down) >= threshold:
            found.append((now, ""))
            start, up, down = now, 0.0, 0.0
    return found


def pelt(key: str, penalty: float, values: Values) -> list[tuple[int, str]]:
    """Return when PELT, run again at each validation, finds a change in the last ones that it had not found before."""
    x, found, last = series(values, key), [], 0
    for now in range(WINDOW, len(x)):
        seen = x[: now + 1]
        scaled = (seen - seen.mean()) / max(np.diff(seen).std() / math.sqrt(2), 1e-12)
        # PELT with a squared error, in C.
        search = ruptures.KernelCPD(kernel="linear", min_size=2).fit(scaled.reshape(-1, 1))
        change = ([0, *search.predict(pen=penalty)])[-2]
        if change > max(last, now - IN_TIME):
            found.append((now, ""))
            last = now
    return found


def early_stopping(patience: int, values: Values) -> list[tuple[int, str]]:
    """Return when `EarlyStopping` on `val_loss` would stop."""
    best, since = math.inf, 0
    for number, row in enumerate(values):
        best, since = (row["val_loss"], 0) if row["val_loss"] < best else (best, since + 1)
        if since >= patience:
            return [(number, "")]
    return []


def label_wave(patience: int, values: Values) -> list[tuple[int, str]]:
    """Return when changed predictions stop to decrease: Label Wave (arXiv 2502.07551), here on validation images."""
    smooth = pd.Series([row.get("margin/churn", math.nan) for row in values]).rolling(3).mean().to_numpy()
    best, since = math.inf, 0
    for number, value in enumerate(smooth):
        best, since = (value, 0) if value < best else (best, since + (not math.isnan(value)))
        if since >= patience:
            return [(number, "")]
    return []


def with_threshold(rule: AllOf | Rule, threshold: float) -> AllOf | Rule:
    """Return a rule with another threshold of its shifts."""
    if isinstance(rule, AllOf):
        return replace(rule, rules=[with_threshold(each, threshold) for each in rule.rules])
    return replace(rule, **{rule.condition: float(threshold)})


def candidates() -> Iterator[Candidate]:
    """Yield the built-in rules as they are, and every detector with all its thresholds."""
    for words, suffix in SUFFIXES.items():
        for rule in (*rules.default(suffix=suffix), rules.memorisation(suffix=suffix)):
            yield Candidate(f"{rule}{words}, as it is", AS_IT_IS, partial(fired, rule))
        yield Candidate(f"{BUILT_IN}{words}", AS_IT_IS, partial(any_fired, rules.default(suffix=suffix)))
    both = (*rules.default(), rules.misclassification(suffix="/train"))
    yield Candidate(BOTH, AS_IT_IS, partial(any_fired, both))
    for threshold in THRESHOLDS:
        for words, suffix in SUFFIXES.items():
            for make in (rules.label_noise, rules.divergence, rules.misclassification):
                rule = with_threshold(make(suffix=suffix), threshold)
                yield Candidate(f"{rule}{words}", f"{threshold}", partial(fired, rule))
        for key, condition in SHIFTS.items():
            rule = Rule(key, **{condition: float(threshold)})
            yield Candidate(f"{condition} {key}", f"{threshold}", partial(fired, rule))
        for key in KEYS:
            yield Candidate(f"CUSUM {key}", f"{threshold}", partial(cusum, key, threshold))
        yield Candidate("Hutchinson per layer, CUSUM", f"{threshold}", partial(layer_cusum, threshold))
    for penalty in PENALTIES:
        for key in ("flatness/confidence", "flatness/scale_free", "val_loss"):
            yield Candidate(f"PELT {key}", f"{penalty}", partial(pelt, key, penalty))
    for patience in PATIENCES:
        yield Candidate("EarlyStopping val_loss", f"{patience}", partial(early_stopping, patience))
        yield Candidate("Label Wave", f"{patience}", partial(label_wave, patience))
