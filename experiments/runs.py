"""Runs of an experiment: in parallel, with a progress bar, resumable; rows in a CSV file."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, NamedTuple

import joblib
import pandas as pd
import torch
from tqdm import tqdm

import lightning_flatness

RESULTS = Path(__file__).with_name("results")
DIGITS = 5
"""Significant digits in the files."""
Row = dict[str, Any]


class Options(NamedTuple):
    """What the command line says."""

    smoke: bool
    data: str | None
    jobs: int
    seeds: int | None
    output: Path


def options(description: str | None, arguments: Sequence[str] | None = None) -> Options:
    """Return what the command line of an experiment says.

    Args:
        description: what the experiment is.
        arguments: None: those of the process.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a few tiny runs; the results go to a temporary folder")
    parser.add_argument(
        "--data", help="digits, mnist5k, mnist, cifar10, cifar100 or a folder; default: the full design"
    )
    parser.add_argument("--jobs", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--seeds", type=int, help="number of seeds; default: that of the full design")
    parser.add_argument("--output", type=Path, help="folder of the results")
    given = parser.parse_args(arguments)
    output = given.output or (Path(mkdtemp(prefix="experiment-")) if given.smoke else RESULTS)
    return Options(given.smoke, given.data, given.jobs, given.seeds, output)


def completed(experiment: str, tasks: Iterable[Any], options: Options, ending: str = ".csv") -> pd.DataFrame:
    """Run the tasks that have no rows yet, and return all rows of the file.

    Args:
        experiment: name of a module. Its class `Task` is a data class that holds the whole configuration of a run, and
            its function `run` returns the rows of a task, one or more. Other processes import both.
        tasks: the tasks.
        options: of the command line.
        ending: `".csv"` or, for long results, `".csv.gz"`.
    """
    name = experiment.rpartition(".")[2]
    path = options.output / f"{name}{ending}"
    path.parent.mkdir(parents=True, exist_ok=True)
    tasks = list(tasks)
    done = _done(path, tasks)
    missing = [config for config in map(asdict, tasks) if _key(config) not in done]
    parallel = joblib.Parallel(n_jobs=options.jobs, return_as="generator_unordered")
    finished = parallel(joblib.delayed(_timed)(experiment, config) for config in missing)
    for rows in tqdm(finished, total=len(missing), desc=name, unit="run"):
        if path.exists():
            rows = rows[list(pd.read_csv(path, nrows=0))]
        # Another member of the archive, or more lines: what is in the file stays.
        rows.to_csv(path, mode="a", header=not path.exists(), index=False, float_format=f"%.{DIGITS}g")
    return pd.read_csv(path)


def results(name: str, folder: Path = RESULTS) -> pd.DataFrame:
    """Return the rows of an experiment that has run."""
    return pd.read_csv(next(folder.glob(f"{name}.csv*")))


def _done(path: Path, tasks: list[Any]) -> set[str]:
    if not path.exists() or not tasks:
        return set()
    columns = list(asdict(tasks[0]))
    return {_key(row) for row in pd.read_csv(path, usecols=columns).drop_duplicates().to_dict("records")}


def _key(values: Row) -> str:
    """Return a configuration as text that a CSV file does not change."""
    numbers = (f"{v:.{DIGITS}g}" if isinstance(v, int | float) else str(v) for _, v in sorted(values.items()))
    return "|".join(numbers)


def _timed(experiment: str, config: Row) -> pd.DataFrame:
    torch.set_num_threads(1)
    module, start = import_module(experiment), time.perf_counter()
    rows = pd.DataFrame(module.run(module.Task(**config)))
    rows = rows.assign(**config)[[*config, *(name for name in rows if name not in config)]]
    return rows.assign(seconds=round(time.perf_counter() - start, 2), versions=_versions())


def _versions() -> str:
    others = " ".join(f"{name} {version(name)}" for name in ("torch", "lightning"))
    return f"lightning-flatness {lightning_flatness.__version__} {others}"
