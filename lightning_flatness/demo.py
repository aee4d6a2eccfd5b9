"""Train a small network on handwritten digits and show the flatness of its last convolution."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import SupportsFloat

import lightning as L
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger

from lightning_flatness.callback import FlatnessMonitor
from lightning_flatness.errors import missing_package
from lightning_flatness.examples.digits import DigitsClassifier, DigitsDataModule
from lightning_flatness.keys import MARGIN, RELATIVE, TRACE
from lightning_flatness.reporting.figures import Panel, flatness_curves
from lightning_flatness.reporting.tables import Table
from lightning_flatness.terminal import Parser, quiet, whole_number

_LOGGERS = ("tensorboard", "csv", "wandb")

# Key -> number format of its column.
_COLUMNS = {"epoch": "d", "val_accuracy": ".2%", RELATIVE: "#.4g", TRACE: "#.4g", MARGIN: ".3f"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo: train, print a table of the measured values, and save the logs and a picture of the curves.

    Args:
        argv: command-line arguments without the name of the program; None: those of the process.

    Returns:
        The exit status 0.

    Raises:
        SystemExit: with status 2 and one line on stderr, if an argument is wrong, the output folder cannot be written
            or a package is missing.
    """
    parser = _parser()
    arguments = parser.parse_args(argv)
    names = [name for name in _LOGGERS if name in (arguments.logger or ["tensorboard", "csv"])]
    try:
        _require(["sklearn", "matplotlib", *(name for name in names if name != "csv")])
        run = _new_run(arguments.output)
    except ModuleNotFoundError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(
            f"--output must be a folder that can be written; got {error.filename} ({error.strerror}). Name another one."
        )

    with quiet(), _one_thread():
        history = _train(arguments.epochs, arguments.seed, [_logger(name, run) for name in names])
    flatness_curves(history).savefig(run / "curves.png")

    print(f"\n{_table(history)}\n\nLower is flatter.\n")
    print(f"Picture      {run / 'curves.png'}")
    if "csv" in names:
        print(f"CSV          {run / 'metrics.csv'}")
    if "tensorboard" in names:
        print(f"TensorBoard  tensorboard --logdir {arguments.output}")
    if "wandb" in names:
        print(f"W&B          wandb sync {run / 'wandb' / 'latest-run'}")
    return 0


class _History(L.Callback):
    """Keeps the values that the Trainer has logged by the end of each validation."""

    def __init__(self) -> None:
        self.values: dict[str, list[float]] = {key: [] for key in _COLUMNS}

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        logged: dict[str, SupportsFloat] = {**trainer.callback_metrics, "epoch": trainer.current_epoch}
        for key, series in self.values.items():
            series.append(float(logged.get(key, math.nan)))


def _train(epochs: int, seed: int, loggers: list[Logger]) -> dict[str, list[float]]:
    """Train the network and return the columns of the table, one value per validation."""
    L.seed_everything(seed, verbose=False)
    model, data, history = DigitsClassifier(), DigitsDataModule(seed), _History()
    print(f"Residual GAP network, {sum(p.numel() for p in model.parameters()):,} parameters, on 1,797 digits.")
    trainer = L.Trainer(
        accelerator="cpu",  # a network this small gains nothing from a GPU
        max_epochs=epochs,
        logger=loggers,
        callbacks=[FlatnessMonitor(), history, TQDMProgressBar(refresh_rate=10)],
        enable_checkpointing=False,
        enable_model_summary=False,
        log_every_n_steps=10,
    )
    trainer.fit(model, datamodule=data)
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.finish()
    return history.values


def _table(history: dict[str, list[float]]) -> str:
    """Return the table with aligned columns and one row per validation."""
    columns = {
        Panel.of(key).title.capitalize(): [
            format(int(v) if number == "d" else v, number).rstrip(".") for v in history[key]
        ]
        for key, number in _COLUMNS.items()
    }
    return str(Table(columns))


def _logger(name: str, run: Path) -> Logger:
    """Return the Lightning logger of that name, which writes into the folder of the run."""
    if name == "tensorboard":
        return TensorBoardLogger(run, name="", version="")
    if name == "csv":
        return CSVLogger(run, name="", version="")
    settings = {"silent": True}
    return WandbLogger(project="lightning-flatness-demo", name=run.name, save_dir=run, offline=True, settings=settings)


def _require(packages: Sequence[str]) -> None:
    """Raise ModuleNotFoundError for the first package that is missing."""
    for package in packages:
        if find_spec(package) is None:
            raise missing_package("the demo", package)


def _new_run(output: Path) -> Path:
    """Create the next free folder `run-1`, `run-2`, ..., so that no run overwrites another."""
    number = 1
    while (output / f"run-{number}").exists():
        number += 1
    run = output / f"run-{number}"
    run.mkdir(parents=True)
    return run


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute on one thread: as fast for so small a network, and much faster where the cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _parser() -> Parser:
    """Return the parser of the command line."""
    parser = Parser(
        prog="python -m lightning_flatness",
        description=__doc__,
        epilog="`python -m lightning_flatness measure --help`: measure checkpoints of your own; `... report --help`: a "
        "page of your log folders.",
    )
    parser.add_argument(
        "--epochs",
        type=partial(whole_number, least=1),
        default=20,
        help="training epochs (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=partial(whole_number, least=0),
        default=0,
        help="seed of the data split and the weights (default: %(default)s)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("flatness-demo"),
        help="folder for the logs and the picture (default: %(default)s)",
    )
    parser.add_argument(
        "--logger",
        type=_logger_names,
        action="extend",
        help=f"any of {', '.join(_LOGGERS)} (offline), repeated or joined by commas (default: tensorboard,csv)",
    )
    return parser


def _logger_names(text: str) -> list[str]:
    """Return the names of loggers that commas join."""
    names = text.split(",")
    for name in names:
        if name not in _LOGGERS:
            raise argparse.ArgumentTypeError(f"must be any of {', '.join(_LOGGERS)}; got {name!r}")
    return names
