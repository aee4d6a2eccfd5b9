"""The values of all validations of a training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pandas import DataFrame


class History:
    """What a training's validations yielded, oldest first: the monitor's keys and the module's own `val...` metrics.

    It is part of the monitor's state in checkpoints, so a resumed training has the validations before.

    Attributes:
        steps: the step of each validation, as the loggers have it.
        epochs: its epoch.
        values: by key, one value per validation; NaN where a validation has none.

    Example:
        >>> history = History()
        >>> history.add(step=9, epoch=0, values={"margin/mean": 1.5})
        >>> history.add(step=19, epoch=1, values={"margin/mean": 2.0, "margin/churn": 0.1})
        >>> history.values
        {'margin/mean': [1.5, 2.0], 'margin/churn': [nan, 0.1]}
    """

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.epochs: list[int] = []
        self.values: dict[str, list[float]] = {}

    def __len__(self) -> int:
        """Return the number of validations."""
        return len(self.steps)

    def add(self, step: int, epoch: int, values: Mapping[str, float]) -> None:
        """Add one validation."""
        for key in values:
            self.values.setdefault(key, [math.nan] * len(self))
        self.steps.append(step)
        self.epochs.append(epoch)
        for key, series in self.values.items():
            series.append(float(values.get(key, math.nan)))

    def to_pandas(self) -> DataFrame:
        """Return the history as a table of pandas, with one row per validation.

        Returns:
            A `pandas.DataFrame` with the steps as its index and the columns `epoch` and one per key.

        Raises:
            ModuleNotFoundError: if pandas is not installed.
        """
        try:
            from pandas import DataFrame, Index
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "`to_pandas` needs pandas, which must be installed; got no module `pandas`. Run `pip install pandas`, "
                "or read `history.values`.",
                name="pandas",
            ) from error
        return DataFrame({"epoch": self.epochs, **self.values}, index=Index(self.steps, name="step"))

    def state_dict(self) -> dict[str, Any]:
        """Return the history in plain Python types."""
        values = {key: list(series) for key, series in self.values.items()}
        return {"steps": list(self.steps), "epochs": list(self.epochs), "values": values}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the history of a checkpoint instead of the present one."""
        self.steps, self.epochs = list(state["steps"]), list(state["epochs"])
        self.values = {key: list(series) for key, series in state["values"].items()}
