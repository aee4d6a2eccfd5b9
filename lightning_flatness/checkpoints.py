"""Measure the checkpoints of a LightningModule on its validation data: a report of each, and a table of all."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from pkgutil import resolve_name
from typing import Any, NamedTuple, TypeVar

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_flatness.callback import FlatnessMonitor
from lightning_flatness.curvature.methods import METHODS, LayerName, MethodName, method_for
from lightning_flatness.keys import KEYS, MARGIN, RELATIVE, SCALE_FREE, SCALE_FREE_MARGIN, TRACE, layer_key
from lightning_flatness.reporting.tables import Table
from lightning_flatness.terminal import Parser, quiet, whole_number

_Kind = TypeVar("_Kind")
_COLUMNS = (RELATIVE, SCALE_FREE, MARGIN, SCALE_FREE_MARGIN)


class _Refused(Exception):
    """What was asked for cannot be done; the message is the sentence to print."""


@dataclass(frozen=True)
class _Measurement:
    """The values of one checkpoint on one validation loader.

    Attributes:
        checkpoint: the file.
        loader: how the keys of the loader end, `/dataloader_idx_1`; empty if there is one loader.
        measured: what was measured, in words.
        accuracy: share of samples whose margin is not negative; None for a loss without margins.
        values: by key, as in `docs/keys.md`, without the ending of the loader.
    """

    checkpoint: str
    loader: str
    measured: str
    accuracy: float | None
    values: dict[str, float]

    def __str__(self) -> str:
        """Return the report of this checkpoint and loader, one line a key."""
        width = max(30, *(len(key) + 2 for key in self.values))
        rows = [
            f"  {key:<{width}}{value:<14.6g}{KEYS[quantity].direction if KEYS[quantity].better else ''}".rstrip()
            for quantity in KEYS
            for key, value in self.values.items()
            if _quantity(key) == quantity
        ]
        accuracy = [] if self.accuracy is None else [f"  {'accuracy':<{width}}{self.accuracy:.2%}"]
        return "\n".join([f"{self.checkpoint}{self.loader}: {self.measured}", *accuracy, *rows])


def main(argv: Sequence[str] | None = None) -> int:
    """Measure checkpoints, print a report of each and a table of all.

    Args:
        argv: command-line arguments without the name of the program and `measure`; None: those of the process.

    Returns:
        The exit status 0.

    Raises:
        SystemExit: with status 2 and a sentence on stderr, if an argument is wrong or a checkpoint cannot be measured.
    """
    parser = _parser()
    arguments = parser.parse_args(argv)
    measurements: list[_Measurement] = []
    try:
        load = _loader(arguments)
        for path in arguments.checkpoints:
            if not path.is_file():
                raise _Refused(f"A checkpoint must be a file; {str(path)!r} is none. Check the path.")
        for number, path in enumerate(arguments.checkpoints, 1):
            print(f"{path} ({number} of {len(arguments.checkpoints)})", file=sys.stderr)
            with quiet():
                found = _measured(path, *load(path), _asked(arguments))
            print("\n\n".join(map(str, found)) + "\n")
            measurements += found
        if arguments.json is not None:
            _write(arguments.json, measurements)
    except _Refused as error:
        parser.error(str(error))
    print(_table(measurements))
    return 0


def _loader(arguments: Any) -> Callable[[Path], tuple[LightningModule, LightningDataModule | None]]:
    """Return the function that makes the module and its data of a checkpoint."""
    model = _resolved("--model", arguments.model, LightningModule)
    data = _resolved("--data", arguments.data, LightningDataModule)
    if arguments.config is not None:
        return partial(_from_config, _settings(arguments.config), arguments.config, model, data)
    if model is None:
        raise _Refused("The module must be named; got none. Give `--model package.module:Class` or `--config FILE`.")
    return partial(_from_classes, model, data)


def _resolved(option: str, path: str | None, kind: type[_Kind]) -> type[_Kind] | None:
    if path is None:
        return None
    wanted = f"`{option}` must be the import path of a {kind.__name__}, such as `package.module:Class`"
    try:
        found = resolve_name(path)
    except (ImportError, AttributeError, ValueError) as error:
        raise _Refused(f"{wanted}; got {path!r}: {error}.") from error
    if not isinstance(found, type) or not issubclass(found, kind):
        raise _Refused(f"{wanted}; {path!r} is none.")
    return found


def _from_classes(
    model: type[LightningModule], data: type[LightningDataModule] | None, path: Path
) -> tuple[LightningModule, LightningDataModule | None]:
    """Make both with the hyperparameters that the checkpoint has of them."""

    def load(kind: Any) -> Any:
        try:
            return kind.load_from_checkpoint(path, map_location="cpu")
        except TypeError as error:
            raise _Refused(
                f"`{kind.__name__}` must be made from the hyperparameters in {str(path)!r}; {error}. Call "
                "`self.save_hyperparameters()` in its `__init__` before training, or give `--config`."
            ) from error
        except (RuntimeError, KeyError, EOFError, UnpicklingError) as error:
            raise _misfit(path, kind, error) from error

    return load(model), None if data is None else load(data)


def _from_config(
    settings: dict[str, Any],
    config: Path,
    model: type[LightningModule] | None,
    data: type[LightningDataModule] | None,
    path: Path,
) -> tuple[LightningModule, LightningDataModule | None]:
    """Make both from a LightningCLI configuration, and load the weights."""
    from jsonargparse import ArgumentError
    from lightning.pytorch.cli import LightningCLI

    try:
        made = LightningCLI(
            *(model, data),
            args=settings,
            run=False,
            save_config_callback=None,
            seed_everything_default=False,
            trainer_defaults={"accelerator": "cpu", "logger": False},
            parser_kwargs={"exit_on_error": False},
        )
    except ArgumentError as error:
        raise _Refused(f"{str(config)!r} must be a configuration of LightningCLI; {error}") from error
    try:
        checkpoint = torch.load(path, map_location="cpu")
        made.model.on_load_checkpoint(checkpoint)
        made.model.load_state_dict(checkpoint["state_dict"])
    except (RuntimeError, KeyError, EOFError, UnpicklingError) as error:
        raise _misfit(path, type(made.model), error) from error
    return made.model, made.datamodule


def _settings(config: Path) -> dict[str, Any]:
    """Return what a configuration says of the model and the data; that of the Trainer does not matter."""
    try:
        import jsonargparse  # noqa: F401
        import yaml
    except ModuleNotFoundError as error:
        raise _Refused(
            f"`--config` needs LightningCLI; got no module `{error.name}`. "
            "Run `pip install 'jsonargparse[signatures]'`."
        ) from error
    try:
        settings = yaml.safe_load(config.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise _Refused(f"`--config` must be a YAML file of LightningCLI; {str(config)!r} is none: {error}.") from error
    settings = settings.get("fit", settings) if isinstance(settings, dict) else {}
    if "model" not in settings:
        raise _Refused(f"`--config` must be a YAML file of LightningCLI; {str(config)!r} has no `model`.")
    return {name: settings[name] for name in ("seed_everything", "model", "data") if name in settings}


def _misfit(path: Path, kind: type, error: Exception) -> _Refused:
    reason = " ".join(str(error).split())
    return _Refused(
        f"{str(path)!r} must be a checkpoint of `{kind.__name__}` that Lightning has saved; it is none, or of another "
        f"architecture: {reason if len(reason) < 300 else reason[:300] + ' ...'}"
    )


class _Asked(NamedTuple):
    """What to measure, as the monitor takes it."""

    layer: LayerName
    method: MethodName
    max_samples: int | None


def _asked(arguments: Any) -> _Asked:
    names = arguments.layer
    layer = names[0] if names is not None and len(names) == 1 else names
    return _Asked(layer, arguments.method, arguments.max_samples)


def _measured(
    path: Path, model: LightningModule, data: LightningDataModule | None, asked: _Asked
) -> list[_Measurement]:
    """Validate the model with a monitor; everything that is printed meanwhile goes to stderr."""
    owner = model if data is None else data
    for name, what, part in (("val_dataloader", "validation data", owner), ("validation_step", "a loss", model)):
        if not is_overridden(name, part, LightningDataModule if part is data else LightningModule):
            raise _Refused(
                f"`{type(part).__name__}` must give {what}; it has no `{name}`. Define it"
                + (", or give `--data package.module:DataModule`." if part is model and part is owner else ".")
            )
    try:
        method_for(model, asked.method, asked.layer)  # whether the layers are there
        monitor = FlatnessMonitor(asked.layer, method=asked.method, max_samples=asked.max_samples, strict=True)
    except ValueError as error:
        raise _Refused(f"{str(path)!r} cannot be measured: {error}") from error
    with redirect_stdout(sys.stderr):
        trainer = Trainer(
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            callbacks=[monitor, TQDMProgressBar()],
        )
        try:
            trainer.validate(model, datamodule=data, verbose=False)
        except ValueError as error:
            raise _Refused(f"{str(path)!r} cannot be measured: {error}") from error
    values = {key: float(value) for key, value in trainer.callback_metrics.items() if _quantity(key) in KEYS}
    if not values:
        raise _Refused(f"{str(path)!r} cannot be measured: its validation has no sample.")
    found = []
    for loader in dict.fromkeys(map(_loader_of, values)):
        own = {key.removesuffix(loader): value for key, value in values.items() if _loader_of(key) == loader}
        negative = own.get("margin/negative")
        accuracy = None if negative is None else 1 - negative
        found.append(_Measurement(str(path), loader, monitor.measured or "", accuracy, own))
    return found


def _loader_of(key: str) -> str:
    """Return how a key ends if there are several loaders."""
    found = re.search(r"/dataloader_idx_\d+$", key)
    return found[0] if found else ""


def _quantity(key: str) -> str:
    """Return a key without the layer and the loader."""
    return "/".join(key.split("/")[:2])


def _table(measurements: Sequence[_Measurement]) -> str:
    """Return the table of all, one row each."""
    columns = {"Checkpoint": [f"{each.checkpoint}{each.loader}" for each in measurements]}
    columns["Accuracy"] = ["-" if each.accuracy is None else f"{each.accuracy:.2%}" for each in measurements]
    for key in _COLUMNS:
        columns[KEYS[key].title] = [_cell(each.values, key) for each in measurements]
    network = [_cell(each.values, layer_key(TRACE, None)) for each in measurements]
    if set(network) != {"-"}:
        columns[f"{KEYS[TRACE].title}, network"] = network
    return str(Table(columns))


def _cell(values: dict[str, float], key: str) -> str:
    """Return the value of a key, or of the same key of the only layer that has one."""
    found = [value for name, value in values.items() if name == key or name.startswith(f"{key}/")]
    return f"{found[0]:#.4g}".rstrip(".") if len(found) == 1 else "-"


def _write(path: Path, measurements: Sequence[_Measurement]) -> None:
    try:
        path.write_text(json.dumps([asdict(each) for each in measurements], indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise _Refused(f"`--json` must be a file that can be written; got {str(path)!r} ({error.strerror}).") from error


def _parser() -> Parser:
    parser = Parser(prog="python -m lightning_flatness measure", description=__doc__)
    parser.add_argument("checkpoints", nargs="+", type=Path, metavar="CHECKPOINT", help="a file that Lightning saved")
    parser.add_argument("--model", metavar="PACKAGE.MODULE:CLASS", help="import path of the LightningModule")
    parser.add_argument(
        "--data",
        metavar="PACKAGE.MODULE:CLASS",
        help="import path of the LightningDataModule (default: the module's own `val_dataloader`)",
    )
    parser.add_argument("--config", type=Path, help="a LightningCLI configuration, which has both")
    parser.add_argument(
        "--layer",
        action="append",
        help="name of the convolution (default: found); for `--method jacobian` the name of any layer, or `all`; "
        "several: give it again",
    )
    parser.add_argument(
        "--method", choices=METHODS, default="auto", help="how to measure, see `select_method` (default: auto)"
    )
    parser.add_argument(
        "--max-samples",
        type=partial(whole_number, least=1),
        help="measure at most so many samples (default: all)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the values to this file")
    return parser
