"""Detectors of a change in recorded curves: the rules of this package, and others that they are compared with."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
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
VALIDATION, TRAINING = ("monitor",), ("on training images",)
"""Columns of `experiments.costs`: what a monitor takes. The losses and the predictions are there anyway."""
PLACES = (("", "", VALIDATION), (" on training images", "/train", TRAINING))
"""Where the rules read: words, how the keys end, and the costs."""
DEFAULT = "default rules"
BOTH = f"{DEFAULT}, and misclassification on training images"
LABELS, RATE = "labels", "learning rate"
"""Causes that an alert of a built-in rule may name."""
LOSSES = ("val_loss", "training_loss")
AS_IT_IS = "as it is"
THRESHOLDS = (2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 30, 50, 100)
PENALTIES = (5, 12, 30, 80, 200, 500)
PATIENCES = (2, 3, 4, 5, 6, 8, 10, 15, 20)
Values = list[dict[str, float]]
Detector = Callable[[Values], list[tuple[int, str]]]
"""From the validations of a run to those at which it fires, each with the cause that it names."""


class Candidate(NamedTuple):
    """A detector with one threshold, and what has to be measured for it: columns of `experiments.costs`."""

    name: str
    threshold: str
    detect: Detector
    reads: tuple[str, ...] = ()


def fired(rule: Rule | AllOf, values: Values) -> list[tuple[int, str]]:
    """Return when a rule fires, and the cause that its alert names first, if it is a built-in rule."""
    tracker, found = RuleTracker(rule), []
    for number, row in enumerate(values):
        if alert := tracker.observe(row, step=number):
            cause = RATE if alert.causes.startswith("a learning rate") else LABELS
            found.append((number, cause if rule.name in rules.__all__ else ""))
    return found


def any_fired(chosen: Sequence[Rule | AllOf], values: Values) -> list[tuple[int, str]]:
    """Return when any of the rules of a monitor fires."""
    return events(alert for rule in chosen for alert in fired(rule, values))


def both_fired(values: Values) -> list[tuple[int, str]]:
    """Return when the default rules fire, or `misclassification` in a second monitor, which has alerts of its own."""
    second = fired(rules.misclassification(suffix="/train"), values)
    return sorted((*any_fired(rules.default(), values), *second), key=lambda alert: alert[0])


def events(alerts: Iterable[tuple[int, str]]) -> list[tuple[int, str]]:
    """Return the first of alerts in the same validation or the next: they are one event, as in a monitor."""
    found: list[tuple[int, str]] = []
    for alert in sorted(alerts, key=lambda each: each[0]):
        if not found or alert[0] > found[-1][0] + 1:
            found.append(alert)
    return found


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
    return events(alert for x in layers for alert in _cusum(x, threshold))


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


def names() -> list[str]:
    """Return the names of all detectors, in order."""
    return list(dict.fromkeys(candidate.name for candidate in candidates()))


def candidates() -> Iterator[Candidate]:
    """Yield the built-in rules as they are, and every detector with all its thresholds."""
    for words, suffix, reads in PLACES:
        for rule in (*rules.default(suffix=suffix), rules.memorisation(suffix=suffix)):
            yield Candidate(f"{rule}{words}, as it is", AS_IT_IS, partial(fired, rule), reads)
        yield Candidate(f"{DEFAULT}{words}", AS_IT_IS, partial(any_fired, rules.default(suffix=suffix)), reads)
    yield Candidate(BOTH, AS_IT_IS, both_fired, (*VALIDATION, *TRAINING))
    for threshold in map(str, THRESHOLDS):
        for words, suffix, reads in PLACES:
            for make in (rules.label_noise, rules.divergence, rules.misclassification):
                rule = with_threshold(make(suffix=suffix), float(threshold))
                yield Candidate(f"{rule}{words}", threshold, partial(fired, rule), reads)
        for key, condition in SHIFTS.items():
            rule = Rule(key, **{condition: float(threshold)})
            yield Candidate(f"{condition} {key}", threshold, partial(fired, rule), () if key in LOSSES else VALIDATION)
        for key in KEYS:
            detect = partial(cusum, key, float(threshold))
            yield Candidate(f"CUSUM {key}", threshold, detect, () if key in LOSSES else VALIDATION)
        detect = partial(layer_cusum, float(threshold))
        yield Candidate("Hutchinson per layer, CUSUM", threshold, detect, ("layer traces",))
    for penalty in PENALTIES:
        for key in ("flatness/confidence", "flatness/scale_free", "val_loss"):
            detect = partial(pelt, key, penalty)
            yield Candidate(f"PELT {key}", f"{penalty}", detect, () if key in LOSSES else VALIDATION)
    for patience in PATIENCES:
        yield Candidate("EarlyStopping val_loss", f"{patience}", partial(early_stopping, patience))
        yield Candidate("Label Wave", f"{patience}", partial(label_wave, patience))
