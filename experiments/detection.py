"""Judges the rules and other detectors on the curves that `experiments.alerts` recorded.

    python -m experiments.detection

Thresholds are chosen on one half of the runs as the lowest without a false alarm there. The table says what they do on
the other half: another data set and other seeds.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
import pandas as pd
import ruptures
from tqdm import tqdm

from experiments import costs
from experiments.alerts import CHANGES, DISTURBED_AT, NAME, UNDISTURBED
from experiments.layer_traces import KEYS as LAYER_TRACES
from experiments.runs import RESULTS, results
from experiments.statistics import share
from lightning_flatness import AllOf, Rule, rules
from lightning_flatness.rules import RuleTracker

JUDGED = "detection"
"""Name of the file of the judgements."""
SPENT, TIMED = "detectors", 3
"""Name of the file of their costs, and the runs that they are timed on."""
HALVES = {"digits": "tuning", "mnist5k": "held out"}
"""Data sets, each with its own seeds; thresholds are chosen on the tuning half, what is found is said of the other."""
IN_TIME = 5
"""Validations after a disturbance within which an alert counts as a detection."""
GROUPS = {
    "strong": ("labels_30", "rate_x10"),
    "weak": ("labels_5", "labels_10", "rate_x2", "rate_x3", "corrupted_inputs"),
    "mild": ("no_augmentation", "no_weight_decay"),
}
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
BUILT_IN = ("built-in", "label_noise", "divergence", "memorisation")
"""How the detectors begin that name a cause."""
THRESHOLDS = (2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 30, 50, 100)
PENALTIES = (2, 5, 12, 30, 80, 200)
PATIENCES = (2, 3, 4, 5, 6, 8, 10, 15, 20)
Values = list[dict[str, float]]
Detector = Callable[[Values], list[tuple[int, str]]]
"""From the validations of a run to those at which it fires, each with the cause that it names."""


class Curve(NamedTuple):
    """One recorded run."""

    half: str
    kind: str
    disturbed_at: int
    values: Values


class Candidate(NamedTuple):
    """A detector with one threshold."""

    name: str
    threshold: str
    detect: Detector


def curves(rows: pd.DataFrame) -> list[Curve]:
    """Return the recorded runs."""
    keys, found = [name for name in rows if "/" in name or name.endswith(("_loss", "_accuracy"))], []
    for (data, *_, validations, _, kind), run in rows.groupby(
        ["data", "network", "optimizer", "validations", "seed", "kind"], sort=False
    ):
        values = [
            {key: value for key, value in zip(keys, row, strict=True) if not math.isnan(value)}
            for row in run.sort_values("validation")[keys].to_numpy(dtype=float)
        ]
        found.append(Curve(HALVES.get(data, "further"), kind, round(DISTURBED_AT * validations), values))
    return found


def fired(rule: Rule | AllOf, values: Values) -> list[tuple[int, str]]:
    """Return when a rule fires."""
    tracker = RuleTracker(rule)
    return [(number, str(rule)) for number, row in enumerate(values) if tracker.observe(row, step=number)]


def any_fired(chosen: Sequence[Rule | AllOf], values: Values) -> list[tuple[int, str]]:
    """Return when any of several rules fires."""
    return sorted(alert for rule in chosen for alert in fired(rule, values))


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
        change = ([0, *ruptures.Pelt(model="l2", min_size=2, jump=1).fit(scaled).predict(pen=penalty)])[-2]
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


def two_conditions() -> AllOf:
    """Return the rule for memorisation without its condition on the share of wrong samples."""
    rule = rules.memorisation()
    return replace(rule, rules=rule.rules[:2], name="memorisation, two conditions")


def with_threshold(rule: AllOf | Rule, threshold: float) -> AllOf | Rule:
    """Return a rule with another threshold of its shifts."""
    if isinstance(rule, AllOf):
        return replace(rule, rules=[with_threshold(each, threshold) for each in rule.rules])
    return replace(rule, **{rule.condition: float(threshold)})


def memorisation(above: float) -> AllOf:
    """Return the rule for memorisation with another limit of the uncertainty."""
    rule = rules.memorisation()
    return replace(rule, rules=[rule.rules[0], replace(rule.rules[1], above=above), *rule.rules[2:]])


def candidates() -> Iterator[Candidate]:
    """Yield the built-in rules as they are, and every detector with all its thresholds."""
    yield Candidate("built-in rules", "as they are", partial(any_fired, rules.default()))
    for rule in (*rules.default(), two_conditions()):
        yield Candidate(f"{rule}, as it is", "as it is", partial(fired, rule))
    for threshold in THRESHOLDS:
        for rule in (rules.label_noise(), rules.divergence()):
            yield Candidate(str(rule), f"{threshold}", partial(fired, with_threshold(rule, threshold)))
        for key, condition in SHIFTS.items():
            rule = Rule(key, **{condition: float(threshold)})
            yield Candidate(f"{condition} {key}", f"{threshold}", partial(fired, rule))
        for key in KEYS:
            yield Candidate(f"CUSUM {key}", f"{threshold}", partial(cusum, key, threshold))
        yield Candidate("Hutchinson per layer, CUSUM", f"{threshold}", partial(layer_cusum, threshold))
    for above in (0.3, 0.4, 0.5, 0.6, 0.7):
        yield Candidate("memorisation", f"{above}", partial(fired, memorisation(above)))
    for penalty in PENALTIES:
        for key in ("flatness/confidence", "flatness/scale_free", "val_loss"):
            yield Candidate(f"PELT {key}", f"{penalty}", partial(pelt, key, penalty))
    for patience in PATIENCES:
        yield Candidate("EarlyStopping val_loss", f"{patience}", partial(early_stopping, patience))
        yield Candidate("Label Wave", f"{patience}", partial(label_wave, patience))


def judged(rows: pd.DataFrame) -> pd.DataFrame:
    """Return what every candidate does in every recorded run.

    Returns:
        A row for each detector, threshold and run with `half`, `kind`, `validations`, `alerts` (before a disturbance
        they are those of the healthy run, and not counted), `delay` (of the first, in validations; the first validation
        after a disturbance is 1) and `named`: whether the first alerts name the cause. `detected`: an alert in time,
        for `memorisation` at any time. The traces of the layers were not recorded in all runs; their detector has
        no row where they were not.
    """
    recorded, found = curves(rows), []
    for candidate in tqdm(list(candidates()), desc="judging", unit="detector"):
        for run in recorded:
            if candidate.name.startswith("Hutchinson") and LAYER_TRACES[0] not in run.values[0]:
                continue
            found.append(
                {
                    "detector": candidate.name,
                    "threshold": candidate.threshold,
                    "half": run.half,
                    "kind": run.kind,
                    **_judgement(run, candidate.detect(run.values)),
                }
            )
    return pd.DataFrame(found)


def _judgement(run: Curve, alerts: list[tuple[int, str]]) -> dict[str, object]:
    start = run.disturbed_at if run.kind in CHANGES else 0
    after = [(number - start + 1, cause) for number, cause in alerts if number >= start]
    delay = after[0][0] if after else math.nan
    return {
        "validations": len(run.values) - start,
        "alerts": len(after),
        "delay": delay,
        "detected": delay <= (IN_TIME if run.kind in CHANGES else math.inf),
        "named": _cause(run.kind) in {cause for number, cause in after if number <= delay + 1},
    }


def _cause(kind: str) -> str:
    return {"labels": "label_noise", "rate": "divergence"}.get(kind.split("_")[0], kind)


def selected(judgements: pd.DataFrame) -> dict[str, str]:
    """Return the threshold of each detector: the lowest without a false alarm on the tuning half, else the highest."""
    tuning = judgements[(judgements.half == "tuning") & judgements.kind.isin(UNDISTURBED)]
    found = {}
    for name, group in tuning.groupby("detector", sort=False):
        alarms = group.groupby("threshold", sort=False).alerts.sum()
        quiet = alarms[alarms == 0]
        found[str(name)] = str((quiet if len(quiet) else alarms.tail(1)).index[0])
    return found


def table(judgements: pd.DataFrame, half: str, cost: pd.Series) -> pd.DataFrame:
    """Return what each detector with its selected threshold does on one half of the runs.

    Args:
        judgements: of `judged`.
        half: `tuning` or `held out`.
        cost: of `spent`, by detector.
    """
    chosen, found = selected(judgements), []
    for name, threshold in chosen.items():
        runs = judgements[
            (judgements.detector == name) & (judgements.threshold == threshold) & (judgements.half == half)
        ]
        healthy = runs[runs.kind.isin(UNDISTURBED)]
        row: dict[str, object] = {"detector": name, "threshold": threshold}
        row["false alarms per 100"] = 100 * healthy.alerts.sum() / healthy.validations.sum()
        row["healthy runs with one"] = str(share((healthy.alerts > 0).sum(), len(healthy)))
        for group, kinds in GROUPS.items():
            disturbed = runs[runs.kind.isin(kinds)]
            row[group] = str(share(disturbed.detected.sum(), len(disturbed)))
        late = runs[runs.kind == "memorisation"]
        row["memorisation"] = str(share(late.detected.sum(), len(late)))
        hit = runs[runs.detected & runs.kind.isin(CHANGES)]
        row["delay"] = hit.delay.median()
        row["named"] = str(share(hit.named.sum(), len(hit))) if name.startswith(BUILT_IN) else ""
        row["ms"] = cost.get(name, math.nan)
        row["runs"] = len(runs)
        found.append(row)
    return pd.DataFrame(found).set_index("detector")


def spent(rows: pd.DataFrame, cost: pd.DataFrame) -> pd.Series:
    """Return the milliseconds of the processor that each detector takes in a validation, with what it needs measured.

    Args:
        rows: of `experiments.alerts`; the detectors run on some of them.
        cost: of `experiments.costs`.
    """
    sample, found = curves(rows)[-TIMED:], {}
    for candidate in candidates():
        begun = time.process_time()
        for run in sample:
            candidate.detect(run.values)
        ms = 1000 * (time.process_time() - begun) / sum(len(run.values) for run in sample)
        found.setdefault(candidate.name, []).append(ms)
    own = {name: float(np.mean(times)) for name, times in found.items()}
    return pd.Series({name: ms + cost.assign(free=0.0)[_source(name)].mean() for name, ms in own.items()}, name="ms")


def _source(name: str) -> str:
    """Return the column of the costs of what a detector reads; the losses and the predictions are there anyway."""
    if name.startswith("Hutchinson"):
        return "layer traces"
    return "free" if "_loss" in name or name == "Label Wave" else "monitor"


if __name__ == "__main__":
    judgements = judged(results(NAME))
    judgements.to_csv(RESULTS / f"{JUDGED}.csv.gz", index=False)
    cost = spent(results(NAME), results(costs.NAME))
    cost.rename_axis("detector").to_csv(RESULTS / f"{SPENT}.csv", float_format="%.2g")
    for part in ("tuning", "held out"):
        print(f"\n{part}\n{table(judgements, part, cost).to_string()}")
