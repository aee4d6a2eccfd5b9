"""Evaluates the built-in rules on the curves that `signals.py` recorded.

    python benchmarks/judge.py

writes `rules.csv` and prints its totals as a table. A disturbance at a known epoch counts as detected if the rule fires
in one of the first three validations after it; a healthy run in which the rule fires at all is a false alert.
"""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from statistics import median
from typing import NamedTuple

from signals import CHOOSING, DISTURBED_AT, REPORT, SETTINGS, Row, read

from lightning_flatness import rules
from lightning_flatness.rules import RuleTracker

OUTPUT = Path(__file__).with_name("rules.csv")
IN_TIME = 3
"""Validations after a disturbance within which it is to be detected."""
DISTURBANCES = ("healthy", "label_noise", "lr_x10", "noise_from_start")
NAMES = ("label_noise", "divergence", "misclassification", "memorisation", "default")


Judged = tuple[Row, dict[str, list[int]]]
"""The first row of a run, and the epochs at which each rule fired in it."""


class Result(NamedTuple):
    """What one rule did in the runs of one kind."""

    seeds: str
    rule: str
    disturbance: str
    setting: str
    runs: int
    fired: int
    """Runs with an alert: from the disturbance on where its epoch is known, at any time elsewhere."""
    in_time: int | None
    """Runs with an alert in the first three validations after a disturbance at a known epoch."""
    median_delay: float | None
    """Validations until the first alert, in the runs with one: after the disturbance, or from the start."""


def alerts(rows: list[Row]) -> dict[str, list[int]]:
    """Return the epochs at which each built-in rule fires in a run; `default`: any of the default ones."""
    found: dict[str, list[int]] = {}
    for name in NAMES[:-1]:
        tracker = RuleTracker(getattr(rules, name)())
        found[name] = [row.epoch for row in rows if tracker.observe(row.values, step=row.epoch, epoch=row.epoch)]
    found["default"] = sorted(epoch for rule in rules.default() for epoch in found[str(rule)])
    return found


def judge(
    runs: list[tuple[Row, dict[str, list[int]]]], seeds: str, rule: str, disturbance: str, setting: str
) -> Result:
    """Count what a rule did in the runs of one kind; `all` settings together or one."""
    known = disturbance in ("label_noise", "lr_x10")
    start = DISTURBED_AT if known else 0
    chosen = [
        [epoch - start + 1 for epoch in found[rule] if epoch >= start]
        for first, found in runs
        if first.disturbance == disturbance
        and setting in ("all", first.setting)
        and first.seed in {"choosing": CHOOSING, "report": REPORT}[seeds]
    ]
    delays = [delays[0] for delays in chosen if delays]
    in_time = sum(delay <= IN_TIME for delay in delays) if known else None
    return Result(
        seeds, rule, disturbance, setting, len(chosen), len(delays), in_time, median(delays) if delays else None
    )


def table(found: list[Result]) -> str:
    """Return the totals as a Markdown table, one row per rule."""
    text = [
        "| rule | seeds | healthy: alerts | label noise: in time | lr x 10: in time | noise from the start: found |",
        "|---|---|---|---|---|---|",
    ]
    totals = [result for result in found if result.setting == "all"]
    for (seeds, rule), group in groupby(totals, key=lambda result: result[:2]):
        cells = []
        for result in group:
            count = result.fired if result.in_time is None else result.in_time
            delay = "" if result.disturbance == "healthy" or not result.fired else f" ({result.median_delay:g})"
            cells.append(f"{count}/{result.runs}{delay}")
        text.append(f"| `{rule}` | {seeds} | {' | '.join(cells)} |")
    return "\n".join(text)


def results() -> list[Result]:
    """Judge all recorded runs."""
    grouped = groupby(read(), key=lambda row: row[:3])
    runs = [(rows[0], alerts(rows)) for rows in (list(group) for _, group in grouped)]
    return [
        judge(runs, seeds, rule, disturbance, setting)
        for seeds in ("choosing", "report")
        for rule in NAMES
        for disturbance in DISTURBANCES
        for setting in ("all", *SETTINGS)
    ]


def lines(found: list[Result]) -> str:
    """Return the results as they are written to `rules.csv`."""
    rows = [Result._fields, *found]
    return "".join(",".join("" if cell is None else str(cell) for cell in row) + "\n" for row in rows)


if __name__ == "__main__":
    judged = results()
    OUTPUT.write_text(lines(judged), encoding="utf-8")
    print(table(judged))
