from __future__ import annotations

import contextlib
import csv
import io
import logging
import math
import runpy
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_flatness import demo

KEYS = ["epoch", "val_accuracy", "flatness/relative", "flatness/trace", "margin/mean"]


class Run(NamedTuple):
    status: int
    folder: Path
    printed: str


def run_demo(output: Path, *arguments: str) -> Run:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        status = demo.main([*arguments, "--output", str(output)])
    return Run(status, max(output.iterdir()), printed.getvalue())


def validations(folder: Path) -> list[list[float]]:
    with (folder / "metrics.csv").open() as file:
        return [[float(row[key]) for key in KEYS] for row in csv.DictReader(file) if row["val_accuracy"]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_demo(tmp_path_factory.mktemp("demo"), "--epochs", "2")


def test_table_shows_the_values_of_the_csv(run: Run) -> None:
    assert run.status == 0
    lines = run.printed.split("\n\n")[1].splitlines()
    assert len({len(line) for line in lines}) == 1, "the columns are not aligned"
    heading, _, *rows = lines
    for word in ("Epoch", "accuracy", "Relative flatness", "Hessian trace", "margin"):
        assert word in heading
    table = [[float(cell.rstrip("%")) / (100 if "%" in cell else 1) for cell in row.split()] for row in rows]
    assert [row[0] for row in table] == [0, 1]
    assert all(math.isfinite(value) for row in table for value in row)
    for shown, logged in zip(table, validations(run.folder), strict=True):
        assert shown == pytest.approx(logged, rel=1e-3, abs=6e-4)


def test_tensorboard_holds_the_same_curves(run: Run) -> None:
    (events,) = run.folder.glob("events.out.tfevents.*")
    written = EventAccumulator(str(events)).Reload()
    for number, key in enumerate(KEYS[1:], start=1):
        logged = [row[number] for row in validations(run.folder)]
        assert [scalar.value for scalar in written.Scalars(key)] == pytest.approx(logged, rel=1e-6)


def test_last_lines_explain_direction_and_files(run: Run) -> None:
    assert "Lower is flatter." in run.printed
    assert f"tensorboard --logdir {run.folder.parent}\n" in run.printed
    assert str(run.folder / "metrics.csv") in run.printed
    assert str(run.folder / "curves.png") in run.printed
    assert (run.folder / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_same_seed_same_numbers_in_a_new_folder(tmp_path: Path) -> None:
    runs = [run_demo(tmp_path, "--epochs", "1", "--seed", seed, "--logger", "csv") for seed in ("5", "5", "6")]
    assert [run.folder.name for run in runs] == ["run-1", "run-2", "run-3"]
    first, again, other = (validations(run.folder) for run in runs)
    assert first == again
    assert first != other
    assert not list(tmp_path.rglob("events*"))
    assert "tensorboard" not in runs[0].printed


def test_wandb_stays_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setattr("wandb.run", None)  # what an earlier test of this process may have left
    run = run_demo(tmp_path, "--epochs", "1", "--logger", "csv,wandb", "--logger", "csv")
    assert list(run.folder.glob("wandb/offline-run-*/*.wandb"))
    assert f"wandb sync {run.folder}" in run.printed
    assert len(validations(run.folder)) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "--epochs: must be a whole number from 1 .*; got '0'"),
        (["--epochs", "1.5"], "--epochs: must be a whole number from 1 .*; got '1.5'"),
        (["--seed", "-1"], "--seed: must be a whole number from 0 .*; got '-1'"),
        (["--seed", str(2**32)], "--seed: must be a whole number .*; got '4294967296'"),
        (["--logger", "csv,mlflow"], "--logger: must be any of tensorboard, csv, wandb; got 'mlflow'"),
        (["--output", "file/below"], r"--output must be a folder that can be written; got file/below"),
        (["--speed", "9"], "unrecognized arguments: --speed 9"),
    ],
)
def test_wrong_input_is_reported_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("file").touch()
    with pytest.raises(SystemExit, match="2"):
        demo.main(arguments)
    (line,) = capsys.readouterr().err.splitlines()
    with pytest.raises(RuntimeError, match=message):
        raise RuntimeError(line)
    assert [path.name for path in Path().iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("package", "hint"),
    [
        ("sklearn", "pip install scikit-learn`, or `pip install '.[examples]'"),
        ("matplotlib", "pip install matplotlib`, or `pip install '.[plots]'"),
        ("tensorboard", "pip install tensorboard`, or `pip install '.[tensorboard]'"),
        ("wandb", "pip install wandb`, or `pip install '.[wandb]'"),
    ],
)
def test_missing_package_is_reported_before_the_training(
    package: str, hint: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit, match="2"):
        demo.main(["--logger", "wandb,tensorboard"])
    (line,) = capsys.readouterr().err.splitlines()
    assert f"got no module `{package}`" in line
    assert hint in line
    assert not list(Path().iterdir())


def test_process_is_left_as_it_was(tmp_path: Path) -> None:
    torch.set_num_threads(2)
    run_demo(tmp_path, "--epochs", "1", "--logger", "csv")
    assert torch.get_num_threads() == 2
    assert logging.getLogger("lightning.pytorch").level == logging.INFO


@pytest.mark.parametrize("command", [[], ["demo"]], ids=str)
def test_python_m_runs_the_demo(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning_flatness", *command, "--epochs", "0"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_module("lightning_flatness", run_name="__main__")
    assert "--epochs: must be a whole number" in capsys.readouterr().err
