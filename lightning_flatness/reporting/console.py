"""What a monitor writes to the console: messages on a line of their own, and a table at the end of a training."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_flatness.keys import HEADLINE, KEYS, quantity
from lightning_flatness.reporting.history import History
from lightning_flatness.reporting.tables import Table


@contextmanager
def own_line() -> Iterator[None]:
    """Take the progress bars of tqdm away while something is written, and draw them again behind it."""
    tqdm = sys.modules.get("tqdm")  # nobody has bars if it was never imported
    if tqdm is None:
        yield
    else:
        with tqdm.tqdm.external_write_mode(file=sys.stderr):
            yield


def say(message: str) -> None:
    """Log a message on the first process."""
    with own_line():
        rank_zero_info(message)


def warn(message: str) -> None:
    """Warn on the first process."""
    with own_line():
        rank_zero_warn(message, category=UserWarning)


def summary(history: History) -> Table:
    """Return the first, the best and the last value of each headline key, and the epoch of the best.

    Example:
        >>> history = History()
        >>> for epoch, value in enumerate((27.0, 12.0, 13.0)):
        ...     history.add(step=epoch, epoch=epoch, values={"flatness/relative": value})
        >>> print(summary(history))
                      key  first           best  last
        -----------------  -----  -------------  ----
        flatness/relative     27  12 in epoch 1    13
    """
    columns: dict[str, list[str]] = {"key": [], "first": [], "best": [], "last": []}
    for key, series in history.values.items():
        finite = [(value, epoch) for value, epoch in zip(series, history.epochs, strict=True) if math.isfinite(value)]
        if quantity(key) in HEADLINE and finite:
            best, epoch = (min if KEYS[quantity(key)].better == "lower" else max)(finite, key=lambda pair: pair[0])
            cells = (key, f"{finite[0][0]:.4g}", f"{best:.4g} in epoch {epoch}", f"{finite[-1][0]:.4g}")
            for column, cell in zip(columns.values(), cells, strict=True):
                column.append(cell)
    return Table(columns)


def show_summary(
    trainer: Trainer, label: str, history: History, facts: Mapping[str, str], alerts: Sequence[str]
) -> None:
    """Show the table, the facts and the alerts of a training, as rich text where Lightning uses that.

    It is silent like Lightning's own output: without a progress bar, and where the level of the logger
    `lightning.pytorch` is above INFO.

    Args:
        trainer: the Trainer, at the end of its training.
        label: what the monitor is called.
        history: the values of the training.
        facts: what was measured and how, by name.
        alerts: one line for each.
    """
    bar = trainer.progress_bar_callback
    is_silent = bar is None or getattr(bar, "is_disabled", False)
    if is_silent or not trainer.is_global_zero or not logging.getLogger("lightning.pytorch").isEnabledFor(logging.INFO):
        return
    table = summary(history)
    lines = [f"{name}: {fact}" for name, fact in facts.items()]
    lines += [f"alerts: {len(alerts) or 'none'}", *(f"  {alert}" for alert in alerts)]
    if any(kind.__name__ == "RichProgressBar" for kind in type(bar).__mro__):
        _rich(label, table, lines)
    else:
        say(
            "\n".join([f"{label}, over {len(history)} validations:", str(table) if table.rows else "no values", *lines])
        )


def _rich(label: str, table: Table, lines: Sequence[str]) -> None:
    import rich.table
    from rich.text import Text

    drawn: Any = rich.table.Table(*table.headings, title=label, title_justify="left")
    for row in table.rows:
        drawn.add_row(*row)
    console = rich.get_console()
    console.print(drawn)
    console.print(Text("\n".join(lines)))
