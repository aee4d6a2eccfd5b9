"""Judges the rules and other detectors on the curves that `experiments.alerts` recorded.

    python -m experiments.detection

Thresholds are chosen on one half of the runs: the lowest with no more false alarms there than the default rules give.
The table says what they do on the other half: another data set and other seeds. Trainings with warm restarts, which
throw back healthy networks as well, count apart.
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
from experiments.alerts import CHANGES, DISTURBED_AT, GROUP, NAME, UNDISTURBED
from experiments.detectors import DEFAULT, IN_TIME, LABELS, LOSSES, RATE, Values, candidates, names
from experiments.runs import RESULTS, results
from experiments.statistics import Estimate, share

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
"""Setting in which healthy trainings are thrown back, too, and some within the time of a detection."""
OTHERS = ("CUSUM", "PELT", "Hutchinson", "EarlyStopping", "Label Wave", *(f"shift_up {loss}" for loss in LOSSES))
"""How the detectors begin that are none of this package, or read a loss."""


class Curve(NamedTuple):
    """One recorded run."""

    half: str
    optimizer: str
    kind: str
    group: str
    disturbed_at: int
    values: Values


def curves(rows: pd.DataFrame) -> list[Curve]:
    """Return the recorded runs; what is before a disturbance is that of the healthy run."""
    keys, found = [name for name in rows if "/" in name or name.endswith(("_loss", "_rate"))], []
    for (data, _, optimizer, validations, _, seed), group in rows.groupby(GROUP, sort=False):
        start, name = round(DISTURBED_AT * int(validations)), " ".join(map(str, group[GROUP].iloc[0]))
        values = {kind: _values(run, keys) for kind, run in group.groupby("kind", sort=False)}
        for kind, own in values.items():
            whole = [*values["healthy"][:start], *own] if kind in CHANGES else own
            found.append(Curve(half_of(data, seed), optimizer, str(kind), name, start, whole))
    return found


def _values(run: pd.DataFrame, keys: list[str]) -> Values:
    """Return what there is in each validation."""
    return [
        {key: value for key, value in zip(keys, row, strict=True) if not math.isnan(value)}
        for row in run.sort_values("validation")[keys].to_numpy(dtype=float)
    ]


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
        A row for each run, detector and threshold with `half`, `optimizer`, `kind`, `group` (of the runs that have a
        common beginning), `validations`, `alerts` (before a disturbance they are those of the healthy run, and not
        counted), `delay` (of the first, in validations; the first validation after a disturbance is 1) and `named`:
        the cause that the first alert names first. `detected`: an alert in time, for `memorisation` at any time.
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
            "group": run.group,
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
        "named": after[0][1] if after else "",
    }


def selected(judgements: pd.DataFrame) -> dict[str, str]:
    """Return the threshold of each detector, chosen on the tuning half without warm restarts.

    It is the lowest with no more false alarms there than the default rules give, else the highest.
    """
    tuning = undisturbed(judgements[judgements.half == "tuning"])
    allowed, found = tuning[tuning.detector == DEFAULT].alerts.sum(), {}
    for name, group in tuning.groupby("detector", sort=False):
        alarms = group.groupby("threshold", sort=False).alerts.sum()
        quiet = alarms[alarms <= allowed]
        found[str(name)] = str((quiet if len(quiet) else alarms.tail(1)).index[0])
    return found


def undisturbed(runs: pd.DataFrame, restarts: bool = False) -> pd.DataFrame:
    """Return the healthy runs without warm restarts, or those with them."""
    return runs[runs.kind.isin(UNDISTURBED) & ((runs.optimizer == RESTARTS) == restarts)]


def disturbed(runs: pd.DataFrame, group: str) -> pd.DataFrame:
    """Return the runs with disturbances of one of the `GROUPS`, without warm restarts."""
    return runs[runs.kind.isin(GROUPS[group]) & (runs.optimizer != RESTARTS)]


def of_selected(judgements: pd.DataFrame, half: str | None = None) -> pd.DataFrame:
    """Return what the detectors with their selected thresholds do, on one half or in all runs."""
    of_chosen = judgements[judgements.threshold == judgements.detector.map(selected(judgements))]
    return of_chosen if half is None else of_chosen[of_chosen.half == half]


def best_other(judgements: pd.DataFrame, group: str) -> str:
    """Return the detector of `OTHERS` that finds most disturbances of a group on the tuning half."""
    runs = disturbed(of_selected(judgements, "tuning"), group)
    return str(runs[runs.detector.str.startswith(OTHERS)].groupby("detector", sort=False).detected.mean().idxmax())


def table(judgements: pd.DataFrame, half: str, cost: pd.Series) -> pd.DataFrame:
    """Return what each detector with its selected threshold does on one half of the runs.

    Args:
        judgements: of `judged`.
        half: `tuning` or `held out`.
        cost: of `spent`, by detector.
    """
    chosen, found, judged_half = selected(judgements), [], of_selected(judgements, half)
    for name in filter(chosen.__contains__, names()):
        runs = judged_half[judged_half.detector == name]
        healthy = undisturbed(runs)
        row: dict[str, object] = {"detector": name, "threshold": chosen[name]}
        row["false alarms per 1,000"] = per_thousand(healthy)
        row["with warm restarts"] = per_thousand(undisturbed(runs, restarts=True))
        row["healthy runs with one"] = str(share((healthy.alerts > 0).sum(), len(healthy)))
        for group in GROUPS:
            of_group = disturbed(runs, group)
            row[group] = str(share(of_group.detected.sum(), len(of_group)))
        late = runs[(runs.kind == "memorisation") & (runs.optimizer != RESTARTS)]
        row["memorisation"] = str(share(late.detected.sum(), len(late)))
        hit = runs[runs.detected & runs.kind.isin(CHANGES) & (runs.optimizer != RESTARTS)]
        row["delay"] = hit.delay.median()
        row["named"] = str(named(hit)) if (hit.named != "").any() else ""
        row["ms"] = cost.get(name, math.nan)
        found.append(row)
    return pd.DataFrame(found).set_index("detector")


def named(detected: pd.DataFrame) -> Estimate:
    """Return the share of detections whose first alert names the cause first, if it is one of `CAUSES`."""
    known = detected[detected.kind.isin(CAUSES)]
    return share((known.named == known.kind.map(CAUSES)).sum(), len(known))


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
        measured = sum(cost[source].mean() for source in candidate.reads)
        found.setdefault(candidate.name, []).append(ms + measured)
    return pd.Series({name: float(np.mean(times)) for name, times in found.items()}, name="ms")


if __name__ == "__main__":
    judgements = of_selected(judged(results(NAME), jobs=2))
    judgements.to_csv(RESULTS / f"{JUDGED}.csv.gz", index=False)
    cost = spent(results(NAME), results(costs.NAME))
    cost.rename_axis("detector").to_csv(RESULTS / f"{SPENT}.csv", float_format="%.2g")
    for part in ("tuning", "held out"):
        print(f"\n{part}\n{table(judgements, part, cost).to_string()}")
