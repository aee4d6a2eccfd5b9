"""Reads trainings back from their log folders: TensorBoard's event files, Lightning's CSV logs, `alerts.jsonl`."""

from __future__ import annotations

import csv
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from lightning_flatness.errors import missing_package
from lightning_flatness.keys import KEYS, OF_LAYER, key_of, key_suffix, quantity
from lightning_flatness.reporting.history import History
from lightning_flatness.reporting.loggers import ALERTS_FILE, LAYER
from lightning_flatness.reporting.tables import Table

_CSV, _EVENTS, _HYPERPARAMETERS = "metrics.csv", "events.out.tfevents", "hparams.yaml"
_LOADER = re.compile(r"/dataloader_idx_\d+$")
_PREFIX = re.compile(r".*?-(?=(flatness|margin)/)")  # of a logger, in front of every name
# How much of each kind is kept; the last entry always is. 0: everything.
_KEPT = {"scalars": 0, "tensors": 1, "histograms": 16, "images": 1}
_SHOWN_KEYS = 8  # in a message


class LoggedAlert(NamedTuple):
    """An alert as the logs have it; what they do not have is empty.

    Attributes:
        monitor: name of the monitor; empty: it has none.
        rule: name of the rule.
        step: of the validation.
        epoch: of the validation.
        reason: what happened.
        action: what was done.
        severity: `"info"`, `"warning"` or `"critical"`.
        causes: the usual causes.
        look_at: what to look at.
        onset_step: the step before the change began; None if it is not known.
        others: the rules that fired for the same event.
    """

    monitor: str
    rule: str
    step: int
    epoch: int
    reason: str
    action: str = ""
    severity: str = ""
    causes: str = ""
    look_at: str = ""
    onset_step: int | None = None
    others: Sequence[str] = ()


class Histogram(NamedTuple):
    """How many samples lie between the edges, which are one more than the counts."""

    step: int
    edges: Sequence[float]
    counts: Sequence[float]


@dataclass
class Run:
    """What the log folder of one training holds.

    Attributes:
        folder: the log folder.
        name: what the report calls it.
        series: the value at each step by key, as in `docs/keys.md`, in the order of the steps.
        epochs: the epoch of each step.
        alerts: oldest first.
        refused: why a network could not be measured; empty: it could.
        facts: layer, method and loss, by the name of the monitor.
        histograms: of the margins by the ending of the keys, oldest first.
    """

    folder: Path
    name: str = ""
    series: dict[str, dict[int, float]] = field(default_factory=dict)
    epochs: dict[int, int] = field(default_factory=dict)
    alerts: list[LoggedAlert] = field(default_factory=list)
    refused: str = ""
    facts: dict[str, dict[str, str]] = field(default_factory=dict)
    histograms: dict[str, list[Histogram]] = field(default_factory=dict)

    @property
    def endings(self) -> list[str]:
        """How the monitors' keys end: one entry for each monitor, loader and layer; empty: none has logged."""
        return list(dict.fromkeys(key_suffix(key) for key in self.series if quantity(key) in KEYS))

    @property
    def own_metrics(self) -> list[str]:
        """The module's own `val...` metrics, without the endings of loaders."""
        return list(dict.fromkeys(_LOADER.sub("", key) for key in self.series if key.startswith("val")))

    def is_layer(self, ending: str) -> bool:
        """Return whether an ending is that of one layer among several."""
        found = {quantity(key) for key in self.series if key_suffix(key) == ending and quantity(key) in KEYS}
        return bool(monitor_of(ending)) and found <= set(OF_LAYER)

    def without_layer(self, ending: str) -> str:
        """Return how the keys of the monitor end that has measured this layer; another ending stays as it is."""
        if not self.is_layer(ending):
            return ending
        return "".join(f"/{part}" for part in ending.split("/")[2:] if part != "ggn")

    def own(self, metric: str, ending: str) -> dict[int, float]:
        """Return a metric of the module for the loader that an ending names, by step; empty: it has none."""
        loader = _LOADER.search(ending)
        return self.series.get(f"{metric}{loader[0] if loader else ''}") or self.series.get(metric, {})

    def history(self, ending: str) -> History:
        """Return the validations that a monitor has measured, also of its layers, with the module's own metrics."""
        endings = {ending, *(each for each in self.endings if self.without_layer(each) == ending)}
        values = {key: series for key, series in self.series.items() if key_suffix(key) in endings}
        values = {key: series for key, series in values.items() if quantity(key) in KEYS}
        steps = sorted({step for series in values.values() for step in series})
        values |= {metric: own for metric in self.own_metrics if (own := self.own(metric, ending))}
        history = History()
        for step in steps:
            history.add(step, self.epochs.get(step, 0), {k: each[step] for k, each in values.items() if step in each})
        return history


def monitor_of(ending: str) -> str:
    """Return the name of the monitor whose keys end so.

    Example:
        >>> monitor_of("/train/dataloader_idx_1")
        'train'
    """
    return _LOADER.sub("", ending).removeprefix("/")


def runs_in(*places: str | Path) -> tuple[list[Run], list[str]]:
    """Return the trainings in these folders and their subfolders, and a sentence on each log that is left out.

    Args:
        places: folders; a file of a log stands for its folder.

    Raises:
        ValueError: if a folder is not there, or none of them has a value of a `FlatnessMonitor`.
        ModuleNotFoundError: if there are event files and tensorboard is not installed.
    """
    folders = sorted({folder for place in places for folder in _folders(Path(place))}, key=_natural)
    if not folders:
        raise _no_logs(places)
    runs, notes = [], []
    for folder in folders:
        try:
            run = _run(folder)
        except (OSError, ValueError, csv.Error) as error:
            notes.append(f"{folder} cannot be read: {error}")
            continue
        if run.endings or run.own_metrics:
            runs.append(run)
        else:
            notes.append(f"{folder} has no value of a FlatnessMonitor and no metric `val...`.")
    if not any(run.endings for run in runs):
        raise _no_flatness(folders, runs, notes)
    _name(runs)
    return runs, notes


def _name(runs: Sequence[Run]) -> None:
    """Name runs by their folders, without what all of them have in front or at the end, such as `version_0`."""
    base = Path(os.path.commonpath([run.folder.resolve().parent for run in runs]))
    for run in runs:
        path = run.folder.resolve().relative_to(base)
        is_shared = len(runs) > 1 and all(other.folder.name == path.name for other in runs)
        run.name = (path.parent if is_shared else path).as_posix()


def _folders(place: Path) -> Iterator[Path]:
    if not place.exists():
        raise ValueError(f"A log folder must exist; {str(place)!r} does not. Give the folder that the logger wrote to.")
    for folder, _, files in os.walk(place if place.is_dir() else place.parent):
        if any(name == _CSV or _EVENTS in name for name in files):
            yield Path(folder)


def _run(folder: Path) -> Run:
    """Read everything in one folder; of values that are in both logs, those of the CSV log, which has all digits."""
    run = Run(folder)
    texts = _read_events(run) if any(folder.glob(f"*{_EVENTS}*")) else {}
    if (folder / _CSV).is_file():
        _read_csv(run)
    run.series = {key: dict(sorted(series.items())) for key, series in run.series.items()}
    _read_hyperparameters(run)
    for tag, text in texts.items():
        if tag == "monitor/configuration" or tag.startswith("monitor/configuration/"):
            run.facts[monitor_of(tag.removeprefix("monitor/configuration"))] = dict(Table.of_markdown(text).rows)
    run.refused = next((facts["not measured"] for facts in run.facts.values() if "not measured" in facts), "")
    if (folder / ALERTS_FILE).is_file():
        _read_alerts(run)
    else:
        for tag, text in texts.items():
            if tag == "monitor/alerts" or tag.startswith("monitor/alerts/"):
                name = monitor_of(tag.removeprefix("monitor/alerts"))
                run.alerts += [
                    LoggedAlert(name, rule, int(step), int(epoch), reason, action)
                    for step, epoch, rule, reason, action in Table.of_markdown(text).rows
                ]
    run.alerts.sort(key=lambda alert: alert.step)
    return run


def _read_events(run: Run) -> dict[str, str]:
    """Take up numbers and histograms; return the last version of each text by its tag."""
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ModuleNotFoundError as error:
        raise missing_package("Reading the event files of TensorBoard", "tensorboard") from error
    events = EventAccumulator(str(run.folder), _KEPT).Reload()
    tags = events.Tags()
    scalars = (tag for tag in tags["scalars"] if not tag.startswith("monitor/"))
    _take_up(run, {tag: {each.step: each.value for each in events.Scalars(tag)} for tag in scalars})
    for tag in tags["histograms"]:
        if tag == "per_sample/margin" or tag.startswith("per_sample/margin/"):
            run.histograms[_ending(tag.removeprefix("per_sample/margin"))] = [
                Histogram(each.step, each.histogram_value.bucket_limit, each.histogram_value.bucket[1:])
                for each in events.Histograms(tag)
            ]
    return {
        tag.removesuffix("/text_summary"): events.Tensors(tag)[-1].tensor_proto.string_val[0].decode()
        for tag in tags["tensors"]
        if tag.endswith("/text_summary")
    }


def _ending(suffix: str) -> str:
    """Return the ending of a histogram, which has the loader first, as that of the keys, which have it last."""
    parts = [part for part in suffix.split("/") if part]
    return "".join(f"/{part}" for part in sorted(parts, key=lambda part: part.startswith("dataloader_idx_")))


def _read_csv(run: Run) -> None:
    with (run.folder / _CSV).open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file)
        if "step" not in (rows.fieldnames or ()):
            raise ValueError(f"`{_CSV}` must be written by Lightning's CSVLogger; it has no column `step`.")
        found: dict[str, dict[int, float]] = {}
        for row in rows:
            step = _number(row.pop("step"))
            for name, cell in row.items() if math.isfinite(step) else ():
                if name is not None and cell:
                    found.setdefault(name, {})[int(step)] = _number(cell)
    _take_up(run, found)


def _number(cell: str | None) -> float:
    try:
        return float(cell or math.nan)
    except ValueError:
        return math.nan


def _take_up(run: Run, found: Mapping[str, Mapping[int, float]]) -> None:
    """Add the values of one log by step; its names may begin with the logger's `prefix`."""
    matches = () if any(quantity(key_of(name)) in KEYS for name in found) else map(_PREFIX.match, found)
    prefix = next((match[0] for match in matches if match), "")
    for name, series in found.items():
        name = name.removeprefix(prefix)
        if name == "epoch":
            run.epochs |= {step: int(value) if math.isfinite(value) else 0 for step, value in series.items()}
        else:
            run.series.setdefault(key_of(name), {}).update(series)


def _read_hyperparameters(run: Run) -> None:
    """Take up the measured layers, which are all that a CSV log says of the monitors."""
    import yaml

    try:
        given = yaml.safe_load((run.folder / _HYPERPARAMETERS).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):  # there are none, or of the module's own kind
        return
    for name, layer in given.items() if isinstance(given, dict) else ():
        if isinstance(name, str) and (name == LAYER or name.startswith(f"{LAYER}/")):
            run.facts[monitor_of(name.removeprefix(LAYER))] = {"layer": str(layer)}


def _read_alerts(run: Run) -> None:
    """Take up `alerts.jsonl`; an alert stands there again when more is known about it, so the last one counts."""
    found: dict[tuple[str, str, int], LoggedAlert] = {}
    for line in (run.folder / ALERTS_FILE).read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:  # the process ended while it was written
            continue
        if entry["event"] == "refused":
            run.refused = entry["reason"]
        elif entry["event"] == "alert":
            alert = LoggedAlert(**{name: entry[name] for name in LoggedAlert._fields if name in entry})
            found[alert.monitor, alert.rule, alert.step] = alert
    run.alerts += found.values()


def _natural(folder: Path) -> list[Any]:
    """Return what sorts `version_10` behind `version_9`."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", str(folder))]


def _no_logs(places: Sequence[str | Path]) -> ValueError:
    is_wandb = any(True for place in places for _ in Path(place).rglob("*.wandb"))
    return ValueError(
        f"A log folder must hold a `{_CSV}` of Lightning's CSVLogger or event files of TensorBoard; "
        f"{', '.join(map(repr, map(str, places)))} {'holds files of W&B only' if is_wandb else 'holds neither'}. "
        + ("Train with a CSVLogger as well." if is_wandb else "Give the folder that the logger wrote to.")
    )


def _no_flatness(folders: Sequence[Path], runs: Sequence[Run], notes: Sequence[str]) -> ValueError:
    keys = list(dict.fromkeys(key for run in runs for key in run.series))
    refused = next((run.refused for run in runs if run.refused), "")
    found = f"it has {', '.join(keys[:_SHOWN_KEYS])}{' ...' if len(keys) > _SHOWN_KEYS else ''}" if keys else notes[0]
    return ValueError(
        f"A log must hold values of a FlatnessMonitor, such as `flatness/relative`; of {len(folders)} none does: "
        + (f"the network was refused. {refused}" if refused else f"{found.rstrip('.')}. Train with ")
        + ("" if refused else "`callbacks=[FlatnessMonitor()]` and a logger.")
    )


def best_step(series: Mapping[int, float], is_lower_better: bool) -> int | None:
    """Return the first step with the best finite value; None if there is none."""
    finite = {step: value for step, value in series.items() if math.isfinite(value)}
    return (min if is_lower_better else max)(finite, key=lambda step: finite[step]) if finite else None
