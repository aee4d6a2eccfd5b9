"""Judges the rules and other detectors on the curves that `experiments.alerts` recorded.

    python -m experiments.detection

Thresholds are chosen on one half of the runs: the lowest with no more false alarms there than the default rules give.
The table says what they do on the other half: another data set and other seeds.
"""

from __future__ import annotations

import math
import time
from typing import NamedTuple

import joblib
import numpy as np
import pandas as pd
from tqdm import tqdm

from experiments import costs
from experiments.alerts import CHANGES, DISTURBED_AT, NAME, UNDISTURBED
from experiments.detectors import BUILT_IN, IN_TIME, LABELS, ON_TRAINING, RATE, Values, candidates
from experiments.runs import RESULTS, results
from experiments.statistics import share

JUDGED = "detection"
"""Name of the file of the judgements."""
SPENT, TIMED = "detectors", 3
"""Name of the file of their costs, and the runs that they are timed on."""
TUNED_ON, REPORTED_ON = "digits", "mnist5k"
"""Data sets: rules and thresholds are chosen on one, and what they find is reported on the other."""
SEEN = (1, 3)
"""Seeds of the second one that are not reported: once they had been judged, the default rules were changed again."""
GROUPS = {
    "strong": ("labels_30", "rate_x10"),
    "weak": ("labels_5", "labels_10", "rate_x2", "rate_x3", "corrupted_inputs"),
    "mild": ("no_augmentation", "no_weight_decay"),
}
CAUSES = dict.fromkeys(("labels_5", "labels_10", "labels_30", "corrupted_inputs", "memorisation"), LABELS)
CAUSES |= dict.fromkeys(("rate_x2", "rate_x3", "rate_x10"), RATE)
"""What an alert is to name; what no longer matches the inputs and what is wrong are one cause."""
RESTARTS = "sgd_restarts"
"""Setting in which healthy trainings are thrown back, too."""


class Curve(NamedTuple):
    """One recorded run."""

    half: str
    optimizer: str
    kind: str
    disturbed_at: int
    values: Values


def curves(rows: pd.DataFrame) -> list[Curve]:
    """Return the recorded runs."""
    keys, found = [name for name in rows if "/" in name or name.endswith(("_loss", "_rate"))], []
    for (data, _, optimizer, validations, seed, kind), run in rows.groupby(
        ["data", "network", "optimizer", "validations", "seed", "kind"], sort=False
    ):
        values = [
            {key: value for key, value in zip(keys, row, strict=True) if not math.isnan(value)}
            for row in run.sort_values("validation")[keys].to_numpy(dtype=float)
        ]
        found.append(Curve(half_of(data, seed), optimizer, kind, round(DISTURBED_AT * validations), values))
    return found


def half_of(data: str, seed: int) -> str:
    """Return `tuning`, `held out`, or `further` for a run that belongs to neither half."""
    if data == TUNED_ON:
        return "tuning"
    return "held out" if data == REPORTED_ON and seed not in SEEN else "further"


def judged(rows: pd.DataFrame, jobs: int = 1) -> pd.DataFrame:
    """Return what every candidate does in every recorded run.

    Args:
        rows: of `experiments.alerts`.
        jobs: processes.

    Returns:
        A row for each run, detector and threshold with `half`, `optimizer`, `kind`, `validations`, `alerts` (before a
        disturbance they are those of the healthy run, and not counted), `delay` (of the first, in validations; the
        first validation after a disturbance is 1) and `named`: whether the first alert names the cause. `detected`: an
        alert in time, for `memorisation` at any time.
    """
    recorded = curves(rows)
    found = joblib.Parallel(n_jobs=jobs, return_as="generator")(joblib.delayed(judgements_of)(run) for run in recorded)
    return pd.concat(tqdm(found, total=len(recorded), desc="judging", unit="run"), ignore_index=True)


def judgements_of(run: Curve) -> pd.DataFrame:
    """Return what every candidate does in one run."""
    found = [
        {
            "detector": candidate.name,
            "threshold": candidate.threshold,
            "half": run.half,
            "optimizer": run.optimizer,
            "kind": run.kind,
            **_judgement(run, candidate.detect(run.values)),
        }
        for candidate in candidates()
    ]
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
        "named": bool(after) and after[0][1] == CAUSES.get(run.kind),
    }


def selected(judgements: pd.DataFrame) -> dict[str, str]:
    """Return the threshold of each detector, chosen on the tuning half.

    It is the lowest with no more false alarms there than the built-in rules give, else the highest.
    """
    tuning = judgements[(judgements.half == "tuning") & judgements.kind.isin(UNDISTURBED)]
    allowed, found = tuning[tuning.detector == BUILT_IN].alerts.sum(), {}
    for name, group in tuning.groupby("detector", sort=False):
        alarms = group.groupby("threshold", sort=False).alerts.sum()
        quiet = alarms[alarms <= allowed]
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
        row["false alarms per 1,000"] = per_thousand(healthy)
        row["without warm restarts"] = per_thousand(healthy[healthy.optimizer != RESTARTS])
        row["healthy runs with one"] = str(share((healthy.alerts > 0).sum(), len(healthy)))
        for group, kinds in GROUPS.items():
            disturbed = runs[runs.kind.isin(kinds)]
            row[group] = str(share(disturbed.detected.sum(), len(disturbed)))
        late = runs[runs.kind == "memorisation"]
        row["memorisation"] = str(share(late.detected.sum(), len(late)))
        hit = runs[runs.detected & runs.kind.isin(CHANGES)]
        row["delay"] = hit.delay.median()
        hit = hit[hit.kind.isin(CAUSES)]
        row["named"] = str(share(hit.named.sum(), len(hit))) if hit.named.any() else ""
        row["ms"] = cost.get(name, math.nan)
        row["runs"] = len(runs)
        found.append(row)
    return pd.DataFrame(found).set_index("detector")


def per_thousand(healthy: pd.DataFrame) -> float:
    """Return the alerts in a thousand validations."""
    return 1000 * healthy.alerts.sum() / healthy.validations.sum()


def spent(rows: pd.DataFrame, cost: pd.DataFrame) -> pd.Series:
    """Return the milliseconds of the processor that each detector takes in a validation, with what it needs measured.

    Args:
        rows: of `experiments.alerts`; the detectors run on some of them.
        cost: of `experiments.costs`.
    """
    sample, found = curves(rows)[-TIMED:], dict[str, list[float]]()
    for candidate in candidates():
        begun = time.process_time()
        for run in sample:
            candidate.detect(run.values)
        ms = 1000 * (time.process_time() - begun) / sum(len(run.values) for run in sample)
        found.setdefault(candidate.name, []).append(ms)
    own, each = {name: float(np.mean(times)) for name, times in found.items()}, cost[list(costs.SOURCES[1:])].mean()
    return pd.Series({name: ms + sum(each[source] for source in _sources(name)) for name, ms in own.items()}, name="ms")


def _sources(name: str) -> list[str]:
    """Return the columns of the costs of what a detector reads; the losses and the predictions are there anyway."""
    if name.startswith("Hutchinson"):
        return ["layer traces"]
    if "_loss" in name or name == "Label Wave":
        return []
    if ON_TRAINING in name:
        return ["on training images", *(["monitor"] if name.startswith(f"{BUILT_IN}, and") else [])]
    return ["monitor"]


if __name__ == "__main__":
    judgements = judged(results(NAME), jobs=2)
    judgements.to_csv(RESULTS / f"{JUDGED}.csv.gz", index=False)
    cost = spent(results(NAME), results(costs.NAME))
    cost.rename_axis("detector").to_csv(RESULTS / f"{SPENT}.csv", float_format="%.2g")
    for part in ("tuning", "held out"):
        print(f"\n{part}\n{table(judgements, part, cost).to_string()}")
