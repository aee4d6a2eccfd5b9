"""Keeps the flattest of the checkpoints that are about as good as the best one."""

from __future__ import annotations

from math import inf, isnan
from typing import Any, Literal, NamedTuple

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_flatness.keys import KEYS, SCALE_FREE_MARGIN, quantity


class _Candidate(NamedTuple):
    """A checkpoint by its two values, signed: higher is better in the first, lower in the second."""

    score: float
    flatness: float

    def dominates(self, other: _Candidate) -> bool:
        """Return whether this one is chosen before the other one, whatever the best score is."""
        return self.score >= other.score and self.flatness <= other.flatness


class FlattestCheckpoint(ModelCheckpoint):
    """Among the checkpoints within a tolerance of the best one, keep the one with the largest scale-free margin.

    Flatness alone must not choose a checkpoint: an untrained network is the flattest of all. Here the metric decides
    first, and flatness breaks what is nearly a tie. By default it is that of the margins, which generalized best in
    `docs/experiments/choosing.md`; relative flatness prefers the earlier checkpoints of a training that still learns.

    A checkpoint stays on the disk as long as it can still be chosen: while it is within the tolerance of the best one,
    and no other is both as good and as flat. `best_model_path` is the chosen one, `best_model_score` its metric. A
    validation without a value of the flatness counts as the sharpest.

    Args:
        monitor: key of the metric that decides first, such as `val_acc`.
        mode: `"max"` if higher is better, `"min"` if lower is.
        tolerance: how far from the best value a checkpoint may be, in the unit of the metric.
        flatness: key of the tie-break, such as `flatness/relative`. The lowest value is chosen, of a key for which
            higher is better, as of the default, the highest; see `docs/keys.md`.
        **options: of Lightning's `ModelCheckpoint`, such as `dirpath` and `filename`; not `save_top_k`.

    Raises:
        ValueError: if the tolerance is negative or no number, or `save_top_k` is given.

    Example:
        >>> checkpoint = FlattestCheckpoint(monitor="val_acc", mode="max", tolerance=0.005)
        >>> trainer = Trainer(callbacks=[FlatnessMonitor(), checkpoint])  # doctest: +SKIP
        >>> checkpoint.best_model_path  # after `trainer.fit`  # doctest: +SKIP
    """

    def __init__(
        self,
        monitor: str,
        mode: Literal["min", "max"],
        tolerance: float,
        flatness: str = SCALE_FREE_MARGIN,
        **options: Any,
    ) -> None:
        """Check the arguments."""
        if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)) or not 0 <= tolerance < inf:
            raise ValueError(
                f"`tolerance` must be a number, at least 0, in the unit of `{monitor}`; got {tolerance!r}."
            )
        if "save_top_k" in options:
            raise ValueError(
                "`save_top_k` must not be given: as many checkpoints are kept as can still be chosen. Use Lightning's "
                "`ModelCheckpoint` beside this one to keep more."
            )
        super().__init__(monitor=monitor, mode=mode, save_top_k=-1, **options)
        self.tolerance = tolerance
        self.flatness = flatness
        self._sign = 1 if mode == "max" else -1
        known = KEYS.get(quantity(flatness))
        self._flatness_sign = -1 if known is not None and known.better == "higher" else 1
        self._next = _Candidate(-inf, inf)
        self._candidates: dict[str, _Candidate] = {}  # by path

    @property
    def state_key(self) -> str:
        """Key of the state in a checkpoint."""
        return f"{super().state_key}{self.flatness}{self.tolerance}"

    def check_monitor_top_k(self, trainer: Trainer, current: Tensor | None = None) -> bool:
        """Return whether the present weights can become the chosen ones; all processes decide like the first."""
        if current is None:
            return False
        value = trainer.callback_metrics.get(self.flatness)
        found = self._sign * float(current), inf if value is None else self._flatness_sign * float(value)
        score, flatness = trainer.strategy.broadcast(found)
        self._next = _Candidate(-inf if isnan(score) else score, inf if isnan(flatness) else flatness)
        best = max((each.score for each in self._candidates.values()), default=-inf)
        if self._next.score < best - self.tolerance:
            return False
        return not any(each.dominates(self._next) for each in self._candidates.values())

    def state_dict(self) -> dict[str, Any]:
        """Return what Lightning's callback does, and the values of the candidates."""
        return {**super().state_dict(), "candidates": {path: tuple(each) for path, each in self._candidates.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the candidates that are still there."""
        super().load_state_dict(state_dict)
        if self.best_k_models:  # Lightning leaves them out where the folder is another one
            self._candidates = {path: _Candidate(*values) for path, values in state_dict["candidates"].items()}

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        """Choose, save and remove; private, as seen in Lightning 2.5.3 to 2.6.6."""
        if filepath not in self.best_k_models:  # the last weights, or those at an exception
            super()._save_checkpoint(trainer, filepath)
            return
        candidates = {**self._candidates, filepath: self._next}
        best = max(each.score for each in candidates.values())
        self._candidates = {
            path: each
            for path, each in candidates.items()
            if each.score >= best - self.tolerance and (path == filepath or not self._next.dominates(each))
        }
        removed = [path for path in candidates if path not in self._candidates]
        for path in removed:
            self.best_k_models.pop(path, None)
        # The state that is saved with the weights is the one after the choice.
        self.best_model_path = min(self._candidates, key=lambda path: self._candidates[path].flatness)
        self.best_model_score = self.best_k_models[self.best_model_path]
        super()._save_checkpoint(trainer, filepath)
        for path in removed:
            if self._should_remove_checkpoint(trainer, path, filepath):
                self._remove_checkpoint(trainer, path)
