"""Trains what the documentation shows: `python docs/gallery.py [PART ...]`, about ten minutes on one core.

The parts are `reading` (docs/how-to/reading.md), `keys` (docs/reference/gallery.md) and `checkpoints`
(docs/how-to/flattest-checkpoint.md), and `examples`, the pictures that docs/examples and the demo draw; without one all
are made. Pictures go to docs/images, numbers into the pages, between comments that name the table. It needs Python 3.11
and the extra `dev`.
"""

from __future__ import annotations

import contextlib
import io
import math
import runpy
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import lightning as L
import torch
from matplotlib.figure import Figure
from PIL import Image

from lightning_flatness import FlatnessMonitor, FlattestCheckpoint, demo, measure, rules
from lightning_flatness.examples.digits import DigitsClassifier, DigitsDataModule
from lightning_flatness.keys import CONFIDENCE, KEYS, MARGIN, RELATIVE, SCALE_FREE, SCALE_FREE_MARGIN
from lightning_flatness.reporting.style import BLUE, GREEN, LIGHT, ORANGE, VERMILION, panel, title

DOCS = Path(__file__).parent
IMAGES = DOCS / "images" / "gallery"
EPOCHS, CHANGE = 30, 15
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class At(L.Callback):
    """Calls a function at the start of each training epoch.

    Args:
        act: gets the epoch, the Trainer and the module.
    """

    def __init__(self, act: Callable[[int, L.Trainer, DigitsClassifier], None]) -> None:
        self.act = act

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Call the function."""
        self.act(trainer.current_epoch, trainer, pl_module)


def wrong_labels(share: float, epoch: int) -> At:
    """Replace a share of the training labels by random ones at the start of an epoch."""

    def act(now: int, trainer: L.Trainer, module: DigitsClassifier) -> None:
        if now == epoch:
            labels, random = trainer.datamodule.training.tensors[1], torch.Generator().manual_seed(1)
            chosen = torch.randperm(len(labels), generator=random)[: int(share * len(labels))]
            labels[chosen] = torch.randint(10, (len(chosen),), generator=random)

    return At(act)


def scale_rate(trainer: L.Trainer, factor: float) -> None:
    """Multiply the learning rate and the rest of its schedule."""
    scheduler = trainer.lr_scheduler_configs[0].scheduler
    scheduler.base_lrs = [factor * rate for rate in scheduler.base_lrs]
    for group in trainer.optimizers[0].param_groups:
        group["lr"] *= factor


def rate(factor: float, epoch: int) -> At:
    """Multiply the learning rate at the start of an epoch."""
    return At(lambda now, trainer, module: scale_rate(trainer, factor) if now == epoch else None)


def only_scale(factor: float, epoch: int, back: int) -> At:
    """Freeze the network in an epoch; multiply its logits after each further one, and divide them again later."""

    def act(now: int, trainer: L.Trainer, module: DigitsClassifier) -> None:
        if now >= epoch:
            scale_rate(trainer, 0.0)
            module.eval()  # the statistics of batch normalisation stay
            with torch.no_grad():
                for parameter in module.net.classifier.parameters():
                    parameter.mul_(factor if now < back else 1 / factor)

    return At(act)


@dataclass
class Run:
    """A training of the documentation.

    Attributes:
        name: in the file of its picture.
        label: in the legends of the keys.
        disturbance: what happens to it.
        rows: the epochs that the table shows.
        options: of the Trainer.
    """

    name: str
    label: str
    disturbance: At | None = None
    rows: tuple[int, ...] = (0, 2, 5, CHANGE - 1, EPOCHS - 1)
    options: dict[str, Any] = field(default_factory=dict)


AROUND = (0, 5, CHANGE - 1, CHANGE, CHANGE + 1, CHANGE + 3, EPOCHS - 1)
RUNS = {
    run.name: run
    for run in (
        Run("healthy", "healthy"),
        Run("noise", "labels turn wrong", wrong_labels(0.3, CHANGE), AROUND),
        Run("rate", "rate x 10", rate(10.0, CHANGE), AROUND),
        Run("memorised", "random labels", wrong_labels(1.0, 0), (0, 5, 10, 15, 20, EPOCHS - 1)),
        Run("scale", "only the scale", only_scale(1.3, 20, 25), (0, 19, 22, 24, 27, EPOCHS - 1)),
    )
}
COMPARED = ("healthy", "noise", "rate", "memorised")


@cache
def trained(name: str) -> tuple[FlatnessMonitor, FlatnessMonitor, DigitsClassifier]:
    """Train a run, and return its monitor, that of its training data, and the module."""
    run = RUNS[name]
    L.seed_everything(0, verbose=False)
    monitor = FlatnessMonitor(rules=[*rules.default(), rules.memorisation()])
    training = FlatnessMonitor(data="train")
    callbacks = [monitor, training, *([run.disturbance] if run.disturbance else [])]
    trainer = L.Trainer(max_epochs=EPOCHS, callbacks=callbacks, enable_checkpointing=False, **QUIET, **run.options)
    module = DigitsClassifier()
    trainer.fit(module, datamodule=DigitsDataModule())
    return monitor, training, module


def store(picture: Image.Image, path: Path) -> None:
    """Write a picture with a palette of 128 colours, which takes a third of the bytes."""
    picture.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)


def save(figure: Figure, name: str) -> None:
    """Write a figure into the gallery."""
    file = io.BytesIO()
    figure.savefig(file, format="png")
    store(Image.open(file), IMAGES / f"{name}.png")


def write(page: str, name: str, text: str) -> None:
    """Put a text into a page, between the two comments that name it."""
    path = DOCS / page
    before, begin, rest = path.read_text(encoding="utf-8").partition(f"<!-- {name}: made by docs/gallery.py -->\n")
    _, end, after = rest.partition(f"<!-- end of {name} -->\n")
    if not (begin and end):
        raise ValueError(f"{path} must have the two comments of {name!r}; it has not both.")
    path.write_text(f"{before}{begin}\n{text.strip()}\n\n{end}{after}", encoding="utf-8")


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as a Markdown table, numbers to the right."""
    head, *body = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---:"] * len(head), *body))


def number(value: float) -> str:
    """Return three significant digits."""
    return f"{value:.3g}"


def reading() -> None:
    """Make the pictures and tables of docs/how-to/reading.md."""
    for name, run in RUNS.items():
        monitor, training, _ = trained(name)
        save(monitor.figure(), f"reading-{name}")
        history, seen = monitor.history, training.history.values["margin/negative/train"]
        rows = [["epoch", "accuracy", "on training data", "relative", "scale-free", "uncertainty", "mean margin"]]
        for at in run.rows:
            values = {key: series[at] for key, series in history.values.items()}
            shares = (f"{values['val_accuracy']:.1%}", f"{1 - seen[at]:.1%}")
            keys = (RELATIVE, SCALE_FREE, CONFIDENCE, MARGIN)
            rows.append([str(history.epochs[at]), *shares, *(number(values[key]) for key in keys)])
        alerts = [
            f"{' and '.join(f'`{rule}`' for rule in alert.rule_names)} in epoch {alert.epoch}, which began after epoch "
            f"{history.epochs[history.steps.index(alert.onset_step)]}"
            for alert in monitor.alerts
        ]
        said = f"Alerts of the default rules and `memorisation`: {'; '.join(alerts) or 'none'}."
        write("how-to/reading.md", f"table {name}", f"{table(rows)}\n\n{said}")
    start()


def start() -> None:
    """Make the picture and the table of the first epochs."""
    L.seed_everything(0, verbose=False)
    monitor = FlatnessMonitor()
    stop = At(lambda now, trainer, module: setattr(trainer, "should_stop", now == EPOCHS // 5))
    options = {"val_check_interval": 2, "enable_checkpointing": False, "callbacks": [monitor, stop]}
    trainer = L.Trainer(max_epochs=EPOCHS, **options, **QUIET)
    trainer.fit(DigitsClassifier(), datamodule=DigitsDataModule())
    save(monitor.figure(), "reading-start")
    history = monitor.history
    rows = [["step", "share of the training", "accuracy", "relative", "scale-free", "mean margin"]]
    for step in (1, 5, 9, 19, 37, 75, 113, 189):
        values = {key: series[history.steps.index(step)] for key, series in history.values.items()}
        share = (step + 1) / (EPOCHS * trainer.num_training_batches)
        numbers = (number(values[key]) for key in (RELATIVE, SCALE_FREE, MARGIN))
        rows.append([str(step), f"{share:.1%}", f"{values['val_accuracy']:.1%}", *numbers])
    write("how-to/reading.md", "table start", table(rows))


def keys() -> None:
    """Make the pictures and the list of docs/reference/gallery.md."""
    text = []
    for key in KEYS:
        name = key.replace("/", "-")
        save(curves(key), name)
        note = "; ".join([KEYS[key].direction, *([f"unit: {KEYS[key].unit}"] if KEYS[key].unit != "none" else [])])
        section = "flatness" if key.startswith("flatness/") else "margins"
        text += [f"### `{key}`", f"{KEYS[key].title}; {note}. [Meaning](../keys.md#{section})"]
        text += [f"![{KEYS[key].title} of four trainings](../images/gallery/{name}.png)"]
    write("reference/gallery.md", "keys", "\n\n".join(text))
    module, data = trained("healthy")[2], DigitsDataModule()
    data.setup("validate")
    for name, per_sample in (("report", False), ("report-samples", True)):
        report = measure(module, data.val_dataloader(), per_sample=per_sample, loss="cross_entropy")
        save(report.plot(), name)


def curves(key: str) -> Figure:
    """Return the curves of one key in the compared runs."""
    figure = Figure(figsize=(5.6, 2.6), dpi=100, facecolor=LIGHT.paper, layout="constrained")
    axes = panel(figure, 1, 1, 1, LIGHT)
    shown: list[float] = []
    for name, colour, style in zip(
        COMPARED, (GREEN, VERMILION, BLUE, ORANGE), ("-", "--", "-.", (0, (1, 1))), strict=True
    ):
        history = trained(name)[0].history
        axes.plot(history.epochs, history.values[key], color=colour, linestyle=style, linewidth=1.8, label=name)
        shown += [value for value in history.values[key] if math.isfinite(value)]
    for line, name in zip(axes.lines, COMPARED, strict=True):
        line.set_label(RUNS[name].label)
    kind = ""
    if min(shown) > 0 and max(shown) / min(shown) > 20:
        axes.set_yscale("log")
        kind = " (log scale)"
    axes.axvline(CHANGE - 0.5, color=LIGHT.faint, linewidth=1.0, linestyle=":")
    axes.set_xlabel("epoch", fontsize=9.5, color=LIGHT.faint)
    title(axes, KEYS[key].title, f"{key}{kind}", LIGHT)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8.5, frameon=False, handlelength=2.2, columnspacing=1.2)
    return figure


TOLERANCE = 0.005
SETTINGS: dict[str, tuple[float, dict[str, Any]]] = {
    "learning rate 0.05": (0.05, {}),
    "learning rate 0.005": (0.005, {}),
    "learning rate 0.001": (0.001, {}),
    "0.05, validation every quarter of an epoch": (0.05, {"val_check_interval": 0.25}),
}


def checkpoints() -> None:
    """Make the table of docs/how-to/flattest-checkpoint.md."""
    ways = ["best accuracy", "`FlattestCheckpoint`", "by relative flatness", "flatness alone", "with `EarlyStopping`"]
    rows = [["setting", *ways]]
    for setting, (learning_rate, options) in SETTINGS.items():
        L.seed_everything(0, verbose=False)
        monitor = FlatnessMonitor()
        with tempfile.TemporaryDirectory() as folder:
            both = [
                FlattestCheckpoint("val_accuracy", "max", TOLERANCE, key, dirpath=f"{folder}/{key}")
                for key in (SCALE_FREE_MARGIN, RELATIVE)
            ]
            trainer = L.Trainer(max_epochs=20, callbacks=[monitor, *both], **QUIET, **options)
            trainer.fit(DigitsClassifier(learning_rate), datamodule=DigitsDataModule())
            steps = [torch.load(each.best_model_path)["global_step"] - 1 for each in both]  # as the loggers count
        accuracy, flatness = (monitor.history.values[key] for key in ("val_accuracy", RELATIVE))
        best, kept = accuracy.index(max(accuracy)), [monitor.history.steps.index(step) for step in steps]
        assert all(accuracy[at] >= accuracy[best] - TOLERANCE for at in kept), setting
        stopped = flatness[: validations_until_stop(flatness)]
        chosen = (best, *kept, flatness.index(min(flatness)), stopped.index(min(stopped)))
        rows.append([setting, *(f"{accuracy[at]:.1%}, {number(flatness[at])}" for at in chosen)])
    write("how-to/flattest-checkpoint.md", "table checkpoints", table(rows).replace("| ---: |", "| --- |", 1))


def validations_until_stop(values: Sequence[float], patience: int = 3) -> int:
    """Return after how many validations an `EarlyStopping` that minimises a key ends the training."""
    best, since = math.inf, 0
    for count, value in enumerate(values, 1):
        best, since = (value, 0) if value < best else (best, since + 1)
        if since == patience:
            return count
    return len(values)


def examples() -> None:
    """Make the pictures that docs/examples and the demo draw."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for name in ("dashboard", "first_curves", "spectrum"):
            runpy.run_path(str(DOCS / "examples" / f"{name}.py"), run_name="__main__")
        demo.main(["--logger", "csv", "--output", "."])
        for path in (*Path.cwd().glob("*.png"), *Path.cwd().glob("run-1/curves.png")):
            store(Image.open(path), DOCS / "images" / path.name)


PARTS = {"reading": reading, "keys": keys, "checkpoints": checkpoints, "examples": examples}

if __name__ == "__main__":
    torch.set_num_threads(1)
    IMAGES.mkdir(parents=True, exist_ok=True)
    for part in sys.argv[1:] or PARTS:
        PARTS[part]()
